"""Fitting Q2_K, Q4_K and Q5_K: decode = d·sc·q - dmin·m, d and dmin f16 per 256 columns, integers sc, m per group.

How, for all rows of one block at once:
1. every group on its own (`free_fit`): from many starting ranges, alternate codes and the weighted least-squares
   (step, offset), offset ≥ 0; keep the best;
2. (d, dmin) by a search over candidate pairs, the error of a pair estimated with the codes of 1 (`super_scales`);
3. from the best pairs, alternate (`polish`): integers sc, m of every group among neighbours, by the true error with
   codes chosen anew; then the weighted least-squares (d, dmin) over the whole block, rounded to f16.
The best by true error, after all rounding, is returned.

Other than ggml (make_qkx3_quants and make_qp_quants in ggml-quants.c) the objective is the given importance alone,
without the factor sqrt(σ² + w²), and d, dmin, sc and m are chosen together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.grids.constants import constant
from d2qconv_gguf.grids.problem import Problem, best_of, encoded, keep_best


@dataclass(frozen=True)
class AffineShape:
    """Integers of a type. top_code, top_scale: largest code and inner integer. starts: cuts of the range tried.

    starts: (below, above) fractions of the range from the smallest (at most 0) to the largest weight.
    """

    top_code: int
    top_scale: int
    starts: tuple[tuple[float, float], ...]
    n_iterations: int = 3


@dataclass(frozen=True)
class FreeFit:
    """Unrounded (step, offset) of every group, and sums under their codes; each f32[G, n].

    q, qq, qw: Σ a q, Σ a q², Σ a q w.
    """

    error: Tensor
    step: Tensor
    offset: Tensor
    q: Tensor
    qq: Tensor
    qw: Tensor


@dataclass(frozen=True)
class Inner:
    """Block parameters in scaled units. error: f32[G, n]; d, dmin: f32[n], storable; sc, m: f32[G, n], integers."""

    error: Tensor
    d: Tensor
    dmin: Tensor
    sc: Tensor
    m: Tensor


def free_fit(p: Problem, shape: AffineShape) -> FreeFit:
    """The best (step, offset) of every group that the starting ranges lead to."""
    low = p.w.amin(1).clamp_max(0.0)
    width = p.w.amax(1) - low
    best: tuple[Tensor, ...] | None = None
    for cuts in p.chunks(constant(shape.starts, p.w.dtype, p.w.device)):
        below, above = cuts[:, 0, None, None], cuts[:, 1, None, None]
        offset = (-(low + below * width)).clamp_min(0.0)
        step = (width * (1 - below - above) / shape.top_code).clamp_min(0.0)
        sums: list[Tensor] = []
        for _ in range(shape.n_iterations):
            step, offset, *sums = _least_squares(p, step, offset, shape)
        q, qq, qw = sums
        error = p.sum_ww + step * step * qq - 2 * step * qw + offset * (offset + 2 * p.sum_w - 2 * step * q)
        found = best_of((error, step, offset, q, qq, qw))
        best = found if best is None else keep_best(best, found)
    assert best is not None
    return FreeFit(*best)


def _sums(p: Problem, step: Tensor, offset: Tensor, shape: AffineShape) -> tuple[Tensor, Tensor, Tensor]:
    """Σ a q, Σ a q², Σ a q w under the codes of (step, offset); each f32[K, G, n]."""
    q = encoded(p.w + offset[:, :, None], step, 0, shape.top_code)
    aq = q * p.a
    qw = (q * p.aw).sum(2)
    return aq.sum(2), aq.mul_(q).sum(2), qw


def _least_squares(p: Problem, step: Tensor, offset: Tensor, shape: AffineShape) -> tuple[Tensor, ...]:
    """One alternation: codes of (step, offset), then the best (step, offset ≥ 0) of these codes, and their sums."""
    q, qq, qw = _sums(p, step, offset, shape)
    variance = qq - q * q
    step = torch.where(variance > 1e-6 * qq, (qw - q * p.sum_w) / variance.clamp_min(1e-30), step)
    offset = step * q - p.sum_w
    through_zero = torch.where(qq > 0, qw / qq.clamp_min(1e-30), step)
    step = torch.where(offset < 0, through_zero, step).clamp_min(0.0)
    return step, offset.clamp_min(0.0), q, qq, qw


def super_scales(p: Problem, free: FreeFit, shape: AffineShape, keep: int) -> list[tuple[Tensor, Tensor]]:
    """Promising pairs (d, dmin), each f32[n] and storable, best first.

    Pairs put the largest step at d·k and the largest offset at dmin·l for some numbers k, l near the largest inner
    integer. The error is estimated with the codes of `free`, the offset being the best one for the rounded step.
    """
    top = shape.top_scale
    relative = constant(SUPER_RELATIVE, p.w.dtype, p.w.device)
    ds = p.storable(free.step.amax(0) / (relative[:, None] * top))
    dmins = p.storable(free.offset.amax(0) / (relative[:, None] * top))
    errors = []
    for d in ds:
        inverse = torch.where(d == 0, 0.0, 1 / d)
        step = (free.step * inverse).round_().clamp_(0, top) * d
        wanted = step * free.q - p.sum_w
        fixed = p.sum_ww + step * step * free.qq - 2 * step * free.qw
        inverse = torch.where(dmins == 0, 0.0, 1 / dmins)[:, None]
        offset = (wanted * inverse).round_().clamp_(0, top) * dmins[:, None]
        errors.append(((fixed + offset * (offset - 2 * wanted)) * p.share).sum(1))
    order = torch.stack(errors).flatten(0, 1).argsort(0)[:keep]
    return [
        (ds.gather(0, (i // len(dmins))[None])[0], dmins.gather(0, (i % len(dmins))[None])[0]) for i in order
    ]


SUPER_RELATIVE = (0.6, 0.66, 0.72, 0.78, 0.84, 0.9, 0.95, 1.0, 1.05)


def choose_inner(
    p: Problem, supers: tuple[Tensor, Tensor], aim: tuple[Tensor, Tensor], shape: AffineShape, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (sc, m) of every group under the true error, supers = (d, dmin), f32[n] each, being given.

    aim: f32[G, n] each: the step aimed at, and Σ a q under the codes in mind. sc runs over the integers within `reach`
    of that step; m over the three integers around the best offset for the step and these codes; and both may be 0.
    Returns error, sc, m, each f32[G, n].
    """
    top = shape.top_scale
    d, dmin = supers
    free_step, q = aim
    inverse_d = torch.where(d == 0, 0.0, 1 / d)
    inverse_dmin = torch.where(dmin == 0, 0.0, 1 / dmin)
    centre = (free_step * inverse_d).round_()
    shifts = tuple((float(s), t) for s in range(-reach, reach + 1) for t in (-1.0, 0.0, 1.0))
    best: tuple[Tensor, ...] | None = None
    for chunk in p.chunks(constant(shifts, p.w.dtype, p.w.device)):
        sc = (centre + chunk[:, 0, None, None]).clamp_(0, top)
        step = sc * d
        m = ((step * q - p.sum_w) * inverse_dmin).round_().add_(chunk[:, 1, None, None]).clamp_(0, top)
        found = best_of((p.residual(step, m * dmin, 0, shape.top_code), sc, m))
        best = found if best is None else keep_best(best, found)
    assert best is not None
    nothing = (p.sum_ww, torch.zeros_like(p.sum_ww), torch.zeros_like(p.sum_ww))
    error, sc, m = keep_best(best, nothing)
    return error, sc, m


def polish(
    p: Problem, supers: tuple[Tensor, Tensor], free: FreeFit, shape: AffineShape, rounds: int
) -> Inner:
    """Alternate inner integers and the least-squares supers = (d, dmin); the best state met."""
    aim = free.step, free.q
    best: Inner | None = None
    for number in range(rounds):
        error, sc, m = choose_inner(p, supers, aim, shape, reach=1)
        state = Inner(error, *supers, sc, m)
        best = state if best is None else better(p, best, state)
        if number < rounds - 1:
            step = sc * state.d
            sums = _sums(p, step[None], (m * state.dmin)[None], shape)
            aim = step, sums[0][0]
            supers = _least_squares_super(p, state, sums)
    assert best is not None
    return best


def _least_squares_super(p: Problem, x: Inner, sums: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(d, dmin), storable, that minimise the block's error under fixed sc, m and codes; old values if singular."""
    q, qq, qw = (s[0] for s in sums)
    dd = (p.share * x.sc * x.sc * qq).sum(0)
    dm = (p.share * x.sc * x.m * q).sum(0)
    mm = (p.share * x.m * x.m).sum(0)
    dw = (p.share * x.sc * qw).sum(0)
    mw = (p.share * x.m * p.sum_w).sum(0)
    det = dd * mm - dm * dm
    is_regular = det > 1e-6 * dd * mm
    safe = torch.where(is_regular, det, 1.0)
    d = torch.where(is_regular, (dw * mm - dm * mw) / safe, x.d)
    dmin = torch.where(is_regular, (dm * dw - dd * mw) / safe, x.dmin)
    # Singular because no group has an offset: d alone.
    only_d = (mm == 0) & (dd > 0)
    d = torch.where(only_d, dw / torch.where(only_d, dd, 1.0), d)
    is_usable = (d > 0) & (dmin >= 0)
    return p.storable(torch.where(is_usable, d, x.d)), p.storable(torch.where(is_usable, dmin, x.dmin))


def better(p: Problem, first: Inner, second: Inner) -> Inner:
    """Row by row, the state with the smaller error over the whole block."""
    wins = (second.error * p.share).sum(0) < (first.error * p.share).sum(0)
    pairs = zip(
        (second.error, second.d, second.dmin, second.sc, second.m),
        (first.error, first.d, first.dmin, first.sc, first.m),
        strict=True,
    )
    return Inner(*(torch.where(wins, s, f) for s, f in pairs))


def fit_block(p: Problem, shape: AffineShape, pairs: int = 4, rounds: int = 4) -> Inner:
    """All parameters of one block, see the module's docstring."""
    free = free_fit(p, shape)
    best: Inner | None = None
    for supers in super_scales(p, free, shape, pairs):
        state = polish(p, supers, free, shape, rounds)
        best = state if best is None else better(p, best, state)
    assert best is not None
    return best
