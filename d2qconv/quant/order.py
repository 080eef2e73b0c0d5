"""The order in which a sweep takes the columns."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from d2qconv.grids.base import Grid


def gar(diagonal: Tensor, grid: Grid) -> Tensor:
    """GAR, as D²Quant's authors use it: what matters most is rounded first, while much is left to compensate for it.

    Columns are sorted inside each group by falling diagonal of the Hessian, groups inside their block and blocks by
    their largest one. Membership does not change, so nothing about it is stored. Codes of several columns stay whole:
    `step` columns move together, by their largest diagonal.

    diagonal: f32[n_in]. Returns i64[n_in] on the CPU: the column at each position of the sweep.
    """
    d = diagonal.detach().cpu().float()
    columns = torch.arange(len(d))
    for width, holder in pairwise((grid.step, grid.group, grid.block, len(d))):
        if width == holder:
            continue
        # Runs of `width` columns are whole by now; they are sorted inside each run of `holder`.
        runs = columns.view(-1, holder // width, width)
        rank = d[runs].amax(-1).argsort(dim=1, descending=True, stable=True)
        columns = runs.gather(1, rank[:, :, None].expand_as(runs)).reshape(-1)
    return columns
