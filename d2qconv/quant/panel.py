"""Rounding a panel: a few consecutive columns that share one lattice, each column's error taken out of the next.

This is the part of the sweep that must go column by column. `round_panel` says what it does, by the grid's own
`encode` and `decode`. Where the grid is a lattice, `round_lattice` does the same without asking the grid for steps and
offsets at every column, and `d2qconv.quant.panel_triton` in one kernel where every row is a lane. All give the same
bits on one device: products and sums are rounded one by one, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from d2qconv.grids.base import Grid, Lattice, Params, VectorGrid


@dataclass(frozen=True)
class Panel:
    """Consecutive columns of one group of one block, as the sweep takes them.

    rest: f32[n, n_out], the columns as the sweep reaches them, changed in place. factor: f32[n, n], their part of U.
    place: the first one's number inside the block.
    old: f32[n, n_out] or None: the values that the columns have; then they are chosen again instead of compensated for.
    drift: f32[n, n] or None, their part of GPTAQ's P; then `pull`, f32[n, n_out], is what it is multiplied by: the
    source's weights, or None for the column itself as the sweep reaches it. metric: f32[n / step, step, step] for codes
    of several columns (`local_metrics`), else None.
    """

    rest: Tensor
    factor: Tensor
    place: int
    drift: Tensor | None = None
    pull: Tensor | None = None
    old: Tensor | None = None
    metric: Tensor | None = None


def round_panel(panel: Panel, grid: Grid, params: Params, codes: Tensor, errors: Tensor) -> None:
    """Fill codes u8[n / step, n_out] and errors f32[n, n_out], which the columns to the right still have to lose.

    For column j: e_j = (w_j − ŵ_j) / U_jj; then for every k > j of the panel w_k −= U_jk e_j, and w_k += P_jk v_j with
    v_j from `pull`. With `old`: e_j = ŵ_j − old_j. A code of several columns: see `round_vectors`.
    """
    rest = panel.rest
    for j in range(len(rest)):
        w, place = rest[j : j + 1], panel.place + j
        code = grid.encode(w.T, params, place)
        codes[j] = code[:, 0]
        value = grid.decode(code, params, place).T
        error = (w - value) / panel.factor[j, j] if panel.old is None else value - panel.old[j : j + 1]
        errors[j] = error[0]
        _take_out(panel, j, error)


def round_lattice(panel: Panel, lattice: Lattice, codes: Tensor, errors: Tensor) -> None:
    """`round_panel` by the formulas of `Lattice`, whose column_scale is that of the panel's columns, f32[n].

    On a CPU most of a panel's time is calls of small operations, and reading (step, offset) from the parameters at
    every column was more than half of them.
    """
    rest, step, zero, offset = panel.rest, lattice.step, lattice.zero, lattice.offset
    divisor = torch.where(step == 0, torch.inf, step)
    lowest, highest = -zero, lattice.levels - 1 - zero
    table, scales = lattice.table, lattice.column_scale
    bounds = None if table is None else (table[1:] + table[:-1]) / 2
    chosen = torch.empty_like(rest)
    for j in range(len(rest)):
        w, code = rest[j], chosen[j]
        q = w if scales is None else w / scales[j]
        q = (q if offset is None else q + offset) / divisor
        if table is None or bounds is None:
            torch.round(q, out=code).clamp_(lowest, highest).add_(zero)
            value = code - zero
        else:
            number = torch.bucketize(q, bounds)
            code.copy_(number)
            value = table[number]
        value.mul_(step)
        if offset is not None:
            value.sub_(offset)
        if scales is not None:
            value.mul_(scales[j])
        error = (w - value) / panel.factor[j, j] if panel.old is None else value - panel.old[j]
        errors[j] = error
        _take_out(panel, j, error)
    codes.copy_(chosen)


def _take_out(panel: Panel, j: int, error: Tensor) -> None:
    """What the error of column j, f32[n_out] or f32[1, n_out], changes in the columns behind it."""
    rest, later = panel.rest, slice(j + 1, len(panel.rest))
    rest[later].sub_(panel.factor[j, later, None] * error)
    if panel.drift is not None:
        pull = rest[j] if panel.pull is None else panel.pull[j]
        rest[later].add_(panel.drift[j, later, None] * pull)


def round_vectors(panel: Panel, grid: VectorGrid, params: Params, codes: Tensor, errors: Tensor) -> None:
    """`round_panel` for codes of `step` columns b: e = U_bbᵀ⁻¹ (w − ŵ), and w_k −= U_bkᵀ e for every k behind them.

    ‖e‖² is what the run's error adds to the loss, so the code is chosen by it.
    """
    rest, step, metric = panel.rest, grid.step, panel.metric
    assert metric is not None, "codes of several columns need a metric"
    assert panel.old is None, "codes of several columns are not chosen again one by one"
    for first in range(0, len(rest), step):
        run, later = slice(first, first + step), slice(first + step, len(rest))
        w, place, number = rest[run], panel.place + first, first // step
        code = grid.encode_vectors(w.T, params, place, metric[number : number + 1])
        codes[number] = code[:, 0]
        value = grid.decode(code, params, place).T
        errors[run] = solve_triangular(panel.factor[run, run].T, w - value, upper=False)
        drift = None if panel.drift is None else panel.drift[run, later]
        pull = w if panel.pull is None else panel.pull[run]
        hand_on(rest[later], panel.factor[run, later], errors[run], drift, pull)


def local_metrics(factor: Tensor, step: int) -> Tensor:
    """(U_bbᵀ U_bb)⁻¹ of every run b of `step` columns, f32[n / step, step, step]: ‖U_bbᵀ⁻¹ e‖² = eᵀ (U_bbᵀ U_bb)⁻¹ e.

    factor: f32[n, n], upper triangular.
    """
    n_runs = len(factor) // step
    runs = torch.arange(n_runs, device=factor.device)
    local = factor.reshape(n_runs, step, n_runs, step)[runs, :, runs]
    eye = torch.eye(step, device=factor.device).expand(n_runs, step, step)
    inverse: Tensor = solve_triangular(local, eye, upper=True)
    return inverse @ inverse.mT


def hand_on(
    later: Tensor, factor: Tensor, errors: Tensor, drift: Tensor | None = None, pull: Tensor | None = None
) -> None:
    """Later −= Uᵀ errors, and += Pᵀ pull where there is drift.

    later: f32[m, n_out], in place. factor, drift: f32[n, m]. errors, pull: f32[n, n_out].
    """
    if not len(later):
        return
    later.addmm_(factor.T, errors, alpha=-1)
    if drift is not None and pull is not None:
        later.addmm_(drift.T, pull)
