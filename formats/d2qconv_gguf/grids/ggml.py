"""What all grids of ggml have in common: an f16 scale or two a block, rows cut into whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from d2qconv.errors import Refusal
from d2qconv.grids.base import Exactness, Lattice, Params, blocks_refusal
from d2qconv.grids.scaling import scaled_rows


class GgmlGrid:
    """Base of the grids here.

    id, block, group: see `d2qconv.grids.base.Grid`. block_bytes: bytes of one stored block. scales: the f16
    parameters, in which decode is linear.
    """

    id: str
    block: int
    group: int
    block_bytes: int
    scales: tuple[str, ...] = ("d",)

    def __repr__(self) -> str:
        """`<grid q2_k>`."""
        return f"<grid {self.id}>"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, parameters included."""
        return 8 * self.block_bytes / self.block

    def accepts(self, shape: Sequence[int]) -> Refusal | None:
        """Why a matrix `[n_out, n_in]` cannot be stored on this grid, or None."""
        todo = "no quantized type here fits; store this tensor as f16"
        if shape and shape[-1] % 32 == 0:
            wider = "q2_0, whose blocks have 64 columns, or " if shape[-1] % 64 == 0 else ""
            todo = f"use {wider}iq4_nl, q4_0 or q8_0, whose blocks have 32 columns"
        return blocks_refusal(self.id, self.block, shape, todo)

    def lattice(self, params: Params, group: int) -> Lattice | None:  # noqa: ARG002
        """None: codes of several columns have no lattice."""
        return None

    def scale_rows(self, params: Params, scale: Tensor) -> tuple[Params, Exactness]:
        """The f16 parameters times scale_i, rounded to storage; see `Grid.scale_rows` and `scaled_rows`."""
        return scaled_rows(params, self.scales, scale, self.id)
