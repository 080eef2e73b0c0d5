"""ggml's storage types by number and size, and a decoder for those that gguf-py does not know yet.

gguf-py 0.19 ends at number 41. Q2_0 (42) is in llama.cpp since build b9916 of July 2026 (pull request 24448). Its
decoder is written here from the description of the format alone, a bit at a time, and shares nothing with our grids and
codecs: it is the second opinion that gguf-py gives on all other types, and is itself held against stock ggml in the
tests. A fork of llama.cpp has blocks of 128 columns under the same number; its files have other sizes and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


class NewerType(IntEnum):
    """Types that gguf-py has no name for."""

    Q2_0 = 42


GgmlType: TypeAlias = GGMLQuantizationType | NewerType

#: type -> (columns, bytes) of a block
SIZES: Mapping[GgmlType, tuple[int, int]] = {**GGML_QUANT_SIZES, NewerType.Q2_0: (64, 18)}

#: The llama.cpp that a newer type needs.
NEEDS: Mapping[NewerType, str] = {NewerType.Q2_0: "llama.cpp b9916 (July 2026) or newer"}

#: `general.file_type` of Q2_0, LLAMA_FTYPE_MOSTLY_Q2_0 in llama.h.
FILE_TYPE_Q2_0 = 41


def type_of(number: int) -> GgmlType:
    """The type of that number; raises ValueError if neither gguf-py nor we know it."""
    known = {int(t) for t in NewerType}
    return NewerType(number) if number in known else GGMLQuantizationType(number)


def decode_q2_0(data: np.ndarray) -> np.ndarray:
    """f32[n] of whole blocks u8[n / 64 · 18], in order.

    A block is an f16 d and 16 bytes; weight j lies in bits 2·(j mod 4) and the next of byte j div 4, and is
    d · (number - 1). Source: dequantize_row_q2_0 in ggml-quants.c.
    """
    blocks = np.ascontiguousarray(data).reshape(-1, 18)
    d = np.frombuffer(blocks[:, :2].tobytes(), dtype="<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(-1, 64, 2).astype(np.float32)
    values: np.ndarray = d[:, None] * (bits[:, :, 0] + 2 * bits[:, :, 1] - 1)
    return values.reshape(-1)


DECODERS: Mapping[NewerType, Callable[[np.ndarray], np.ndarray]] = {NewerType.Q2_0: decode_q2_0}
