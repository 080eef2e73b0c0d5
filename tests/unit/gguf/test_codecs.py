"""Blocks written out by hand, where single fields lie, goldens, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2qconv.errors import ExportError, VerifyError
from d2qconv_gguf.codecs import CODECS
from d2qconv_gguf.ggml_types import SIZES
from d2qconv_gguf.grids import GRIDS

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "blocks.json").read_text(encoding="utf-8"))
HALF = b"\x00\x38"  # f16 0.5
ONE = b"\x00\x3c"  # f16 1.0
MINUS_TWO = b"\x00\xc0"  # f16 -2.0


def values(name, block):
    codec = CODECS[name]
    data = np.frombuffer(block, dtype=np.uint8)[None]
    return codec.unpack(data, (1, codec.grid.block)).decode()[0].tolist()


@pytest.mark.parametrize("name", CODECS)
def test_golden_block(name):
    block = bytes.fromhex(GOLDEN[name]["bytes"])
    assert values(name, block) == GOLDEN[name]["values"]
    codec = CODECS[name]
    coded = codec.unpack(np.frombuffer(block, dtype=np.uint8), (1, codec.grid.block))
    assert codec.pack(coded).tobytes() == block


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_those_of_gguf(name):
    codec = CODECS[name]
    assert codec.grid is GRIDS[name]
    assert SIZES[codec.ggml_type] == (codec.grid.block, codec.block_bytes)
    assert codec.grid.bits_per_weight == 8 * codec.block_bytes / codec.grid.block
    assert codec.row_bytes(512) == 512 // codec.grid.block * codec.block_bytes


def test_q4_0_by_hand():
    # Byte i holds column i below and column 16 + i above: nibbles i and 15 - i, minus 8, times 0.5.
    block = HALF + bytes(i | (15 - i) << 4 for i in range(16))
    assert values("q4_0", block) == [(i - 8) * 0.5 for i in range(16)] + [(7 - i) * 0.5 for i in range(16)]


def test_q8_0_by_hand():
    block = MINUS_TWO + bytes([0x80, 0xFF, 0x00, 0x01, 0x7F]) + bytes(27)
    assert values("q8_0", block) == [256.0, 2.0, 0.0, -2.0, -254.0] + [0.0] * 27


def test_q2_k_by_hand():
    # Group k of 16 has step k and offset 15 - k halves; all codes of the first 128 columns are 0,1,2,3 by 32s
    # (0b11100100), of the last 128 they are 3,2,1,0.
    scales = bytes(k | (15 - k) << 4 for k in range(16))
    block = scales + b"\xe4" * 32 + b"\x1b" * 32 + ONE + HALF
    codes = [0, 1, 2, 3, 3, 2, 1, 0]
    assert values("q2_k", block) == [codes[c // 32] * (c // 16) - 0.5 * (15 - c // 16) for c in range(256)]


def test_q3_k_by_hand():
    # Low bits as above; the high bit is set in the odd runs of 32 (0b10101010). sc = 33 + k, so that steps are 1 + k.
    sc = [33 + k for k in range(16)]
    low = bytes(sc[j] & 15 | (sc[j + 8] & 15) << 4 for j in range(8))
    high = bytes(sum((sc[j + 4 * r] >> 4) << 2 * r for r in range(4)) for j in range(4))
    block = b"\xaa" * 32 + b"\xe4" * 32 + b"\x1b" * 32 + low + high + HALF
    codes = [0, 5, 2, 7, 3, 6, 1, 4]
    assert values("q3_k", block) == [0.5 * (1 + c // 16) * (codes[c // 32] - 4) for c in range(256)]


def test_q4_k_by_hand():
    # sc = 5, 13, 21, ..., 61; m = 63, 55, ..., 7. Low nibbles 9, high nibbles 4.
    sc, m = [5 + 8 * j for j in range(8)], [63 - 8 * j for j in range(8)]
    scales = [sc[j] | (sc[j + 4] >> 4) << 6 for j in range(4)]
    scales += [m[j] | (m[j + 4] >> 4) << 6 for j in range(4)]
    scales += [sc[j + 4] & 15 | (m[j + 4] & 15) << 4 for j in range(4)]
    block = MINUS_TWO + HALF + bytes(scales) + b"\x49" * 128
    codes = [9, 4] * 4
    assert values("q4_k", block) == [
        -2.0 * sc[c // 32] * codes[c // 32] - 0.5 * m[c // 32] for c in range(256)
    ]


def test_q5_k_by_hand():
    # As above, and bit 4 of the codes is set in the odd runs of 32 (0b10101010).
    sc, m = [5 + 8 * j for j in range(8)], [63 - 8 * j for j in range(8)]
    scales = [sc[j] | (sc[j + 4] >> 4) << 6 for j in range(4)]
    scales += [m[j] | (m[j + 4] >> 4) << 6 for j in range(4)]
    scales += [sc[j + 4] & 15 | (m[j + 4] & 15) << 4 for j in range(4)]
    block = MINUS_TWO + HALF + bytes(scales) + b"\xaa" * 32 + b"\x49" * 128
    codes = [9, 20] * 4
    assert values("q5_k", block) == [
        -2.0 * sc[c // 32] * codes[c // 32] - 0.5 * m[c // 32] for c in range(256)
    ]


def test_q6_k_by_hand():
    # Low nibbles 9 in columns 0..63 of a half, 4 in 64..127; the high bits are 0,1,2,3 by 32s (0b11100100).
    # sc = -128, -111, ..., 127.
    sc = [17 * k - 128 for k in range(16)]
    block = b"\x49" * 128 + b"\xe4" * 64 + bytes(s & 255 for s in sc) + HALF
    codes = [9, 9 + 16, 4 + 32, 4 + 48] * 2
    assert values("q6_k", block) == [0.5 * sc[c // 16] * (codes[c // 32] - 32) for c in range(256)]


#: kvalues_iq4nl of ggml-common.h.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def test_iq4_nl_by_hand():
    block = HALF + bytes(i | (15 - i) << 4 for i in range(16))
    assert values("iq4_nl", block) == [0.5 * v for v in (*IQ4, *reversed(IQ4))]


def test_iq4_xs_by_hand():
    # sc = 3, 11, 19, ..., 59: low nibbles 3, 11 in turn, high bits 0, 0, 1, 1, 2, 2, 3, 3.
    sc = [3 + 8 * j for j in range(8)]
    block = MINUS_TWO + b"\x50\xfa" + b"\xb3" * 4 + bytes(i | (15 - i) << 4 for i in range(16)) * 8
    run = (*IQ4, *reversed(IQ4))
    assert values("iq4_xs", block) == [-2.0 * (sc[c // 32] - 32) * run[c % 32] for c in range(256)]


def test_q2_0_by_hand():
    # 0b11100100: codes 0, 1, 2, 3 from the lowest bits on; 0b00011011: 3, 2, 1, 0.
    block = HALF + b"\xe4" * 8 + b"\x1b" * 8
    assert values("q2_0", block) == [-0.5, 0.0, 0.5, 1.0] * 8 + [1.0, 0.5, 0.0, -0.5] * 8


def test_tq2_0_by_hand():
    block = b"\xe4" * 32 + b"\x1b" * 32 + MINUS_TWO
    levels = [2.0, 0.0, -2.0, -4.0]
    assert values("tq2_0", block) == [v for v in (*levels, *reversed(levels)) for _ in range(32)]


def test_half_precision_of_either_kind_survives():
    # The smallest subnormal and the largest number.
    assert values("q4_0", b"\x01\x00" + b"\x99" * 16) == [2.0**-24] * 32
    assert values("q4_0", b"\xff\x7b" + b"\x99" * 16) == [65504.0] * 32


def sample(name, n_out=2, n_blocks=2):
    codec = CODECS[name]
    n_in = n_blocks * codec.grid.block
    return codec.unpack(np.zeros((n_out, codec.row_bytes(n_in)), dtype=np.uint8), (n_out, n_in))


@pytest.mark.parametrize("name", CODECS)
def test_cut_data_is_refused(name):
    codec = CODECS[name]
    data = np.zeros(codec.row_bytes(512) * 3 - 1, dtype=np.uint8)
    with pytest.raises(VerifyError, match=rf"{codec.ggml_type.name}: \d+ bytes for a matrix 3x512"):
        codec.unpack(data, (3, 512))
    with pytest.raises(VerifyError, match="3x500"):
        codec.unpack(data, (3, 500))


def test_a_foreign_grid_is_refused():
    with pytest.raises(ExportError, match="codes on grid q8_0"):
        CODECS["q4_0"].pack(sample("q8_0"))


def test_shapes_that_do_not_agree_are_refused():
    coded = sample("q2_k")
    with pytest.raises(ExportError, match="codes are"):
        CODECS["q2_k"].pack(replace(coded, codes=coded.codes[:1]))
    with pytest.raises(ExportError, match="m is"):
        CODECS["q2_k"].pack(replace(coded, params={**coded.params, "m": coded.params["m"][:, :1]}))
    with pytest.raises(ExportError, match="no whole blocks"):
        CODECS["q2_k"].pack(replace(coded, shape=(2, 500)))


def test_rows_that_are_not_contiguous_pack_alike():
    codec = CODECS["q4_k"]
    data = np.random.default_rng(0).integers(0, 256, (4, codec.row_bytes(512)), dtype=np.uint8)
    coded = codec.unpack(data, (4, 512))
    strided = replace(coded, codes=coded.codes.t().contiguous().t())
    assert (codec.pack(strided) == data).all()
    assert (codec.unpack(data[::2], (2, 512)).codes == coded.codes[::2]).all()
