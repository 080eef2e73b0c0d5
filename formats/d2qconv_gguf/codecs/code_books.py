"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S. Layouts: block_iq2_xxs … block_iq3_s in ggml-common.h.

A code is its word's number in the low bits and its signs above (`grids.code_search.Book`).
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from d2qconv_gguf.codecs.base import Bytes, Codec, Codes, f16_bytes, f16_values, join_planes, split_planes


def _bytes(numbers: Codes, dtype: str) -> Bytes:
    """Little-endian numbers [N, n] as bytes u8[N, n · itemsize]."""
    return np.ascontiguousarray(numbers).astype(dtype).view(np.uint8)


def _numbers(data: Bytes, dtype: str) -> NDArray[np.int32]:
    """Inverse of `_bytes` for numbers below 2^31."""
    return np.ascontiguousarray(data).view(dtype).astype(np.int32)


def _neighbours(values: Bytes, bits: int) -> Bytes:
    """Values below 2^bits into bytes, neighbours side by side, the first in the lowest bits: u8[N, n · bits / 8]."""
    return join_planes(values, bits, 1)


def _apart(data: Bytes, bits: int) -> Bytes:
    """Inverse of `_neighbours`."""
    return split_planes(data, bits, 1)


def _signs_and_scale(signs: Codes, s: Bytes) -> Bytes:
    """A u32 for 32 columns: four times 7 signs from the lowest bit, s in the highest four. signs: [N, 32]."""
    runs = signs.astype(np.uint32).reshape(len(signs), -1, 4) << np.array([0, 7, 14, 21], dtype=np.uint32)
    return _bytes(np.bitwise_or.reduce(runs, axis=2) | s.astype(np.uint32) << np.uint32(28), "<u4")


def _split_signs_and_scale(data: Bytes) -> tuple[NDArray[np.int32], Bytes]:
    """Inverse: signs i32[N, 32], s u8[N, 8]."""
    packed = np.ascontiguousarray(data).view("<u4")
    signs = packed[:, :, None] >> np.array([0, 7, 14, 21], dtype=np.uint32) & np.uint32(127)
    return signs.reshape(len(data), -1).astype(np.int32), (packed >> np.uint32(28)).astype(np.uint8)


class IQ2XXSCodec(Codec):
    """f16 d, then for 32 columns four bytes of word numbers and a u32 of signs and s."""

    ggml_type = GGMLQuantizationType.IQ2_XXS
    block_bytes = 66

    def _pack(self, codes: Codes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        words = (codes & 255).astype(np.uint8).reshape(len(codes), 8, 4)
        rest = _signs_and_scale(codes >> 8, params["s"].astype(np.uint8)).reshape(len(codes), 8, 4)
        return np.concatenate(
            [f16_bytes(params["d"]), np.concatenate([words, rest], axis=2).reshape(len(codes), -1)], axis=1
        )

    def _unpack(self, blocks: Bytes) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
        halves = blocks[:, 2:].reshape(len(blocks), 8, 2, 4)
        words = halves[:, :, 0].reshape(len(blocks), -1).astype(np.int32)
        signs, s = _split_signs_and_scale(halves[:, :, 1].reshape(len(blocks), -1))
        return words | signs << 8, {"d": f16_values(blocks[:, :2]), "s": s}


class IQ2XSCodec(Codec):
    """f16 d, `qs` u16[32] (9 bits of word, 7 of signs), `scales[8]` (s of two groups a byte)."""

    ggml_type = GGMLQuantizationType.IQ2_XS
    block_bytes = 74

    def _pack(self, codes: Codes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        s = _neighbours(params["s"].astype(np.uint8), 4)
        return np.concatenate([f16_bytes(params["d"]), _bytes(codes, "<u2"), s], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
        d, qs, scales = np.split(blocks, [2, 66], axis=1)
        return _numbers(qs, "<u2"), {"d": f16_values(d), "s": _apart(scales, 4)}


class IQ2SCodec(Codec):
    """f16 d, `qs[32]` (low 8 bits of the word), `signs[32]`, `qh[8]` (its high 2 bits), `scales[8]`."""

    ggml_type = GGMLQuantizationType.IQ2_S
    block_bytes = 82

    def _pack(self, codes: Codes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        low, signs = (codes & 255).astype(np.uint8), (codes >> 10).astype(np.uint8)
        high = _neighbours((codes >> 8 & 3).astype(np.uint8), 2)
        s = _neighbours(params["s"].astype(np.uint8), 4)
        return np.concatenate([f16_bytes(params["d"]), low, signs, high, s], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
        d, low, signs, high, scales = np.split(blocks, [2, 34, 66, 74], axis=1)
        codes = low.astype(np.int32) | _apart(high, 2).astype(np.int32) << 8 | signs.astype(np.int32) << 10
        return codes, {"d": f16_values(d), "s": _apart(scales, 4)}


class IQ3XXSCodec(Codec):
    """f16 d, `qs[64]` (words of 4 columns), then a u32 of signs and s for 32 columns."""

    ggml_type = GGMLQuantizationType.IQ3_XXS
    block_bytes = 98

    def _pack(self, codes: Codes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        rest = _signs_and_scale(codes >> 16, params["s"].astype(np.uint8))
        return np.concatenate([f16_bytes(params["d"]), _bytes(codes & 0xFFFF, "<u2"), rest], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
        d, qs, rest = np.split(blocks, [2, 66], axis=1)
        signs, s = _split_signs_and_scale(rest)
        return _numbers(qs, "<u2") | signs << 16, {"d": f16_values(d), "s": s}


class IQ3SCodec(Codec):
    """f16 d, `qs[64]` (low 8 bits of the word), `qh[8]` (its high bit), `signs[32]`, `scales[4]`."""

    ggml_type = GGMLQuantizationType.IQ3_S
    block_bytes = 110

    def _pack(self, codes: Codes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        low, high = (codes & 255).astype(np.uint8), (codes >> 8 & 1).astype(np.uint8)
        signs = _neighbours((codes >> 9).astype(np.uint8), 4)
        s = _neighbours(params["s"].astype(np.uint8), 4)
        return np.concatenate([f16_bytes(params["d"]), low, _neighbours(high, 1), signs, s], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
        d, low, high, signs, scales = np.split(blocks, [2, 66, 74, 106], axis=1)
        codes = low.astype(np.int32) | _apart(high, 1).astype(np.int32) << 8
        return codes | _apart(signs, 4).astype(np.int32) << 9, {"d": f16_values(d), "s": _apart(scales, 4)}
