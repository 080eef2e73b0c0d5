"""Storage types by the names that the options use.

All dialects compute step · (code - zero). Where: vLLM, AutoRound and MLX in the model's type, compressed-tensors in the
scale's, others in f32. So that they all get the same number, a step has so few significant bits that every product is
exact in f16, which holds 11: 8 for 2 and 3 bits (with a zero point, |code - zero| has up to 3 bits) and for 4 bits
without a zero point, 7 for 4 bits with one. For 8 bits that would be 3 bits: there steps have 8, which f16 and bf16
both hold, and a runtime that multiplies in f16 rounds once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import torch

from d2qconv.errors import Refusal
from d2qconv.exporters.base import FloatType, TensorPlan
from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Grid
from d2qconv.grids.exact import FoundGrid, as_affine, holds

#: Bits of a code by the name of the type.
BITS: Mapping[str, int] = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
#: A matrix that stays as it is.
FLOAT = "float"
GROUPS = ("32", "64", "128")
CHANNEL = "channel"
Kind: TypeAlias = Literal["integer", "none"]
#: The float type behind an option's name.
FLOATS: Mapping[str, FloatType] = {"float16": FloatType.F16, "bfloat16": FloatType.BF16}
#: What safetensors calls a type.
SAFETENSORS: Mapping[torch.dtype, str] = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint32: "U32",
}
#: What a package computes in if no option says it.
DTYPE = "float16"
_HELD_BY_BOTH = 8
_F16_BITS = 11


def significand(bits: int, zero: Kind) -> int:
    """Bits of a step such that its product with every code - zero is exact in f16; see the module."""
    widest = (1 << bits) - 1 if zero == "integer" else (1 << (bits - 1)) - 1
    return _HELD_BY_BOTH if bits == 8 else min(_HELD_BY_BOTH, _F16_BITS - widest.bit_length())


def grid(name: str, group_size: str, n_in: int, zero: Kind, dtype: str) -> AffineGrid:
    """The grid of a type for rows of `n_in` columns; raises KeyError for a name that is none."""
    bits, is_row = BITS[name], group_size == CHANNEL
    scale: Literal["f16", "bf16"] = "f16" if dtype == "float16" else "bf16"
    return AffineGrid(
        bits,
        n_in if is_row else int(group_size),
        zero,
        scale,
        is_per_channel=is_row,
        significand=significand(bits, zero) if scale == "f16" else 0,
    )


def holding(given: Grid) -> Iterator[AffineGrid]:
    """Grids of these folders that hold every value of `given`: its own groups first, then smaller ones that fit."""
    narrow = as_affine(given)
    if narrow is None or narrow.zero == "float" or narrow.scale == "f32":
        return
    smaller = [group for group in sorted(map(int, GROUPS), reverse=True) if group < narrow.group]
    for group in (narrow.group, *smaller):
        wide = AffineGrid(
            narrow.bits,
            group,
            narrow.zero,
            narrow.scale,
            is_per_channel=narrow.is_per_channel and group == narrow.group,
            significand=narrow.significand,
        )
        if holds(wide, given):
            yield wide


def overflows(given: Grid) -> bool:
    """Whether -zero · step is known not to be an f16 everywhere, where steps are f16."""
    return isinstance(given, FoundGrid) and given.scale == "f16" and not given.has_f16_offsets


def dtype_of_steps(storages: Iterable[Grid | FloatType]) -> str:
    """What holds the steps of another format's grids: bfloat16 if that is what they are in, or float16."""
    narrow = [as_affine(s) for s in storages if not isinstance(s, FloatType)]
    return "bfloat16" if any(n is not None and n.scale == "bf16" for n in narrow) else DTYPE


def dtype_of(tensors: Sequence[TensorPlan]) -> str:
    """What a runtime may compute in so that it keeps every step, and floats as well as that allows."""
    floats = {t.storage for t in tensors if isinstance(t.storage, FloatType)}
    is_bf16 = FloatType.BF16 in floats and FloatType.F16 not in floats
    only = {kind for kind in (_only_in(t.storage) for t in tensors) if kind}
    return "bfloat16" if "bfloat16" in only or (is_bf16 and not only) else DTYPE


def step_refusals(dtype: str, tensors: Sequence[TensorPlan]) -> list[Refusal]:
    """Matrices whose steps a runtime that computes in this type would round."""
    lost = [t.id for t in tensors if _only_in(t.storage) not in ("", dtype)]
    if not lost:
        return []
    more = f" and of {len(lost) - 1} more" if len(lost) > 1 else ""
    why = f"runtimes turn scales into {dtype}, which does not hold those of {lost[0]}{more}"
    return [Refusal("option dtype", why, "leave it out, or quantize again with --requantize")]


def cast_warnings(dtype: str, tensors: Sequence[TensorPlan]) -> list[str]:
    """Floats that are in the file as they were, and that a runtime rounds when it loads them."""
    wider = [t for t in tensors if isinstance(t.storage, FloatType) and t.storage is not FLOATS[dtype]]
    if not wider:
        return []
    kinds = " and ".join(sorted({t.type_name for t in wider}))
    return [
        f"{len(wider)} tensors of floats are stored in {kinds}; where a runtime computes in {dtype}, as config.json "
        "says, it rounds them when it loads: ask it for float32 to have every value"
    ]


def _only_in(storage: Grid | FloatType) -> str:
    """The type that alone holds a grid's steps; empty if both do, or if there are none."""
    if not isinstance(storage, AffineGrid):
        return ""
    if storage.scale == "bf16":
        return "bfloat16"
    return "" if 0 < storage.significand <= _HELD_BY_BOTH else "float16"
