"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: values = d · (s + ½) · unit · word · signs.

A word is 8 (IQ2) or 4 (IQ3) magnitudes out of a table (`code_words`), d one f16 for 256 columns, s a 4-bit integer for
16 or 32. Parameters: `d` f16[n_out, n_blocks]; `s` u8[n_out, n_blocks, groups]. Source of the values:
dequantize_row_iq2_xxs … dequantize_row_iq3_s in ggml-quants.c.

Every product is exact in f32: 11 bits of d, 5 of s + ½, at most 6 of a magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.grids.base import Params, diagonal_metric
from d2qconv_gguf.grids import code_words as cw
from d2qconv_gguf.grids.code_fit import TOP, fit_block
from d2qconv_gguf.grids.code_search import Book, nearest
from d2qconv_gguf.grids.ggml import GgmlGrid
from d2qconv_gguf.grids.problem import Problem, row_chunks

#: How far from the present s the sweep looks when it reaches a group.
_REACH = 2


class CodeBookGrid(GgmlGrid):
    """Base of them. unit: see the module. spread: of `code_fit`."""

    block = 256
    book: Book
    unit: float
    spread: tuple[float, float]

    @property
    def step(self) -> int:
        """Columns of a code."""
        return self.book.step

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.book.n_codes

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See `Grid.fit` and `code_fit`. d is not negative."""
        parts = [self._fit_rows(w[rows], importance) for rows in row_chunks(w)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit_rows(self, w: Tensor, importance: Tensor) -> dict[str, Tensor]:
        p = Problem.make(w, importance, self.group)
        d, s = fit_block(p, self.book, self.unit, self.spread)
        return {"d": p.f16(d)[:, None], "s": s.t()[:, None].to(torch.uint8)}

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:
        """`refit_vectors` under the importance."""
        return self.refit_vectors(params, group, w, diagonal_metric(importance, self.step))

    def refit_vectors(self, params: Params, group: int, w: Tensor, metric: Tensor) -> Params:
        """Choose s of one group again among its neighbours, by the cost of the codes that each gives."""
        present = params["s"][:, 0, group].long()
        reach = torch.arange(-_REACH, _REACH + 1, device=w.device)
        # The present one comes first, so that it stays where others are as good.
        tried = (present[:, None] + reach[reach.abs().argsort(stable=True)]).clamp(0, TOP)
        scale = params["d"].float() * (tried + 0.5) * self.unit
        cost = torch.zeros_like(scale)
        for number, run in enumerate(torch.split(w, self.step, dim=1)):
            u = _in_units(run[:, None], scale[:, :, None]).flatten(0, 1)
            found = nearest(self.book, u, metric[number])[1]
            cost += torch.where(scale == 0, 0.0, found.view(scale.shape) * scale.square())
        s = params["s"].clone()
        s[:, 0, group] = tried.gather(1, cost.argmin(1, keepdim=True))[:, 0].to(torch.uint8)
        return {**params, "s": s}

    def encode(self, w: Tensor, params: Params, col: int) -> Tensor:
        """Codes i32[n_out, n / step] nearest to w; see `Grid.encode`."""
        eye = torch.eye(self.step, device=w.device)
        return self.encode_vectors(w, params, col, eye.expand(w.shape[1] // self.step, -1, -1))

    def encode_vectors(self, w: Tensor, params: Params, col: int, metric: Tensor) -> Tensor:
        """Codes i32[n_out, n / step] of least cost; see `VectorGrid.encode_vectors`."""
        scale = self._scales(params, col, w.shape[1])
        runs = _in_units(w.reshape(len(w), -1, self.step), scale[:, :, None])
        found = [nearest(self.book, runs[:, i], metric[i])[0] for i in range(runs.shape[1])]
        return torch.stack(found, 1)

    def decode(self, codes: Tensor, params: Params, col: int = 0) -> Tensor:
        """Values f32[n_out, n] of codes i32[n_out, n / step]; see `Grid.decode`."""
        scale = self._scales(params, col, codes.shape[1] * self.step)
        return (self.book.values(codes) * scale[:, :, None]).flatten(1)

    def _scales(self, params: Params, col: int, n: int) -> Tensor:
        """Scales d (s + ½) unit of the runs of the columns col .. col+n: f32[n_out, n / step]."""
        first, last = col // self.group, -(-(col + n) // self.group)
        s = params["s"][:, 0:1, first:last] if params["d"].shape[1] == 1 else params["s"]
        scale = params["d"].float()[:, :, None] * (s.float() + 0.5) * self.unit
        runs = scale.flatten(1).repeat_interleave(self.group // self.step, dim=1)
        start = (col - first * self.group) // self.step
        return runs[:, start : start + n // self.step]


def _in_units(w: Tensor, scale: Tensor) -> Tensor:
    """Weights in units of their scale; 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, w / torch.where(scale == 0, 1.0, scale))


class IQ2XXS(CodeBookGrid):
    """256 words of 8, even minuses, s per 32 columns: 66 bytes per 256."""

    id = "iq2_xxs"
    group, block_bytes, unit, spread = 32, 66, 0.25, (0.7, 1.9)
    book = Book(cw.IQ2_XXS, cw.IQ2_LEVELS, 8, 8, is_even=True)


class IQ2XS(CodeBookGrid):
    """512 words of 8, even minuses, s per 16 columns: 74 bytes per 256."""

    id = "iq2_xs"
    group, block_bytes, unit, spread = 16, 74, 0.25, (0.7, 1.9)
    book = Book(cw.IQ2_XS, cw.IQ2_LEVELS, 8, 8, is_even=True)


class IQ2S(CodeBookGrid):
    """1024 words of 8, every sign free, s per 16 columns: 82 bytes per 256."""

    id = "iq2_s"
    group, block_bytes, unit, spread = 16, 82, 0.25, (0.7, 1.9)
    book = Book(cw.IQ2_S, cw.IQ2_LEVELS, 8, 8, is_even=False)


class IQ3XXS(CodeBookGrid):
    """Two of 256 words of 4, even minuses in 8, s per 32 columns: 98 bytes per 256."""

    id = "iq3_xxs"
    group, block_bytes, unit, spread = 32, 98, 0.5, (0.85, 2.4)
    book = Book(cw.IQ3_XXS, cw.IQ3_XXS_LEVELS, 4, 8, is_even=True)


class IQ3S(CodeBookGrid):
    """512 words of 4, every sign free, s per 32 columns: 110 bytes per 256."""

    id = "iq3_s"
    group, block_bytes, unit, spread = 32, 110, 2.0, (0.85, 2.4)
    book = Book(cw.IQ3_S, cw.IQ3_S_LEVELS, 4, 4, is_even=False)
