"""Codes as bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2qconv.ir.packing import code_bits, pack_codes, unpack_codes


def test_widths_divide_a_byte():
    assert [code_bits(n) for n in (1, 2, 3, 4, 5, 8, 16, 17, 255, 256)] == [1, 1, 2, 2, 4, 4, 4, 8, 8, 8]


def test_wide_codes_take_whole_bytes():
    assert [code_bits(n) for n in (257, 1 << 16, (1 << 16) + 1, 1 << 23, 1 << 31)] == [16, 16, 24, 24, 32]


@given(st.sampled_from([1, 2, 4, 8, 16, 24, 31]), st.lists(st.integers(0, 9), max_size=3), st.integers(0, 99))
def test_every_shape_comes_back(bits, shape, seed):
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.randint(
        0,
        1 << bits if bits < 31 else (1 << 31) - 1,
        shape,
        dtype=dtype,
        generator=torch.Generator().manual_seed(seed),
    )
    bits = 32 if bits == 31 else bits
    packed = pack_codes(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (-(-codes.numel() * bits // 8),))
    back = unpack_codes(packed, bits, shape)
    assert back.dtype == dtype
    assert back.shape == codes.shape
    assert torch.equal(back, codes)


def test_columns_first_in_memory_are_packed_by_rows_all_the_same():
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4) % 4
    assert torch.equal(pack_codes(codes.t().contiguous().t(), 2), pack_codes(codes, 2))


def test_by_hand():
    # m = 2 bytes; the runs are 1 2, 3 0, 1 and nothing
    packed = pack_codes(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2)
    assert packed.tolist() == [1 | 3 << 2 | 1 << 4, 2]
    assert pack_codes(torch.tensor([7, 9], dtype=torch.uint8), 4).tolist() == [7 | 9 << 4]
    # lowest bytes first
    assert pack_codes(torch.tensor([0x030201, 0x060504], dtype=torch.int32), 24).tolist() == [
        1,
        4,
        2,
        5,
        3,
        6,
    ]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a code 4 does not fit into 2 bits"):
        pack_codes(torch.tensor([0, 4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="are not 9 codes of 2 bits"):
        unpack_codes(torch.zeros(2, dtype=torch.uint8), 2, (3, 3))
