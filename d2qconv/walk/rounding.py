"""One matrix at a time: from float to its planned storage, and how far that is from where it started."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.export.base import FloatType
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Held
from d2qconv.quant.hessian import inverse_factor, toward_source
from d2qconv.quant.sweep import gptq, round_to_nearest
from d2qconv.run import Recipe


class TensorError(msgspec.Struct, frozen=True):
    """How far one quantized matrix is from its source.

    weight: ‖W − Ŵ‖² / ‖W‖². output: the same for W x over the calibration inputs, tr(ΔHΔᵀ) / tr(WHWᵀ).
    """

    tensor: str
    weight: float
    output: float


@dataclass(frozen=True)
class Rounder:
    """Rounds by one recipe."""

    recipe: Recipe

    def __call__(
        self,
        w: Tensor,
        storage: Grid | FloatType,
        statistics: InputStatistics | None,
        where: str,
        source: Tensor | None = None,
    ) -> Held:
        """w: f32[n_out, n_in] or a vector. Without statistics to nearest, all columns alike.

        source: the source's weights, where w is not those (a shift was folded in).
        """
        if isinstance(storage, FloatType):
            return w.to(storage.dtype)
        if statistics is None:
            return round_to_nearest(w, torch.ones(w.shape[1], device=w.device), storage)
        if self.recipe.rounding == "nearest":
            return round_to_nearest(w, _positive(statistics.gram.diagonal()), storage)
        factor = inverse_factor(statistics.gram, self.recipe.damping, where)
        if statistics.cross is not None:
            miss = (w if source is None else source) @ statistics.cross - w @ statistics.gram
            w = toward_source(w, miss, factor, self.recipe.asymmetry)
        return gptq(w, factor, storage, is_refit=self.recipe.refit)


def error_of(tensor: str, w: Tensor, approximation: Tensor, statistics: InputStatistics) -> TensorError:
    """Relative errors of `approximation` against w, both f32[n_out, n_in]."""
    difference = w - approximation
    gram = statistics.gram
    return TensorError(
        tensor,
        float(difference.square().sum() / w.square().sum().clamp_min(1e-30)),
        float(((difference @ gram) * difference).sum() / ((w @ gram) * w).sum().clamp_min(1e-30)),
    )


def _positive(diagonal: Tensor) -> Tensor:
    """An importance must be positive: inputs that were always zero count a millionth of the mean."""
    floor = diagonal.mean().clamp_min(1e-30) * 1e-6
    return diagonal.clamp_min(floor)
