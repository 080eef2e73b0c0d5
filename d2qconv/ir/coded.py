"""A quantized matrix.

It has no arithmetic. It can be decoded, its rows can be picked, and that is all: whatever is written
to a file is what the quantizer chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from d2qconv.grids.base import Exactness, Grid, Params, take_rows

#: Values that `decoded_rows` decodes at a time.
_PIECE = 1 << 19


@dataclass(frozen=True)
class Coded:
    """A quantized matrix.

    shape: (n_out, n_in). codes: [n_out, n_in / grid.step] in `code_dtype(grid.levels)`.
    params: see `d2qconv.grids.base`.
    """

    grid: Grid
    shape: tuple[int, int]
    codes: Tensor
    params: Params

    def decode(self) -> Tensor:
        """The weights, f32[n_out, n_in], exactly as a reader of the package will see them."""
        return self.grid.decode(self.codes, self.params)

    def take_rows(self, index: Tensor) -> Coded:
        """Rows `index` (i64[n]) in that order. Exact."""
        return replace(
            self,
            shape=(len(index), self.shape[1]),
            codes=self.codes[index],
            params=take_rows(self.params, index),
        )

    def rows(self, some: slice) -> Coded:
        """Consecutive rows, without a copy. Exact."""
        codes = self.codes[some]
        shared = {name: p.shape[0] == 1 for name, p in self.params.items()}
        params = {name: p if shared[name] else p[some] for name, p in self.params.items()}
        return replace(self, shape=(len(codes), self.shape[1]), codes=codes, params=params)

    def decoded_rows(self) -> Iterator[Tensor]:
        """The weights, f32[rows, n_in] of some rows at a time: as many as fit into a processor's cache."""
        n_out, n_in = self.shape
        step = max(1, _PIECE // n_in)
        for at in range(0, n_out, step):
            yield self.rows(slice(at, at + step)).decode()

    def scale_rows(self, scale: Tensor) -> tuple[Coded, Exactness]:
        """Every row i times scale_i (f32[n_out]), codes unchanged, steps rounded to storage precision."""
        params, exactness = self.grid.scale_rows(self.params, scale)
        return replace(self, params=params), exactness

    def to(self, device: torch.device | str) -> Coded:
        """The same matrix on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            params={name: p.to(device) for name, p in self.params.items()},
        )


def cat_rows(parts: Sequence[Coded]) -> Coded:
    """One matrix of the rows of several on the same grid, whose parameters are each row's own. Exact."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return replace(
        first,
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
        codes=torch.cat([part.codes for part in parts]),
        params={name: torch.cat([part.params[name] for part in parts]) for name in first.params},
    )


#: A quantized or float tensor, in memory, in the precision that the package stores.
Held: TypeAlias = Coded | Tensor


def decoded(held: Held) -> Tensor:
    """The values of a tensor in storage, f32."""
    return held.decode() if isinstance(held, Coded) else held.float()
