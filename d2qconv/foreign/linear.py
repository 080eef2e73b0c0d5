"""A linear as another tool quantized it, whatever its bytes look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from d2qconv.errors import InputError
from d2qconv.grids.affine import GROUPS
from d2qconv.grids.exact import FoundGrid
from d2qconv.ir.coded import Coded

#: Bits that the dialects here have.
BITS = (2, 3, 4, 8)
#: Values that are decoded at a time, so that what is made of them on the way stays small.
_PIECE = 1 << 21


@dataclass(frozen=True)
class ForeignLinear:
    """One matrix: value = step · (code - zero), the parameters those of the column's group.

    module: as the checkpoint names it. shape: (n_out, n_in). arrays: names of the tensors that it consists of. codes:
    reads u8[n_out, n_in]. steps: reads a float tensor [n_out, n_groups], as stored. zeros: reads integers
    [n_out, n_groups], None where the middle code 2^(bits-1) is zero. index: reads the group of every column,
    i32[n_in]; None if groups are runs of columns.
    """

    module: str
    shape: tuple[int, int]
    bits: int
    n_groups: int
    arrays: tuple[str, ...]
    codes: Callable[[], Tensor]
    steps: Callable[[], Tensor]
    zeros: Callable[[], Tensor] | None = None
    index: Callable[[], Tensor] | None = None

    def decode(self) -> Tensor:
        """The weights, f32[n_out, n_in], in any order of columns: each product exact, rounded once."""
        step, zero = self._parameters()
        step, column = step.float(), self._column.long()
        codes = self.codes()
        values = torch.empty(self.shape, dtype=torch.float32)
        for at in range(0, len(codes), rows := max(1, _PIECE // self.shape[1])):
            some = slice(at, at + rows)
            middle = self._middle if zero is None else zero[some].float()[:, column]
            values[some] = (codes[some].to(torch.float32) - middle).mul_(step[some][:, column])
        return values

    @cached_property
    def grid(self) -> FoundGrid | None:
        """The affine grid that it is on; None if its groups are on none, and `why_no_grid` says why.

        Reads steps and zero points, no codes. The step's type is the narrowest that holds all of them.
        """
        runs = self._runs
        if runs is None:
            return None
        step, zero = self._parameters()
        step = step.float()
        is_middle = zero is None or bool((zero == self._middle).all())
        low, high = (self._middle, self._middle) if zero is None else (int(zero.min()), int(zero.max()))
        offset = step * (self._middle if zero is None else zero.to(torch.float32))
        return FoundGrid(
            self.bits,
            runs,
            "none" if is_middle else "integer",
            _narrowest(step),
            is_per_channel=runs == self.shape[1] and runs not in GROUPS,
            significand=_significand(step),
            least_zero=low,
            most_zero=high,
            has_f16_offsets=_is_f16(offset),
        )

    @cached_property
    def why_no_grid(self) -> str:
        """Why there is none, in words; empty where there is one."""
        if self._runs is not None:
            return ""
        n_in, column = self.shape[1], self._column
        starts = [0, *(int(at) + 1 for at in torch.nonzero(column[1:] != column[:-1])), n_in]
        sizes = [end - start for start, end in pairwise(starts)]
        if len(sizes) > len(torch.unique(column)):
            return "columns of one group do not stand together (act-order), which no format here stores"
        if min(sizes) == max(sizes):
            return f"its groups are of {sizes[0]} columns, which no format here stores"
        return (
            f"its groups are of {min(sizes)} to {max(sizes)} columns, since {n_in} columns are no whole number of "
            f"groups of {max(sizes)}; no format here stores that"
        )

    def coded(self) -> Coded:
        """Codes and parameters as they are, on `grid`.

        Where a step is 0, every code says 0, some of them -0.0. MLX's offset cannot say which, so all codes there
        become the zero point's.
        """
        grid = self.grid
        assert grid is not None, "asked only where there is a grid"
        at = self._column[:: grid.group].long()
        step, zero = self._parameters()
        params = {"step": step[:, at].to(grid.storage.dtype).contiguous()}
        if grid.zero == "integer":
            assert zero is not None, "a grid with zero points has them"
            params["zero"] = zero[:, at].to(torch.uint8).contiguous()
        codes, is_nothing = self.codes(), params["step"] == 0
        if bool(is_nothing.any()):
            params["step"][is_nothing] = 0.0
            zeros = params.get("zero", torch.full_like(params["step"], self._middle, dtype=torch.uint8))
            every = grid.group
            codes = torch.where(
                is_nothing.repeat_interleave(every, 1), zeros.repeat_interleave(every, 1), codes
            )
        return Coded(grid, self.shape, codes, params)

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Steps as stored, and zero points; raises InputError. Read anew each time: all of them are gigabytes."""
        step = self.steps()
        if not torch.isfinite(step).all():
            raise InputError(
                "holds scales that are not finite", where=self.module, todo="get the checkpoint again"
            )
        return step, None if self.zeros is None else self.zeros()

    @cached_property
    def _column(self) -> Tensor:
        """The group of every column, i32[n_in]."""
        if self.index is None:
            return torch.arange(self.shape[1], dtype=torch.int32) // (self.shape[1] // self.n_groups)
        found = self.index()
        if found.min() < 0 or found.max() >= self.n_groups:
            raise InputError(
                f"puts columns into groups {int(found.min())} to {int(found.max())} of {self.n_groups}",
                where=self.module,
            )
        return found

    @cached_property
    def _runs(self) -> int | None:
        """Columns that stand together in one group: the largest number that an affine grid can have, or a row."""
        n_in = self.shape[1]
        column = self._column
        for size in (n_in, *sorted(GROUPS, reverse=True)):
            if n_in % size == 0 and bool((column.view(-1, size) == column[::size, None]).all()):
                return size
        return None


def _narrowest(step: Tensor) -> Literal["f16", "bf16", "f32"]:
    """The float type that holds every one of these f32 steps."""
    if _is_f16(step):
        return "f16"
    return "bf16" if torch.equal(step.to(torch.bfloat16).float(), step) else "f32"


def _is_f16(values: Tensor) -> bool:
    return torch.equal(values.to(torch.float16).float(), values)


def _significand(step: Tensor) -> int:
    """Bits that all steps have in use, if they are at most 8; 0 for more."""
    for bits in (7, 8):
        mantissa, _ = torch.frexp(step)
        scaled = mantissa * (1 << bits)
        if torch.equal(scaled, scaled.round()):
            return bits
    return 0
