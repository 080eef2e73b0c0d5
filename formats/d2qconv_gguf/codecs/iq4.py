"""IQ4_NL and IQ4_XS: 4-bit codes of unequal levels. Layouts: block_iq4_nl and block_iq4_xs in ggml-common.h."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from d2qconv_gguf.codecs.base import Bytes, Codec, f16_bytes, f16_values, join_planes, split_planes
from d2qconv_gguf.codecs.legacy import Q40Codec


class IQ4NLCodec(Q40Codec):
    """f16 d, `qs[16]`: the bytes of Q4_0, with other values."""

    ggml_type = GGMLQuantizationType.IQ4_NL


class IQ4XSCodec(Codec):
    """f16 d, u16 `scales_h` (high two bits of the 8 sc, in order), `scales_l[4]` (low nibbles), `qs[128]`.

    qs: of every 32 columns, column i in the low nibble of byte i, column 16 + i in the high one.
    """

    ggml_type = GGMLQuantizationType.IQ4_XS
    block_bytes = 136

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        sc = params["sc"].astype(np.uint8)
        high, low = join_planes(sc >> np.uint8(4), 2, 1), join_planes(sc & np.uint8(15), 4, 1)
        return np.concatenate([f16_bytes(params["d"]), high, low, join_planes(codes, 4, 16)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        d, high, low, qs = np.split(blocks, [2, 4, 8], axis=1)
        sc = split_planes(low, 4, 1) | (split_planes(high, 2, 1) << np.uint8(4))
        return split_planes(qs, 4, 16), {"d": f16_values(d), "sc": sc}
