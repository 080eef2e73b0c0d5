"""From the options to the storage type of every matrix.

Who decides, the first that says something: `--tensor-type`, of which later ones win; `--embedding` and `--head`; a
measured choice (`candidates`); a mix of llama-quantize; `--type`. What cannot be meant is refused with a reason: a
rule that matches no tensor, a block that the model does not have, a mix with a type that is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from d2qconv.arch.spec import ModelDesc
from d2qconv.errors import Refusal
from d2qconv.exporters.base import TensorPlan, type_name
from d2qconv.exporters.overrides import Override, OverrideOption, last_that_holds
from d2qconv.names import Role, TensorId
from d2qconv_gguf import GgufOptions, types
from d2qconv_gguf.mixes import MIXES, Mix, Model

#: What is taken where neither an option nor a mix says anything: of the matrices in the blocks, and of the ends.
TYPE, ENDS = "q2_k", "q8_0"
#: Rules for single matrices.
RULES = OverrideOption("tensor-type", types.names(), "q4_k")


@dataclass(frozen=True)
class TypeMap:
    """The types of one model. layout: its llama.cpp architecture. chosen: types that a measurement has decided on."""

    options: GgufOptions
    model: ModelDesc
    layout: str
    chosen: Mapping[TensorId, types.Storage] = field(default_factory=dict)

    def type_of(self, tensor: TensorId) -> str:
        """Name of a matrix's type, as it was asked for: it need not exist."""
        if tensor in self.chosen:
            return type_name(self.chosen[tensor])
        return self.asked(tensor) or self._default(tensor)

    def asked(self, tensor: TensorId) -> str | None:
        """The type that an option gives this very matrix, if one does."""
        override = last_that_holds(self._overrides, tensor)
        if override is not None:
            return override.type
        ends = {Role.EMBED: self.options.embedding, Role.HEAD: self.options.head}
        return ends.get(tensor.role)

    def refusals(self) -> Iterator[Refusal]:
        """What of the options cannot be meant."""
        for name in ("type", "embedding", "head"):
            value = getattr(self.options, name)
            if value is not None and types.storage(value) is None:
                todo = f"use one of {', '.join(types.names())}"
                if name == "type" and _mix_name(value) is not None:
                    todo += f"; {value} is a mix: --mix {value}"
                yield Refusal(f"option {name}", f"{value!r} is not a storage type", todo)
        yield from self._mix_refusals()
        yield from RULES.refusals(self.options.tensor_type, self.model)

    def file_type(self, tensors: Sequence[TensorPlan]) -> int:
        """`general.file_type`: the mix's, else that of the type which most weights of the blocks have."""
        if self._mix is not None:
            return self._mix.file_type
        weights: Counter[str] = Counter()
        for planned in tensors:
            if planned.id.block is not None and len(planned.shape) == 2:
                weights[planned.type_name] += planned.shape[0] * planned.shape[1]
        return int(types.FILE_TYPES[weights.most_common(1)[0][0]])

    @cached_property
    def _overrides(self) -> tuple[Override, ...]:
        return RULES.overrides(self.options.tensor_type)

    @cached_property
    def _mix(self) -> Mix | None:
        name = None if self.options.mix is None else _mix_name(self.options.mix)
        return None if name is None else MIXES[name]

    def _default(self, tensor: TensorId) -> str:
        """Where no option names the matrix."""
        if self._mix is None:
            return ENDS if tensor.block is None else self.options.type or TYPE
        dims = self.model.dims
        model = Model(self.layout, dims.n_layers, dims.n_heads, dims.n_kv_heads)
        return self._mix.type_of(tensor.role, tensor.block, model, is_tied=self.model.is_tied)

    def _mix_refusals(self) -> Iterator[Refusal]:
        name = self.options.mix
        if name is None:
            return
        if self._mix is None:
            yield Refusal("option mix", f"{name!r} is not a mix", f"use one of {', '.join(MIXES)}")
            return
        if self.options.type is not None:
            why = f"the mix {name} chooses the types of the blocks, and --type {self.options.type} does too"
            yield Refusal("option mix", why, "leave out one of them; --tensor-type changes single matrices")
        absent = sorted({t for t in map(self.type_of, _matrices(self.model)) if types.storage(t) is None})
        if absent:
            why = f"the mix {name} has matrices in {', '.join(absent)}, which this version cannot write"
            yield Refusal("option mix", why, f"it writes {', '.join(types.names())}")


def _mix_name(text: str) -> str | None:
    """The mix of that name, in whatever case."""
    return text.upper() if text.upper() in MIXES else None


def _matrices(model: ModelDesc) -> Iterable[TensorId]:
    return (tensor for tensor, dense in model.tensors.items() if len(dense.shape) == 2)
