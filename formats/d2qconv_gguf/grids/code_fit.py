"""Fitting a block of a code-book type: one f16 d for 256 columns and 4-bit integers s for its groups.

How, for all rows of one block at once, with errors counted by importance:
1. every group on its own: scales from a geometric range around the group's weighted root mean square; the words nearest
   at each, and the least-squares scale of these words; the best, and once more at its scale;
2. d: candidates that put the largest scale at each s from 15 down; every group takes the s next to its scale, and the
   error is estimated with the words of 1;
3. every group tries its s and the two beside it by true error; then the least-squares d of the whole block, rounded to
   f16, and s once more. The better of both states stays.

Other than ggml (quantize_row_iq2_xxs_impl and its kin in ggml-quants.c) the objective is the given importance alone,
without the factor sqrt(σ² + w²), and d is chosen together with all s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.grids.constants import constant
from d2qconv_gguf.grids.code_search import Book, Prepared
from d2qconv_gguf.grids.problem import Problem, keep_best

#: Largest s.
TOP = 15
#: Scales tried for a group, and values of s at which the largest scale may stand.
N_SCALES, N_TOPS = 10, 24


@dataclass(frozen=True)
class Fitted:
    """A state of the search, in scaled units. error: f32[G, n]; d: f32[n], storable; s: f32[G, n], integers.

    wm, mm: f32[G, n], Σ a m w and Σ a m² of its words.
    """

    error: Tensor
    d: Tensor
    s: Tensor
    wm: Tensor
    mm: Tensor


def fit_block(p: Problem, book: Book, unit: float, spread: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Parameters of one block in scaled units: d f32[n], storable, and s f32[G, n], integers.

    spread: smallest and largest scale tried for a group, in units of its root mean square over the mean magnitude.
    """
    prepared = Prepared.of(book, p.w, p.a)
    scale, wm, mm = _free_scales(p, prepared, book, spread)
    d = _super_scale(p, scale, wm, mm, unit)
    centre = _integers(scale, d, unit)
    best = _try_inner(p, prepared, d, centre, unit)
    factor = (best.s + 0.5) * unit
    dot, norm = (p.share * factor * best.wm).sum(0), (p.share * factor.square() * best.mm).sum(0)
    again = p.storable(torch.where(norm > 0, dot / norm.clamp_min(1e-30), best.d).clamp_min(0))
    other = _try_inner(p, prepared, again, best.s, unit)
    errors = [(x.error * p.share).sum(0) for x in (best, other)]
    wins = errors[1] < errors[0]
    d, s = torch.where(wins, other.d, best.d), torch.where(wins, other.s, best.s)
    # No word is zero: of weights far below the smallest f16, nothing is better than the least that there is.
    is_lost = torch.minimum(*errors) >= (p.sum_ww * p.share).sum(0)
    return torch.where(is_lost, 0.0, d), s


def _free_scales(
    p: Problem, prepared: Prepared, book: Book, spread: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Every group's best scale, and Σ a m w and Σ a m² of its words; each f32[G, n]."""
    middle = sum(book.levels) / len(book.levels)
    rms = p.sum_ww.sqrt().clamp_min(1e-30) / middle
    ratio = (spread[1] / spread[0]) ** (1 / (N_SCALES - 1))
    best: tuple[Tensor, ...] = (torch.full_like(rms, torch.inf), rms, rms, rms)
    for number in range(N_SCALES):
        best = keep_best(best, _least_squares(p, prepared, rms * (spread[0] * ratio**number)))
    best = keep_best(best, _least_squares(p, prepared, best[1]))
    return best[1], best[2], best[3]


def _least_squares(p: Problem, prepared: Prepared, scale: Tensor) -> tuple[Tensor, ...]:
    """Error, scale (positive), Σ a m w and Σ a m² of the words nearest at `scale`, with the scale that suits them."""
    wm, mm = prepared.sums(scale)
    fitted = torch.where(wm > 0, wm / mm, scale)
    return p.sum_ww - 2 * fitted * wm + fitted.square() * mm, fitted, wm, mm


def _super_scale(p: Problem, scale: Tensor, wm: Tensor, mm: Tensor, unit: float) -> Tensor:
    """The storable d, f32[n], of least error with the words as they are."""
    largest = scale.amax(0)
    tops = constant(tuple(TOP + 1.0 - 0.5 * i for i in range(N_TOPS)), scale.dtype, scale.device)
    d = torch.stack([p.storable(largest / (top * unit)) for top in tops])
    stored = (_integers(scale[None], d[:, None], unit) + 0.5) * unit * d[:, None]
    error = p.sum_ww - 2 * stored * wm + stored.square() * mm
    return d.gather(0, (error * p.share).sum(1).argmin(0, keepdim=True))[0]


def _integers(scale: Tensor, d: Tensor, unit: float) -> Tensor:
    """The s at which d (s + ½) unit comes nearest to the scale."""
    step = torch.where(d == 0, 1.0, d * unit)
    return (scale / step - 0.5).round().clamp(0, TOP)


def _try_inner(p: Problem, prepared: Prepared, d: Tensor, centre: Tensor, unit: float) -> Fitted:
    """Every group's best s of `centre` and its neighbours, by the true error. d: f32[n]; centre: f32[G, n]."""
    best: tuple[Tensor, ...] | None = None
    for move in (0.0, -1.0, 1.0):
        s = (centre + move).clamp(0, TOP)
        scale = (s + 0.5) * unit * d
        wm, mm = prepared.sums(torch.where(scale == 0, 1.0, scale))
        found = (p.sum_ww - 2 * scale * wm + scale.square() * mm, s, wm, mm)
        best = found if best is None else keep_best(best, found)
    assert best is not None
    return Fitted(best[0], d, *best[1:])
