"""Storage types by the names that the options use, and their sizes in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from d2qconv.errors import Refusal
from d2qconv.export.base import FloatType, type_name
from d2qconv.grids.base import Grid
from d2qconv_gguf.codecs import CODECS
from d2qconv_gguf.grids import GRIDS

Storage: TypeAlias = Grid | FloatType

#: grid id or float type -> ggml's own type
GGML_TYPES: Mapping[str, GGMLQuantizationType] = {
    **{name: codec.ggml_type for name, codec in CODECS.items()},
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
}

#: `general.file_type`: the name that llama.cpp prints; it changes nothing else (llama-model-loader.cpp:739-799).
#: The K-quants are the `_S` kinds, of which every matrix of the blocks has the one type. Mixes have their own.
FILE_TYPES: Mapping[str, LlamaFileType] = {
    "q2_k": LlamaFileType.MOSTLY_Q2_K_S,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_S,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
}


def names() -> tuple[str, ...]:
    """Every storage type that can be asked for."""
    return (*GRIDS, *(t.value for t in FloatType))


def storage(name: str) -> Storage | None:
    """The grid or float type of that name, or None."""
    if name in GRIDS:
        return GRIDS[name]
    return FloatType(name) if name in tuple(FloatType) else None


def fitting(shape: Sequence[int]) -> tuple[str, ...]:
    """The types in which a matrix of that shape can be stored."""
    grids = [name for name, grid in GRIDS.items() if grid.accepts(shape) is None]
    return (*grids, *(t.value for t in FloatType))


def shape_refusal(where: str, stored: Storage, shape: Sequence[int]) -> Refusal | None:
    """Why a matrix cannot be stored on that grid, with the types that it can be stored in; None if it can."""
    refusal = None if isinstance(stored, FloatType) else stored.accepts(shape)
    if refusal is None:
        return None
    return Refusal(where, refusal.why, f"types that fit {tuple(shape)}: {', '.join(fitting(shape))}")


def n_bytes(stored: Storage, shape: Sequence[int]) -> int:
    """Bytes of a tensor in the file, without the padding between tensors; 0 where the shape does not fit."""
    block, size = GGML_QUANT_SIZES[GGML_TYPES[type_name(stored)]]
    return int(math.prod(shape) // block * size)
