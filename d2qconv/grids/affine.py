"""Affine grids: decode = step · (code - zero) - offset, one step and one zero point (or offset) per group.

What GPTQ, compressed-tensors, ONNX MatMulNBits, MLX and others store, whatever their bytes look like. Three kinds of
zero point:

- `integer`: a code of its own in each group, decode = step · (code - zero);
- `float`: a stored offset, decode = step · code - offset (MLX calls -offset the bias);
- `none`: the middle code 2^(bits-1) for all, decode = step · (code - 2^(bits-1)).

Parameters: `step` f16, bf16 or f32 [n_out, n_blocks]; `zero` u8[n_out, n_blocks] if it is an integer of each group;
`offset`, of the step's dtype, if the zero is a float. A step may be negative, after `scale_rows` or with zero `none`.

Order of operations, all in f32: code - zero, times step, minus offset. The difference is exact; in f16 and bf16 the
product is exact too (11 + 9 bits of significand), so that a fused multiply-add changes nothing and every device and
runtime gets the same bits. With f32 steps the product rounds first: do not fuse it with the subtraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2qconv.errors import InputError, Refusal
from d2qconv.grids.affine_fit import Clip, Storage, Zero, fit_group
from d2qconv.grids.base import Exactness, Lattice, Params, matrix_refusal
from d2qconv.grids.scaling import scaled_rows

#: Groups that the formats know, columns.
GROUPS = (16, 32, 64, 128, 256)
BITS = (2, 3, 4, 8)
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_SCALE_BITS = {"f16": 16, "bf16": 16, "f32": 32}
_SHORT = {"integer": "int", "float": "float", "none": "sym"}


@dataclass(frozen=True)
class AffineGrid:
    """`bits` per code, one parameter set per `group` columns; see the module. Equal grids are equal objects.

    scale: storage type of step and offset. clip: how `fit` chooses them, see `affine_fit`. is_per_channel: the group
    is a whole row, of any length. significand: bits of step and offset that are used, 0 for all; see `stored`.
    Raises InputError for numbers that no format knows.
    """

    bits: int
    group: int
    zero: Zero
    scale: Literal["f16", "bf16", "f32"] = "f16"
    clip: Clip = "search"
    is_per_channel: bool = False
    significand: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(
                f"no affine grid has {self.bits} bits", where="affine grid", todo=f"use one of {BITS}"
            )
        is_good_group = self.group >= 1 if self.is_per_channel else self.group in GROUPS
        if not is_good_group:
            raise InputError(
                f"no affine grid has groups of {self.group} columns",
                where="affine grid",
                todo=f"use one of {GROUPS}, or one group per row",
            )

    @property
    def id(self) -> str:
        """`affine2_g128_int`, `affine4_channel4096_sym_bf16`, `affine2_g128_int_released`: defaults are left out."""
        parts = [
            f"affine{self.bits}",
            f"{'channel' if self.is_per_channel else 'g'}{self.group}",
            _SHORT[self.zero],
        ]
        parts += [self.scale] * (self.scale != "f16")
        parts += [f"s{self.significand}"] * (self.significand > 0)
        parts += [{"released": "released", "none": "unclipped"}.get(self.clip, "")] * (self.clip != "search")
        return "_".join(parts)

    @property
    def block(self) -> int:
        """As group."""
        return self.group

    @property
    def step(self) -> int:
        """One code per column."""
        return 1

    @property
    def levels(self) -> int:
        """2^bits."""
        return 1 << self.bits

    @property
    def bits_per_weight(self) -> float:
        """Codes, the step, and the zero point (`bits`) or the offset of each group."""
        size = _SCALE_BITS[self.scale]
        return self.bits + (size + {"integer": self.bits, "float": size, "none": 0}[self.zero]) / self.group

    @property
    def scales(self) -> tuple[str, ...]:
        """`step`, and `offset` if there is one."""
        return ("step", "offset") if self.zero == "float" else ("step",)

    @property
    def storage(self) -> Storage:
        """What is stored, in torch's types."""
        return Storage(self.levels, self.zero, _DTYPES[self.scale], self.significand)

    def accepts(self, shape: Sequence[int]) -> Refusal | None:
        """Why a matrix `[n_out, n_in]` cannot be stored on this grid, or None."""
        where = f"{self.id}, shape {'x'.join(str(n) for n in shape)}"
        refusal = matrix_refusal(where, shape)
        if refusal is not None:
            return refusal
        n_in = shape[1]
        if n_in % self.group == 0 and not (self.is_per_channel and n_in != self.group):
            return None
        if self.is_per_channel:
            why = f"a row has {n_in} columns, not {self.group}"
            return Refusal(where, why, f"make the grid for {n_in} columns")
        fitting = " or ".join(str(group) for group in GROUPS if n_in % group == 0)
        todo = f"use groups of {fitting}" if fitting else "use one group per row, or store this tensor as f16"
        why = f"a row of {n_in} columns is not a whole number of groups of {self.group}"
        return Refusal(where, why, todo)

    def fit(self, w: Tensor, importance: Tensor) -> Params:
        """See `Grid.fit`, and `affine_fit` for the ways of `clip`. Steps are not negative unless zero is `none`."""
        step, zero, offset = fit_group(w, importance, self.storage, self.clip)
        found = {"step": step, "zero": zero, "offset": offset}
        return {name: p[:, None] for name, p in found.items() if p is not None}

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:  # noqa: ARG002
        """`params` itself: a block is one group."""
        return params

    def encode(self, w: Tensor, params: Params, col: int) -> Tensor:  # noqa: ARG002
        """Codes u8[n_out, n] of columns of one block (w: f32[n_out, n]); see `Grid.encode`.

        clamp(round((w + offset) / step), -zero, levels - 1 - zero) + zero in f32, ties to the even number of steps;
        `zero` where the step is 0.
        """
        step, zero, offset = self._f32(params)
        q = w.clone() if offset is None else w + offset
        q.div_(torch.where(step == 0, torch.inf, step)).round_()
        if isinstance(zero, Tensor):
            q.clamp_(-zero, self.levels - 1 - zero)
        else:
            q.clamp_(-zero, self.levels - 1 - zero)
        return q.add_(zero).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, col: int = 0) -> Tensor:  # noqa: ARG002
        """Values f32[n_out, n] of codes u8[n_out, n]; see `Grid.decode` and the module."""
        step, zero, offset = self._f32(params)
        values = codes.reshape(codes.shape[0], step.shape[1], -1).to(torch.float32)
        values.sub_(zero[:, :, None] if isinstance(zero, Tensor) else zero)
        values.mul_(step[:, :, None])
        if offset is not None:
            values.sub_(offset[:, :, None])
        return values.reshape(codes.shape)

    def lattice(self, params: Params, group: int) -> Lattice:  # noqa: ARG002
        """See `Grid.lattice`; a block has one group."""
        step, zero, offset = self._f32(params)
        zeros = torch.full((1,), zero, device=step.device) if isinstance(zero, float) else zero.reshape(-1)
        return Lattice(
            step.reshape(-1), zeros, None if offset is None else offset.reshape(-1), None, self.levels
        )

    def scale_rows(self, params: Params, scale: Tensor) -> tuple[Params, Exactness]:
        """Step and offset times scale_i, rounded to storage; see `Grid.scale_rows` and `scaled_rows`."""
        return scaled_rows(params, self.scales, scale, self.id, self.significand)

    def _f32(self, params: Params) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """(step, zero, offset), f32[n_out or 1, n_blocks] each; zero a number if all share it."""
        step = params["step"].to(torch.float32)
        if self.zero == "integer":
            return step, params["zero"].to(torch.float32), None
        if self.zero == "float":
            return step, 0.0, params["offset"].to(torch.float32)
        return step, float(self.levels // 2), None
