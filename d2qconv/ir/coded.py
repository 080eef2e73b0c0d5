"""A quantized matrix.

It has no arithmetic. It can be decoded, its rows can be picked, and that is all: whatever is written
to a file is what the quantizer chose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from d2qconv.grids.base import Exactness, Grid, Params, take_rows


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


#: A quantized or float tensor, in memory, in the precision that the package stores.
Held: TypeAlias = Coded | Tensor


def decoded(held: Held) -> Tensor:
    """The values of a tensor in storage, f32."""
    return held.decode() if isinstance(held, Coded) else held.float()
