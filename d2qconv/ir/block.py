"""One decoder block after quantization, as the folds see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from d2qconv.ir.coded import Held, decoded
from d2qconv.names import Role


@dataclass(frozen=True)
class QuantizedBlock:
    """Linears as codes (or as float, where the plan keeps them so), norm gains and biases in f32.

    A fold takes one and returns another; nothing is changed in place.
    """

    linears: Mapping[Role, Held]
    norms: Mapping[Role, Tensor]
    biases: Mapping[Role, Tensor] = field(default_factory=dict)

    def weight(self, role: Role) -> Tensor:
        """The decoded matrix of a linear, f32[n_out, n_in]."""
        return decoded(self.linears[role])

    def with_linear(self, role: Role, linear: Held) -> QuantizedBlock:
        """The same block with one matrix replaced."""
        return replace(self, linears={**self.linears, role: linear})

    def with_bias(self, role: Role, bias: Tensor) -> QuantizedBlock:
        """The same block with one bias replaced or added."""
        return replace(self, biases={**self.biases, role: bias})
