"""Q2_K to Q6_K: super-blocks of 256 columns. Layouts: block_q2_K, …, block_q6_K in ggml-common.h."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from d2qconv_gguf.codecs.base import Bytes, Codec, f16_bytes, f16_values, join_planes, split_planes


class Q2KCodec(Codec):
    """`scales[16]` (low nibble sc, high nibble m), `qs[64]` (2 bits, planes of 32 columns), f16 d, f16 dmin."""

    ggml_type = GGMLQuantizationType.Q2_K
    block_bytes = 84

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        scales = params["sc"].astype(np.uint8) | (params["m"].astype(np.uint8) << np.uint8(4))
        tail = [f16_bytes(params["d"]), f16_bytes(params["dmin"])]
        return np.concatenate([scales, join_planes(codes, 2, 32), *tail], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        scales, qs, d, dmin = np.split(blocks, [16, 80, 82], axis=1)
        return split_planes(qs, 2, 32), {
            "d": f16_values(d),
            "dmin": f16_values(dmin),
            "sc": scales & np.uint8(15),
            "m": scales >> np.uint8(4),
        }


class Q3KCodec(Codec):
    """`hmask[32]` (bit 2 of the codes, planes of 32), `qs[64]` (bits 0 and 1), `scales[12]`, f16 d.

    scales: 16 six-bit integers; byte k % 8 holds the low four bits of number k in nibble k / 8, byte 8 + k % 4 its
    high two bits at bit 2·(k / 4).
    """

    ggml_type = GGMLQuantizationType.Q3_K
    block_bytes = 110

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        sc = params["sc"].astype(np.uint8)
        low = join_planes(sc & np.uint8(15), 4, 8)
        high = join_planes(sc >> np.uint8(4), 2, 4)
        hmask = join_planes(codes >> np.uint8(2), 1, 32)
        qs = join_planes(codes & np.uint8(3), 2, 32)
        return np.concatenate([hmask, qs, low, high, f16_bytes(params["d"])], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        hmask, qs, low, high, d = np.split(blocks, [32, 96, 104, 108], axis=1)
        sc = split_planes(low, 4, 8) | (split_planes(high, 2, 4) << np.uint8(4))
        codes = split_planes(qs, 2, 32) | (split_planes(hmask, 1, 32) << np.uint8(2))
        return codes, {"d": f16_values(d), "sc": sc}


class Q4KCodec(Codec):
    """f16 d, f16 dmin, `scales[12]`, `qs[128]` (4 bits, planes of 32 columns).

    scales, for j in 0..3: byte j is sc[j] with the high two bits of sc[j+4] above it, byte 4 + j the same of m,
    byte 8 + j the low four bits of sc[j+4] and above them those of m[j+4].
    """

    ggml_type = GGMLQuantizationType.Q4_K
    block_bytes = 144

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        return np.concatenate([_head(params), join_planes(codes, 4, 32)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        return split_planes(blocks[:, 16:], 4, 32), _from_head(blocks[:, :16])


class Q5KCodec(Codec):
    """Head as of Q4_K, `qh[32]` (bit 4 of the codes, planes of 32 columns), `qs[128]` as of Q4_K."""

    ggml_type = GGMLQuantizationType.Q5_K
    block_bytes = 176

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        high, low = codes >> np.uint8(4), codes & np.uint8(15)
        return np.concatenate([_head(params), join_planes(high, 1, 32), join_planes(low, 4, 32)], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        head, high, low = np.split(blocks, [16, 48], axis=1)
        return split_planes(low, 4, 32) | (split_planes(high, 1, 32) << np.uint8(4)), _from_head(head)


class Q6KCodec(Codec):
    """`ql[128]` (bits 0 to 3, planes of 64 columns), `qh[64]` (bits 4 and 5, planes of 32), i8 `scales[16]`, f16 d."""

    ggml_type = GGMLQuantizationType.Q6_K
    block_bytes = 210

    def _pack(self, codes: Bytes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        low, high = join_planes(codes & np.uint8(15), 4, 64), join_planes(codes >> np.uint8(4), 2, 32)
        scales = params["sc"].astype(np.uint8) ^ np.uint8(128)
        return np.concatenate([low, high, scales, f16_bytes(params["d"])], axis=1)

    def _unpack(self, blocks: Bytes) -> tuple[Bytes, dict[str, NDArray[np.generic]]]:
        low, high, scales, d = np.split(blocks, [128, 192, 208], axis=1)
        codes = split_planes(low, 4, 64) | (split_planes(high, 2, 32) << np.uint8(4))
        return codes, {"d": f16_values(d), "sc": scales ^ np.uint8(128)}


def _head(params: dict[str, NDArray[np.generic]]) -> Bytes:
    """d, dmin and the 6-bit sc and m of Q4_K and Q5_K: u8[N, 16]."""
    sc, m = params["sc"].astype(np.uint8), params["m"].astype(np.uint8)
    scales = [x[:, :4] | (x[:, 4:] >> np.uint8(4) << np.uint8(6)) for x in (sc, m)]
    low = (sc[:, 4:] & np.uint8(15)) | (m[:, 4:] << np.uint8(4))
    return np.concatenate([f16_bytes(params["d"]), f16_bytes(params["dmin"]), *scales, low], axis=1)


def _from_head(head: Bytes) -> dict[str, NDArray[np.generic]]:
    """Inverse of `_head`."""
    d, dmin, sc4, m4, low = np.split(head, [2, 4, 8, 12], axis=1)
    sc, m = (
        np.concatenate([x & np.uint8(63), nibble | (x >> np.uint8(6) << np.uint8(4))], axis=1)
        for x, nibble in ((sc4, low & np.uint8(15)), (m4, low >> np.uint8(4)))
    )
    return {"d": f16_values(d), "dmin": f16_values(dmin), "sc": sc, "m": m}
