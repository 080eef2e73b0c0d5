"""The codecs of ggml's types, by the id of their grid."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from d2qconv_gguf.codecs.base import Codec
from d2qconv_gguf.codecs.code_books import IQ2SCodec, IQ2XSCodec, IQ2XXSCodec, IQ3SCodec, IQ3XXSCodec
from d2qconv_gguf.codecs.k_quants import Q2KCodec, Q3KCodec, Q4KCodec
from d2qconv_gguf.codecs.legacy import Q40Codec, Q80Codec
from d2qconv_gguf.grids import GRIDS

#: `iq2_xxs`, `q2_k`, …
CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "iq2_xxs": IQ2XXSCodec(GRIDS["iq2_xxs"]),
        "iq2_xs": IQ2XSCodec(GRIDS["iq2_xs"]),
        "iq2_s": IQ2SCodec(GRIDS["iq2_s"]),
        "q2_k": Q2KCodec(GRIDS["q2_k"]),
        "iq3_xxs": IQ3XXSCodec(GRIDS["iq3_xxs"]),
        "iq3_s": IQ3SCodec(GRIDS["iq3_s"]),
        "q3_k": Q3KCodec(GRIDS["q3_k"]),
        "q4_k": Q4KCodec(GRIDS["q4_k"]),
        "q4_0": Q40Codec(GRIDS["q4_0"]),
        "q8_0": Q80Codec(GRIDS["q8_0"]),
    }
)
