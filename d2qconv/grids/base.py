"""What a quantization grid is.

A grid says which VALUES a weight can take; the codec of an export format says which BYTES hold them.
A quantized matrix is `codes` (which level) and `params` (which grid instance: steps, offsets), both in the
precision that the file stores. `decode` is the only way from them to values, and nothing downstream rounds.

Shapes. A matrix is `f32[n_out, n_in]`. Along its rows it is cut into blocks of `grid.block` columns, the unit
that owns a parameter set; inside a block, `grid.group` columns share one (step, offset); one code covers
`grid.step` columns. `Params` maps a parameter's name to a tensor `[n_out, n_blocks, ...]` in storage dtype;
a leading 1 instead of n_out means that all rows share it. So rows and blocks are cut the same way for every
grid, and no grid needs code for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard, runtime_checkable

from d2qconv.errors import Refusal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: name of a parameter -> tensor [n_out or 1, n_blocks, ...] in storage dtype
Params: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True)
class Exactness:
    """What a parameter operation rounded: the largest relative change of a step that it did not ask for."""

    max_relative_error: float

    @property
    def is_exact(self) -> bool:
        """Whether nothing was rounded."""
        return self.max_relative_error == 0.0


@dataclass(frozen=True)
class Lattice:
    """The levels of one group of a scalar grid, row by row: value = step · (code - zero) - offset, in that order, f32.

    step: f32[n_out] or f32[1]. zero: integers as f32[n_out] or f32[1]. offset: f32[n_out], f32[1] or None for 0.
    column_scale: f32[group] or None; the value times this, rounded once more. levels: number of codes, from 0.
    The nearest code to w is clamp(round((w / column_scale + offset) / step), -zero, levels - 1 - zero) + zero, ties to
    the even number of steps, and `zero` where the step is 0.
    table: f32[levels] or None: unequal levels, ascending. Then value = step · table[code] - offset, and the nearest
    code is the number of boundaries (table[i] + table[i + 1]) / 2 below the quotient, which is 0 where the step is 0.
    """

    step: Tensor
    zero: Tensor
    offset: Tensor | None
    column_scale: Tensor | None
    levels: int
    table: Tensor | None = None


@runtime_checkable
class Grid(Protocol):
    """The values that one storage type can represent. Stateless; equal grids are the same object."""

    @property
    def id(self) -> str:
        """Unique name, e.g. `q2_k`."""

    @property
    def block(self) -> int:
        """Columns that own one parameter set."""

    @property
    def group(self) -> int:
        """Columns that share one (step, offset); divides `block`."""

    @property
    def step(self) -> int:
        """Columns covered by one code; divides `group`. 1 for scalar grids; more for a `VectorGrid`."""

    @property
    def levels(self) -> int:
        """Number of codes, all of them legal: at most 256 for scalar grids, 2^31 for others."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, parameters included."""

    @property
    def scales(self) -> tuple[str, ...]:
        """The float parameters in which `decode` is jointly linear, codes and all other parameters being fixed.

        They are what a last pass may still change (`d2qconv.refine`).
        """

    def accepts(self, shape: Sequence[int]) -> Refusal | None:
        """Why a matrix `[n_out, n_in]` cannot be stored on this grid, or None."""

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """Parameters of ONE block that minimise Σ_j importance_j (w_ij - decode_ij)² in every row i.

        w: f32[n_out, block]; importance: f32[block], positive, shared by all rows.
        Returns params `[n_out, 1, ...]`, already rounded to storage precision. Finite for any finite input.
        """

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:
        """Choose again the inner step and offset of group number `group` of one block, all else unchanged.

        w: f32[n_out, group]: the columns as they are when the sweep reaches them; importance: f32[group].
        params: of one block, `[n_out, 1, ...]`. A grid without inner parameters returns `params` itself.
        """

    def encode(self, w: Tensor, params: Params, col: int) -> Tensor:
        """Codes whose DECODED value is nearest to w.

        w: f32[n_out, n] with n a multiple of `step`: the columns col .. col+n of ONE block.
        params: of that block, `[n_out, 1, ...]`. Returns codes [n_out, n/step] in `code_dtype(levels)`.
        """

    def decode(self, codes: Tensor, params: Params, col: int = 0) -> Tensor:
        """Values of codes, computed in f32 in the runtime's own order of operations.

        codes: [n_out, n/step] in `code_dtype(levels)`: columns col .. col+n; params `[n_out, n_blocks, ...]` of the
        blocks that these columns lie in (whole blocks from col 0, or a part of one block). Returns f32[n_out, n].
        """

    def lattice(self, params: Params, group: int) -> Lattice | None:
        """The levels of group number `group` of one block, of which `encode` and `decode` are then the formulas there.

        params: of one block, `[n_out, 1, ...]`. None if the grid is no such thing (code books).
        """

    def scale_rows(self, params: Params, scale: Tensor) -> tuple[Params, Exactness]:
        """Parameters whose decoded rows are `scale_i` times as large, rounded to storage precision.

        scale: f32[n_out], any finite value but 0. Codes stay.
        """


class VectorGrid(Grid, Protocol):
    """A grid whose codes cover `step` > 1 columns, so that which code is best depends on how their errors add up.

    metric: f32[n / step, step, step], symmetric and positive definite, one for every run of `step` columns, the same
    for all rows: an error e of a run costs eᵀ metric e.
    """

    def encode_vectors(self, w: Tensor, params: Params, col: int, metric: Tensor) -> Tensor:
        """`encode` under a metric: the cheapest code of every run that the grid's search finds."""

    def refit_vectors(self, params: Params, group: int, w: Tensor, metric: Tensor) -> Params:
        """`refit` under a metric instead of an importance; `encode_vectors` under it then costs no more than before."""


def is_vector(grid: Grid) -> TypeGuard[VectorGrid]:
    """Whether a code covers several columns: then the grid is a VectorGrid."""
    return grid.step > 1


def code_dtype(levels: int) -> torch.dtype:
    """The dtype of codes 0 .. levels - 1."""
    import torch

    return torch.uint8 if levels <= 256 else torch.int32


def diagonal_metric(importance: Tensor, step: int) -> Tensor:
    """The metric in which column j's squared error costs importance_j: f32[n] → f32[n / step, step, step]."""
    import torch

    return torch.diag_embed(importance.view(-1, step))


def encode_weighed(grid: Grid, w: Tensor, params: Params, importance: Tensor, col: int = 0) -> Tensor:
    """The codes of one block's columns col .. col+n whose errors cost least under an importance per column.

    w: f32[n_out, n]; importance: f32[n]. For a scalar grid these are the nearest codes, whatever the importance.
    """
    if is_vector(grid):
        return grid.encode_vectors(w, params, col, diagonal_metric(importance, grid.step))
    return grid.encode(w, params, col)


def matrix_refusal(where: str, shape: Sequence[int]) -> Refusal | None:
    """Why no grid can hold a tensor of that shape, or None: it is no matrix, or one without weights."""
    if len(shape) != 2:
        return Refusal(where, "only matrices can be quantized", "store this tensor as f32 or f16")
    if min(shape) < 1:
        return Refusal(where, "the matrix is empty", "check the checkpoint's config against its tensors")
    return None


def blocks_refusal(grid_id: str, block: int, shape: Sequence[int], todo: str) -> Refusal | None:
    """Why a matrix `[n_out, n_in]` is no whole number of a grid's blocks, or no matrix; None if it is.

    todo: what to do where only n_in is to blame.
    """
    where = f"{grid_id}, shape {'x'.join(str(n) for n in shape)}"
    refusal = matrix_refusal(where, shape)
    if refusal is not None or shape[1] % block == 0:
        return refusal
    why = f"a row of {shape[1]} columns is not a whole number of blocks of {block}"
    return Refusal(where, why, todo)


def take_rows(params: Params, index: Tensor) -> dict[str, Tensor]:
    """Params of the rows in `index` (i64[n]), in that order. Shared parameters stay shared."""
    return {name: p if p.shape[0] == 1 else p[index] for name, p in params.items()}


def take_block(params: Params, block: int) -> dict[str, Tensor]:
    """Params of one block, `[n_out, 1, ...]`."""
    return {name: p[:, block : block + 1] for name, p in params.items()}


def stack_blocks(blocks: Sequence[Params]) -> dict[str, Tensor]:
    """Params of consecutive blocks, joined: the inverse of `take_block` over all of them."""
    import torch

    return {name: torch.cat([b[name] for b in blocks], dim=1) for name in blocks[0]}
