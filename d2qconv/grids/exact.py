"""Which grids hold every value of another one, bit for bit, and how codes and parameters are said on them.

So that one quantization can be written in several formats. A matrix is brought to an affine grid first: its own, or the
one that its grid says it is part of (`AffineLike`). From there to a wider affine grid: smaller groups repeat the
parameters of the larger ones, no zero point becomes the middle code, f16 and bf16 steps become f32. Each of these
leaves every decoded f32 value as it is, since decode computes step · (code - zero) in f32 on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Grid, Params

#: Steps that a storage type holds besides its own.
_HOLDS = {"f32": ("f32", "f16", "bf16"), "f16": ("f16",), "bf16": ("bf16",)}


@dataclass(frozen=True)
class FoundGrid(AffineGrid):
    """The affine grid of a matrix that is quantized already, with what its parameters happen to be.

    least_zero, most_zero: its zero points, the middle code where it has none. has_f16_offsets: step · zero is an f16
    everywhere.
    """

    least_zero: int = 0
    most_zero: int = 255
    has_f16_offsets: bool = False

    @property
    def span(self) -> tuple[int, int]:
        """The least and the largest that code - zero can be."""
        return -self.most_zero, self.levels - 1 - self.least_zero


def span_of(grid: AffineGrid) -> tuple[int, int]:
    """The least and the largest that code - zero can be on an affine grid without offsets."""
    if isinstance(grid, FoundGrid):
        return grid.span
    middle = grid.levels // 2
    return (-middle, middle - 1) if grid.zero == "none" else (1 - grid.levels, grid.levels - 1)


@runtime_checkable
class Containing(Protocol):
    """A grid of some format that holds values of affine grids by codes of its own. Optional."""

    def contains(self, given: AffineGrid) -> bool:
        """Whether every value of `given` is one of its own, whatever the parameters are."""

    def contained(self, given: AffineGrid, codes: Tensor, params: Params) -> tuple[Tensor, Params]:
        """Its codes and parameters for these on `given`, which it contains."""


@runtime_checkable
class AffineLike(Protocol):
    """A grid of some format whose codes and values are those of an affine grid. Optional."""

    @property
    def affine_grid(self) -> AffineGrid | None:
        """That grid; None if there is none after all."""

    def affine_params(self, params: Params) -> Params:
        """Parameters of the affine grid for the same codes."""


def as_affine(grid: Grid) -> AffineGrid | None:
    """The affine grid that `grid` is, or is said to be part of."""
    if isinstance(grid, AffineGrid):
        return grid
    return grid.affine_grid if isinstance(grid, AffineLike) else None


def holds(wide: Grid, grid: Grid) -> bool:
    """Whether every value of `grid` is one of `wide`, whatever the parameters are."""
    narrow = as_affine(grid)
    if narrow is not None and isinstance(wide, Containing):
        return wide.contains(narrow)
    return narrow is not None and isinstance(wide, AffineGrid) and _has_same_codes(wide, narrow)


def _has_same_codes(wide: AffineGrid, narrow: AffineGrid) -> bool:
    """Whether values of `narrow` have the same codes on `wide`."""
    if narrow.bits != wide.bits or narrow.group % wide.group:
        return False
    if wide.is_per_channel and not (narrow.is_per_channel and narrow.group == wide.group):
        return False
    is_zero_held = narrow.zero == wide.zero or (narrow.zero, wide.zero) == ("none", "integer")
    is_step_held = wide.significand == 0 or 0 < narrow.significand <= wide.significand
    return is_zero_held and is_step_held and narrow.scale in _HOLDS[wide.scale]


def placed(grid: Grid, codes: Tensor, params: Params, wide: Grid) -> tuple[Tensor, Params]:
    """Codes and parameters on `wide`, which holds `grid`, for the same values."""
    narrow = as_affine(grid)
    assert narrow is not None, "only what is affine is held by another grid"
    assert holds(wide, grid), f"{wide.id} does not hold {grid.id}"
    found = grid.affine_params(params) if isinstance(grid, AffineLike) else params
    if isinstance(wide, Containing):
        return wide.contained(narrow, codes, found)
    assert isinstance(wide, AffineGrid), "what holds is affine, or says that it contains"
    return codes, _widened(narrow, found, wide)


def _widened(narrow: AffineGrid, params: Params, wide: AffineGrid) -> Params:
    """Parameters on `wide` for the same codes."""
    found = dict(params)
    repeats = narrow.group // wide.group
    found = {name: p.repeat_interleave(repeats, dim=1) for name, p in found.items()}
    for name in wide.scales:
        found[name] = found[name].to(wide.storage.dtype)
    if narrow.zero == "none" and wide.zero == "integer":
        found["zero"] = torch.full_like(found["step"], wide.levels // 2, dtype=torch.uint8)
    return found
