"""The types without an offset: decode = step · level, the step of either sign.

Levels are code - zero, or the 16 unequal ones of the IQ4 types. Parameters: `d` f16[n_out, n_blocks], which may be
negative; types with inner scales also `sc` u8[n_out, n_blocks, groups], an integer stored as its distance from the
lowest one (sc - 32, or sc - 128 for Q6_K). Source of the values: dequantize_row_* in ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.grids.affine import BITS, GROUPS, AffineGrid
from d2qconv.grids.base import Params
from d2qconv.grids.exact import span_of
from d2qconv_gguf.grids.levels import IQ4_LEVELS
from d2qconv_gguf.grids.problem import Problem, has_kernels, row_chunks
from d2qconv_gguf.grids.scalar import ScalarGrid
from d2qconv_gguf.grids.symmetric_search import (
    SymmetricShape,
    fit_block,
    fit_single,
    residual,
    try_all_inner,
)


class SignedK(ScalarGrid):
    """Base of the types with signed inner scales: step = d · (sc + lowest inner integer)."""

    search: SymmetricShape

    def affine(self, params: Params, blocks: slice, groups: slice) -> tuple[Tensor, Tensor | None]:
        """Give step = d · (sc + lowest inner integer), exact in f32."""
        sc = params["sc"][:, blocks, groups].to(torch.float32) + self.search.inner[0]
        return params["d"][:, blocks, None].to(torch.float32) * sc, None

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See `Grid.fit` and `symmetric_search`."""
        if has_kernels(w):
            from d2qconv_gguf.grids import symmetric_triton

            return symmetric_triton.fit(w, importance, self.search, self.group)
        ds, scs = [], []
        for rows in row_chunks(w):
            p = Problem.make(w[rows], importance, self.group)
            found = fit_block(p, self.search)
            ds.append(p.f16(found.d)[:, None])
            scs.append((found.sc.t()[:, None] - self.search.inner[0]).to(torch.uint8))
        return {"d": torch.cat(ds), "sc": torch.cat(scs)}

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:
        """Choose sc of one group again under the given d; see `Grid.refit`.

        All integers are tried, and compared with the present one by the true weighted error: it never grows.
        """
        if has_kernels(w):
            from d2qconv_gguf.grids import symmetric_triton

            return symmetric_triton.refit(params, group, w, importance, self.search)
        chosen, lowest = [], self.search.inner[0]
        for rows in row_chunks(w):
            p = Problem.make(w[rows], importance, self.group)
            d = params["d"][rows, 0].to(torch.float32) / p.scale
            error, sc = try_all_inner(p, d, self.search)
            old = params["sc"][rows, :, group].t().to(torch.float32) + lowest
            old_error = residual(p, (old * d)[None], self.search)[0]
            chosen.append(torch.where(error < old_error, sc, old)[0] - lowest)
        new = params["sc"].clone()
        new[:, 0, group] = torch.cat(chosen).to(torch.uint8)
        return {**params, "sc": new}


class Q3K(SignedK):
    """3-bit codes, signed 6-bit sc per 16 columns: 110 bytes per 256. decode = d·(sc - 32)·(code - 4)."""

    id = "q3_k"
    block, group, levels, zero, block_bytes = 256, 16, 8, 4, 110
    search = SymmetricShape(-4, 3, tuple(2.2 + 0.28 * k for k in range(10)))


class Q6K(SignedK):
    """6-bit codes, 8-bit sc per 16 columns: 210 bytes per 256. decode = d·(sc - 128)·(code - 32).

    The file holds sc - 128 as i8. d·(sc - 128) has 18 significant bits and the product 23: exact in f32.
    """

    id = "q6_k"
    block, group, levels, zero, block_bytes = 256, 16, 64, 32, 210
    search = SymmetricShape(-32, 31, tuple(28.4 + 0.4 * k for k in range(12)), inner=(-128, 127))


class IQ4XS(SignedK):
    """16 unequal levels, signed 6-bit sc per 32 columns: 136 bytes per 256. decode = d·(sc - 32)·level[code].

    d·(sc - 32) has 16 significant bits and the product 23: exact in f32.
    """

    id = "iq4_xs"
    block, group, levels, block_bytes = 256, 32, 16, 136
    table = IQ4_LEVELS
    search = SymmetricShape(-127, 113, tuple(88.0 + 3.2 * k for k in range(14)), table=IQ4_LEVELS)


class SingleStep(ScalarGrid):
    """Base of the types with one f16 step per block."""

    search: SymmetricShape

    @property
    def affine_grid(self) -> AffineGrid | None:
        """Its values are an affine grid's where the levels are equal and a block has one step and no inner ones."""
        bits = self.levels.bit_length() - 1
        if self.table or self.block != self.group or self.group not in GROUPS or bits not in BITS:
            return None
        return AffineGrid(bits, self.group, "none" if self.zero == self.levels // 2 else "integer", "f16")

    def affine_params(self, params: Params) -> Params:
        """The same steps, and the zero point where it is not the middle code; see `d2qconv.grids.exact`."""
        step = params["d"]
        if self.zero == self.levels // 2:
            return {"step": step}
        return {"step": step, "zero": torch.full_like(step, self.zero, dtype=torch.uint8)}

    def contains(self, given: AffineGrid) -> bool:
        """Whether code - zero of `given`, or its negative, is within the levels here; see `Containing`."""
        return self._sign(given) != 0

    def contained(self, given: AffineGrid, codes: Tensor, params: Params) -> tuple[Tensor, Params]:
        """Levels moved to the zero here, the step's sign turned with them where only so they fit."""
        sign, n = self._sign(given), codes.shape[0]
        zero = params["zero"].to(torch.int16) if given.zero == "integer" else given.levels // 2
        step = params["step"].expand(n, -1).repeat_interleave(given.group // self.group, dim=1)
        levels = codes.to(torch.int16).view(n, -1, given.group)
        levels = (levels - (zero[:, :, None] if isinstance(zero, Tensor) else zero)) * sign + self.zero
        return levels.view(n, -1).to(torch.uint8), {"d": (step * sign).contiguous()}

    def _sign(self, given: AffineGrid) -> int:
        """1 or -1: by which the levels of `given` fit; 0 if by none."""
        if self.table or given.zero == "float" or given.scale != "f16" or given.group % self.block:
            return 0
        low, high = span_of(given)
        least, most = -self.zero, self.levels - 1 - self.zero
        if least <= low and high <= most:
            return 1
        return -1 if least <= -high and -low <= most else 0

    def affine(self, params: Params, blocks: slice, groups: slice) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        """Give step = d."""
        return params["d"][:, blocks, None].to(torch.float32), None

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See `Grid.fit` and `symmetric_search`."""
        if has_kernels(w):
            from d2qconv_gguf.grids import symmetric_triton

            return symmetric_triton.fit_single(w, importance, self.search)
        ds = []
        for rows in row_chunks(w):
            p = Problem.make(w[rows], importance, self.group)
            ds.append(p.f16(fit_single(p, self.search))[:, None])
        return {"d": torch.cat(ds)}


class Q40(SingleStep):
    """4-bit codes: 18 bytes per 32. decode = d·(code - 8)."""

    id = "q4_0"
    block, group, levels, zero, block_bytes = 32, 32, 16, 8, 18
    search = SymmetricShape(-8, 7, tuple(5.0 + 0.2 * k for k in range(20)))


class Q50(SingleStep):
    """5-bit codes: 22 bytes per 32. decode = d·(code - 16)."""

    id = "q5_0"
    block, group, levels, zero, block_bytes = 32, 32, 32, 16, 22
    search = SymmetricShape(-16, 15, tuple(12.0 + 0.3 * k for k in range(20)))


class IQ4NL(SingleStep):
    """16 unequal levels: 18 bytes per 32. decode = d·level[code]."""

    id = "iq4_nl"
    block, group, levels, block_bytes = 32, 32, 16, 18
    table = IQ4_LEVELS
    search = SymmetricShape(-127, 113, tuple(64.0 * 1.028**k for k in range(32)), table=IQ4_LEVELS)


class Q20(SingleStep):
    """2-bit codes: 18 bytes per 64. decode = d·(code - 1), so -d, 0, d and 2d, d of either sign.

    ggml's own quantizer sets d to the largest weight and never uses code 3; every reader knows it.
    """

    id = "q2_0"
    block, group, levels, zero, block_bytes = 64, 64, 4, 1, 18
    search = SymmetricShape(-1, 2, tuple(1.25 * 1.1**k for k in range(16)), n_iterations=4)


class TQ20(SingleStep):
    """2-bit codes: 66 bytes per 256. decode = d·(code - 1), as Q2_0. ggml means it for ternary weights."""

    id = "tq2_0"
    block, group, levels, zero, block_bytes = 256, 256, 4, 1, 66
    search = SymmetricShape(-1, 2, tuple(1.25 * 1.12**k for k in range(16)), n_iterations=4)


class Q80(SingleStep):
    """8-bit codes: 34 bytes per 32. decode = d·(code - 128); the file holds code - 128 as i8.

    ggml's own quantizer never writes -128; every reader knows it.
    """

    id = "q8_0"
    block, group, levels, zero, block_bytes = 32, 32, 256, 128, 34
    search = SymmetricShape(-128, 127, tuple(120.0 + 0.57 * k for k in range(16)))
