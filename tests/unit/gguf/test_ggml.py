"""Every type decoded by stock ggml itself: the C functions inside the wheel xllamacpp, called through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from d2qconv_gguf.codecs import CODECS
from d2qconv_gguf.ggml_types import decode_q2_0

xllamacpp = pytest.importorskip("xllamacpp")

#: ggml writes the K of a K-quant large, all else small.
SYMBOLS = {name: f"dequantize_row_{name.replace('_k', '_K')}" for name in CODECS}


@pytest.fixture(scope="module")
def ggml():
    """The shared library that holds llama.cpp."""
    found = next(Path(xllamacpp.__path__[0]).glob("*.so"), None)
    if found is None:
        pytest.skip("this wheel of xllamacpp has no shared library")
    return ctypes.CDLL(str(found))


def dequantize(ggml, symbol, blocks, n):
    """f32[n] by `void f(const void * blocks, float * values, int64_t n)`."""
    function = getattr(ggml, symbol, None)
    if function is None:
        pytest.skip(f"{symbol} is not exported")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    values = np.full(n, np.nan, dtype=np.float32)
    data = np.ascontiguousarray(blocks)
    function(data.ctypes.data, values.ctypes.data, n)
    return values


def random_blocks(codec, n_blocks=64):
    """Any bytes whose values are finite: blocks in which an f16 is not are drawn again."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (8 * n_blocks, codec.block_bytes), dtype=np.uint8)
    whole = codec.unpack(blocks, (len(blocks), codec.grid.block)).decode().numpy()
    return blocks[np.isfinite(whole).all(1)][:n_blocks]


@pytest.mark.parametrize("name", CODECS)
def test_stock_ggml_decodes_the_same_bits(ggml, name):
    codec = CODECS[name]
    blocks = random_blocks(codec)
    assert len(blocks) == 64
    theirs = dequantize(ggml, SYMBOLS[name], blocks, 64 * codec.grid.block)
    ours = codec.unpack(blocks, (64, codec.grid.block)).decode().numpy().reshape(-1)
    assert (ours.view(np.int32) == theirs.view(np.int32)).all()


def test_our_second_decoder_of_q2_0_is_ggmls(ggml):
    blocks = random_blocks(CODECS["q2_0"])
    theirs = dequantize(ggml, "dequantize_row_q2_0", blocks, 64 * 64)
    assert (decode_q2_0(blocks).view(np.int32) == theirs.view(np.int32)).all()
