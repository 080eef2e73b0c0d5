"""What to do with rows that are no whole number of a type's blocks: widen the model with zeros, or take other types.

ggml stores rows in blocks of 256 weights (K-quants, code books), 64 or 32. A model whose hidden size is 576 fits the
large ones only once it is padded (`d2qconv.fold.padding`), which costs a third more bytes in every row, the embedding's
too; types with small blocks cost more bits in every weight. Which is better is arithmetic: bytes of all tensors, and
the error that a type makes with normal weights rounded to nearest, averaged over the source's weights.

What cannot be padded exactly at a bearable price, the rows of o, goes to the narrowest type that fits and has no fewer
bits than the one asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from d2qconv.arch.spec import Dim, ModelDesc, Padding
from d2qconv.errors import Refusal
from d2qconv.exporters.base import FloatType, TensorPlan, type_name
from d2qconv.fold import padding as fold
from d2qconv.grids.base import Grid
from d2qconv.names import TensorId
from d2qconv.quant.sweep import round_to_nearest
from d2qconv_gguf import types
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.types import Storage

Mode = Literal["never", "auto", "always"]
#: The storage that the options ask for, None where they ask for nonsense.
Asked = Callable[[TensorId], Storage | None]
#: Rows of the sample on which a type's error is measured.
_N_ROWS = 64


@dataclass(frozen=True)
class Storages:
    """One way to store a model. types: of every tensor. error: see the module."""

    types: Mapping[TensorId, Storage]
    n_bytes: int
    error: float

    def merit(self, n_weights: int) -> float:
        """Bits that a weight takes, and those that the error is worth: one more bit makes a fourth of it."""
        return 8 * self.n_bytes / n_weights + math.log(max(self.error, 1e-12), 4)

    @property
    def numbers(self) -> str:
        """`89.7 MB, error 0.075`."""
        return f"{self.n_bytes / 1e6:,.1f} MB, error {self.error:.3g}"


@dataclass(frozen=True)
class Decision:
    """padding: None for the widths that the model has. instead: storages of tensors that what was asked does not fit.

    note: what was chosen, what else there was, in numbers; empty where all fits.
    """

    padding: Padding | None
    instead: Mapping[TensorId, Storage]
    note: str = ""


def decide(model: ModelDesc, asked: Asked, mode: Mode) -> Decision:
    """How that model is stored. Reads no weight.

    `always`: padded to the blocks of the types asked for. `auto`: the same, unless one other type for what does not fit
    needs no more bytes and makes less error, or not more than the bytes saved are worth (`Storages.merit`).
    """
    if mode == "never" or not _unfit(model, asked):
        return Decision(None, {})
    padding = _needed(model, asked)
    if padding is None or (mode == "auto" and fold.check(model, padding)):
        return Decision(None, narrow(model, asked), _narrow_note(model, asked))
    if fold.check(model, padding):
        return Decision(padding, {})
    wide, plain = _padded(model, asked, padding), _unpadded(model, asked)
    within = [s for s in plain.values() if s.n_bytes <= wide.n_bytes]
    best = min(within, key=lambda s: (s.error, s.n_bytes), default=None)
    least = min(plain.values(), key=lambda s: s.n_bytes, default=None)
    shown = best or least
    other = "no other type fits"
    if shown is not None:
        other = f"{_names(plain, shown)} where {_asked_names(model, asked)} does not fit: {shown.numbers}"
    whole = f"padded ({fold.describe(model, padding)}): {wide.numbers}"
    n_weights = model.n_weights
    if mode == "auto" and best is not None and best.merit(n_weights) <= wide.merit(n_weights):
        instead = {t: best.types[t] for t in _unfit(model, asked)}
        return Decision(None, instead, f"not padded, {other}; {whole}")
    why = "" if best is not None or mode == "always" else ", more than that"
    return Decision(padding, {}, f"{whole}; not padded, {other}{why}")


def substitutes(model: ModelDesc, asked: Asked, mode: Mode) -> Mapping[TensorId, Storage]:
    """Storages of tensors that what was asked does not fit, in a model whose padding was decided."""
    if mode == "never":
        return {}
    if model.unpadded is not None:
        return narrow(model, asked)
    decision = decide(model, asked, mode)
    return decision.instead if decision.padding is None else {}


def cost(model: ModelDesc, asked: Asked) -> str:
    """What `--pad` would cost, for the refusal of a type that does not fit; empty where it does not help."""
    padding = _needed(model, asked)
    if padding is None:
        return "or add --pad always, for a wider type where one does not fit"
    if fold.check(model, padding):
        return ""
    made = _padded(model, asked, padding)
    return (
        f"or add --pad always: exact zeros, {fold.describe(model, padding)}, "
        f"{made.n_bytes / 1e6:,.1f} MB of tensors in all; --pad auto takes other types where they are better"
    )


def narrow(model: ModelDesc, asked: Asked) -> dict[TensorId, Storage]:
    """For every tensor that the asked type does not fit: that with the fewest bits, at least as many, and least error.

    f16 where no grid fits.
    """
    found: dict[TensorId, Storage] = {}
    for tensor, wanted in _unfit(model, asked).items():
        shape = model.tensors[tensor].shape
        fits = [
            g
            for g in GRIDS.values()
            if g.accepts(shape) is None and g.bits_per_weight >= wanted.bits_per_weight
        ]
        found[tensor] = min(fits, key=lambda g: (g.bits_per_weight, error_of(g)), default=FloatType.F16)
    return found


def zero_refusals(model: ModelDesc, tensors: Mapping[TensorId, TensorPlan]) -> list[Refusal]:
    """Types that do not hold a padded model's zeros exactly: in the embedding's columns, in the rows of o and down."""
    if model.unpadded is None or model.arch.residual is None:
        return []
    residual, n_real = model.arch.residual, model.unpadded.hidden
    found = {}
    for tensor, planned in tensors.items():
        grid = planned.storage
        if isinstance(grid, FloatType) or tensor.role not in (residual.source, *residual.writers):
            continue
        n = n_real if tensor.role is residual.source else 0
        if not holds_zeros(grid, n):
            why = f"{planned.type_name} cannot hold the zeros of a padded model exactly here"
            found[tensor.role] = Refusal(f"{tensor.role}", why, "choose another type for it, q8_0 for one")
    return list(found.values())


def holds_zeros(grid: Grid, n_real: int) -> bool:
    """Whether zeros behind the first n_real columns of a row are decoded as 0, rounded to nearest."""
    first = n_real // grid.block * grid.block
    w = torch.zeros(_N_ROWS, grid.block)
    real = torch.randn(_N_ROWS, n_real - first, generator=torch.Generator().manual_seed(0))
    w[:, : n_real - first] = real
    for values in (w, torch.zeros_like(w)):
        decoded = round_to_nearest(values, torch.ones(grid.block), grid).decode()
        if bool(decoded[:, n_real - first :].any()):
            return False
    return True


def error_of(storage: Storage) -> float:
    """Relative squared error of normal weights rounded to nearest on a grid; 0 for floats."""
    return 0.0 if isinstance(storage, FloatType) else _grid_error(storage.id)


@cache
def _grid_error(name: str) -> float:
    storage = GRIDS[name]
    w = torch.randn(_N_ROWS, storage.block, generator=torch.Generator().manual_seed(0))
    decoded = round_to_nearest(w, torch.ones(storage.block), storage).decode()
    return float((decoded - w).square().sum() / w.square().sum())


def _unfit(model: ModelDesc, asked: Asked) -> dict[TensorId, Grid]:
    """Matrices that the asked grid does not fit, with it."""
    found = {}
    for tensor, dense in model.tensors.items():
        wanted = asked(tensor)
        if (
            wanted is not None
            and not isinstance(wanted, FloatType)
            and wanted.accepts(dense.shape) is not None
        ):
            found[tensor] = wanted
    return found


def _needed(model: ModelDesc, asked: Asked) -> Padding | None:
    """The least widths whose rows are whole blocks of the types asked for; None if they are those there are."""
    blocks = {Dim.HIDDEN: 1, Dim.FFN: 1}
    for tensor, grid in _unfit(model, asked).items():
        site = model.arch.site(tensor.role)
        if site is not None and site.n_in in blocks:
            blocks[site.n_in] = math.lcm(blocks[site.n_in], grid.block)
    dims = model.dims
    made = Padding(
        *(-(-n // b) * b for n, b in ((dims.hidden, blocks[Dim.HIDDEN]), (dims.ffn, blocks[Dim.FFN])))
    )
    return None if (made.hidden, made.ffn) == (dims.hidden, dims.ffn) else made


def _padded(model: ModelDesc, asked: Asked, padding: Padding) -> Storages:
    wide = fold.padded(model, padding)
    return _storages(model, wide, asked, narrow(wide, asked))


def _unpadded(model: ModelDesc, asked: Asked) -> dict[str, Storages]:
    """By the one type that takes all that does not fit."""
    unfit = _unfit(model, asked)
    return {
        name: _storages(model, model, asked, dict.fromkeys(unfit, grid))
        for name, grid in GRIDS.items()
        if all(grid.accepts(model.tensors[t].shape) is None for t in unfit)
    }


def _storages(
    source: ModelDesc, stored: ModelDesc, asked: Asked, instead: Mapping[TensorId, Storage]
) -> Storages:
    """source: whose weights the errors are averaged over; stored: the same model in the widths that are stored."""
    chosen = {t: instead.get(t) or asked(t) or FloatType.F32 for t in stored.tensors}
    n_bytes = sum(types.n_bytes(chosen[t], dense.shape) for t, dense in stored.tensors.items())
    n_weights = {t: dense.n_elements for t, dense in source.tensors.items() if len(dense.shape) == 2}
    errors = sum(float(n * error_of(chosen[t])) for t, n in n_weights.items())
    return Storages(chosen, n_bytes, errors / sum(n_weights.values()))


def _names(plain: Mapping[str, Storages], shown: Storages) -> str:
    return next(name for name, storages in plain.items() if storages is shown)


def _asked_names(model: ModelDesc, asked: Asked) -> str:
    return " and ".join(dict.fromkeys(type_name(grid) for grid in _unfit(model, asked).values()))


def _narrow_note(model: ModelDesc, asked: Asked) -> str:
    names = " and ".join(dict.fromkeys(type_name(s) for s in narrow(model, asked).values()))
    return f"not padded: {names} where {_asked_names(model, asked)} does not fit"
