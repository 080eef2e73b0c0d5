"""One matrix at a time: from float to its planned storage, and how far that is from where it started."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.export.base import FloatType
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded, Held
from d2qconv.precision import tensor_cores
from d2qconv.quant.dsq import SCALE, ColumnScaled, split
from d2qconv.quant.hessian import drift, inverse_factor, toward_source
from d2qconv.quant.order import gar
from d2qconv.quant.polish import damped, polish
from d2qconv.quant.sweep import Drift, gptq, round_to_nearest
from d2qconv.run import Recipe
from d2qconv.timing import timed


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

    @property
    def needs_source(self) -> bool:
        """Whether statistics must know what the source model feeds each linear."""
        return self.recipe.rounding == "gptq" and self.recipe.asymmetry > 0

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
            with timed("fit"):
                return round_to_nearest(w, torch.ones(w.shape[1], device=w.device), storage)
        if self.recipe.rounding == "nearest":
            with timed("fit"):
                return round_to_nearest(w, positive(statistics.gram.diagonal()), storage)
        with tensor_cores(False):
            return self._compensated(w, storage, statistics, where, w if source is None else source)

    def _compensated(
        self, w: Tensor, grid: Grid, statistics: InputStatistics, where: str, source: Tensor
    ) -> Coded:
        """The sweep, with what the recipe adds to it."""
        recipe, pull = self.recipe, None
        with timed("factor"):
            order = gar(statistics.gram.diagonal(), grid) if recipe.order == "gar" else None
            here = statistics if order is None else statistics.ordered(order)
            factor = inverse_factor(here.gram, recipe.damping, where)
            if here.cross is None or recipe.asymmetry == 0:
                pass
            elif recipe.asymmetry_form == "closed":
                miss = _taken(source, order) @ here.cross - _taken(w, order) @ here.gram
                moved = toward_source(_taken(w, order), miss, factor, recipe.asymmetry)
                w = moved if order is None else _taken(moved, order.argsort())
            else:
                p = drift(here.gram, here.cross, factor, recipe.asymmetry)
                pull = Drift(p, source if recipe.asymmetry_form == "rescomp" else None)
        coded = gptq(w, factor, grid, is_refit=recipe.refit, order=order, drift=pull)
        del here, factor
        if recipe.polish == 0 or pull is not None:
            return coded
        return self._polished(w, statistics.gram, coded)

    def _polished(self, w: Tensor, gram: Tensor, coded: Coded) -> Coded:
        """Codes chosen again; column scales stay, so the inner grid sees weights and inputs as scaled by them."""
        recipe, hessian = self.recipe, damped(gram, self.recipe.damping)
        if not isinstance(coded.grid, ColumnScaled):
            return polish(w, hessian, coded, passes=recipe.polish, is_refit=recipe.refit)
        inner, c = split(coded)
        hessian.mul_(c).mul_(c[:, None])
        found = polish(w / c, hessian, inner, passes=recipe.polish, is_refit=recipe.refit)
        return replace(coded, codes=found.codes, params={**found.params, SCALE: coded.params[SCALE]})


def error_of(tensor: str, w: Tensor, approximation: Tensor, statistics: InputStatistics) -> TensorError:
    """Relative errors of `approximation` against w, both f32[n_out, n_in]."""
    difference = w - approximation
    gram = statistics.gram
    return TensorError(
        tensor,
        float(difference.square().sum() / w.square().sum().clamp_min(1e-30)),
        float(((difference @ gram) * difference).sum() / ((w @ gram) * w).sum().clamp_min(1e-30)),
    )


def _taken(w: Tensor, order: Tensor | None) -> Tensor:
    """Columns of w in that order."""
    return w if order is None else w[:, order.to(w.device)]


def positive(diagonal: Tensor) -> Tensor:
    """An importance must be positive: inputs that were always zero count a millionth of the mean."""
    floor = diagonal.mean().clamp_min(1e-30) * 1e-6
    return diagonal.clamp_min(floor)
