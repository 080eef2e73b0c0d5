"""Tiny random models of every architecture as ModelDesc, and what an exporter is handed for them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from session_folder import new_folder

from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import Dims, ModelDesc, Rope
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.exporters.base import FloatType, TargetPlan
from d2qconv.grids.base import Grid, stack_blocks
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import Provenance, QuantizedModel
from d2qconv.names import Part, Role, TensorId

LLAMA_5M = Path(__file__).parents[1] / "data" / "tiny-llama-5m"
PROVENANCE = Provenance(
    version="0",
    fingerprint="f",
    source="random",
    source_license="",
    recipe="nearest",
    calibration="none",
    carriers={"mean_shift": "ffn_gate.bias and ffn_up.bias"},
)
ROPES = {
    "default": Rope(10000.0),
    "linear": Rope(10000.0, "linear", factor=2.0),
    "yarn": Rope(10000.0, "yarn", factor=4.0, original_max_positions=64),
    "yarn-attention": Rope(10000.0, "yarn", factor=4.0, original_max_positions=64, attention_factor=1.3),
    "llama3": Rope(
        500000.0,
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=64,
    ),
}
DIMS = Dims(vocab=512, hidden=256, ffn=256, n_layers=2, n_heads=4, n_kv_heads=2, head=64)
#: biases that the checkpoints of an architecture have
OWN_BIASES = {"qwen2": (Role.Q, Role.K, Role.V)}


@cache
def make_desc(
    arch: str, *, biases=None, is_tied=True, rope="default", dims=DIMS, seed=0, dtype=torch.bfloat16
):
    """A random model. Its logits have a spread of about 1, so that their errors can be seen."""
    table = BUILT_IN[arch]
    biases = OWN_BIASES.get(arch, ()) if biases is None else biases
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in table.sites:
        if site.role is Role.HEAD and is_tied:
            continue
        for block in range(dims.n_layers) if "{i}" in site.module else (None,):
            n_out = dims.size(site.n_out)
            if site.n_in is None:
                weight = 1 + 0.2 * torch.randn(n_out, generator=random)
            else:
                n_in = dims.size(site.n_in)
                gain = 2.0 if site.role in (Role.Q, Role.K) else 1.0
                weight = torch.randn(n_out, n_in, generator=random) * gain / math.sqrt(n_in)
            tensors[TensorId(site.role, block)] = Dense.of(weight.to(dtype))
            if site.role in biases:
                bias = torch.randn(n_out, generator=random)
                tensors[TensorId(site.role, block, Part.BIAS)] = Dense.of(bias.to(dtype))
    return ModelDesc(table, dims, ROPES[rope], 1e-5, is_tied, 256, (0,), (0,), tensors)


@cache
def small_source() -> Checkpoint:
    """A checkpoint with the first 512 tokens of a real tokenizer, and no weights."""
    folder = new_folder("tokenizer")
    tokenizer = json.loads((LLAMA_5M / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < DIMS.vocab}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [p for p in pairs if {*p, "".join(p)} <= model["vocab"].keys()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(LLAMA_5M / "tokenizer_config.json", folder)
    config = json.loads((LLAMA_5M / "config.json").read_text()) | {"vocab_size": DIMS.vocab}
    return Checkpoint(folder, str(folder), "", config, {}, "")


@cache
def nearest(weight: torch.Tensor, grid: Grid) -> Coded:
    """Round to nearest, block by block."""
    codes, params = [], []
    for at in range(0, weight.shape[1], grid.block):
        block = weight[:, at : at + grid.block].float()
        params.append(grid.fit(block, torch.ones(grid.block)))
        codes.append(grid.encode(block, params[-1], 0))
    return Coded(grid, tuple(weight.shape), torch.cat(codes, dim=1), stack_blocks(params))


def quantized(desc: ModelDesc, plan: TargetPlan, *, shift: float = 0.0, seed: int = 1) -> QuantizedModel:
    """Every tensor as planned; biases that the plan adds are random, with `shift` as their spread."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for planned in plan.tensors:
        dense = desc.tensors.get(planned.id)
        if dense is None:
            dense = Dense.of(shift * torch.randn(planned.shape, generator=random))
        is_float = isinstance(planned.storage, FloatType)
        tensors[planned.id] = dense if is_float else nearest(dense.load(), planned.storage)
    return QuantizedModel(desc, tensors, PROVENANCE)


def as_stored(model: QuantizedModel) -> ModelDesc:
    """What the quantizer believes the file holds: our own decoding, rows in the checkpoint's order."""
    tensors = {
        tensor: Dense.of(stored.decode()) if isinstance(stored, Coded) else stored
        for tensor, stored in model.tensors.items()
    }
    return replace(model.desc, tensors=tensors)
