"""Rounding a matrix onto a grid, with and without error compensation.

`gptq` is the column sweep of GPTQ (arXiv 2210.17323) over any `Grid`:

- at the first column of a block the grid is fitted to the weights as they are by then, the errors of all earlier
  columns already in them, under the weights 1/U_jj²: the price of an error in column j once all later columns have
  compensated for it;
- where the grid has inner parameters, they are chosen again when the sweep reaches their group;
- a code covers `step` columns; its error e = (w − ŵ) U_bb⁻¹ is taken out of the columns to the right, e U_b,right.
  For step 1 this is the familiar (w − ŵ)/U_jj.

What comes back is codes and parameters in storage precision; their `decode()` is the result, exactly.
Everything is f32. The weights are kept transposed, so that a column is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.grids.base import Grid, Params, stack_blocks
from d2qconv.ir.coded import Coded

#: Columns whose errors are collected before they are taken out of the rest of the matrix in one product.
LAZY_COLUMNS = 256


def round_to_nearest(w: Tensor, importance: Tensor, grid: Grid) -> Coded:
    """Fit every block to the weights and take the nearest codes.

    w: f32[n_out, n_in]; importance: f32[n_in], positive (the Hessian's diagonal).
    """
    blocks: list[Params] = []
    codes: list[Tensor] = []
    for start in range(0, w.shape[1], grid.block):
        columns = slice(start, start + grid.block)
        params = grid.fit(w[:, columns], importance[columns])
        codes.append(grid.encode(w[:, columns], params, 0))
        blocks.append(params)
    return Coded(grid, (w.shape[0], w.shape[1]), torch.cat(codes, dim=1), stack_blocks(blocks))


def gptq(
    w: Tensor,
    factor: Tensor,
    grid: Grid,
    *,
    is_refit: bool,
) -> Coded:
    """Round w so that errors are compensated by the columns to their right.

    w: f32[n_out, n_in], left as it is. factor: U, f32[n_in, n_in] of `inverse_factor`. is_refit: see the module.
    """
    sweep = _Sweep(
        rest=w.T.clone(memory_format=torch.contiguous_format),
        factor=factor,
        importance=factor.diagonal().square().reciprocal(),
        grid=grid,
        is_refit=is_refit,
        codes=torch.empty(w.shape[0], w.shape[1] // grid.step, dtype=torch.uint8, device=w.device),
    )
    n_in = w.shape[1]
    lazy = max(LAZY_COLUMNS // grid.block, 1) * grid.block
    blocks: list[Params] = []
    for start in range(0, n_in, lazy):
        end = min(start + lazy, n_in)
        errors = torch.empty(end - start, w.shape[0], device=w.device)
        for block in range(start, end, grid.block):
            blocks.append(sweep.block(block, end, errors[block - start :]))
        sweep.rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return Coded(grid, (w.shape[0], n_in), sweep.codes, stack_blocks(blocks))


@dataclass(frozen=True)
class _Sweep:
    """The state of one sweep. rest: f32[n_in, n_out], the weights with all errors so far taken out of them."""

    rest: Tensor
    factor: Tensor
    importance: Tensor
    grid: Grid
    is_refit: bool
    codes: Tensor

    def block(self, start: int, end: int, errors: Tensor) -> Params:
        """Round the block at column `start`, correcting columns up to `end`; fills errors f32[block.., n_out]."""
        grid, rest = self.grid, self.rest
        stop = start + grid.block
        params = grid.fit(rest[start:stop].T, self.importance[start:stop])
        for group in range(grid.block // grid.group):
            first = start + group * grid.group
            last = first + grid.group
            if self.is_refit:
                params = grid.refit(params, group, rest[first:last].T, self.importance[first:last])
            for column in range(first, last, grid.step):
                self._column(column, start, end, params, errors)
        return params

    def _column(self, column: int, start: int, end: int, params: Params, errors: Tensor) -> None:
        grid, rest = self.grid, self.rest
        after = column + grid.step
        w = rest[column:after]
        code = grid.encode(w.T, params, column - start)
        self.codes[:, column // grid.step : after // grid.step] = code
        difference = w - grid.decode(code, params, column - start).T
        local = self.factor[column:after, column:after]
        if grid.step == 1:
            error = difference / local
        else:
            error = torch.linalg.solve_triangular(local.T, difference, upper=False)
        errors[column - start : after - start] = error
        rest[after:end].addmm_(self.factor[column:after, after:end].T, error, alpha=-1)
