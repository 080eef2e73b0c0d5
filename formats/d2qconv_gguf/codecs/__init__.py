"""The codecs of ggml's types, by the id of their grid."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from d2qconv_gguf.codecs.base import Codec
from d2qconv_gguf.codecs.code_books import IQ2SCodec, IQ2XSCodec, IQ2XXSCodec, IQ3SCodec, IQ3XXSCodec
from d2qconv_gguf.codecs.iq4 import IQ4NLCodec, IQ4XSCodec
from d2qconv_gguf.codecs.k_quants import Q2KCodec, Q3KCodec, Q4KCodec, Q5KCodec, Q6KCodec
from d2qconv_gguf.codecs.legacy import Q20Codec, Q40Codec, Q41Codec, Q50Codec, Q80Codec, TQ20Codec
from d2qconv_gguf.grids import GRIDS

#: One for every grid of `GRIDS`.
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
        "q5_k": Q5KCodec(GRIDS["q5_k"]),
        "q6_k": Q6KCodec(GRIDS["q6_k"]),
        "iq4_xs": IQ4XSCodec(GRIDS["iq4_xs"]),
        "iq4_nl": IQ4NLCodec(GRIDS["iq4_nl"]),
        "q2_0": Q20Codec(GRIDS["q2_0"]),
        "tq2_0": TQ20Codec(GRIDS["tq2_0"]),
        "q4_0": Q40Codec(GRIDS["q4_0"]),
        "q4_1": Q41Codec(GRIDS["q4_1"]),
        "q5_0": Q50Codec(GRIDS["q5_0"]),
        "q8_0": Q80Codec(GRIDS["q8_0"]),
    }
)
