"""Rounding of steps to few significant bits."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from d2qconv.grids.scaling import stored, top


@given(st.floats(-6e4, 6e4, width=32), st.integers(2, 10))
def test_the_nearest_number_of_so_many_bits(value, bits):
    found = stored(torch.tensor([value]), torch.float32, bits).item()
    if value == 0:
        assert found == 0
        return
    exponent = math.frexp(value)[1] - bits
    assert math.ldexp(found, -exponent) == round(math.ldexp(value, -exponent))


def test_what_is_as_large_as_can_be_stays_finite():
    for bits in (0, 7, 8):
        largest = top(torch.float16, bits)
        assert torch.isfinite(stored(torch.tensor([largest]), torch.float16, bits)).all()
        assert stored(torch.tensor([largest]), torch.float16, bits).item() == largest
