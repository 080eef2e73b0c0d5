"""Rounding a matrix onto a grid, with and without error compensation.

`gptq` is the column sweep of GPTQ (arXiv 2210.17323) over any `Grid`:

- at the first column of a block the grid is fitted to the weights as they are by then, the errors of all earlier
  columns already in them, under the weights 1/U_jj²: the price of an error in column j once all later columns have
  compensated for it;
- where the grid has inner parameters, they are chosen again when the sweep reaches their group;
- a code covers `step` columns b; its error e = U_bbᵀ⁻¹ (w − ŵ) is taken out of the columns to the right, U_b,rightᵀ e.
  For step 1 this is the familiar (w − ŵ)/U_jj. Which of the codes of several columns is best is decided by ‖e‖²,
  which is what it adds to the loss.

Errors are handed on in three ranges: column by column inside a panel (`d2qconv.quant.panel`), panel by panel inside a
chunk (`d2qconv.quant.chunk`), and beyond that in one product. What comes back is codes and parameters in storage
precision; their `decode()` is the result, exactly. Everything is f32. The weights are kept transposed, so that a column
is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.grids.base import Grid, Params, code_dtype, encode_weighed, stack_blocks
from d2qconv.ir.coded import Coded
from d2qconv.quant.chunk import Chunk, Rounded, round_chunk
from d2qconv.quant.dsq import ColumnScaled
from d2qconv.quant.panel import hand_on
from d2qconv.timing import timed

#: Columns whose errors are collected before they are taken out of the rest of the matrix in one product.
LAZY_COLUMNS = 256
#: Chunks of a matrix from which on recording one pays.
MIN_RECORDED = 4


@dataclass(frozen=True)
class Drift:
    """GPTAQ's term (arXiv 2504.02692): the sweep also adds w_i P_i,right for what the inputs have moved by.

    p: f32[n_in, n_in], strictly upper triangular, in the sweep's order; see `d2qconv.quant.hessian.drift`.
    source: f32[n_out, n_in], taken instead of the compensated weight w_i; None for GPTAQ as published.
    """

    p: Tensor
    source: Tensor | None = None


def round_to_nearest(w: Tensor, importance: Tensor, grid: Grid) -> Coded:
    """Fit every block to the weights and take the nearest codes.

    w: f32[n_out, n_in]; importance: f32[n_in], positive (the Hessian's diagonal).
    """
    blocks: list[Params] = []
    codes: list[Tensor] = []
    for start in range(0, w.shape[1], grid.block):
        columns = slice(start, start + grid.block)
        blocks.append(grid.fit(w[:, columns], importance[columns]))
        codes.append(encode_weighed(grid, w[:, columns], blocks[-1], importance[columns]))
    return Coded(grid, (w.shape[0], w.shape[1]), torch.cat(codes, 1), stack_blocks(blocks))


def gptq(
    w: Tensor,
    factor: Tensor,
    grid: Grid,
    *,
    is_refit: bool,
    order: Tensor | None = None,
    drift: Drift | None = None,
) -> Coded:
    """Round w so that errors are compensated by the columns that come after.

    w: f32[n_out, n_in], left as it is. factor: U, f32[n_in, n_in] of `inverse_factor`. is_refit: see the module.
    order: i64[n_in] on the CPU, the columns as the sweep takes them (`d2qconv.quant.order`), in which then factor and
    drift are given too; None for left to right. The result is in w's own order. Since blocks, groups and codes stay
    whole, and a grid treats those of its own kind alike, a sweep in another order is one over moved columns.
    """
    n_out, n_in = w.shape
    source = None if drift is None else drift.source
    sweep = _Sweep(
        rest=_taken(w.T, order),
        factor=factor.contiguous(),
        importance=factor.diagonal().square().reciprocal(),
        grid=grid,
        is_refit=is_refit,
        drift=None if drift is None else drift.p,
        pull=None if source is None else _taken(source.T, order),
        codes=torch.empty(n_in // grid.step, n_out, dtype=code_dtype(grid.levels), device=w.device),
    )
    params, codes = stack_blocks(sweep.run()), sweep.codes
    if order is not None:
        params = {name: _moved_back(p, order, grid.block) for name, p in params.items()}
        codes = torch.empty_like(codes)
        codes[(order[:: grid.step] // grid.step).to(codes.device)] = sweep.codes
    return Coded(grid, (n_out, n_in), codes.T.contiguous(), params)


def _taken(columns: Tensor, order: Tensor | None) -> Tensor:
    """Rows of `columns` in that order, in memory of their own."""
    if order is None:
        return columns.clone(memory_format=torch.contiguous_format)
    return columns[order.to(columns.device)].contiguous()


def _moved_back(p: Tensor, order: Tensor, block: int) -> Tensor:
    """A parameter `[n_out or 1, n_blocks, ...]` of the sweep's blocks, groups or columns, as the grid numbers them.

    What follows n_blocks, if anything, are equal parts of a block, and is one number each.
    """
    n, n_blocks, *parts = p.shape
    n_parts = parts[0] if parts else 1
    width = block // n_parts
    back = p.new_empty(n, n_blocks * n_parts)
    back[:, (order[::width] // width).to(p.device)] = p.reshape(n, n_blocks * n_parts)
    return back.view(p.shape)


@dataclass(frozen=True)
class _Sweep:
    """The state of one sweep.

    rest: f32[n_in, n_out], the weights with all errors so far taken out of them. All is in the sweep's order.
    """

    rest: Tensor
    factor: Tensor
    importance: Tensor
    grid: Grid
    is_refit: bool
    drift: Tensor | None
    pull: Tensor | None
    codes: Tensor

    def run(self) -> Sequence[Params]:
        """All blocks; returns their parameters."""
        n_in, n_out = self.rest.shape
        width, step = self.grid.block, self.grid.step
        lazy = min(max(LAZY_COLUMNS // width, 1) * width, n_in)
        blocks: list[Params] = []
        errors = torch.empty(lazy, n_out, device=self.rest.device)
        for start in range(0, n_in, lazy):
            done, later = slice(start, min(start + lazy, n_in)), slice(min(start + lazy, n_in), n_in)
            into = Rounded(
                self.codes[done.start // step : done.stop // step], errors[: done.stop - done.start]
            )
            blocks += round_fast(
                self._chunk(done), self.grid, into, is_refit=self.is_refit, n_chunks=n_in // lazy
            )
            with timed("sweep"):
                drift = None if self.drift is None else self.drift[done, later]
                pull = None if drift is None else (self.rest if self.pull is None else self.pull)[done]
                hand_on(self.rest[later], self.factor[done, later], into.errors, drift, pull)
        return blocks

    def _chunk(self, done: slice) -> Chunk:
        return Chunk(
            rest=self.rest[done],
            factor=self.factor[done, done],
            importance=self.importance[done],
            drift=None if self.drift is None else self.drift[done, done],
            pull=None if self.pull is None else self.pull[done],
        )


def round_fast(chunk: Chunk, grid: Grid, into: Rounded, *, is_refit: bool, n_chunks: int) -> Sequence[Params]:
    """`round_chunk`, by a recording where there are chunks enough of its shape to pay for one."""
    is_talking = isinstance(grid, ColumnScaled) and grid.reduce is not None
    is_plain = chunk.drift is None and not is_talking
    if chunk.rest.is_cuda and is_plain and n_chunks >= MIN_RECORDED:
        from d2qconv.quant.graphs import layout, recorded

        n, n_out = chunk.rest.shape
        recording = recorded(
            grid,  # type: ignore[arg-type] # hashable
            n,
            n_out,
            chunk.rest.device,
            layout(chunk.given),
            is_refit=is_refit,
            has_old=chunk.old is not None,
        )
        if recording is not None:
            with timed("sweep"):
                return recording(chunk, into)
    return round_chunk(chunk, grid, into, is_refit=is_refit)
