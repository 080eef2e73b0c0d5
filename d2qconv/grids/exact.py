"""Which grids hold every value of another one, bit for bit, and how codes and parameters are said on them.

So that one quantization can be written in several formats. A matrix is brought to an affine grid first: its own, or the
one that its grid says it is part of (`AffineLike`). From there to a wider affine grid: smaller groups repeat the
parameters of the larger ones, no zero point becomes the middle code, f16 and bf16 steps become f32. Each of these
leaves every decoded f32 value as it is, since decode computes step · (code - zero) in f32 on both.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Grid, Params

#: Steps that a storage type holds besides its own.
_HOLDS = {"f32": ("f32", "f16", "bf16"), "f16": ("f16",), "bf16": ("bf16",)}


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


def holds(wide: AffineGrid, grid: Grid) -> bool:
    """Whether every value of `grid` has the same code on `wide`, whatever the parameters are."""
    narrow = as_affine(grid)
    if narrow is None or narrow.bits != wide.bits or narrow.group % wide.group or wide.is_per_channel:
        return False
    is_zero_held = narrow.zero == wide.zero or (narrow.zero, wide.zero) == ("none", "integer")
    is_step_held = wide.significand in (0, narrow.significand)
    return is_zero_held and is_step_held and narrow.scale in _HOLDS[wide.scale]


def widened(grid: Grid, params: Params, wide: AffineGrid) -> Params:
    """Parameters on `wide`, which holds `grid`, for the same codes."""
    narrow = as_affine(grid)
    assert narrow is not None, "only what is affine is held by an affine grid"
    assert holds(wide, grid), f"{wide.id} does not hold {grid.id}"
    found = dict(grid.affine_params(params) if isinstance(grid, AffineLike) else params)
    repeats = narrow.group // wide.group
    found = {name: p.repeat_interleave(repeats, dim=1) for name, p in found.items()}
    for name in wide.scales:
        found[name] = found[name].to(wide.storage.dtype)
    if narrow.zero == "none" and wide.zero == "integer":
        found["zero"] = torch.full_like(found["step"], wide.levels // 2, dtype=torch.uint8)
    return found
