"""GPTQ's layout, version 2 (zero points as they are), and AutoRound's own, which is the same without `g_idx`.

::

    qweight  i32[words(n_in), n_out]       codes along the columns of the matrix, down this array
    qzeros   i32[n_groups, words(n_out)]
    scales   [n_groups, n_out]             f16 or bf16
    g_idx    i32[n_in]                     column div group size

Version 1 stores zero point - 1, and readers disagree on what becomes of 0, so it is not written. Sources: GPTQModel
(nn_modules/qlinear), auto_round (export/export_to_autoround, auto_round_extension).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2qconv import __version__
from d2qconv.errors import Refusal
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv_hf import bits
from d2qconv_hf.dialects.base import (
    Array,
    Content,
    Facts,
    Scheme,
    affine,
    step_dtype,
    steps_of,
    whole_words,
    words,
    zeros_of,
)

_BLOCKS = "model.layers"
#: Their linears turn the input and the decoded weights into f16, whatever the model computes in: 1.3e-3 was measured.
HALF = 5e-3


def _said(scheme: Scheme) -> dict[str, Any]:
    """A scheme as these configs say it: group size -1 is a whole row."""
    return {"bits": scheme.bits, "group_size": scheme.group or -1, "sym": not scheme.has_zero}


class _Transposed:
    """What both have in common."""

    has_index = False

    def refuse(self, grid: AffineGrid, shape: Sequence[int]) -> Refusal | None:
        """Both sides must fill whole words."""
        n_out, n_in = shape
        return whole_words(grid, n_in, "columns", n_out, n_in) or whole_words(
            grid, n_out, "rows", n_out, n_in
        )

    def layout(self, module: str, grid: AffineGrid, shape: tuple[int, int]) -> dict[str, Array]:
        """See the module."""
        n_out, n_in = shape
        n_groups = n_in // grid.group
        found = {
            f"{module}.qweight": Array(torch.int32, (bits.n_words(n_in, grid.bits), n_out)),
            f"{module}.qzeros": Array(torch.int32, (n_groups, bits.n_words(n_out, grid.bits))),
            f"{module}.scales": Array(step_dtype(grid), (n_groups, n_out)),
        }
        if self.has_index:
            found[f"{module}.g_idx"] = Array(torch.int32, (n_in,))
        return found

    def arrays(self, module: str, coded: Coded) -> dict[str, Tensor]:
        """See the module."""
        grid, n_in = affine(coded), coded.shape[1]
        codes = bits.pack(coded.codes.numpy(), grid.bits)
        zeros = bits.pack(np.ascontiguousarray(zeros_of(coded).T), grid.bits)
        found = {
            f"{module}.qweight": words(np.ascontiguousarray(codes.T)),
            f"{module}.qzeros": words(zeros),
            f"{module}.scales": steps_of(coded).T.contiguous(),
        }
        if self.has_index:
            found[f"{module}.g_idx"] = torch.arange(n_in, dtype=torch.int32) // grid.group
        return found


class Gptq(_Transposed):
    """`gptq_v2`; see the module."""

    facts = Facts("gptq", "gptqmodel", "1.4.3", HALF, frozenset({"llama", "hy_v3"}))
    has_index = True

    def refuse_all(self, content: Content) -> list[Refusal]:
        """Nothing: GPTQModel takes types that differ."""
        del content
        return []

    def config(self, content: Content) -> dict[str, Any]:
        """`quantization_config`; linears of other bits under `dynamic`, by regular expressions."""
        first, *others = content.schemes
        found: dict[str, Any] = {
            "quant_method": "gptq",
            **_said(first),
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": "gptq_v2",
            "format": "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"d2qconv:{__version__}", "gptqmodel:1.4.3"]},
        }
        dynamic: dict[str, Any] = {}
        for name, scheme in content.linears.items():
            pattern = f"^{re.escape(name)}$"
            if scheme is None:
                dynamic[f"-:{pattern}"] = {}
            elif scheme in others:
                dynamic[f"+:{pattern}"] = _said(scheme)
        return {"quantization_config": found | ({"dynamic": dynamic} if dynamic else {})}


class AutoRound(_Transposed):
    """`auto_round`; see the module."""

    facts = Facts("auto-round", "auto-round", "0.16", HALF, frozenset({"llama", "hy_v3"}))

    def refuse_all(self, content: Content) -> list[Refusal]:
        """Nothing: every linear may have a type of its own."""
        del content
        return []

    def config(self, content: Content) -> dict[str, Any]:
        """`quantization_config`; linears of other bits, and float ones, under `extra_config`."""
        first = content.schemes[0]
        extra: dict[str, Any] = {name: {"bits": 16, "data_type": "float"} for name in content.floats}
        extra |= {
            name: _said(scheme)
            for name, scheme in content.linears.items()
            if scheme is not None and scheme != first
        }
        found: dict[str, Any] = {
            "quant_method": "auto-round",
            "packing_format": "auto_round",
            **_said(first),
            "data_type": "int",
            "iters": 0,
            "autoround_version": self.facts.version,
            "block_name_to_quantize": _BLOCKS,
        }
        return {"quantization_config": found | ({"extra_config": extra} if extra else {})}
