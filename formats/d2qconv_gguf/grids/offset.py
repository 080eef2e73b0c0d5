"""Q4_1: decode = d·code + m, an f16 step and an f16 offset per 32 columns.

Parameters: `d` and `m` f16[n_out, n_blocks], both of either sign. d·code has 15 significant bits: exact in f32, so that
only the sum rounds. Source of the values: dequantize_row_q4_1 in ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Params
from d2qconv.grids.exact import FoundGrid
from d2qconv_gguf.grids.scalar import ScalarGrid

#: The same values, the offset of the other sign.
_SAME = AffineGrid(4, 32, "float", "f16")


class Q41(ScalarGrid):
    """4-bit codes and an offset: 20 bytes per 32. decode = d·code + m."""

    id = "q4_1"
    block, group, levels, block_bytes = 32, 32, 16, 20
    scales = ("d", "m")

    def affine(self, params: Params, blocks: slice, groups: slice) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        """Give step = d and offset = -m."""
        return (
            params["d"][:, blocks, None].to(torch.float32),
            -params["m"][:, blocks, None].to(torch.float32),
        )

    def contains(self, given: AffineGrid) -> bool:
        """Whether codes fit, and -step · zero is an f16 everywhere; see `d2qconv.grids.exact.Containing`."""
        is_fit = given.zero != "float" and given.scale == "f16" and given.levels <= self.levels
        return (
            is_fit
            and isinstance(given, FoundGrid)
            and given.has_f16_offsets
            and given.group % self.block == 0
        )

    def contained(self, given: AffineGrid, codes: Tensor, params: Params) -> tuple[Tensor, Params]:
        """The same codes, m = -step · zero."""
        zero = params["zero"] if given.zero == "integer" else given.levels // 2
        m = (params["step"].to(torch.float32) * zero).neg().to(torch.float16)
        both = {"d": params["step"], "m": m}
        repeats = given.group // self.block
        return codes, {
            name: p.expand(len(codes), -1).repeat_interleave(repeats, dim=1) for name, p in both.items()
        }

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See `Grid.fit` and `d2qconv.grids.affine_fit`."""
        found = _SAME.fit(w, importance)
        return {"d": found["step"], "m": -found["offset"]}
