"""Fitting the types without an offset: decode = step · q, q one of consecutive integers or of a table of levels.

Levels do not lie evenly about 0 (the lowest integer reaches one further than the highest), so the sign of the step
matters: both are searched. From many starting steps of either sign, codes and the weighted least-squares step
alternate. Types whose step is one f16 number round it and are done. Where step = d·sc, sc a signed integer per group,
the search goes on for d with the codes found, and from the best few alternates, as `affine_search` does, inner integers
under the true error and the least-squares d, rounded to f16. At the end all integers sc are tried in every group.

Source of the formats: ggml-quants.c. The objective is the given importance alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.grids.constants import constant
from d2qconv_gguf.grids.problem import Problem, best_of, encoded, keep_best


@dataclass(frozen=True)
class SymmetricShape:
    """Numbers of a type.

    lowest, highest: what codes stand for. table: the levels between them, ascending, where they are not all integers.
    starts: at which (unrounded) level the largest weight is put, tried in turn. inner: first and last inner integer.
    """

    lowest: int
    highest: int
    starts: tuple[float, ...]
    n_iterations: int = 2
    table: tuple[float, ...] = ()
    inner: tuple[int, int] = (-32, 31)

    @property
    def n_inner(self) -> int:
        """Number of inner integers."""
        return self.inner[1] - self.inner[0] + 1

    @property
    def extremes(self) -> tuple[float, ...]:
        """At which inner integer the longest step is put, tried in turn."""
        return tuple(n * self.n_inner / 64 for n in EXTREME_SCALES)


@dataclass(frozen=True)
class SignedFit:
    """Unrounded steps of one sign, and sums under their codes; each f32[G, n]. qq, qw: Σ a q², Σ a q w."""

    error: Tensor
    step: Tensor
    qq: Tensor
    qw: Tensor


@dataclass(frozen=True)
class SignedInner:
    """Block parameters in scaled units. error: f32[G, n]; d: f32[n], storable; sc: f32[G, n], integers."""

    error: Tensor
    d: Tensor
    sc: Tensor


def signed_fit(p: Problem, shape: SymmetricShape, sign: int) -> SignedFit:
    """The best step of this sign, per group, that the starting steps lead to."""
    largest = p.w.abs().amax(1)
    best: tuple[Tensor, ...] | None = None
    for starts in p.chunks(constant(shape.starts, p.w.dtype, p.w.device)):
        step = largest * (sign / starts[:, None, None])
        found: tuple[Tensor, ...] = ()
        for _ in range(shape.n_iterations):
            step, qq, qw = _least_squares(p, step, shape)
            found = (p.sum_ww + step * (step * qq - 2 * qw), step, qq, qw)
        found = best_of(found)
        best = found if best is None else keep_best(best, found)
    assert best is not None
    return SignedFit(*best)


def _least_squares(p: Problem, step: Tensor, shape: SymmetricShape) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the steps f32[K, G, n], then the best steps for them, and Σ a q², Σ a q w."""
    q = _encoded(p, step, shape)
    qw = (q * p.aw).sum(2)
    qq = q.square_().mul_(p.a).sum(2)
    return torch.where(qq > 0, qw / qq.clamp_min(1e-30), step), qq, qw


def _encoded(p: Problem, step: Tensor, shape: SymmetricShape) -> Tensor:
    return encoded(p.w, step, shape.lowest, shape.highest, shape.table)


def residual(p: Problem, step: Tensor, shape: SymmetricShape) -> Tensor:
    """The true error of steps f32[K, G, n]; see `Problem.residual`."""
    return p.residual(step, None, shape.lowest, shape.highest, shape.table)


def fit_single(p: Problem, shape: SymmetricShape) -> Tensor:
    """The storable step f32[n] of a block without inner parameters, by the true error after rounding to f16."""
    largest = p.w.abs().amax(1)
    best: tuple[Tensor, ...] | None = None
    starts = constant(shape.starts, p.w.dtype, p.w.device)
    for chunk in p.chunks(torch.cat([starts, -starts])):
        step = largest / chunk[:, None, None]
        for _ in range(shape.n_iterations):
            step = _least_squares(p, step, shape)[0]
        step = p.storable(step)
        found = best_of((residual(p, step, shape), step))
        best = found if best is None else keep_best(best, found)
    assert best is not None
    error, step = best
    if shape.table:
        # No level is 0: weights too small for the smallest f16 are nearer to a step of 0.
        step = torch.where(error <= p.sum_ww, step, 0.0)
    return step[0]


def super_scales(
    p: Problem, fits: tuple[SignedFit, SignedFit], keep: int, shape: SymmetricShape
) -> list[Tensor]:
    """Promising d, each f32[n] and storable, best first; the error is estimated with the codes of `fits`."""
    plus, minus = fits
    step = torch.where(plus.error <= minus.error, plus.step, minus.step)
    extreme = step.gather(0, step.abs().argmax(0, keepdim=True))[0]
    numbers = constant(shape.extremes, p.w.dtype, p.w.device)
    candidates = p.storable(extreme / numbers[:, None])
    inverse = torch.where(candidates == 0, 0.0, 1 / candidates)[:, None]
    errors = []
    for fit in fits:
        rounded = (fit.step * inverse).round_().clamp_(*shape.inner) * candidates[:, None]
        errors.append(p.sum_ww + rounded * (rounded * fit.qq - 2 * fit.qw))
    error = (torch.minimum(errors[0], errors[1]) * p.share).sum(1)
    return [candidates.gather(0, i[None])[0] for i in error.argsort(0)[:keep]]


#: Of inner integers from -32 to 31.
EXTREME_SCALES = (
    -35.0,
    -33.0,
    -32.0,
    -31.0,
    -30.0,
    -29.0,
    -28.0,
    -26.0,
    -24.0,
    -22.0,
    33.0,
    31.0,
    30.0,
    29.0,
    27.0,
    25.0,
)


def choose_inner(
    p: Problem, d: Tensor, steps: tuple[Tensor, ...], shape: SymmetricShape
) -> tuple[Tensor, Tensor]:
    """Integers sc of every group under the true error: those within 1 of each step aimed at (f32[G, n]).

    Returns error and sc, each f32[G, n].
    """
    inverse = torch.where(d == 0, 0.0, 1 / d)
    best: tuple[Tensor, ...] | None = None
    for step in steps:
        centre = (step * inverse).round_()
        for chunk in p.chunks(constant((-1.0, 0.0, 1.0), p.w.dtype, p.w.device)):
            sc = (centre + chunk[:, None, None]).clamp_(*shape.inner)
            found = best_of((residual(p, sc * d, shape), sc))
            best = found if best is None else keep_best(best, found)
    assert best is not None
    return best[0], best[1]


def try_all_inner(p: Problem, d: Tensor, shape: SymmetricShape) -> tuple[Tensor, Tensor]:
    """The best integer sc of every group, of all there are, by the true error. Returns error and sc, f32[G, n]."""
    best: tuple[Tensor, ...] | None = None
    lowest, highest = shape.inner
    every = constant(tuple(float(sc) for sc in range(lowest, highest + 1)), p.w.dtype, p.w.device)
    for chunk in p.chunks(every):
        sc = chunk[:, None, None].expand(-1, *p.sum_w.shape)
        found = best_of((residual(p, sc * d, shape), sc))
        best = found if best is None else keep_best(best, found)
    assert best is not None
    return best[0], best[1]


def fit_block(p: Problem, shape: SymmetricShape, keep: int = 2, rounds: int = 2) -> SignedInner:
    """All parameters of one block with inner integers, see the module's docstring."""
    fits = (signed_fit(p, shape, 1), signed_fit(p, shape, -1))
    best: SignedInner | None = None
    for start in super_scales(p, fits, keep, shape):
        d, steps = start, (fits[0].step, fits[1].step)
        for number in range(rounds):
            error, sc = choose_inner(p, d, steps, shape)
            state = SignedInner(error, d, sc)
            best = state if best is None else _better(p, best, state)
            if number < rounds - 1:
                d = _least_squares_d(p, state, shape)
    assert best is not None
    error, sc = try_all_inner(p, best.d, shape)
    return _better(p, best, SignedInner(error, best.d, sc))


def _least_squares_d(p: Problem, x: SignedInner, shape: SymmetricShape) -> Tensor:
    """The storable d that minimises the block's error under fixed sc and codes; the old one if all are 0."""
    q = _encoded(p, (x.sc * x.d)[None], shape)[0]
    qw = (p.share * x.sc * (q * p.aw).sum(1)).sum(0)
    qq = (p.share * x.sc * x.sc * q.square_().mul_(p.a).sum(1)).sum(0)
    return p.storable(torch.where(qq > 0, qw / qq.clamp_min(1e-30), x.d))


def _better(p: Problem, first: SignedInner, second: SignedInner) -> SignedInner:
    """Row by row, the state with the smaller error over the whole block."""
    wins = (second.error * p.share).sum(0) < (first.error * p.share).sum(0)
    return SignedInner(
        torch.where(wins, second.error, first.error),
        torch.where(wins, second.d, first.d),
        torch.where(wins, second.sc, first.sc),
    )
