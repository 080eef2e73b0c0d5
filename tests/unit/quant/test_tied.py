"""Column scales that are chosen before the sweep: their ties, their size, and that they are worth it."""

from itertools import pairwise

import pytest
import torch

import d2qconv.quant.tied as tied_module
from d2qconv.grids.affine import AffineGrid
from d2qconv.quant.sweep import round_to_nearest
from d2qconv.quant.tied import LIMIT, column_scales
from d2qconv_gguf.grids import GRIDS

N_IN = 256


def problem(seed=0, n_out=48, spread=0.5):
    """Weights whose columns differ in size, and energies of the inputs that differ more."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n_out, N_IN, generator=generator) * 0.05
    w = w * torch.exp(spread * torch.randn(N_IN, generator=generator))
    energy = torch.exp(2 * spread * torch.randn(N_IN, generator=generator))
    return w, energy


def loss(w, energy, grid, c):
    """Σ energy (w − c·q)², q rounded to nearest."""
    q = round_to_nearest(w / c, energy * c.square(), grid).decode()
    return float(((w - q * c).square().sum(0) * energy).sum(dtype=torch.float64))


def shared_heads(n_values=2, head=32):
    """As o's columns read the rows of v: heads in a row share a value head."""
    shared = N_IN // (n_values * head)
    return torch.arange(n_values * head).view(n_values, 1, head).expand(-1, shared, -1).reshape(-1)


GRID_LIST = [GRIDS["q2_k"], GRIDS["q4_0"], AffineGrid(2, 64, "float")]
TIES = [None, shared_heads(), torch.zeros(N_IN, dtype=torch.long)]


@pytest.mark.parametrize("grid", GRID_LIST, ids=lambda g: g.id)
@pytest.mark.parametrize("ties", TIES, ids=["free", "heads", "all"])
def test_scales_are_positive_of_mean_one_and_never_worse_than_none(grid, ties):
    w, energy = problem()
    c = column_scales(w, energy, grid, ties)
    assert c.shape == (N_IN,)
    assert float(c.min()) > 0
    assert float(c.max()) <= LIMIT
    # The clamp comes last and may move the mean a little.
    assert float(c.log().mean().exp()) == pytest.approx(1, abs=0.05)
    ones = loss(w, energy, grid, torch.ones(N_IN))
    assert loss(w, energy, grid, c) <= ones


@pytest.mark.parametrize("grid", GRID_LIST, ids=lambda g: g.id)
def test_tied_columns_have_one_scale(grid):
    w, energy = problem(seed=1)
    ties = shared_heads()
    c = column_scales(w, energy, grid, ties)
    per_tie = torch.empty(64)
    per_tie[ties] = c
    assert torch.equal(per_tie[ties], c)
    assert len(c.unique()) > 32


def test_all_columns_tied_leave_nothing_to_choose():
    w, energy = problem()
    c = column_scales(w, energy, GRIDS["q4_0"], torch.zeros(N_IN, dtype=torch.long))
    torch.testing.assert_close(c, torch.ones(N_IN))


@pytest.mark.parametrize("grid", GRID_LIST, ids=lambda g: g.id)
def test_uneven_columns_gain_and_the_fewer_ties_the_more(grid):
    w, energy = problem(seed=2)
    ones = loss(w, energy, grid, torch.ones(N_IN))
    free = loss(w, energy, grid, column_scales(w, energy, grid))
    # Heads that read the same values need the same scales here.
    assert free < 0.9 * ones
    tied = loss(w, energy, grid, column_scales(w, energy, grid, shared_heads()))
    assert free <= tied <= ones


def test_scales_of_the_weights_are_found_through_the_ties():
    """Columns of one tie have the same size; the scales that even them out take the error of even columns."""
    generator = torch.Generator().manual_seed(3)
    ties = shared_heads()
    true = torch.exp(torch.randn(64, generator=generator))[ties].clamp(1 / 4, 4)
    even = torch.randn(48, N_IN, generator=generator)
    energy = 1 / true.square()
    grid = GRIDS["q2_k"]
    c = column_scales(even * true, energy, grid, ties)
    best = loss(even, torch.ones(N_IN), grid, torch.ones(N_IN))
    found, none = (loss(even * true, energy, grid, x) for x in (c, torch.ones(N_IN)))
    assert found < best + 0.25 * (none - best)
    ratio = (c / true).log()
    assert float(ratio.std()) < 0.5 * float(true.log().std())


def test_the_best_of_all_that_was_tried_is_taken(monkeypatch):
    """The alternation begins at the best exponent; where it leads to worse, that stays."""
    cases = ((0, 1, "q2_k"), (2, 1, "q2_k"), (3, 2, "q2_k"), (0, 1, "q8_0"), (1, 1, "q8_0"), (2, 1, "q4_0"))
    problems = [(problem(seed=seed, n_out=n_out, spread=2.0), GRIDS[name]) for seed, n_out, name in cases]

    def losses(n_rounds):
        monkeypatch.setattr(tied_module, "N_ROUNDS", n_rounds)
        return [loss(w, e, grid, column_scales(w, e, grid)) for (w, e), grid in problems]

    found = [losses(n) for n in range(5)]
    for fewer, more in pairwise(found):
        assert all(b <= a for a, b in zip(fewer, more, strict=True))
    assert sum(found[-1]) < sum(found[0])


def test_columns_without_weights_keep_finite_scales():
    w, energy = problem()
    w[:, :40] = 0
    energy[100:140] = 1e-12
    for ties in (None, shared_heads()):
        c = column_scales(w, energy, GRIDS["q2_k"], ties)
        assert bool(torch.isfinite(c).all())
        assert float(c.min()) >= 1 / LIMIT
    assert torch.equal(column_scales(w * 0, energy, GRIDS["q2_k"]), torch.ones(N_IN))


def test_the_codes_of_scaled_weights_times_scaled_inputs_are_the_same_outputs():
    """What makes the scales foldable: (Q diag c) x = Q (c ⊙ x) with the rows of v, tied, in place of x."""
    w, energy = problem()
    ties = shared_heads()
    c = column_scales(w, energy, GRIDS["q2_k"], ties)
    q = round_to_nearest(w / c, energy * c.square(), GRIDS["q2_k"]).decode()
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(64, 10, generator=generator)
    per_value = torch.empty(64)
    per_value[ties] = c
    torch.testing.assert_close((q * c) @ values[ties], q @ (per_value[:, None] * values)[ties])
