"""A tensor of a checkpoint, not read yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """A tensor, read when asked for.

    shape: the checkpoint's shape. dtype: the checkpoint's, bf16, f16 or f32 if these are weights; `load` returns just
    that. read_rows: reads the rows i64[n] of a matrix without the others, where the source can do so.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_rows: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Dense:
        """Wrap a tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def load(self) -> Tensor:
        """Read the tensor, in its own dtype, on the CPU."""
        return self.read()

    def rows(self, index: Tensor) -> Tensor:
        """The rows i64[n], in its own dtype; without the others in memory where there is `read_rows`."""
        return self.load()[index] if self.read_rows is None else self.read_rows(index)

    def slices(self, n_elements: int) -> Iterator[Tensor]:
        """All rows in their order, about `n_elements` weights at a time; at once where there is no `read_rows`."""
        import torch

        if self.read_rows is None:
            yield self.load()
            return
        step = max(1, n_elements // max(1, math.prod(self.shape[1:])))
        for at in range(0, self.shape[0], step):
            yield self.read_rows(torch.arange(at, min(at + step, self.shape[0])))

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)
