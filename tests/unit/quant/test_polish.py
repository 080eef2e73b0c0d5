"""Choosing codes again: no row gets worse, and in the end no single code could be better."""

import pytest
import torch

from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.grids.affine import AffineGrid
from d2qconv.quant.dsq import ColumnScaled
from d2qconv.quant.hessian import inverse_factor
from d2qconv.quant.polish import damped, polish
from d2qconv.quant.sweep import gptq, round_to_nearest
from d2qconv.run import Recipe
from d2qconv.walk.rounding import Rounder
from d2qconv_gguf.grids import GRIDS

AFFINE = AffineGrid(2, 64, "integer")
CASES = [GRIDS["q2_k"], GRIDS["q3_k"], GRIDS["q4_0"], AFFINE]


def problem(n_out=24, n_in=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    x = torch.randn(4 * n_in, n_in, generator=generator) @ (torch.eye(n_in) + 2 * mix)
    return torch.randn(n_out, n_in, generator=generator) * 0.05, x.T @ x / len(x)


def losses(w, got, hessian):
    """Of every row, f64."""
    difference = (w - got).double()
    return ((difference @ hessian.double()) * difference).sum(1)


@pytest.mark.parametrize("grid", CASES, ids=lambda grid: grid.id)
@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_no_row_gets_worse_and_the_whole_gets_better(grid, start):
    w, gram = problem()
    hessian = damped(gram, 0.01)
    if start == "gptq":
        before = gptq(w, inverse_factor(gram, 0.01, "test"), grid, is_refit=True)
    else:
        before = round_to_nearest(w, gram.diagonal(), grid)
    after = polish(w, hessian, before, passes=2, is_refit=True)
    old, new = losses(w, before.decode(), hessian), losses(w, after.decode(), hessian)
    assert bool((new <= old * (1 + 1e-4)).all())
    assert float(new.sum()) < (0.97 if start == "gptq" else 0.8) * float(old.sum())
    assert after.grid is grid
    assert after.codes.dtype == torch.uint8
    assert {n: p.dtype for n, p in after.params.items()} == {n: p.dtype for n, p in before.params.items()}
    assert {n: p.shape for n, p in after.params.items()} == {n: p.shape for n, p in before.params.items()}


def test_in_the_end_no_single_code_could_be_better():
    w, gram = problem(n_out=3, n_in=64)
    hessian = damped(gram, 0.01)
    done = polish(w, hessian, round_to_nearest(w, gram.diagonal(), AFFINE), passes=40, is_refit=False)
    best = losses(w, done.decode(), hessian)
    for column in range(64):
        for code in range(4):
            codes = done.codes.clone()
            codes[:, column] = code
            other = losses(w, AFFINE.decode(codes, done.params), hessian)
            assert bool((other >= best * (1 - 1e-4)).all()), (column, code)


def test_no_passes_change_nothing():
    w, gram = problem()
    before = gptq(w, inverse_factor(gram, 0.01, "test"), AFFINE, is_refit=False)
    after = polish(w, damped(gram, 0.01), before, passes=0, is_refit=False)
    assert torch.equal(after.codes, before.codes)
    assert all(torch.equal(p, before.params[n]) for n, p in after.params.items())


def test_column_scales_stay_as_they_are():
    w, gram = problem(seed=2)
    statistics = InputStatistics(gram, torch.zeros(512))
    grid = ColumnScaled(GRIDS["q2_k"])
    recipe = {"order": "natural", "asymmetry": 0.0}
    plain, polished = (
        Rounder(Recipe(polish=passes, **recipe))(w, grid, statistics, "test") for passes in (0, 2)
    )
    assert torch.equal(plain.params["column_scale"], polished.params["column_scale"])
    assert polished.grid == grid
    hessian = damped(gram, 0.01)
    old, new = (losses(w, held.decode(), hessian).sum() for held in (plain, polished))
    assert float(new) < 0.98 * float(old)


def test_it_aims_where_the_sweep_aimed():
    """With an asymmetric target: W′, not the source's weights."""
    w, gram = problem(seed=3)
    cross = gram + 0.1 * torch.randn(512, 512, generator=torch.Generator().manual_seed(5))
    statistics = InputStatistics(gram, torch.zeros(512), cross, torch.zeros(512))
    plain, polished = (
        Rounder(Recipe(polish=passes, asymmetry=0.5))(w, AFFINE, statistics, "test") for passes in (0, 2)
    )
    factor = inverse_factor(gram, 0.01, "test").double()
    target = w + 0.5 * (w @ (cross - gram)).double() @ factor.T @ factor
    hessian = damped(gram, 0.01)
    old, new = (losses(target, held.decode(), hessian).sum() for held in (plain, polished))
    assert float(new) < 0.97 * float(old)
