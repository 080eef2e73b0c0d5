"""The fitting problem of one block, brought into a form in which it is quick and safe to solve.

What. Minimise Σ_j importance_j (w_ij - decode_ij)² for every row i of one block, where every group of columns has
its own (step, offset) and decode = step · q - offset with q one of `n` consecutive integers.

How. Rows come last, so that sums over a group's few columns run over long contiguous vectors: `f32[G, g, n]` for G
groups of g columns and n rows. Rows are divided by a power of two near their largest weight, which changes no
rounding but keeps squares in range. Importance is normalised to sum to 1 in every group; `share` keeps the group's
part of the whole. Candidates get a leading dimension K and are worked off in chunks of bounded size.

Which dtypes. f32 throughout; parameters are rounded to storage (f16, integers) inside the search, never after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from d2qconv_gguf.grids.levels import nearest_level

#: Largest finite f16, and the smallest one above zero.
F16_MAX = 65504.0
F16_TINY = 2.0**-24
#: A row whose largest weight lies below this cannot be told from zero in any ggml type.
SMALLEST_SCALE = 2.0**-40
LARGEST_SCALE = 2.0**120
#: Elements of one temporary: about the second-level cache of a CPU core; 128 MiB on a GPU.
_CPU_ELEMENTS = 2**16
_GPU_ELEMENTS = 2**25


@dataclass(frozen=True)
class Problem:
    """One block, or one group of it, ready for a search.

    w: f32[G, g, n], rows divided by `scale`. a: f32[G, g, 1], importance, sums to 1 in every group.
    share: f32[G, 1], the group's part of the importance, largest 1. scale: f32[n], powers of two.
    aw: f32[G, g, n] = a·w. sum_w, sum_ww: f32[G, n] = Σ a w, Σ a w².
    """

    w: Tensor
    a: Tensor
    share: Tensor
    scale: Tensor
    aw: Tensor
    sum_w: Tensor
    sum_ww: Tensor

    @classmethod
    def make(cls, w: Tensor, importance: Tensor, group: int) -> Problem:
        """w: f32[n_out, columns]; importance: f32[columns], not negative; columns a multiple of `group`."""
        rows, columns = w.shape
        largest = w.abs().amax(1).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        scale = torch.exp2(torch.floor(torch.log2(largest)))
        grouped = (w / scale[:, None]).t().reshape(columns // group, group, rows).contiguous()
        a = importance.to(w.dtype).reshape(columns // group, group, 1)
        a = a / a.amax().clamp_min(torch.finfo(w.dtype).tiny)
        share = a.sum(1)
        # A group that nobody asks for is fitted evenly.
        a = torch.where(share[:, :, None] > 1e-30, a / share[:, :, None].clamp_min(1e-30), 1.0 / group)
        aw = grouped * a
        share = share / share.amax().clamp_min(1e-30)
        return cls(grouped, a, share, scale, aw, aw.sum(1), (aw * grouped).sum(1))

    @property
    def n_groups(self) -> int:
        """Groups of columns."""
        return self.w.shape[0]

    def storable(self, x: Tensor) -> Tensor:
        """Round x (f32[..., n], in scaled units) to the nearest finite f16, but a nonzero x never to zero.

        Zero would be the worst choice for a row of tiny weights: the inner integers can still be 0 themselves.
        """
        y = self.f16(x).to(torch.float32)
        tiny = torch.copysign(torch.full_like(y, F16_TINY), x)
        return torch.where((y == 0) & (x != 0), tiny, y) / self.scale

    def f16(self, x: Tensor) -> Tensor:
        """Convert x (f32[..., n], in scaled units) to f16 in the units of the weights, saturating."""
        return (x * self.scale).clamp(-F16_MAX, F16_MAX).to(torch.float16)

    def residual(
        self,
        step: Tensor,
        offset: Tensor | None,
        lowest: int,
        highest: int,
        table: tuple[float, ...] = (),
    ) -> Tensor:
        """Σ_j a_j (w_j - nearest decoded value)² per group and row: f32[K, G, n].

        step, offset: f32[K, G, n]. lowest, highest, table: see `encoded`.
        """
        r = self.w if offset is None else self.w + offset[:, :, None]
        q = encoded(r, step, lowest, highest, table)
        return torch.addcmul(r, q, step[:, :, None], value=-1).square_().mul_(self.a).sum(2)

    def chunks(self, candidates: Tensor) -> Iterator[Tensor]:
        """Cut candidates [K, ...] into pieces whose temporaries have bounded size."""
        limit = _CPU_ELEMENTS if self.w.device.type == "cpu" else _GPU_ELEMENTS
        size = max(1, limit // self.w.numel())
        for start in range(0, len(candidates), size):
            yield candidates[start : start + size]


def encoded(r: Tensor, step: Tensor, lowest: int, highest: int, table: tuple[float, ...] = ()) -> Tensor:
    """Nearest integers lowest..highest, or levels of `table`, to r / step; the one nearest to 0 where step is 0.

    r: f32[G, g, n] or f32[K, G, g, n]; step: f32[K, G, n]. Returns f32[K, G, g, n].
    """
    inverse = torch.where(step == 0, 0.0, 1.0 / step)[:, :, None]
    # A step far below the weights would overflow to inf, and inf · 0 is not a number.
    inverse = inverse.clamp(-1e30, 1e30)
    if table:
        return nearest_level(r * inverse, table)
    return (r * inverse).round_().clamp_(lowest, highest)


def keep_best(best: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Elementwise, the tuple whose first entry (the error) is smaller; `best` on a tie or if `found` is nan."""
    is_better = found[0] < best[0]
    return tuple(torch.where(is_better, f, b) for f, b in zip(found, best, strict=True))


def best_of(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of candidates along dimension 0, the one with the smallest first entry, elementwise."""
    if len(found[0]) == 1:
        return tuple(f[0] for f in found)
    index = torch.nan_to_num(found[0], nan=torch.inf).argmin(0, keepdim=True)
    return tuple(f.gather(0, index).squeeze(0) for f in found)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def has_kernels(w: Tensor) -> bool:
    """Whether w is on a device whose fits are Triton kernels (`affine_triton`, `symmetric_triton`): CUDA with Triton.

    PyTorch's wheels for CUDA bring Triton along. Without it the PyTorch code does the same, launch by launch.
    """
    return w.is_cuda and _has_triton()


def row_chunks(w: Tensor) -> list[slice]:
    """Slices of the rows of w (f32[n_out, columns]): about one temporary on a CPU, a sixteenth of one on a GPU."""
    limit = _CPU_ELEMENTS if w.device.type == "cpu" else _GPU_ELEMENTS // 16
    size = max(1, limit // w.shape[1])
    return [slice(start, start + size) for start in range(0, w.shape[0], size)]
