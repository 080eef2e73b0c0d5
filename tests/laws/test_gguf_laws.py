"""The laws for ggml's types. The independent decoder is gguf-py's wherever it has one."""

from __future__ import annotations

import numpy as np
from gguf.quants import dequantize

from d2qconv.testing.laws import GridLaws
from d2qconv_gguf.codecs import CODECS
from d2qconv_gguf.ggml_types import decode_q2_0
from d2qconv_gguf.grids import GRIDS

#: Byte offsets of the f16 numbers in a block.
HALVES = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), (0,)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_xs": (0,),
    "iq4_nl": (0,),
    "q2_0": (0,),
    "tq2_0": (64,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q8_0": (0,),
}


class GgufLaws(GridLaws):
    def random_packed(self, rng, n_out, n_in):
        """Any bytes, but infinite and undefined f16 become finite: the top exponent bit is cleared there."""
        data = rng.integers(0, 256, (n_out, self.codec.row_bytes(n_in)), dtype=np.uint8)
        blocks = data.reshape(-1, self.codec.block_bytes)
        for offset in HALVES[self.grid.id]:
            high = blocks[:, offset + 1]
            high[(high & 0x7C) == 0x7C] &= 0xBF
        return data

    def reference_decode(self, packed, shape):
        return dequantize(packed, self.codec.ggml_type).reshape(shape)

    def test_every_bit_pattern_survives(self):
        """Infinite and undefined scales too: unpacking and packing move bits only."""
        n_in = 2 * self.grid.block
        data = np.full((2, self.codec.row_bytes(n_in)), 0xFF, dtype=np.uint8)
        data[1] = np.arange(data.shape[1]) % 256
        assert (self.codec.pack(self.codec.unpack(data, (2, n_in))) == data).all()


class TestQ2K(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q2_k"], CODECS["q2_k"], 0.069


class TestQ3K(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q3_k"], CODECS["q3_k"], 0.0215


class TestQ4K(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q4_k"], CODECS["q4_k"], 0.0050


class TestQ5K(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q5_k"], CODECS["q5_k"], 0.00125


class TestQ6K(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q6_k"], CODECS["q6_k"], 0.0004


class TestIQ4XS(GgufLaws):
    grid, codec, max_fit_error = GRIDS["iq4_xs"], CODECS["iq4_xs"], 0.0057


class TestIQ4NL(GgufLaws):
    grid, codec, max_fit_error = GRIDS["iq4_nl"], CODECS["iq4_nl"], 0.0056


class TestQ20(GgufLaws):
    """gguf-py has no decoder: the reader's own, which tests/unit/gguf/test_ggml.py holds against stock ggml."""

    grid, codec, max_fit_error = GRIDS["q2_0"], CODECS["q2_0"], 0.125

    def reference_decode(self, packed, shape):
        return decode_q2_0(packed).reshape(shape)


class TestTQ20(GgufLaws):
    grid, codec, max_fit_error = GRIDS["tq2_0"], CODECS["tq2_0"], 0.140


class TestQ40(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q4_0"], CODECS["q4_0"], 0.0068


class TestQ41(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q4_1"], CODECS["q4_1"], 0.0056


class TestQ50(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q5_0"], CODECS["q5_0"], 0.0017


class TestQ80(GgufLaws):
    grid, codec, max_fit_error = GRIDS["q8_0"], CODECS["q8_0"], 0.00003


class CodeBookLaws(GgufLaws):
    """Searches take longer here."""

    n_blocks, n_rows = 2, 8


class TestIQ2XXS(CodeBookLaws):
    grid, codec, max_fit_error = GRIDS["iq2_xxs"], CODECS["iq2_xxs"], 0.110


class TestIQ2XS(CodeBookLaws):
    grid, codec, max_fit_error = GRIDS["iq2_xs"], CODECS["iq2_xs"], 0.084


class TestIQ2S(CodeBookLaws):
    grid, codec, max_fit_error = GRIDS["iq2_s"], CODECS["iq2_s"], 0.060


class TestIQ3XXS(CodeBookLaws):
    grid, codec, max_fit_error = GRIDS["iq3_xxs"], CODECS["iq3_xxs"], 0.0325


class TestIQ3S(CodeBookLaws):
    grid, codec, max_fit_error = GRIDS["iq3_s"], CODECS["iq3_s"], 0.0175
