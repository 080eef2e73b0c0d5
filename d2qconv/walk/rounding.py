"""One matrix at a time: from float to its planned storage, and how far that is from where it started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec
import torch
from torch import Tensor

from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.exporters.base import FloatType
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded, Held, cat_rows, decoded
from d2qconv.precision import tensor_cores
from d2qconv.quant.dsq import SCALE, ColumnScaled, HasInner, split
from d2qconv.quant.hessian import drift, inverse_factor, toward_source
from d2qconv.quant.order import gar
from d2qconv.quant.polish import damped, polish
from d2qconv.quant.slabs import slabs
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
        """The sweep, with what the recipe adds to it, slab by slab where rows are independent."""
        sweep = _Compensation.of(self.recipe, grid, statistics, where)
        rows = [slice(0, len(w))] if isinstance(grid, HasInner) else slabs(*w.shape)
        return cat_rows([sweep(w[some], source[some]) for some in rows])


@dataclass(frozen=True)
class _Compensation:
    """What all rows of a matrix share while they are rounded.

    order: i64[n_in] on the CPU, or None. factor: f32[n_in, n_in] in that order. drift: of `quant.hessian.drift`, for
    the forms of asymmetry that have it.
    """

    recipe: Recipe
    grid: Grid
    statistics: InputStatistics
    order: Tensor | None
    factor: Tensor
    drift: Tensor | None

    @classmethod
    def of(cls, recipe: Recipe, grid: Grid, statistics: InputStatistics, where: str) -> _Compensation:
        """Order and factor; raises RunError."""
        with timed("factor"):
            gram, cross = statistics.gram, statistics.cross
            order = gar(gram.diagonal(), grid) if recipe.order == "gar" else None
            factor = inverse_factor(_square(gram, order), recipe.damping, where)
            moves = None
            if cross is not None and recipe.asymmetry > 0 and recipe.asymmetry_form != "closed":
                moves = drift(_square(gram, order), _square(cross, order), factor, recipe.asymmetry)
        return cls(recipe, grid, statistics, order, factor, moves)

    def __call__(self, w: Tensor, source: Tensor) -> Coded:
        """Some rows, f32[n, n_in], and the source's."""
        recipe, cross, gram = self.recipe, self.statistics.cross, self.statistics.gram
        pull = None
        if self.drift is not None:
            pull = Drift(self.drift, source if recipe.asymmetry_form == "rescomp" else None)
        elif cross is not None and recipe.asymmetry > 0:
            with timed("factor"):
                miss = (source @ cross).addmm_(w, gram, alpha=-1)
                w = toward_source(w, miss, self.factor, recipe.asymmetry, self.order)
                del miss
        coded = gptq(w, self.factor, self.grid, is_refit=recipe.refit, order=self.order, drift=pull)
        if recipe.polish == 0 or pull is not None:
            return coded
        return self._polished(w, coded)

    def _polished(self, w: Tensor, coded: Coded) -> Coded:
        """Codes chosen again; column scales stay, so the inner grid sees weights and inputs as scaled by them."""
        recipe, hessian = self.recipe, self._hessian
        if not isinstance(coded.grid, ColumnScaled):
            return polish(w, hessian, coded, passes=recipe.polish, is_refit=recipe.refit)
        inner, c = split(coded)
        hessian = (hessian * c).mul_(c[:, None])
        found = polish(w / c, hessian, inner, passes=recipe.polish, is_refit=recipe.refit)
        return replace(coded, codes=found.codes, params={**found.params, SCALE: coded.params[SCALE]})

    @cached_property
    def _hessian(self) -> Tensor:
        return damped(self.statistics.gram, self.recipe.damping)


def error_of(tensor: str, w: Tensor, approximation: Held, statistics: InputStatistics) -> TensorError:
    """Relative errors of `approximation` against w, both [n_out, n_in]; f32 sums of a slab, added up in f64."""
    sums = torch.zeros(4, dtype=torch.float64, device=w.device)
    for some in slabs(*w.shape):
        part = approximation.rows(some) if isinstance(approximation, Coded) else approximation[some]
        difference = w[some] - decoded(part)
        sums += torch.stack(
            [*_energies(difference, statistics.gram), *_energies(w[some], statistics.gram)]
        ).double()
    weight, output, whole_weight, whole_output = sums.tolist()
    return TensorError(tensor, weight / max(whole_weight, 1e-30), output / max(whole_output, 1e-30))


def embedding_error(tensor: str, w: Tensor, approximation: Held, tokens: Tensor) -> TensorError:
    """The same of an embedding, whose inputs are one-hot: its output error is that of the rows which tokens read.

    w: [vocab, hidden] of any float dtype. tokens: i64, any shape. All on the CPU.
    """
    counts = torch.bincount(tokens.reshape(-1), minlength=len(w)).double()
    sums = torch.zeros(4, dtype=torch.float64)
    for some in slabs(*w.shape):
        part = decoded(approximation.rows(some) if isinstance(approximation, Coded) else approximation[some])
        whole = w[some].float()
        missed, energy = ((x * x).sum(1).double() for x in (whole - part, whole))
        times = counts[some]
        sums += torch.stack([missed.sum(), (missed * times).sum(), energy.sum(), (energy * times).sum()])
    weight, output, whole_weight, whole_output = sums.tolist()
    return TensorError(tensor, weight / max(whole_weight, 1e-30), output / max(whole_output, 1e-30))


def _energies(w: Tensor, gram: Tensor) -> Sequence[Tensor]:
    """‖W‖² and tr(W H Wᵀ)."""
    return w.square().sum(), (w @ gram).mul_(w).sum()


def _square(moment: Tensor, order: Tensor | None) -> Tensor:
    """f32[n, n] with rows and columns in that order."""
    if order is None:
        return moment
    index = order.to(moment.device)
    return moment[index][:, index]


def positive(diagonal: Tensor) -> Tensor:
    """An importance must be positive: inputs that were always zero count a millionth of the mean."""
    floor = diagonal.mean().clamp_min(1e-30) * 1e-6
    return diagonal.clamp_min(floor)
