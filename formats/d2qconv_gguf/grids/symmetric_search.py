"""Fitting Q3_K, Q4_0 and Q8_0: decode = step · q with q from -zero to zero - 1; no offset.

The lowest integer reaches one further than the highest, so the sign of the step matters: both are searched.
From many starting steps of either sign, codes and the weighted least-squares step alternate. Q4_0 and Q8_0 round the
step to f16 and are done. Q3_K (step = d·sc, sc a signed 6-bit integer per 16 columns) then searches d with the codes
found, and from the best few alternates, as `affine_search` does, inner integers under the true error and the
least-squares d, rounded to f16. At the end all 64 integers are tried in every group.

Source of the formats: ggml-quants.c. The objective is the given importance alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.grids.constants import constant
from d2qconv_gguf.grids.problem import Problem, best_of, encoded, keep_best

#: Q3_K's inner integers.
LOWEST_SCALE, HIGHEST_SCALE = -32, 31
_EVERY_SCALE = tuple(float(sc) for sc in range(LOWEST_SCALE, HIGHEST_SCALE + 1))


@dataclass(frozen=True)
class SymmetricShape:
    """zero: codes are -zero .. zero-1. starts: at which (unrounded) code the largest weight is put, tried in turn."""

    zero: int
    starts: tuple[float, ...]
    n_iterations: int = 2


@dataclass(frozen=True)
class SignedFit:
    """Unrounded steps of one sign, and sums under their codes; each f32[G, n]. qq, qw: Σ a q², Σ a q w."""

    error: Tensor
    step: Tensor
    qq: Tensor
    qw: Tensor


@dataclass(frozen=True)
class SignedInner:
    """Block parameters in scaled units. error: f32[G, n]; d: f32[n], storable; sc: f32[G, n], -32..31."""

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
            q = encoded(p.w, step, -shape.zero, shape.zero - 1)
            qw = (q * p.aw).sum(2)
            qq = q.square_().mul_(p.a).sum(2)
            step = torch.where(qq > 0, qw / qq.clamp_min(1e-30), step)
            found = (p.sum_ww + step * (step * qq - 2 * qw), step, qq, qw)
        found = best_of(found)
        best = found if best is None else keep_best(best, found)
    assert best is not None
    return SignedFit(*best)


def fit_single(p: Problem, shape: SymmetricShape) -> Tensor:
    """The storable step f32[n] of a block without inner parameters, by the true error after rounding to f16."""
    largest = p.w.abs().amax(1)
    best: tuple[Tensor, ...] | None = None
    starts = constant(shape.starts, p.w.dtype, p.w.device)
    for chunk in p.chunks(torch.cat([starts, -starts])):
        step = largest / chunk[:, None, None]
        for _ in range(shape.n_iterations):
            q = encoded(p.w, step, -shape.zero, shape.zero - 1)
            qw = (q * p.aw).sum(2)
            qq = q.square_().mul_(p.a).sum(2)
            step = torch.where(qq > 0, qw / qq.clamp_min(1e-30), step)
        step = p.storable(step)
        found = best_of((p.residual(step, None, -shape.zero, shape.zero - 1), step))
        best = found if best is None else keep_best(best, found)
    assert best is not None
    return best[1][0]


def super_scales(p: Problem, fits: tuple[SignedFit, SignedFit], keep: int) -> list[Tensor]:
    """Promising d, each f32[n] and storable, best first; the error is estimated with the codes of `fits`."""
    plus, minus = fits
    step = torch.where(plus.error <= minus.error, plus.step, minus.step)
    extreme = step.gather(0, step.abs().argmax(0, keepdim=True))[0]
    numbers = constant(EXTREME_SCALES, p.w.dtype, p.w.device)
    candidates = p.storable(extreme / numbers[:, None])
    inverse = torch.where(candidates == 0, 0.0, 1 / candidates)[:, None]
    errors = []
    for fit in fits:
        rounded = (fit.step * inverse).round_().clamp_(LOWEST_SCALE, HIGHEST_SCALE) * candidates[:, None]
        errors.append(p.sum_ww + rounded * (rounded * fit.qq - 2 * fit.qw))
    error = (torch.minimum(errors[0], errors[1]) * p.share).sum(1)
    return [candidates.gather(0, i[None])[0] for i in error.argsort(0)[:keep]]


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


def choose_inner(p: Problem, d: Tensor, steps: tuple[Tensor, ...], zero: int) -> tuple[Tensor, Tensor]:
    """Integers sc of every group under the true error: those within 1 of each step aimed at (f32[G, n]).

    Returns error and sc, each f32[G, n].
    """
    inverse = torch.where(d == 0, 0.0, 1 / d)
    best: tuple[Tensor, ...] | None = None
    for step in steps:
        centre = (step * inverse).round_()
        for chunk in p.chunks(constant((-1.0, 0.0, 1.0), p.w.dtype, p.w.device)):
            sc = (centre + chunk[:, None, None]).clamp_(LOWEST_SCALE, HIGHEST_SCALE)
            found = best_of((p.residual(sc * d, None, -zero, zero - 1), sc))
            best = found if best is None else keep_best(best, found)
    assert best is not None
    return best[0], best[1]


def try_all_inner(p: Problem, d: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """The best integer sc of every group, of all there are, by the true error. Returns error and sc, f32[G, n]."""
    best: tuple[Tensor, ...] | None = None
    every = constant(_EVERY_SCALE, p.w.dtype, p.w.device)
    for chunk in p.chunks(every):
        sc = chunk[:, None, None].expand(-1, *p.sum_w.shape)
        found = best_of((p.residual(sc * d, None, -zero, zero - 1), sc))
        best = found if best is None else keep_best(best, found)
    assert best is not None
    return best[0], best[1]


def fit_block(p: Problem, shape: SymmetricShape, keep: int = 2, rounds: int = 2) -> SignedInner:
    """All parameters of one Q3_K block, see the module's docstring."""
    fits = (signed_fit(p, shape, 1), signed_fit(p, shape, -1))
    best: SignedInner | None = None
    for start in super_scales(p, fits, keep):
        d, steps = start, (fits[0].step, fits[1].step)
        for number in range(rounds):
            error, sc = choose_inner(p, d, steps, shape.zero)
            state = SignedInner(error, d, sc)
            best = state if best is None else _better(p, best, state)
            if number < rounds - 1:
                d = _least_squares_d(p, state, shape.zero)
    assert best is not None
    error, sc = try_all_inner(p, best.d, shape.zero)
    return _better(p, best, SignedInner(error, best.d, sc))


def _least_squares_d(p: Problem, x: SignedInner, zero: int) -> Tensor:
    """The storable d that minimises the block's error under fixed sc and codes; the old one if all are 0."""
    q = encoded(p.w, (x.sc * x.d)[None], -zero, zero - 1)[0]
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
