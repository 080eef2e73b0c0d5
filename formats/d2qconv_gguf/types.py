"""Storage types by the names that the options use, and their sizes in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from gguf import GGMLQuantizationType, LlamaFileType

from d2qconv.errors import Refusal
from d2qconv.exporters.base import FloatType, type_name
from d2qconv.grids.base import Grid
from d2qconv_gguf.codecs import CODECS
from d2qconv_gguf.ggml_types import FILE_TYPE_Q2_0, SIZES, GgmlType
from d2qconv_gguf.grids import GRIDS

Storage: TypeAlias = Grid | FloatType

#: grid id or float type -> ggml's own type
GGML_TYPES: Mapping[str, GgmlType] = {
    **{name: codec.ggml_type for name, codec in CODECS.items()},
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
}

#: `general.file_type`: the name that llama.cpp prints; it changes nothing else (llama-model-loader.cpp:739-799).
#: The K-quants are the `_S` kinds, of which every matrix of the blocks has the one type. Mixes have their own.
FILE_TYPES: Mapping[str, int] = {
    "iq2_xxs": LlamaFileType.MOSTLY_IQ2_XXS,
    "iq2_xs": LlamaFileType.MOSTLY_IQ2_XS,
    "iq2_s": LlamaFileType.MOSTLY_IQ2_M,
    "q2_k": LlamaFileType.MOSTLY_Q2_K_S,
    "iq3_xxs": LlamaFileType.MOSTLY_IQ3_XXS,
    "iq3_s": LlamaFileType.MOSTLY_IQ3_S,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_S,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "q2_0": FILE_TYPE_Q2_0,
    "tq2_0": LlamaFileType.MOSTLY_TQ2_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
}

#: What to know of a type before choosing it: kernels of llama.cpp by backend (docs of ggml, and measured).
CAVEATS: Mapping[str, str] = {
    "q2_0": (
        "q2_0 needs llama.cpp b9916 (July 2026) or newer, and has no fast kernel for x86 CPUs there: prompts and text "
        "take about 20 times as long as with q2_k (CUDA, Metal, Vulkan and ARM have kernels)"
    ),
    "tq2_0": (
        "tq2_0 has no CUDA kernel in llama.cpp: these matrices stay on the CPU, where no type is faster (Metal and "
        "Vulkan have kernels); types with code books are nearer to the original at this size"
    ),
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
    block, size = SIZES[GGML_TYPES[type_name(stored)]]
    return int(math.prod(shape) // block * size)
