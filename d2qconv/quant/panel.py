"""Rounding a panel: a few consecutive columns that share one lattice, each column's error taken out of the next.

This is the part of the sweep that must go column by column. `round_panel` says what it does, by the grid's own
`encode` and `decode`; `d2qconv.quant.panel_triton` does the same in one kernel where every row is a lane. Both give
the same bits on one device: products and sums are rounded one by one, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.linalg import solve_triangular

from d2qconv.grids.base import Grid, Params


@dataclass(frozen=True)
class Panel:
    """Consecutive columns of one group of one block, as the sweep takes them.

    rest: f32[n, n_out], the columns as the sweep reaches them, changed in place. factor: f32[n, n], their part of U.
    place: the first one's number inside the block.
    old: f32[n, n_out] or None: the values that the columns have; then they are chosen again instead of compensated for.
    drift: f32[n, n] or None, their part of GPTAQ's P; then `pull`, f32[n, n_out], is what it is multiplied by: the
    source's weights, or None for the column itself as the sweep reaches it.
    """

    rest: Tensor
    factor: Tensor
    place: int
    drift: Tensor | None = None
    pull: Tensor | None = None
    old: Tensor | None = None


def round_panel(panel: Panel, grid: Grid, params: Params, codes: Tensor, errors: Tensor) -> None:
    """Fill codes u8[n / step, n_out] and errors f32[n, n_out], which the columns to the right still have to lose.

    For column j: e_j = (w_j − ŵ_j) / U_jj; then for every k > j of the panel w_k −= U_jk e_j, and w_k += P_jk v_j with
    v_j from `pull`. A code of `step` columns: e = U_bbᵀ⁻¹ (w − ŵ), and the same for all of them. With `old`, codes of
    one column: e_j = ŵ_j − old_j.
    """
    rest, step = panel.rest, grid.step
    for first in range(0, len(rest), step):
        last = first + step
        w, place = rest[first:last], panel.place + first
        code = grid.encode(w.T, params, place)
        codes[first // step : last // step] = code.T
        value = grid.decode(code, params, place).T
        local = panel.factor[first:last, first:last]
        if panel.old is not None:
            error = value - panel.old[first:last]
        elif step == 1:
            error = (w - value) / local
        else:
            error = solve_triangular(local.T, w - value, upper=False)
        errors[first:last] = error
        for j in range(step):
            rest[last:].sub_(panel.factor[first + j, last:, None] * error[j])
            if panel.drift is not None:
                pull = rest[first + j] if panel.pull is None else panel.pull[first + j]
                rest[last:].add_(panel.drift[first + j, last:, None] * pull)
