"""Storage types by the names that the options use.

All dialects compute step · (code - zero). Where: vLLM, AutoRound and MLX in the model's type, compressed-tensors in the
scale's, others in f32. So that they all get the same number, a step has so few significant bits that every product is
exact in f16, which holds 11: 8 for 2 and 3 bits (with a zero point, |code - zero| has up to 3 bits) and for 4 bits
without a zero point, 7 for 4 bits with one. For 8 bits that would be 3 bits: there steps have 8, which f16 and bf16
both hold, and a runtime that multiplies in f16 rounds once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch

from d2qconv.exporters.base import FloatType
from d2qconv.grids.affine import AffineGrid

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
