"""Q2_K, Q4_K and Q5_K: decode = d·sc·q - dmin·m, with f16 d and dmin per 256 columns, integers sc and m per group.

Parameters: `d`, `dmin` f16[n_out, n_blocks]; `sc`, `m` u8[n_out, n_blocks, groups]. Source of the values:
dequantize_row_q2_K, _q4_K and _q5_K in ggml-quants.c.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from d2qconv.grids.base import Params
from d2qconv_gguf.grids.affine_search import AffineShape, choose_inner, fit_block, free_fit
from d2qconv_gguf.grids.problem import Problem, has_kernels, row_chunks
from d2qconv_gguf.grids.scalar import ScalarGrid

#: Where the range is cut at either end, as fractions of it: few levels want it cut far, many hardly at all.
_CUTS_4_LEVELS = (0.0, 0.07, 0.14, 0.21, 0.3)
_CUTS_16_LEVELS = (-0.03, -0.01, 0.01, 0.03, 0.05, 0.07, 0.1)
_CUTS_32_LEVELS = (-0.015, -0.005, 0.005, 0.015, 0.025, 0.035, 0.05)


class AffineK(ScalarGrid):
    """Base of them. `search` holds the sizes of the integers."""

    scales = ("d", "dmin")
    search: AffineShape

    def affine(self, params: Params, blocks: slice, groups: slice) -> tuple[Tensor, Tensor | None]:
        """Give step = d·sc and offset = dmin·m, both exact in f32."""
        step = _product(params["d"], params["sc"], blocks, groups)
        return step, _product(params["dmin"], params["m"], blocks, groups)

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See `Grid.fit` and `affine_search`. d and dmin are not negative."""
        if has_kernels(w):
            from d2qconv_gguf.grids import affine_triton

            return affine_triton.fit(w, importance, self.search, self.group)
        parts = [self._fit_rows(w[rows], importance) for rows in row_chunks(w)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit_rows(self, w: Tensor, importance: Tensor) -> dict[str, Tensor]:
        p = Problem.make(w, importance, self.group)
        found = fit_block(p, self.search)
        return {
            "d": p.f16(found.d)[:, None],
            "dmin": p.f16(found.dmin)[:, None],
            "sc": found.sc.t()[:, None].to(torch.uint8),
            "m": found.m.t()[:, None].to(torch.uint8),
        }

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:
        """Choose (sc, m) of one group again under the given d and dmin; see `Grid.refit`.

        Candidates are the integers around the least-squares (step, offset) and the present pair, compared by the true
        weighted error: it never grows. d < 0 (a row scaled by a negative number) is searched like any other d, but
        only the present pair is sure to be considered.
        """
        if has_kernels(w):
            from d2qconv_gguf.grids import affine_triton

            return affine_triton.refit(params, group, w, importance, self.search)
        parts = [
            self._refit_rows({name: p[rows] for name, p in params.items()}, group, w[rows], importance)
            for rows in row_chunks(w)
        ]
        sc, m = params["sc"].clone(), params["m"].clone()
        sc[:, 0, group] = torch.cat([part[0] for part in parts])
        m[:, 0, group] = torch.cat([part[1] for part in parts])
        return {**params, "sc": sc, "m": m}

    def _refit_rows(self, params: Params, group: int, w: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """The new (sc, m), u8[n_out] each."""
        p = Problem.make(w, importance, self.group)
        d, dmin = (params[name][:, 0].to(torch.float32) / p.scale for name in ("d", "dmin"))
        free = free_fit(p, self.search)
        error, sc, m = choose_inner(p, (d, dmin), (free.step, free.q), self.search, reach=4)
        old_sc, old_m = (params[name][:, :, group].t().to(torch.float32) for name in ("sc", "m"))
        old = p.residual((old_sc * d)[None], (old_m * dmin)[None], 0, self.search.top_code)[0]
        is_better = error < old
        sc, m = torch.where(is_better, sc, old_sc), torch.where(is_better, m, old_m)
        return sc[0].to(torch.uint8), m[0].to(torch.uint8)


def _product(outer: Tensor, inner: Tensor, blocks: slice, groups: slice) -> Tensor:
    """f16[n, n_blocks] times u8[n, n_blocks, n_groups] in f32, of some blocks and groups."""
    return outer[:, blocks, None].to(torch.float32) * inner[:, blocks, groups].to(torch.float32)


class Q2K(AffineK):
    """2-bit codes, 4-bit sc and m per 16 columns: 84 bytes per 256."""

    id = "q2_k"
    block, group, levels, block_bytes = 256, 16, 4, 84
    search = AffineShape(3, 15, tuple(product(_CUTS_4_LEVELS, _CUTS_4_LEVELS)), n_iterations=2)


class Q4K(AffineK):
    """4-bit codes, 6-bit sc and m per 32 columns: 144 bytes per 256."""

    id = "q4_k"
    block, group, levels, block_bytes = 256, 32, 16, 144
    search = AffineShape(15, 63, tuple(product(_CUTS_16_LEVELS, _CUTS_16_LEVELS)), n_iterations=2)


class Q5K(AffineK):
    """5-bit codes, 6-bit sc and m per 32 columns: 176 bytes per 256."""

    id = "q5_k"
    block, group, levels, block_bytes = 256, 32, 32, 176
    search = AffineShape(31, 63, tuple(product(_CUTS_32_LEVELS, _CUTS_32_LEVELS)), n_iterations=2)
