"""Rounding a chunk: whole blocks of columns, a few hundred in all, before the rest of the matrix hears of it.

`round_chunk` is the sweep's inner part. What it does never depends on the values it sees, so on CUDA it can be recorded
once and replayed for every chunk of that shape (`d2qconv.quant.graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from d2qconv.grids.base import Grid, Params, is_vector
from d2qconv.quant.panel import Panel, hand_on, local_metrics, round_panel, round_vectors
from d2qconv.timing import timed

#: Columns of a panel, at most; a panel lies in one group.
PANEL_COLUMNS = 128


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions of the sweep, whole blocks of the grid.

    rest: f32[n, n_out], the columns as the sweep reaches them, changed in place. factor: f32[n, n], their part of U.
    importance: f32[n] = 1/U_jj². places: i64[n] on the CPU, the column at each position, as the grid numbers it; None
    for consecutive columns. drift, pull, old: see `d2qconv.quant.panel.Panel`. given: parameters of every block, which
    then are not fitted.
    """

    rest: Tensor
    factor: Tensor
    importance: Tensor
    places: Tensor | None = None
    drift: Tensor | None = None
    pull: Tensor | None = None
    old: Tensor | None = None
    given: Sequence[Params] | None = None


@dataclass(frozen=True)
class Rounded:
    """Where a chunk's results go.

    codes: [n / step, n_out], in the grid's `code_dtype`. errors: f32[n, n_out], for the columns behind it.
    """

    codes: Tensor
    errors: Tensor


def round_chunk(chunk: Chunk, grid: Grid, into: Rounded, *, is_refit: bool) -> Sequence[Params]:
    """Fill `into`; returns the parameters of every block in the order of the sweep."""
    metric = local_metrics(chunk.factor, grid.step) if grid.step > 1 else None
    work = _Work(chunk, grid, into, is_refit, metric)
    return [work.block(start) for start in range(0, len(chunk.rest), grid.block)]


@dataclass(frozen=True)
class _Work:
    chunk: Chunk
    grid: Grid
    into: Rounded
    is_refit: bool
    metric: Tensor | None

    def block(self, start: int) -> Params:
        """Round the block at position `start`."""
        grid = self.grid
        stop = start + grid.block
        if self.chunk.given is not None:
            params = self.chunk.given[start // grid.block]
        else:
            with timed("fit"):
                params = grid.fit(*self._natural(start, stop))
        for first in range(start, stop, grid.group):
            group = self._place(first) % grid.block // grid.group
            if self.is_refit and self.chunk.given is None:
                with timed("fit"):
                    params = self._refit(params, group, first)
            with timed("sweep"):
                for left in range(first, first + grid.group, PANEL_COLUMNS):
                    columns = slice(left, min(left + PANEL_COLUMNS, first + grid.group))
                    self._panel(columns, group, params)
                    self._hand_on(columns)
        return params

    def _refit(self, params: Params, group: int, first: int) -> Params:
        """The inner parameters of the group at position `first`, chosen again."""
        grid, step, stop = self.grid, self.grid.step, first + self.grid.group
        w, importance = self._natural(first, stop)
        if self.metric is None or not is_vector(grid):
            return grid.refit(params, group, w, importance)
        metric = self.metric[first // step : stop // step]
        if self.chunk.places is not None:
            metric = metric[self.chunk.places[first:stop:step].argsort().to(metric.device)]
        return grid.refit_vectors(params, group, w, metric)

    def _place(self, position: int) -> int:
        return position if self.chunk.places is None else int(self.chunk.places[position])

    def _natural(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Weights f32[n_out, n] and importance f32[n] of these positions, as the grid numbers their columns."""
        rest, importance = self.chunk.rest[start:stop], self.chunk.importance[start:stop]
        if self.chunk.places is not None:
            index = self.chunk.places[start:stop].argsort().to(rest.device)
            rest, importance = rest[index], importance[index]
        return rest.T, importance

    def _panel(self, columns: slice, group: int, params: Params) -> None:
        """Round some columns of one group; see `round_panel`."""
        chunk, grid = self.chunk, self.grid
        places = torch.arange(columns.start, columns.stop) if chunk.places is None else chunk.places[columns]
        panel = Panel(
            rest=chunk.rest[columns],
            factor=chunk.factor[columns, columns],
            places=places % grid.block,
            drift=None if chunk.drift is None else chunk.drift[columns, columns],
            pull=None if chunk.pull is None else chunk.pull[columns],
            old=None if chunk.old is None else chunk.old[columns],
            metric=None
            if self.metric is None
            else self.metric[columns.start // grid.step : columns.stop // grid.step],
        )
        codes = self.into.codes[columns.start // grid.step : columns.stop // grid.step]
        errors = self.into.errors[columns]
        if is_vector(grid):
            round_vectors(panel, grid, params, codes, errors)
            return
        lattice = grid.lattice(params, group) if chunk.rest.is_cuda and has_triton() else None
        if lattice is None:
            round_panel(panel, grid, params, codes, errors)
            return
        from d2qconv.quant import panel_triton

        if lattice.column_scale is not None and chunk.places is not None:
            inside = (places % grid.group).to(errors.device)
            lattice = replace(lattice, column_scale=lattice.column_scale[inside])
        elif lattice.column_scale is not None:
            inside_first = columns.start % grid.group
            width = columns.stop - columns.start
            lattice = replace(lattice, column_scale=lattice.column_scale[inside_first : inside_first + width])
        panel_triton.round_panel(panel, lattice, codes, errors)

    def _hand_on(self, done: slice) -> None:
        """Take the errors of the positions `done` out of what follows in the chunk."""
        chunk = self.chunk
        pull = None if chunk.drift is None else (chunk.rest if chunk.pull is None else chunk.pull)[done]
        hand_on(
            chunk.rest[done.stop :],
            chunk.factor[done, done.stop :],
            self.into.errors[done],
            None if chunk.drift is None else chunk.drift[done, done.stop :],
            pull,
        )


@cache
def has_triton() -> bool:
    """Whether there is a compiler for our kernels."""
    return find_spec("triton") is not None
