import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2qconv_hf import bits


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_a_row_is_one_long_number_with_the_first_value_lowest(width, n_rows, n, seed):
    values = np.random.default_rng(seed).integers(0, 1 << width, (n_rows, n)).astype(np.uint8)
    packed = bits.pack(values, width)
    assert packed.shape == (n_rows, bits.n_words(n, width))
    for row, words in zip(values.tolist(), packed.tolist(), strict=True):
        wanted = sum(value << (i * width) for i, value in enumerate(row))
        assert sum(word << (32 * i) for i, word in enumerate(words)) == wanted


def test_a_code_of_three_bits_may_lie_in_two_words():
    values = np.zeros((1, 11), dtype=np.uint8)
    values[0, 10] = 0b101
    assert bits.pack(values, 3).tolist() == [[1 << 30, 1]]


def test_a_value_of_more_bits_is_no_code():
    with pytest.raises(ValueError, match="does not fit into 2 bits"):
        bits.pack(np.full((1, 4), 4, dtype=np.uint8), 2)
