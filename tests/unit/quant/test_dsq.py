"""DSQ: a grid with a learned scale per column."""

import pytest
import torch

from d2qconv.grids.base import Grid
from d2qconv.quant.dac import CLIP, ShiftAccumulator
from d2qconv.quant.dsq import LIMIT, SCALE, ColumnScaled, split
from d2qconv.quant.hessian import inverse_factor
from d2qconv.quant.sweep import gptq, round_to_nearest
from d2qconv_gguf.grids import GRIDS


def uneven(n_out=256, n_in=512, spread=0.4, seed=0):
    """Weights whose columns have different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randn(n_in, generator=generator) * spread).exp()
    return torch.randn(n_out, n_in, generator=generator) * 0.02 * sizes


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_0"])
def test_column_scales_pay_where_columns_differ(name):
    w = uneven()
    flat = torch.ones(512)
    plain = round_to_nearest(w, flat, GRIDS[name]).decode()
    scaled = round_to_nearest(w, flat, ColumnScaled(GRIDS[name])).decode()
    assert float((w - scaled).square().sum()) < 0.9 * float((w - plain).square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_fit_is_never_worse_than_the_inner_grid(seed):
    w = uneven(n_in=256, spread=0.0, seed=seed)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(seed)) + 0.1
    inner, outer = GRIDS["q2_k"], ColumnScaled(GRIDS["q2_k"])

    def loss(grid):
        params = grid.fit(w, importance)
        difference = w - grid.decode(grid.encode(w, params, 0), params, 0)
        return float((difference.square().sum(0) * importance).sum())

    assert loss(outer) <= loss(inner) * 1.0001


def test_split_takes_the_scales_out_exactly():
    w = uneven()
    grid = ColumnScaled(GRIDS["q2_k"])
    assert isinstance(grid, Grid)
    factor = inverse_factor(torch.eye(512), 0.01, "test")
    scaled = gptq(w, factor, grid, is_refit=True)
    inner, c = split(scaled)
    assert inner.grid is GRIDS["q2_k"]
    assert SCALE not in inner.params
    assert torch.equal(inner.decode() * c, scaled.decode())


def test_scales_are_positive_bounded_and_of_mean_one():
    w = uneven(spread=2.0)
    w[:, 5] = 0
    params = ColumnScaled(GRIDS["q2_k"]).fit(w[:, :256], torch.ones(256))
    c = params[SCALE].reshape(-1)
    assert float(c.min()) >= 1 / LIMIT
    assert float(c.max()) <= LIMIT


def test_a_plain_matrix_has_nothing_to_split():
    coded = round_to_nearest(uneven(n_in=256), torch.ones(256), GRIDS["q8_0"])
    with pytest.raises(TypeError, match="no column scales"):
        split(coded)


def test_mean_shift_is_the_mean_difference():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 7, 16, generator=generator)
    offset = torch.linspace(-1, 1, 16)
    shifts = ShiftAccumulator(16, "cpu")
    for row in teacher:
        shifts.add(row, row - offset)
    mu, explained = shifts.finish()
    assert torch.allclose(mu, offset, atol=1e-6)
    assert explained == pytest.approx(1.0)


def test_mean_shift_is_clipped_and_noise_is_not_explained():
    shifts = ShiftAccumulator(4, "cpu")
    noise = torch.randn(10000, 4, generator=torch.Generator().manual_seed(0))
    shifts.add(noise, torch.zeros_like(noise))
    _, explained = shifts.finish()
    assert explained < 0.01
    far = ShiftAccumulator(4, "cpu")
    far.add(torch.full((1, 4), 1e6), torch.zeros(1, 4))
    assert float(far.finish()[0].max()) == CLIP
