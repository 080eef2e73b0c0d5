"""compressed-tensors' `pack-quantized`, as versions since 0.18 read it, and vLLM.

::

    weight_packed      i32[n_out, words(n_in)]          codes along the columns
    weight_scale       [n_out, n_groups]                f16 or bf16
    weight_zero_point  i32[words(n_out), n_groups]      codes along the rows; absent without zero points
    weight_shape       i64[2]

Before 0.18 codes of 3 bits were not dense. transformers loads zero points only with `"dequantize": true`, which knows
one scheme for all linears; without zero points several schemes load (`config_groups`). Source: compressed_tensors
compressors/pack_quantized, transformers' quantizer_compressed_tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2qconv.errors import Refusal
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv_hf import bits
from d2qconv_hf.dialects.base import Array, Content, Facts, affine, step_dtype, steps_of, words, zeros_of

_HEAD = "lm_head"


class CompressedTensors:
    """The dialect; see the module."""

    facts = Facts(
        "safetensors", "compressed-tensors", "0.18", 1e-4, frozenset({"llama", "hy_v3"}), mixes_zeros=False
    )

    def refuse(self, grid: AffineGrid, shape: Sequence[int]) -> Refusal | None:
        """Nothing: a row's last word may have spare bits."""
        del grid, shape
        return None

    def refuse_all(self, content: Content) -> list[Refusal]:
        """Several schemes with zero points."""
        schemes = content.schemes
        if len(schemes) < 2 or not any(scheme.has_zero for scheme in schemes):
            return []
        why = "transformers loads mixed types from compressed-tensors only without zero points"
        return [Refusal("option tensor-type", why, "add --zero none, or use to-auto-round")]

    def layout(self, module: str, grid: AffineGrid, shape: tuple[int, int]) -> dict[str, Array]:
        """See the module."""
        n_out, n_in = shape
        n_groups = n_in // grid.group
        found = {
            f"{module}.weight_packed": Array(torch.int32, (n_out, bits.n_words(n_in, grid.bits))),
            f"{module}.weight_scale": Array(step_dtype(grid), (n_out, n_groups)),
            f"{module}.weight_shape": Array(torch.int64, (2,)),
        }
        if grid.zero == "integer":
            rows = bits.n_words(n_out, grid.bits)
            found[f"{module}.weight_zero_point"] = Array(torch.int32, (rows, n_groups))
        return found

    def arrays(self, module: str, coded: Coded) -> dict[str, Tensor]:
        """See the module."""
        grid = affine(coded)
        found = {
            f"{module}.weight_packed": words(bits.pack(coded.codes.numpy(), grid.bits)),
            f"{module}.weight_scale": steps_of(coded),
            f"{module}.weight_shape": torch.tensor(coded.shape, dtype=torch.int64),
        }
        if grid.zero == "integer":
            along_rows = bits.pack(np.ascontiguousarray(zeros_of(coded).T), grid.bits)
            found[f"{module}.weight_zero_point"] = words(np.ascontiguousarray(along_rows.T))
        return found

    def config(self, content: Content) -> dict[str, Any]:
        """`quantization_config`: one group of linears a scheme."""
        schemes = content.schemes
        groups = {}
        for number, scheme in enumerate(schemes):
            targets = ["Linear"]
            if len(schemes) > 1:
                targets = [name for name, its in content.linears.items() if its == scheme]
            groups[f"group_{number}"] = {
                "targets": targets,
                "weights": {
                    "num_bits": scheme.bits,
                    "type": "int",
                    "symmetric": not scheme.has_zero,
                    "strategy": "group" if scheme.group else "channel",
                    "group_size": scheme.group or None,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        found: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            # A tied head is a linear of its own to transformers.
            "ignore": [name for name in content.floats if name != _HEAD] + [_HEAD],
            "kv_cache_scheme": None,
            "config_groups": groups,
        }
        if any(scheme.has_zero for scheme in schemes):
            found["dequantize"] = True
        return {"quantization_config": found}
