"""Rounding a chunk: whole blocks of columns, a few hundred in all, before the rest of the matrix hears of it.

`round_chunk` is the sweep's inner part. What it does never depends on the values it sees, so on CUDA it can be recorded
once and replayed for every chunk of that shape (`d2qconv.quant.graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from d2qconv.grids.base import Grid, Params, is_vector
from d2qconv.quant.panel import Panel, hand_on, local_metrics, round_lattice, round_panel, round_vectors
from d2qconv.timing import timed

#: Columns of a panel, at most; a panel lies in one group.
PANEL_COLUMNS = 128


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions of the sweep, whole blocks of the grid.

    rest: f32[n, n_out], the columns as the sweep reaches them, changed in place. factor: f32[n, n], their part of U.
    importance: f32[n] = 1/U_jj². drift, pull, old: see `d2qconv.quant.panel.Panel`. given: parameters of every block,
    which then are not fitted.
    """

    rest: Tensor
    factor: Tensor
    importance: Tensor
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
                params = grid.fit(*self._columns(start, stop))
        for group, first in enumerate(range(start, stop, grid.group)):
            if self.is_refit and self.chunk.given is None:
                with timed("fit"):
                    params = self._refit(params, group, slice(first, first + grid.group))
            with timed("sweep"):
                for left in range(first, first + grid.group, PANEL_COLUMNS):
                    columns = slice(left, min(left + PANEL_COLUMNS, first + grid.group))
                    self._panel(columns, group, params)
                    self._hand_on(columns)
        return params

    def _columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Weights f32[n_out, n] and importance f32[n] of these positions."""
        return self.chunk.rest[start:stop].T, self.chunk.importance[start:stop]

    def _refit(self, params: Params, group: int, columns: slice) -> Params:
        """The inner parameters of the group at these positions, chosen again."""
        w, importance = self._columns(columns.start, columns.stop)
        if is_vector(self.grid):
            return self.grid.refit_vectors(params, group, w, self._metric(columns))
        return self.grid.refit(params, group, w, importance)

    def _metric(self, columns: slice) -> Tensor:
        """Of the runs at these positions."""
        assert self.metric is not None, "codes of several columns have a metric"
        return self.metric[columns.start // self.grid.step : columns.stop // self.grid.step]

    def _panel(self, columns: slice, group: int, params: Params) -> None:
        """Round some columns of one group; see `round_panel`."""
        chunk, grid = self.chunk, self.grid
        panel = Panel(
            rest=chunk.rest[columns],
            factor=chunk.factor[columns, columns],
            place=columns.start % grid.block,
            drift=None if chunk.drift is None else chunk.drift[columns, columns],
            pull=None if chunk.pull is None else chunk.pull[columns],
            old=None if chunk.old is None else chunk.old[columns],
        )
        codes = self.into.codes[columns.start // grid.step : columns.stop // grid.step]
        errors = self.into.errors[columns]
        if is_vector(grid):
            round_vectors(replace(panel, metric=self._metric(columns)), grid, params, codes, errors)
            return
        lattice = grid.lattice(params, group)
        if lattice is None:
            round_panel(panel, grid, params, codes, errors)
            return
        if lattice.column_scale is not None:
            inside = columns.start % grid.group
            width = columns.stop - columns.start
            lattice = replace(lattice, column_scale=lattice.column_scale[inside : inside + width])
        if chunk.rest.is_cuda and has_triton():
            from d2qconv.quant import panel_triton

            panel_triton.round_panel(panel, lattice, codes, errors)
        else:
            round_lattice(panel, lattice, codes, errors)

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
