"""MLX's affine quantization, as mlx-lm reads it.

::

    weight  u32[n_out, words(n_in)]     codes along the columns
    scales  [n_out, n_groups]           value = code · scale + bias
    biases  [n_out, n_groups]           -zero · scale

The bias has the type of the scale; -zero · scale is exact in it, because steps have few bits (`d2qconv_hf.types`), but
not in bf16. Group sizes and bits: mlx's `quantize` (mlx/ops.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2qconv.errors import Refusal
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv_hf import bits
from d2qconv_hf.dialects.base import (
    Array,
    Content,
    Facts,
    affine,
    step_dtype,
    steps_of,
    whole_words,
    zeros_of,
)

#: Columns of a group (mlx, `quantized_matmul`).
_GROUPS = (32, 64, 128)


class Mlx:
    """The dialect; see the module."""

    facts = Facts("mlx", "mlx-lm", "0.30", 1e-4, frozenset({"llama"}), has_offsets=True)

    def refuse(self, grid: AffineGrid, shape: Sequence[int]) -> Refusal | None:
        """Rows must fill whole words; a group cannot be a row; -zero · scale must be exact."""
        n_out, n_in = shape
        if grid.is_per_channel:
            return Refusal("option group-size", "MLX has no scale for a whole row", "use 32, 64 or 128")
        if grid.group not in _GROUPS:
            why = f"MLX has no groups of {grid.group} columns"
            return Refusal("option group-size", why, f"use one of {', '.join(map(str, _GROUPS))}")
        if grid.zero == "integer" and (grid.scale == "bf16" or not grid.significand or grid.bits == 8):
            why = f"MLX stores -zero · scale, which {grid.scale} does not hold exactly for {grid.bits} bits"
            return Refusal("option zero", why, "add --zero none, or keep --dtype float16 and fewer bits")
        return whole_words(grid, n_in, "columns", n_out, n_in)

    def refuse_all(self, content: Content) -> list[Refusal]:
        """Nothing: every linear may have a type of its own."""
        del content
        return []

    def layout(self, module: str, grid: AffineGrid, shape: tuple[int, int]) -> dict[str, Array]:
        """See the module."""
        n_out, n_in = shape
        groups = Array(step_dtype(grid), (n_out, n_in // grid.group))
        return {
            f"{module}.weight": Array(torch.uint32, (n_out, bits.n_words(n_in, grid.bits))),
            f"{module}.scales": groups,
            f"{module}.biases": groups,
        }

    def arrays(self, module: str, coded: Coded) -> dict[str, Tensor]:
        """See the module."""
        grid, steps = affine(coded), steps_of(coded)
        zeros = torch.from_numpy(zeros_of(coded).copy())
        return {
            f"{module}.weight": torch.from_numpy(bits.pack(coded.codes.numpy(), grid.bits)),
            f"{module}.scales": steps,
            f"{module}.biases": (-zeros.float() * steps.float()).to(steps.dtype),
        }

    def config(self, content: Content) -> dict[str, Any]:
        """`quantization`, with an entry of its own for every linear of other bits."""
        first = content.schemes[0]
        found: dict[str, Any] = {"group_size": first.group, "bits": first.bits, "mode": "affine"}
        for name, scheme in content.linears.items():
            if scheme is None:
                found[name] = False
            elif (scheme.bits, scheme.group) != (first.bits, first.group):
                found[name] = {"group_size": scheme.group, "bits": scheme.bits}
        return {"quantization": found, "quantization_config": found}
