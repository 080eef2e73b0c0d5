"""GAR: a valid order of the sweep, and what it buys."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2qconv.grids.affine import AffineGrid
from d2qconv.quant.dsq import ColumnScaled
from d2qconv.quant.hessian import inverse_factor
from d2qconv.quant.order import gar
from d2qconv.quant.sweep import gptq
from d2qconv_gguf.grids import GRIDS


@dataclass(frozen=True)
class Sizes:
    """All that an order asks of a grid."""

    block: int
    group: int
    step: int


SIZES = [
    Sizes(32, 8, 1),
    Sizes(32, 8, 2),
    Sizes(32, 8, 8),
    Sizes(16, 16, 4),
    Sizes(16, 4, 4),
    Sizes(96, 1, 1),
    Sizes(96, 96, 1),
]


def runs(order, width):
    """i64[n / width, width]: neighbours in the sweep."""
    return order.view(-1, width)


def is_falling(values):
    return bool((values[..., 1:] <= values[..., :-1]).all())


@given(
    sizes=st.sampled_from(SIZES),
    diagonal=st.lists(st.floats(0, 4, width=32), min_size=96, max_size=96),
)
@settings(max_examples=60, deadline=None)
def test_an_order_keeps_groups_blocks_and_codes_together_and_falls_inside_each(sizes, diagonal):
    d = torch.tensor(diagonal)
    order = gar(d, sizes)
    assert sorted(order.tolist()) == list(range(96))
    assert order.device.type == "cpu"
    for width in (sizes.block, sizes.group, sizes.step):
        members = runs(order, width).sort(1).values
        assert torch.equal(members - members[:, :1], torch.arange(width).expand_as(members))
        assert bool((members[:, 0] % width == 0).all())
    # A code's columns are its own and in their own order.
    assert torch.equal(runs(order, sizes.step), runs(order, sizes.step).sort(1).values)
    for width, holder in ((sizes.step, sizes.group), (sizes.group, sizes.block), (sizes.block, 96)):
        largest = d[runs(order, width)].amax(1).view(-1, holder // width)
        assert is_falling(largest)


def test_equal_columns_stay_where_they_are():
    assert torch.equal(gar(torch.ones(96), Sizes(32, 8, 2)), torch.arange(96))


def test_a_known_order():
    d = torch.tensor([1.0, 2, 3, 0, 9, 0, 0, 4])
    assert gar(d, Sizes(8, 4, 1)).tolist() == [4, 7, 5, 6, 2, 1, 0, 3]
    assert gar(d, Sizes(8, 4, 2)).tolist() == [4, 5, 6, 7, 2, 3, 0, 1]
    assert gar(d, Sizes(4, 2, 1)).tolist() == [4, 5, 7, 6, 2, 3, 1, 0]


def problem(n_out=24, n_in=512, seed=0, spread=0.0):
    """Weights, and a Hessian of correlated inputs whose sizes are lognormal with that deviation."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator) / n_in**0.5
    x = torch.randn(4 * n_in, n_in, generator=generator) @ (torch.eye(n_in) + 2 * mix)
    x = x * torch.exp(spread * torch.randn(n_in, generator=generator))
    w = torch.randn(n_out, n_in, generator=generator) * 0.05
    return w, x.T @ x / len(x)


def loss(w, w_hat, gram):
    difference = w - w_hat
    return float(((difference @ gram) * difference).sum())


def swept(w, gram, grid, order, *, is_refit=True):
    here = gram if order is None else gram[order][:, order]
    return gptq(w, inverse_factor(here, 0.01, "test"), grid, is_refit=is_refit, order=order)


GRID_NAMES = ["q2_k", "q4_0", "affine2_g128_float"]


def grid_of(name):
    return GRIDS[name] if name in GRIDS else AffineGrid(2, 128, "float")


@pytest.mark.parametrize("name", GRID_NAMES)
def test_the_natural_order_given_changes_no_bit(name):
    w, gram = problem()
    plain = swept(w, gram, grid_of(name), None)
    given_order = swept(w, gram, grid_of(name), torch.arange(512))
    assert torch.equal(plain.codes, given_order.codes)
    for param in plain.params:
        assert torch.equal(plain.params[param], given_order.params[param]), param


def random_order(n_in, grid, seed):
    """A valid order that knows nothing of the Hessian."""
    return gar(torch.rand(n_in, generator=torch.Generator().manual_seed(seed)), grid)


@pytest.mark.parametrize("name", GRID_NAMES)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_sweep_in_any_valid_order_is_one_over_the_moved_columns(name, is_scaled):
    """And codes and parameters come back at the columns that they belong to."""
    w, gram = problem()
    grid = ColumnScaled(grid_of(name)) if is_scaled else grid_of(name)
    order = random_order(512, grid, seed=1)
    moved = swept(w[:, order], gram[order][:, order], grid, None)
    got = swept(w, gram, grid, order)
    assert torch.equal(got.codes[:, order], moved.codes)
    assert torch.equal(got.decode()[:, order], moved.decode())


@pytest.mark.parametrize("name", GRID_NAMES)
def test_any_valid_order_is_about_as_good_where_columns_are_alike(name):
    w, gram = problem()
    natural = loss(w, swept(w, gram, grid_of(name), None).decode(), gram)
    for seed in range(3):
        order = random_order(512, grid_of(name), seed)
        assert loss(w, swept(w, gram, grid_of(name), order).decode(), gram) == pytest.approx(natural, rel=0.1)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_gar_lowers_the_loss_where_columns_are_not_alike(name):
    w, gram = problem(spread=1.0)
    natural = loss(w, swept(w, gram, grid_of(name), None).decode(), gram)
    ordered = swept(w, gram, grid_of(name), gar(gram.diagonal(), grid_of(name)))
    against = swept(w, gram, grid_of(name), gar(-gram.diagonal(), grid_of(name)))
    assert loss(w, ordered.decode(), gram) < 0.95 * natural
    assert loss(w, ordered.decode(), gram) < 0.95 * loss(w, against.decode(), gram)
