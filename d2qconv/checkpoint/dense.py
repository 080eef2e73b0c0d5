"""A tensor of a checkpoint, not read yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """A tensor, read when asked for.

    shape: the checkpoint's shape. dtype: the checkpoint's, bf16, f16 or f32 if these are weights; `load` returns just
    that.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Dense:
        """Wrap a tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def load(self) -> Tensor:
        """Read the tensor, in its own dtype, on the CPU."""
        return self.read()

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)
