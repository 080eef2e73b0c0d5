"""Q4_0 and Q8_0: blocks of 32 columns. Layouts: block_q4_0 and block_q8_0 in ggml-common.h."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from d2qconv_gguf.codecs.base import Bytes, Codec, f16_bytes, f16_values, join_planes, split_planes


class Q40Codec(Codec):
    """f16 d, `qs[16]`: column i in the low nibble of byte i, column 16 + i in the high one."""

    ggml_type = GGMLQuantizationType.Q4_0
    block_bytes = 18

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate([f16_bytes(params["d"]), join_planes(codes, 4, 16)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return split_planes(blocks[:, 2:], 4, 16), {"d": f16_values(blocks[:, :2])}


class Q80Codec(Codec):
    """f16 d, `qs[32]`: code - 128 as i8, in order."""

    ggml_type = GGMLQuantizationType.Q8_0
    block_bytes = 34

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate([f16_bytes(params["d"]), codes ^ np.uint8(128)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return blocks[:, 2:] ^ np.uint8(128), {"d": f16_values(blocks[:, :2])}
