"""One option for every item, of least total loss within a budget of bytes.

A knapsack with one choice an item, solved by dynamic programming over the bytes above the cheapest choice. Sizes of
matrices have large common divisors, so bytes are counted in their greatest one and the result is exact; where that
would still be more than MAX_BINS steps, sizes are rounded up to a coarser unit, and what this leaves over is spent on
the single exchanges that gain most. Equal losses go to fewer bytes, then to the first option: the result depends on
nothing but the arguments. All sums are f64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Steps of the budget; a table of as many bytes an item is kept.
MAX_BINS = 1 << 15


@dataclass(frozen=True)
class Item:
    """Something that is stored in one of several ways. sizes: bytes, not negative. losses: finite, of each way."""

    sizes: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def cheapest(self) -> int:
        """The way of the fewest bytes, of several that of the least loss."""
        return min(range(len(self.sizes)), key=lambda k: (self.sizes[k], self.losses[k], k))


def least(items: Sequence[Item]) -> int:
    """Bytes of the smallest choice there is."""
    return sum(min(item.sizes) for item in items)


def frontier(items: Sequence[Item]) -> list[tuple[int, float]]:
    """Bytes and loss of the choices that lie on the lower convex hull of all choices, from the smallest one up.

    None of as few bytes loses less than they do. Each follows from the one before by the exchange, of a single item,
    that gains most for a byte; equal gains in the order of the items.
    """
    n_bytes, loss = 0, 0.0
    exchanges: list[tuple[float, int, int, float]] = []
    for i, item in enumerate(items):
        now = item.cheapest
        n_bytes, loss = n_bytes + item.sizes[now], loss + item.losses[now]
        while True:
            size, lost = item.sizes[now], item.losses[now]
            better = [k for k, other in enumerate(item.losses) if item.sizes[k] > size and other < lost]
            if not better:
                break
            # The steepest way down; of equally steep ones the longest.
            slope, _, now = min(
                ((item.losses[k] - lost) / (item.sizes[k] - size), -item.sizes[k], k) for k in better
            )
            exchanges.append((slope, i, item.sizes[now] - size, item.losses[now] - lost))
    found = [(n_bytes, loss)]
    for _, _, more, change in sorted(exchanges):
        n_bytes, loss = n_bytes + more, loss + change
        found.append((n_bytes, loss))
    return found


def choose(items: Sequence[Item], budget: int, max_bins: int = MAX_BINS) -> tuple[int, ...]:
    """For every item the number of its option. Raises ValueError if even the smallest choice exceeds the budget."""
    if any(not math.isfinite(loss) for item in items for loss in item.losses):
        raise ValueError("a loss is not finite")
    room = budget - least(items)
    if room < 0:
        raise ValueError(f"the smallest choice takes {least(items)} bytes, and the budget is {budget}")
    extras = [[size - min(item.sizes) for size in item.sizes] for item in items]
    room = min(room, sum(max(extra) for extra in extras))
    unit = math.gcd(*(size for extra in extras for size in extra)) or 1
    if room // unit > max_bins:
        unit = -(-room // max_bins)
    chosen = _solve(items, [[-(-size // unit) for size in extra] for extra in extras], room // unit)
    return _spend(items, extras, chosen, room)


def _solve(items: Sequence[Item], steps: Sequence[Sequence[int]], n_steps: int) -> list[int]:
    """The best choice whose steps add up to at most n_steps.

    best[c]: the least loss of the items so far in c steps; took[i, c]: the option that item i then has.
    """
    best: NDArray[np.float64] = np.zeros(n_steps + 1)
    took: NDArray[np.uint8] = np.zeros((len(items), n_steps + 1), dtype=np.uint8)
    for i, item in enumerate(items):
        options = sorted(range(len(item.sizes)), key=lambda k: (item.sizes[k], item.losses[k], k))
        new = np.full(n_steps + 1, np.inf)
        for k in options:
            step = steps[i][k]
            if step > n_steps:
                continue
            loss = best[: n_steps + 1 - step] + item.losses[k]
            is_better = loss < new[step:]
            new[step:][is_better] = loss[is_better]
            took[i, step:][is_better] = k
        best = new
    chosen, left = [0] * len(items), n_steps
    for i in reversed(range(len(items))):
        chosen[i] = int(took[i, left])
        left -= steps[i][chosen[i]]
    return chosen


def _spend(
    items: Sequence[Item], extras: Sequence[Sequence[int]], chosen: list[int], room: int
) -> tuple[int, ...]:
    """Spend what is left of `room` on the single exchange that lowers the loss most, until there is none."""
    left = room - sum(extras[i][k] for i, k in enumerate(chosen))
    while True:
        found: tuple[float, int, int, int] | None = None
        for i, item in enumerate(items):
            now = chosen[i]
            for k, loss in enumerate(item.losses):
                more = extras[i][k] - extras[i][now]
                if more <= left and loss < item.losses[now]:
                    move = (loss - item.losses[now], more, i, k)
                    found = move if found is None else min(found, move)
        if found is None:
            return tuple(chosen)
        _, more, i, k = found
        chosen[i] = k
        left -= more
