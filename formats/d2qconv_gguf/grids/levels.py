"""Nearest of a few unequal levels: the 16 values of ggml's IQ4 types (kvalues_iq4nl in ggml-common.h).

The levels are integers, so the boundaries between them are multiples of one half and x lies between the same two as
ceil(2x) / 2: the level is read from a table over ceil(2x), which takes a tenth of the time of a search. A tie goes to
the lower level, as in `torch.bucketize` over the boundaries.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: The levels of IQ4_NL and IQ4_XS by their code.
IQ4_LEVELS = tuple(
    float(v) for v in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)
#: Halves up to which the table reaches, on either side.
REACH = 256


def nearest_level(x: Tensor, table: tuple[float, ...]) -> Tensor:
    """The level nearest to x, f32 as x. table: ascending integers within ±127."""
    return _look_up(x, lookup(table, x.device))


def nearest_code(x: Tensor, table: tuple[float, ...]) -> Tensor:
    """Its number, u8."""
    return _look_up(x, _codes(table, x.device))


def _look_up(x: Tensor, found: Tensor) -> Tensor:
    # A weight that is no number gets some code, as in the grids of equal steps.
    halves = torch.nan_to_num(x).mul_(2).ceil_().clamp_(-REACH, REACH).add_(REACH)
    return found.index_select(0, halves.to(torch.int32).reshape(-1)).reshape(x.shape)


@cache
@torch.inference_mode(False)
def lookup(table: tuple[float, ...], device: torch.device) -> Tensor:
    """The nearest level of x at ceil(2x) + REACH: f32[2 · REACH + 1]; not to be changed."""
    return torch.tensor(table, device=device)[_codes(table, device).to(torch.int32)]


@cache
@torch.inference_mode(False)
def _codes(table: tuple[float, ...], device: torch.device) -> Tensor:
    levels = torch.tensor(table)
    halves = torch.arange(-REACH, REACH + 1) / 2
    found = torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)
    return found.to(torch.uint8).to(device)
