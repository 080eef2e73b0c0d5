"""The types with one f16 d a block, or d and m: Q2_0, TQ2_0, Q4_0, Q4_1, Q5_0, Q8_0.

Layouts: block_q2_0, … in ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from d2qconv_gguf.codecs.base import Bytes, Codec, f16_bytes, f16_values, join_planes, split_planes
from d2qconv_gguf.ggml_types import NewerType


class Q40Codec(Codec):
    """f16 d, `qs[16]`: column i in the low nibble of byte i, column 16 + i in the high one."""

    ggml_type = GGMLQuantizationType.Q4_0
    block_bytes = 18

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate([f16_bytes(params["d"]), join_planes(codes, 4, 16)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return split_planes(blocks[:, 2:], 4, 16), {"d": f16_values(blocks[:, :2])}


class Q41Codec(Codec):
    """f16 d, f16 m, `qs[16]` as Q4_0's."""

    ggml_type = GGMLQuantizationType.Q4_1
    block_bytes = 20

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate(
            [f16_bytes(params["d"]), f16_bytes(params["m"]), join_planes(codes, 4, 16)], axis=1
        )

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return split_planes(blocks[:, 4:], 4, 16), {
            "d": f16_values(blocks[:, :2]),
            "m": f16_values(blocks[:, 2:4]),
        }


class Q50Codec(Codec):
    """f16 d, `qh[4]`: the fifth bit of column i in bit i, `qs[16]` as Q4_0's."""

    ggml_type = GGMLQuantizationType.Q5_0
    block_bytes = 22

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        high = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")
        return np.concatenate(
            [f16_bytes(params["d"]), high, join_planes(codes & np.uint8(15), 4, 16)], axis=1
        )

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
        return split_planes(blocks[:, 6:], 4, 16) | high << np.uint8(4), {"d": f16_values(blocks[:, :2])}


class Q20Codec(Codec):
    """f16 d, `qs[16]`: four columns a byte, the first in the lowest bits."""

    ggml_type = NewerType.Q2_0
    block_bytes = 18

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate([f16_bytes(params["d"]), join_planes(codes, 2, 1)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return split_planes(blocks[:, 2:], 2, 1), {"d": f16_values(blocks[:, :2])}


class TQ20Codec(Codec):
    """`qs[64]` (planes of 32 columns), f16 d."""

    ggml_type = GGMLQuantizationType.TQ2_0
    block_bytes = 66

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate([join_planes(codes, 2, 32), f16_bytes(params["d"])], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return split_planes(blocks[:, :64], 2, 32), {"d": f16_values(blocks[:, 64:])}


class Q80Codec(Codec):
    """f16 d, `qs[32]`: code - 128 as i8, in order."""

    ggml_type = GGMLQuantizationType.Q8_0
    block_bytes = 34

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate([f16_bytes(params["d"]), codes ^ np.uint8(128)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return blocks[:, 2:] ^ np.uint8(128), {"d": f16_values(blocks[:, :2])}
