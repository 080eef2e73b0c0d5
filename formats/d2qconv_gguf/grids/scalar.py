"""What the scalar grids of ggml have in common: decode = step · (code - zero) - offset, one code a column.

With a table of unequal levels decode = step · table[code]. A subclass says its numbers and turns params into
(step, offset) per group, in f32 and in ggml's own order of operations. In every type here the products
step · (code - zero) and the inner products d·sc, dmin·m are exact in f32 (an f16 has 11 significant bits; scale and
code together at most 12, powers of two aside), so that only the subtraction rounds and fused multiply-adds change
nothing: CPU, CUDA, llama.cpp and gguf-py agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.grids.base import Lattice, Params
from d2qconv.grids.constants import constant
from d2qconv_gguf.grids.ggml import GgmlGrid
from d2qconv_gguf.grids.levels import nearest_code


class ScalarGrid(GgmlGrid):
    """Base of the scalar grids. Subclasses define `affine`, `fit`, and `refit` where they have inner parameters.

    levels: see `d2qconv.grids.base.Grid`. zero: the code that stands for 0 steps. table: the levels by their code,
    ascending, where they are not code - zero.
    """

    levels: int
    zero: int = 0
    table: tuple[float, ...] = ()
    step: int = 1

    def affine(self, params: Params, blocks: slice, groups: slice) -> tuple[Tensor, Tensor | None]:
        """(step, offset) of some groups of some blocks: f32[n_out or 1, n_blocks, n_groups]; offset None for 0."""
        raise NotImplementedError

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See `Grid.fit`."""
        raise NotImplementedError

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:  # noqa: ARG002
        """`params` itself: this type has no inner parameters."""
        return params

    def encode(self, w: Tensor, params: Params, col: int) -> Tensor:
        """Codes u8[n_out, n] of the columns col .. col+n of one block (w: f32[n_out, n]); see `Grid.encode`.

        clamp(round((w + offset) / step) + zero), in f32; ties go to the even number of steps. Where the step is 0
        all codes decode alike and the code is `zero`. With a table: the nearest of its levels to w / step, the lower
        one of two.
        """
        step, offset = self._columns(params, col, w.shape[1])
        r = w.reshape(w.shape[0], step.shape[1], -1)
        if offset is not None:
            r = r + offset
        q = r / torch.where(step == 0, torch.inf, step)
        if self.table:
            return nearest_code(q, self.table).reshape(w.shape)
        q = torch.round(q)
        q = q.clamp_(-self.zero, self.levels - 1 - self.zero).add_(self.zero)
        return q.reshape(w.shape).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, col: int = 0) -> Tensor:
        """Values f32[n_out, n] of codes u8[n_out, n]; see `Grid.decode`."""
        step, offset = self._columns(params, col, codes.shape[1])
        values = codes.reshape(codes.shape[0], step.shape[1], -1)
        if self.table:
            values = constant(self.table, torch.float32, codes.device)[values.to(torch.int32)]
        else:
            values = values.to(torch.float32)
        if self.zero:
            values.sub_(self.zero)
        values.mul_(step)
        if offset is not None:
            values.sub_(offset)
        return values.reshape(codes.shape)

    def lattice(self, params: Params, group: int) -> Lattice:
        """See `Grid.lattice`."""
        step, offset = self.affine(params, slice(0, 1), slice(group, group + 1))
        zero = torch.full((1,), float(self.zero), device=step.device)
        return Lattice(
            step.reshape(-1),
            zero,
            None if offset is None else offset.reshape(-1),
            None,
            self.levels,
            constant(self.table, torch.float32, step.device) if self.table else None,
        )

    def _columns(self, params: Params, col: int, n: int) -> tuple[Tensor, Tensor | None]:
        """(step, offset) for the columns col .. col+n, each f32[n_out or 1, k, 1]: k equal runs of columns."""
        first = 0
        if params["d"].shape[1] == 1:
            first, last = col // self.group, (col + n - 1) // self.group + 1
            step, offset = self.affine(params, slice(0, 1), slice(first, last))
        else:
            step, offset = self.affine(params, slice(None), slice(None))
        start = col - first * self.group
        return self._runs(step, start, n), None if offset is None else self._runs(offset, start, n)

    def _runs(self, per_group: Tensor, start: int, n: int) -> Tensor:
        """f32[n_out, n_blocks, n_groups] to f32[n_out, k, 1] for columns start .. start+n."""
        flat = per_group.flatten(1)
        is_whole = start == 0 and n == flat.shape[1] * self.group
        if flat.shape[1] > 1 and not is_whole:
            flat = flat.repeat_interleave(self.group, dim=1)[:, start : start + n]
        return flat[:, :, None]
