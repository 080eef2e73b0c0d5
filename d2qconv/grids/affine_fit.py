"""Fitting a group of an affine grid: step and zero point (or offset) of every row, all rows at once.

The problem. Minimise Σ_j importance_j (w_ij - v_ij)² in every row i over the stored step and zero (or offset), v being
the nearest of the values step·(code - zero) - offset. Three ways (`Clip`):

- `none`: the whole range from min(w, 0) to max(w, 0).
- `released`: D²Quant's released default (GPTQ's clip search): that range times p = 1, 0.99 … 0.21, the p with the
  smallest Σ_j |w_ij - v_ij|^2.4, unweighted.
- `search`: from many starting ranges, between multiples of the weighted standard deviation and between fractions of
  the whole range, one alternation of codes and weighted least squares; the best few of every row get more; they are
  rounded to storage and compared by the true error; around the best, zero points (or offsets) one and two levels away.
  `none` is among the final candidates, so that it is never beaten by it.

How. Rows come last, f32[g, n], so that sums over a group run over long contiguous vectors; candidates come first,
f32[K, n]. A row is divided by a power of two near its largest weight, which changes no rounding but keeps squares in
range. f32 throughout. Rows are worked off in chunks, so that temporaries have bounded size; no loop over rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from d2qconv.grids.constants import constant
from d2qconv.grids.scaling import stored, top

Zero: TypeAlias = Literal["integer", "float", "none"]
Clip: TypeAlias = Literal["search", "released", "none"]

#: Elements of one temporary: 1 MiB on a CPU, 128 MiB on a GPU.
_CPU_ELEMENTS = 2**18
_GPU_ELEMENTS = 2**25
#: Fewer rows than this are not worth a vector loop.
_FEWEST_ROWS = 16
#: A row is divided by a power of two within these bounds.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-100, 2.0**120
#: Shrink factors and exponent of the released search.
_SHRINKS = tuple(1 - i / 100 for i in range(80))
_EXPONENT = 2.4
#: Per number of levels: ends of the starting ranges, in weighted standard deviations from the mean.
_SPREADS = {
    4: (1.2, 1.5, 1.85, 2.4),
    8: (1.7, 2.05, 2.5, 3.1),
    16: (2.1, 2.5, 2.9, 3.4),
    256: (4.0,),
}
#: The same as fractions of the whole range that are cut off.
_CUTS = {
    4: (0.0, 0.12, 0.25),
    8: (0.0, 0.05, 0.1, 0.18),
    16: (-0.01, 0.0, 0.02, 0.04, 0.08),
    256: (-0.003, -0.001, 0.0, 0.002, 0.004),
}
#: More standard deviations than any weight is away.
_FAR = 1e15
#: Starts of a row that survive the first alternation.
_SURVIVORS = 4
#: Further alternations that they get. One more lowers the error of Gaussian and t5 weights by less than 0.1 %.
_ALTERNATIONS = {"integer": 1, "float": 2, "none": 2}


@dataclass(frozen=True)
class Storage:
    """What is stored of a group.

    levels: number of codes. dtype: of the step, and of the offset if zero is `float`. significand: bits of theirs that
    are used, 0 for all.
    """

    levels: int
    zero: Zero
    dtype: torch.dtype
    significand: int = 0

    @property
    def top(self) -> int:
        """The largest code."""
        return self.levels - 1

    @property
    def largest(self) -> float:
        """Largest magnitude that a step or an offset may have: finite, and so are all decoded values in f32."""
        return top(self.dtype, self.significand) if self.dtype == torch.float16 else 2.0**126 / self.levels

    @property
    def smallest(self) -> float:
        """Smallest magnitude of a step other than 0: 2^-24 in f16; 2^-120 else, no subnormal f32."""
        return 2.0**-24 if self.dtype == torch.float16 else 2.0**-120

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest storable numbers, saturating, in storage dtype."""
        return stored(x.clamp(-self.largest, self.largest), self.dtype, self.significand)


@dataclass(frozen=True)
class Group:
    """One group of columns, ready for a search, in units of `scale`.

    w: f32[g, n]. a: f32[g, 1], importance, sums to 1. scale: f32[n], powers of two. low, high: f32[n], the extremes.
    mean, std: f32[n] under a. centred: f32[g, n] = a·(w - mean).
    """

    w: Tensor
    a: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor
    centred: Tensor

    @classmethod
    def make(cls, w: Tensor, importance: Tensor) -> Group:
        """w: f32[n, g]; importance: f32[g], not negative."""
        largest = w.abs().amax(1).contiguous()
        # Clear the significand: the power of two below, exactly, on every device.
        scale = largest.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        scale = scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
        columns = (w / scale[:, None]).t().contiguous()
        a = importance.to(torch.float32)[:, None]
        a = a / a.amax().clamp_min(torch.finfo(torch.float32).tiny)
        total = a.sum()
        a = torch.where(total > 0, a / total, 1.0 / len(a))
        mean = (columns * a).sum(0)
        difference = columns - mean
        centred = difference * a
        std = (centred * difference).sum(0).sqrt()
        return cls(columns, a, scale, columns.amin(0), columns.amax(0), mean, std, centred)

    def stored(self, x: Tensor, storage: Storage) -> Tensor:
        """Round x (f32[K, n]) to storage, and give it back in scaled units."""
        return storage.rounded(x * self.scale).to(torch.float32) / self.scale


@dataclass(frozen=True)
class Candidates:
    """Parameters in scaled units, each f32[K, n]. Only a `float` zero has an offset, and then zero is 0."""

    step: Tensor
    zero: Tensor
    offset: Tensor

    def pick(self, index: Tensor) -> Candidates:
        """Of every row the candidates in index, i64[M, n]."""
        return Candidates(*(x.gather(0, index) for x in (self.step, self.zero, self.offset)))


@dataclass(frozen=True)
class Sums:
    """Of u = code - zero under the importance: Σ a u, Σ a u², Σ a u (w - mean), each f32[K, n]."""

    u: Tensor
    uu: Tensor
    uw: Tensor


def fit_group(
    w: Tensor, importance: Tensor, storage: Storage, clip: Clip
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(step, zero, offset) of every row, see the module.

    w: f32[n, g], finite; importance: f32[g], not negative. Returns step storage.dtype[n]; zero u8[n] if it is an
    integer of each group, else None; offset storage.dtype[n] if the zero is a float, else None.
    """
    found = [_fit_rows(Group.make(part, importance), storage, clip) for part in _row_chunks(w, storage, clip)]
    steps, zeros, offsets = (torch.cat(x) for x in zip(*found, strict=True))
    return (
        steps,
        zeros if storage.zero == "integer" else None,
        offsets if storage.zero == "float" else None,
    )


def _row_chunks(w: Tensor, storage: Storage, clip: Clip) -> Iterator[Tensor]:
    """Cut w (f32[n, g]) into runs of rows whose candidates fit into one temporary."""
    starts = {"search": len(_pairs(storage)), "released": len(_SHRINKS), "none": 1}[clip]
    size = max(_FEWEST_ROWS, _limit(w) // (w.shape[1] * starts))
    return (w[start : start + size] for start in range(0, w.shape[0], size))


def _limit(w: Tensor) -> int:
    return _CPU_ELEMENTS if w.device.type == "cpu" else _GPU_ELEMENTS


def _fit_rows(p: Group, storage: Storage, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """Step and offset in storage dtype, zero u8; each [n]."""
    if clip == "none":
        best = _shrunk(p, storage, (1.0,))
    elif clip == "released":
        best = _released(p, storage)
    else:
        best = _searched(p, storage)
    step, offset = (storage.rounded(x[0] * p.scale) for x in (best.step, best.offset))
    return step, best.zero[0].to(torch.uint8), offset


def _shrunk(p: Group, storage: Storage, shrinks: Sequence[float]) -> Candidates:
    """The whole range, 0 included, times each of `shrinks`; stored. As GPTQ does: the zero point is that of p = 1."""
    factor = constant(tuple(shrinks), torch.float32, p.w.device)[:, None]
    low, high = p.low.clamp_max(0.0), p.high.clamp_min(0.0)
    if storage.zero == "none":
        high = torch.maximum(-low, high)
        low = -high
    step = _positive_step(p, (high - low) * factor / storage.top, storage)
    if storage.zero == "float":
        return Candidates(step, torch.zeros_like(step), p.stored(-low * factor, storage))
    if storage.zero == "none":
        zero = torch.full_like(step, storage.levels // 2)
    else:
        width = torch.where(high > low, high - low, 1.0)
        zero = (-low / width * storage.top).round().expand_as(step)
    return Candidates(step, zero, torch.zeros_like(step))


def _positive_step(p: Group, step: Tensor, storage: Storage) -> Tensor:
    """Rounded to storage, but no step other than 0 becomes 0: it would be the worst choice for tiny weights."""
    least = storage.smallest / p.scale
    size = torch.where(step == 0, 0.0, torch.maximum(p.stored(step, storage).abs(), least))
    return torch.copysign(size, step)


def _released(p: Group, storage: Storage) -> Candidates:
    """The shrink with the smallest Σ |w - v|^2.4; of equal ones, the first."""
    every = _shrunk(p, storage, _SHRINKS)
    error = _residual(p, every, storage, _EXPONENT)
    return every.pick(error.argmin(0, keepdim=True))


def _searched(p: Group, storage: Storage) -> Candidates:
    """See the module."""
    every = _starts(p, storage)
    every, error = _least_squares(p, every, _sums(p, every, storage), storage)
    best = every.pick(_best(error, _SURVIVORS))
    for _ in range(_ALTERNATIONS[storage.zero]):
        best, _ = _least_squares(p, best, _sums(p, best, storage), storage)
    best = _rounded(p, best, storage)
    best = best.pick(_best(_residual(p, best, storage), 1))
    finals = [best, _neighbours(p, best, storage), _shrunk(p, storage, (1.0,))]
    if storage.zero == "float":
        none = torch.zeros_like(best.step)
        finals.append(Candidates(none, none, p.stored(-p.mean[None], storage)))
    every = Candidates(
        torch.cat([x.step for x in finals]),
        torch.cat([x.zero for x in finals]),
        torch.cat([x.offset for x in finals]),
    )
    return every.pick(_best(_residual(p, every, storage), 1))


def _best(error: Tensor, n: int) -> Tensor:
    """Indices i64[n, rows] of the smallest errors, f32[K, rows]; not a number counts as the largest."""
    error = torch.nan_to_num(error, nan=torch.inf)
    if n == 1:
        return error.argmin(0, keepdim=True)
    return error.topk(min(n, len(error)), dim=0, largest=False).indices


def _pairs(storage: Storage) -> list[tuple[float, float, float, float]]:
    """Starting ranges, as (below, above) in standard deviations and (below, above) cut off the whole range."""
    spreads, cuts = _SPREADS[storage.levels], _CUTS[storage.levels]
    if storage.zero == "none":
        # Symmetric: the second number is the sign of the step.
        halves = [(s, sign, 0.0, 0.0) for s in _between(spreads) for sign in (1.0, -1.0)]
        return halves + [(_FAR, sign, cut, cut) for cut in cuts for sign in (1.0, -1.0)]
    return [(b, a, 0.0, 0.0) for b, a in product(spreads, spreads)] + [
        (_FAR, _FAR, b, a) for b, a in product(cuts, cuts)
    ]


def _between(xs: Sequence[float]) -> list[float]:
    """The numbers and the means of neighbours."""
    return sorted([*xs, *((a + b) / 2 for a, b in pairwise(xs))])


def _starts(p: Group, storage: Storage) -> Candidates:
    """One candidate per pair; not rounded."""
    columns = tuple(zip(*_pairs(storage), strict=True))
    below, above, cut_below, cut_above = constant(columns, torch.float32, p.w.device)[:, :, None].unbind(0)
    if storage.zero == "none":
        size = torch.maximum(p.high, -p.low)
        root_mean_square = (p.mean.square() + p.std.square()).sqrt()
        step = above * torch.minimum(below * root_mean_square, size * (1 - cut_below)) / (storage.top / 2)
        return Candidates(step, torch.full_like(step, storage.levels // 2), torch.zeros_like(step))
    width = p.high - p.low
    low = torch.maximum(p.mean - below * p.std, p.low + cut_below * width)
    high = torch.minimum(p.mean + above * p.std, p.high - cut_above * width)
    if storage.zero == "float":
        step = (high - low).clamp_min(0.0) / storage.top
        return Candidates(step, torch.zeros_like(step), -low)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    step = (high - low) / storage.top
    zero = (-low / torch.where(step == 0, 1.0, step)).round().clamp(0, storage.top)
    return Candidates(step, zero, torch.zeros_like(step))


def _steps(p: Group, x: Candidates, storage: Storage) -> Tensor:
    """Numbers of steps, u = code - zero, of the nearest values: f32[K, g, n]."""
    step = torch.where(x.step == 0, torch.inf, x.step)[:, None]
    u = (p.w + x.offset[:, None]).div_(step) if storage.zero == "float" else p.w / step
    if storage.zero == "integer":
        return u.round_().clamp_(-x.zero[:, None], storage.top - x.zero[:, None])
    zero = storage.levels // 2 if storage.zero == "none" else 0
    return u.round_().clamp_(-zero, storage.top - zero)


def _residual(p: Group, x: Candidates, storage: Storage, exponent: float = 2.0) -> Tensor:
    """Σ_j a_j (w_j - v_j)², or Σ_j |w_j - v_j|^exponent unweighted, with v as decoded: f32[K, n]."""
    v = _steps(p, x, storage).mul_(x.step[:, None])
    if storage.zero == "float":
        v.sub_(x.offset[:, None])
    v.sub_(p.w)
    if exponent == 2.0:
        return v.square_().mul_(p.a).sum(1)
    return v.abs_().pow_(exponent).sum(1)


def _sums(p: Group, x: Candidates, storage: Storage) -> Sums:
    """See `Sums`."""
    u = _steps(p, x, storage)
    au = u * p.a
    total = au.sum(1)
    square = au.mul_(u).sum(1)
    return Sums(total, square, u.mul_(p.centred).sum(1))


def _least_squares(p: Group, x: Candidates, s: Sums, storage: Storage) -> tuple[Candidates, Tensor]:
    """The best step and offset (or the nearest zero, and the best step for it) under the codes behind s.

    A row whose codes are all equal keeps its step. Returns also the error under these codes, f32[K, n], less a number
    that all candidates of a row share.
    """
    if storage.zero == "none":
        return _best_step(p, x, s)
    variance = torch.addcmul(s.uu, s.u, s.u, value=-1)
    free = torch.where(variance > 1e-6 * s.uu, s.uw / variance, x.step)
    if storage.zero == "float":
        free = free.clamp_min(0.0)
        return replace(x, step=free, offset=free * s.u - p.mean), free * (free * variance - 2 * s.uw)
    wanted = (x.zero + s.u - p.mean / free).round_().clamp_(0, storage.top)
    shift = torch.where(free > 0, wanted - x.zero, 0.0)
    away = s.u - shift
    moved = Sums(away, torch.addcmul(s.uu, shift, s.u + away, value=-1), s.uw)
    return _best_step(p, replace(x, zero=x.zero + shift), moved)


def _best_step(p: Group, x: Candidates, s: Sums) -> tuple[Candidates, Tensor]:
    """The best step under the codes behind s, zero being given; the old one if that has another sign or there is none.

    Returns also the error, as `_least_squares` does.
    """
    uw = torch.addcmul(s.uw, s.u, p.mean)
    step = uw / s.uu
    step = torch.where(step * x.step > 0, step, x.step)
    return replace(x, step=step), step * (step * s.uu - 2 * uw)


def _rounded(p: Group, x: Candidates, storage: Storage) -> Candidates:
    """Round to storage."""
    step = _positive_step(p, x.step, storage)
    return replace(x, step=step, offset=p.stored(x.offset, storage) if storage.zero == "float" else x.offset)


def _neighbours(p: Group, x: Candidates, storage: Storage) -> Candidates:
    """Stored candidates around x (f32[1, n]): zero or offset some levels away, the rest fitted to that once more."""
    away = constant((-2.0, -1.0, 0.0, 1.0, 2.0), torch.float32, p.w.device)[:, None]
    if storage.zero == "float":
        step = x.step.expand(len(away), -1)
        near = Candidates(step, x.zero.expand_as(step), x.offset + away * step)
        return replace(near, offset=p.stored(step * _sums(p, near, storage).u - p.mean, storage))
    zero = x.zero if storage.zero == "none" else (x.zero + away).clamp(0, storage.top)
    near = Candidates(x.step.expand_as(zero), zero, x.offset.expand_as(zero))
    return _rounded(p, _best_step(p, near, _sums(p, near, storage))[0], storage)
