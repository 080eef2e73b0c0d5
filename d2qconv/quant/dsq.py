"""DSQ, the Dual-Scale Quantizer (D²Quant, arXiv 2602.02546), for any grid.

Ŵ = Q(W / c) · c with one c_j > 0 per input column. `ColumnScaled(grid)` is a grid itself: its levels are the inner
grid's, times c_j. So the same sweep fits c at each block's first column, on the compensated weights, and freezes it.

`fit` alternates two exact steps: the inner grid is fitted to W/c under importance·c², then c_j = ⟨q_j, w_j⟩/⟨q_j, q_j⟩
with q_j the decoded column, the least-squares scale. The codes and parameters kept are the best seen.
The package never holds c: a fold multiplies it into the rows of the matrix that makes this one's input.
Each fitted c has geometric mean 1 in its block before it is clamped to [1/8, 8]; else it and the steps could drift
apart until one underflows in f16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from d2qconv.errors import Refusal
from d2qconv.grids.base import Exactness, Grid, Lattice, Params, VectorGrid, encode_weighed, is_vector
from d2qconv.ir.coded import Coded

#: Name of the column scales among the params, f32[1, n_blocks, block].
SCALE = "column_scale"
#: Rounds of alternation. Q2_K on the reference models: no change in the third digit of the loss after 3.
N_ROUNDS = 3
#: c stays within [1/LIMIT, LIMIT].
LIMIT = 8.0


@dataclass(frozen=True)
class ColumnScaled:
    """`inner` with a learned scale per input column.

    reduce: where rows are shared out over several processes, makes a sum over this one's rows the sum over all rows,
    the same on every process; None where all rows are here. `fit` alone calls it.
    """

    inner: Grid
    reduce: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """`column_scaled(q2_k)`."""
        return f"column_scaled({self.inner.id})"

    @property
    def block(self) -> int:
        """As inner."""
        return self.inner.block

    @property
    def group(self) -> int:
        """As inner."""
        return self.inner.group

    @property
    def step(self) -> int:
        """As inner."""
        return self.inner.step

    @property
    def levels(self) -> int:
        """As inner."""
        return self.inner.levels

    @property
    def bits_per_weight(self) -> float:
        """As inner: the scales end up in another matrix's rows."""
        return self.inner.bits_per_weight

    @property
    def scales(self) -> tuple[str, ...]:
        """As inner."""
        return self.inner.scales

    def accepts(self, shape: Sequence[int]) -> Refusal | None:
        """As inner."""
        return self.inner.accepts(shape)

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See the module. w: f32[n_out, block]; importance: f32[block]."""
        best: dict[str, Tensor] = {}
        best_loss = torch.full((), torch.inf, device=w.device)
        c = torch.ones_like(importance)
        for round_number in range(N_ROUNDS + 1):
            params = {**self.inner.fit(w / c, importance * c.square()), SCALE: c[None, None, :]}
            q = self.inner.decode(
                encode_weighed(self.inner, w / c, params, importance * c.square()), params, 0
            )
            loss = (self._over_rows((w - q * c).square().sum(0)) * importance).sum()
            # The choice is made on the device: nothing waits for it.
            is_better = loss < best_loss
            best = {name: torch.where(is_better, p, best.get(name, p)) for name, p in params.items()}
            best_loss = torch.where(is_better, loss, best_loss)
            if round_number < N_ROUNDS:
                c = _least_squares_scale(
                    self._over_rows((w * q).sum(0)), self._over_rows(q.square().sum(0)), c
                )
        return best

    def _over_rows(self, sums: Tensor) -> Tensor:
        """Sums over this process's rows → over all rows."""
        return sums if self.reduce is None else self.reduce(sums)

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:
        """Inner refit of the scaled weights; c stays."""
        first = group * self.group
        c = params[SCALE][0, 0, first : first + self.group]
        return self.inner.refit(params, group, w / c, importance * c.square())

    def encode(self, w: Tensor, params: Params, col: int) -> Tensor:
        """Inner codes of w/c."""
        return self.inner.encode(w / params[SCALE][0, 0, col : col + w.shape[1]], params, col)

    def encode_vectors(self, w: Tensor, params: Params, col: int, metric: Tensor) -> Tensor:
        """Inner codes of w/c; an error of w/c is c times as large in w."""
        c = params[SCALE][0, 0, col : col + w.shape[1]]
        return self._vectors().encode_vectors(w / c, params, col, _scaled(metric, c))

    def refit_vectors(self, params: Params, group: int, w: Tensor, metric: Tensor) -> Params:
        """Inner refit of the scaled weights; c stays."""
        first = group * self.group
        c = params[SCALE][0, 0, first : first + self.group]
        return self._vectors().refit_vectors(params, group, w / c, _scaled(metric, c))

    def _vectors(self) -> VectorGrid:
        inner = self.inner
        assert is_vector(inner), f"codes of {inner.id} cover one column"
        return inner

    def decode(self, codes: Tensor, params: Params, col: int = 0) -> Tensor:
        """Inner values times c, rounded to f32."""
        q = self.inner.decode(codes, params, col)
        return q * params[SCALE].reshape(-1)[col : col + q.shape[1]]

    def lattice(self, params: Params, group: int) -> Lattice | None:
        """The inner lattice with c of these columns."""
        inner = self.inner.lattice(params, group)
        first = group * self.group
        c = params[SCALE][0, 0, first : first + self.group]
        return None if inner is None else replace(inner, column_scale=c)

    def scale_rows(self, params: Params, scale: Tensor) -> tuple[Params, Exactness]:
        """As inner."""
        scaled, exactness = self.inner.scale_rows(params, scale)
        return {**scaled, SCALE: params[SCALE]}, exactness


def _scaled(metric: Tensor, c: Tensor) -> Tensor:
    """What errors of w/c cost: metric_ij c_i c_j in every run. metric: f32[n / step, step, step]; c: f32[n]."""
    runs = c.view(len(metric), -1)
    return metric * runs[:, :, None] * runs[:, None, :]


@runtime_checkable
class HasInner(Grid, Protocol):
    """A grid with column scales under the name SCALE, and the same grid without them."""

    @property
    def inner(self) -> Grid:
        """Its values times the column scales are this grid's."""


def split(coded: Coded) -> tuple[Coded, Tensor]:
    """Take the column scales out: (the matrix on the inner grid, c f32[n_in]); decode = inner decode · c."""
    grid = coded.grid
    if SCALE not in coded.params or not isinstance(grid, HasInner):
        raise TypeError(f"{grid.id} has no column scales")
    params = {name: p for name, p in coded.params.items() if name != SCALE}
    return Coded(grid.inner, coded.shape, coded.codes, params), coded.params[SCALE].reshape(-1)


def _least_squares_scale(dot: Tensor, norm: Tensor, c: Tensor) -> Tensor:
    """argmin_c Σ_i (w_ij − c_j q_ij)², geometric mean 1; columns without any positive fit keep their c.

    dot: f32[n] = Σ_i w_ij q_ij. norm: f32[n] = Σ_i q_ij². c: f32[n], what they have.
    """
    is_good = (dot > 0) & (norm > 0)
    fitted = torch.where(is_good, dot / torch.where(norm > 0, norm, torch.ones_like(norm)), c)
    fitted = fitted / fitted.log().mean().exp()
    return fitted.clamp(1 / LIMIT, LIMIT)
