"""The budgeted choice, against every choice there is."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2qconv.allocate.choose import Item, choose, frontier, least


def total(items, chosen):
    sizes = sum(item.sizes[k] for item, k in zip(items, chosen, strict=True))
    return sizes, sum(item.losses[k] for item, k in zip(items, chosen, strict=True))


def best(items, budget):
    choices = product(*(range(len(item.sizes)) for item in items))
    return min(loss for size, loss in (total(items, c) for c in choices) if size <= budget)


option = st.tuples(st.integers(0, 60), st.integers(0, 1000))
items_of = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5).map(
    lambda lists: [Item(tuple(8 * s for s, _ in o), tuple(loss / 1000 for _, loss in o)) for o in lists]
)


@given(items_of, st.integers(0, 2400))
def test_no_choice_within_the_budget_is_better(items, more):
    budget = least(items) + more
    size, loss = total(items, choose(items, budget))
    assert size <= budget
    assert loss == pytest.approx(best(items, budget), abs=1e-12)


@given(items_of, st.integers(0, 2400), st.integers(1, 9))
def test_a_coarse_count_stays_within_the_budget_and_leaves_no_single_gain(items, more, bins):
    budget = least(items) + more
    chosen = choose(items, budget, bins)
    size, loss = total(items, chosen)
    assert size <= budget
    for i, item in enumerate(items):
        for k in range(len(item.sizes)):
            other = total(items, (*chosen[:i], k, *chosen[i + 1 :]))
            assert other[0] > budget or other[1] >= loss - 1e-12


def test_a_coarse_count_of_many_awkward_sizes_is_near_the_best():
    """A count in 500 steps against the exact one."""
    items = [Item((100 + i, 150 + 3 * i, 230 + i), (1.0 + i % 7, 0.4, 0.1 / (1 + i % 3))) for i in range(97)]
    budget = int(1.4 * least(items))
    size, loss = total(items, choose(items, budget, 500))
    assert budget - size < 60
    assert loss <= 1.02 * total(items, choose(items, budget))[1]


def test_equal_losses_go_to_fewer_bytes_and_then_to_the_first():
    assert choose([Item((8, 4, 4), (1.0, 1.0, 1.0))], 100) == (1,)
    assert choose([Item((4, 8), (0.0, 0.0)), Item((4, 8), (1.0, 0.5))], 12) == (0, 1)


def test_what_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="takes 4 bytes, and the budget is 3"):
        choose([Item((4, 8), (1.0, 0.0))], 3)
    with pytest.raises(ValueError, match="not finite"):
        choose([Item((4,), (float("nan"),))], 9)


@given(items_of)
def test_the_frontier_is_the_hull_of_all_choices(items):
    found = frontier(items)
    assert found[0][0] == least(items)
    assert found[0][1] == pytest.approx(best(items, least(items)))
    assert found[-1][1] == pytest.approx(best(items, sum(max(item.sizes) for item in items)))
    for size, loss in found:
        assert loss == pytest.approx(best(items, size), abs=1e-9)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(found)]
    assert all(slope < 0 for slope in slopes)
    assert all(a <= b + 1e-12 for a, b in pairwise(slopes))
    # No choice lies below the line between two neighbours.
    for (size, loss), (more, less) in pairwise(found):
        for budget in range(size, more, 8):
            share = (budget - size) / (more - size)
            assert best(items, budget) >= loss + share * (less - loss) - 1e-9
