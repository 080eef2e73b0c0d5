"""What a recipe asks for and a model or a plan of it cannot have; known before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator

from d2qconv.arch.spec import ModelDesc
from d2qconv.errors import Refusal
from d2qconv.exporters.base import Carrier, TargetPlan
from d2qconv.fold.rules import ScaleIntoGain, ScaleIntoRows, ShiftIntoBiases
from d2qconv.names import Role, TensorId
from d2qconv.run import Recipe

#: Matrices that read one norm.
_READERS = ((Role.Q, Role.K, Role.V), (Role.GATE, Role.UP))


def fold_refusals(desc: ModelDesc, recipe: Recipe, target: TargetPlan) -> Iterator[Refusal]:
    """What the model cannot fold although the recipe asks for it."""
    arch = desc.arch
    if recipe.dac_final and desc.is_tied:
        why = "the head is the embedding, and a change of it would change what the first block reads"
        yield Refusal("dac-final", why, "leave it out, or use --rotation, which unties the head")
    if recipe.dsq:
        yield from ScaleIntoRows().check(arch, Role.DOWN)
    if recipe.value_scales:
        yield from ScaleIntoRows().check(arch, Role.O)
    if recipe.norm_scales:
        yield from ScaleIntoGain().check(arch, Role.ATTN_NORM)
        yield from ScaleIntoGain().check(arch, Role.FFN_NORM)
        yield from _unequal_grids(target)
    if target.carrier is Carrier.BIAS:
        yield from ShiftIntoBiases().check(arch, Role.FFN_NORM)
    if target.carrier is Carrier.BIASES:
        if recipe.rounding == "nearest":
            why = "biases take the means out of a sweep, and rounding to nearest has none"
            yield Refusal("carrier biases", why, "use --rounding gptq or another carrier")
        if recipe.attention_weights:
            why = "means weighed by attention are not those that a bias must carry"
            yield Refusal("carrier biases", why, "leave out --attention-weights or use another carrier")


def _unequal_grids(target: TargetPlan) -> Iterator[Refusal]:
    """Column scales that go into a norm's gain are learned for one grid, on which all its readers must be."""
    for roles in _READERS:
        unequal = [
            str(block)
            for block in sorted({t.id.block for t in target.tensors if t.id.block is not None})
            if len({target.by_id[i].type_name for r in roles if (i := TensorId(r, block)) in target.by_id})
            > 1
        ]
        if unequal:
            why = f"{', '.join(roles)} are stored in different types in block {', '.join(unequal)}"
            yield Refusal("norm-scales", why, "give them one type, or leave out --norm-scales")
