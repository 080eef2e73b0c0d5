"""Choosing codes again, once all of them are known.

A sweep rounds a column knowing the errors of the columns before it, and hopes that those behind it will make up for
its own. Afterwards every column's errors are known, and ‖(W − Ŵ) X‖² can be lowered further, chunk by chunk, all
others being fixed. Two moves, each of which never makes a row worse:

- `sweep_again`: a chunk is fitted and swept anew (parameters, inner scales, codes) toward what is best for it now,
  t = ŵ − H_cc⁻¹ g with g = H (ŵ − w) the gradient, by the factor of H_cc⁻¹; rows keep it where their loss falls;
- `descend`: coordinate descent (QuantEase, arXiv 2309.01885): each column in turn takes the code nearest to
  ŵ_j − g_j / H_jj, which is the best one for it.

Both are f32 products of the sweep's size; what is kept is codes and parameters in storage precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.grids.base import Grid, Params, code_dtype, stack_blocks, take_block
from d2qconv.ir.coded import Coded
from d2qconv.quant.chunk import Chunk, Rounded
from d2qconv.quant.sweep import LAZY_COLUMNS, round_fast
from d2qconv.timing import timed


def polish(w: Tensor, hessian: Tensor, coded: Coded, *, passes: int, is_refit: bool) -> Coded:
    """A matrix on the same grid whose loss tr((W − Ŵ) H (W − Ŵ)ᵀ) is at most that of `coded`, in every row.

    w: f32[n_out, n_in]. hessian: f32[n_in, n_in], symmetric and positive definite (damped). passes: of both moves.
    """
    state = _State.of(w, hessian, coded)
    with timed("polish"):
        # Parameters that all rows share cannot change for some of them.
        is_free = coded.shape[0] == 1 or all(p.shape[0] > 1 for p in coded.params.values())
        factors = [*state.factors()] if is_free else []
        for _ in range(passes):
            for chunk, (inverse, factor) in zip(state.chunks(), factors, strict=False):
                state.sweep_again(chunk, inverse, factor, is_refit=is_refit)
            if coded.grid.step == 1:
                for chunk in state.chunks():
                    state.descend(chunk)
    return Coded(coded.grid, coded.shape, state.codes.T.contiguous(), stack_blocks(state.blocks))


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + λI with the λ of `inverse_factor`'s first attempt, f32[n, n]."""
    scale = gram.diagonal().mean()
    hessian = gram.clone()
    hessian.diagonal().add_(damping * torch.where(scale > 0, scale, torch.ones_like(scale)))
    return hessian


@dataclass
class _State:
    """All transposed: values, gradient f32[n_in, n_out]; codes [n_in / step, n_out]."""

    grid: Grid
    hessian: Tensor
    values: Tensor
    gradient: Tensor
    codes: Tensor
    blocks: list[Params]

    @classmethod
    def of(cls, w: Tensor, hessian: Tensor, coded: Coded) -> _State:
        values = coded.decode().T.contiguous()
        n_blocks = coded.shape[1] // coded.grid.block
        return cls(
            grid=coded.grid,
            hessian=hessian,
            values=values,
            gradient=hessian @ (values - w.T),
            codes=coded.codes.T.contiguous(),
            blocks=[take_block(coded.params, b) for b in range(n_blocks)],
        )

    def chunks(self) -> Iterator[slice]:
        """Whole blocks, about LAZY_COLUMNS wide."""
        n_in, block = len(self.values), self.grid.block
        width = min(max(LAZY_COLUMNS // block, 1) * block, n_in)
        return (slice(start, min(start + width, n_in)) for start in range(0, n_in, width))

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For every chunk H_cc⁻¹ and U with H_cc⁻¹ = Uᵀ U, f32; computed in f64."""
        for chunk in self.chunks():
            lower = torch.linalg.cholesky(self.hessian[chunk, chunk].double().flip(0, 1))
            upper = lower.flip(0, 1)
            eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            u = torch.linalg.solve_triangular(upper, eye, upper=True)
            yield (u.T @ u).float(), u.float().contiguous()

    def sweep_again(self, chunk: slice, inverse: Tensor, factor: Tensor, *, is_refit: bool) -> None:
        """See the module."""
        old, g = self.values[chunk], self.gradient[chunk]
        into = self._room(chunk)
        blocks = round_fast(
            Chunk(old - inverse @ g, factor, factor.diagonal().square().reciprocal()),
            self.grid,
            into,
            is_refit=is_refit,
            n_chunks=len(self.values) // len(old),
        )
        change = self._decoded(into.codes, blocks) - old
        # The loss is quadratic: it changes by 2 gᵀδ + δᵀ H_cc δ.
        worth = (change * (2 * g + self.hessian[chunk, chunk] @ change)).sum(0)
        is_better = worth < 0
        codes = self.codes[self._steps(chunk)]
        codes.copy_(torch.where(is_better, into.codes, codes))
        first = chunk.start // self.grid.block
        for number, new in enumerate(blocks, first):
            before = self.blocks[number]
            self.blocks[number] = {
                name: torch.where(is_better.view(-1, *[1] * (p.dim() - 1)), p, before[name])
                for name, p in new.items()
            }
        self._moved(chunk, change.mul_(is_better))

    def descend(self, chunk: slice) -> None:
        """See the module."""
        old = self.values[chunk].clone()
        h = self.hessian[chunk, chunk]
        diagonal = h.diagonal()
        first, last = (edge // self.grid.block for edge in (chunk.start, chunk.stop))
        into = self._room(chunk)
        round_fast(
            Chunk(
                rest=old - self.gradient[chunk] / diagonal[:, None],
                factor=h / diagonal,
                importance=diagonal,
                old=old,
                given=self.blocks[first:last],
            ),
            self.grid,
            into,
            is_refit=False,
            n_chunks=len(self.values) // len(old),
        )
        self.codes[self._steps(chunk)] = into.codes
        self._moved(chunk, self._decoded(into.codes, self.blocks[first:last]) - old)

    def _moved(self, chunk: slice, change: Tensor) -> None:
        """Values of a chunk changed by f32[n, n_out]; decoding has rounded them already."""
        self.values[chunk] += change
        self.gradient.addmm_(self.hessian[:, chunk], change)

    def _decoded(self, codes: Tensor, blocks: Sequence[Params]) -> Tensor:
        return self.grid.decode(codes.T.contiguous(), stack_blocks(blocks)).T

    def _room(self, chunk: slice) -> Rounded:
        n, n_out = self.values[chunk].shape
        device = self.values.device
        return Rounded(
            torch.empty(n // self.grid.step, n_out, dtype=code_dtype(self.grid.levels), device=device),
            torch.empty(n, n_out, device=device),
        )

    def _steps(self, chunk: slice) -> slice:
        return slice(chunk.start // self.grid.step, chunk.stop // self.grid.step)
