"""Tiny seeded models of each architecture, written as Hugging Face folders. For our tests and those of plug-ins.

Which tensors there are is taken from the architecture's table, so a plug-in's architecture works as well if
its roles are ours.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2qconv.arch.bind import expected_tensors
from d2qconv.arch.config import read_config
from d2qconv.arch.registry import architecture_of
from d2qconv.names import Part, Role, TensorId

#: Standard deviation of a matrix is gain / sqrt(n_in): unit inputs give outputs of about the gain.
_GAINS = {Role.O: 0.5, Role.DOWN: 0.5, Role.HEAD: 2.0}
_EMBED_STD = 0.15
_NORM_STD = 0.1
_BIAS_STD = 0.2

#: Files that are copied from a tokenizer folder, where they are there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def make_checkpoint(
    folder: Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    hidden: int = 256,
    ffn: int = 512,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    vocab: int = 512,
    tied: bool = True,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    max_positions: int = 2048,
    norm_eps: float = 1e-6,
    rope_parameters: Mapping[str, object] | None = None,
    bos: int | None = 0,
    eos: int | Sequence[int] | None = 0,
    tokenizer: Path | None = None,
) -> Path:
    """Write a random model and return its folder. Equal arguments give equal weights.

    dtype: of every tensor; the values are drawn in f32 and rounded to it. shards: files of the weights;
    more than one come with an index. attention_bias and mlp_bias: for an architecture that has these keys.
    rope_parameters: transformers 5 style, default `{"rope_type": "default", "rope_theta": 10000.0}`.
    tokenizer: a folder whose tokenizer files are copied. Raises PlanError for what the architecture
    refuses.
    """
    config: dict[str, Any] = {
        "model_type": model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": norm_eps,
        "rope_parameters": dict(rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}),
        "bos_token_id": bos,
        "eos_token_id": list(eos) if isinstance(eos, Sequence) else eos,
        "transformers_version": "5.0.0",
    }
    arch = architecture_of(config)
    config["architectures"] = [arch.class_names[0]]
    keys = {key.name: key for key in arch.config_keys}
    for name, value in (("attention_bias", attention_bias), ("mlp_bias", mlp_bias)):
        # A key that may have one value only (Qwen2's attention_bias) is left out unless it was asked for.
        if value or (name in keys and keys[name].must_be is None):
            config[name] = value
    if "sliding_window" in keys:
        config["sliding_window"] = None
    facts = read_config(arch, config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _draw(tensor, shape, generator).to(dtype)
        for tensor, (name, shape) in expected_tensors(arch, facts)
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_shards(folder, tensors, shards)
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """Write `model.safetensors`, or that many numbered files and their index."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors do not fill {shards} shards")
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _draw(tensor: TensorId, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """f32 values of one tensor: norm gains near 1, biases small, matrices so that activations stay near 1."""
    noise = torch.randn(shape, generator=generator)
    if tensor.part is Part.BIAS:
        return noise * _BIAS_STD
    if len(shape) == 1:
        return 1 + noise * _NORM_STD
    if tensor.role is Role.EMBED:
        return noise * _EMBED_STD
    return noise * (_GAINS.get(tensor.role, 1.0) / math.sqrt(shape[1]))
