"""genai_config.json, and the files that belong to the tokenizer.

The config's keys are those that onnxruntime-genai 0.13 to 0.18 read (src/config.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import Refusal

CONFIG, MODEL = "genai_config.json", "model.onnx"
#: GenAI reads the tokenizer from these.
NEEDED_FILES = ("tokenizer.json", "tokenizer_config.json")
#: Tokens that a generation may have unless it asks for another number; GenAI reserves keys and values for all of them.
MAX_LENGTH = 4096
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def source_refusals(checkpoint: Checkpoint) -> Iterator[Refusal]:
    """What GenAI's tokenizer cannot do without, and special tokens that it refuses to load a model with."""
    generation, vocab = checkpoint.json("generation_config.json") or {}, checkpoint.config.get("vocab_size")
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        beyond = [
            i for i in _ids(generation.get(key)) if not 0 <= i < (vocab if isinstance(vocab, int) else i + 1)
        ]
        if beyond:
            yield Refusal(
                f"generation_config.json, {key}",
                f"ONNX Runtime GenAI refuses tokens that are not in the vocabulary: {beyond[0]} of {vocab}",
                "correct the file, or remove it",
            )
    for name in NEEDED_FILES:
        if checkpoint.file(name) is None:
            yield Refusal(
                name,
                "ONNX Runtime GenAI reads the tokenizer from it and the checkpoint has none",
                "save the tokenizer with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )


def write_config(desc: ModelDesc, checkpoint: Checkpoint, path: Path) -> None:
    """Write genai_config.json; ways of sampling are the checkpoint's generation_config.json's."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(_config(desc, checkpoint)), indent=2))


def _config(desc: ModelDesc, checkpoint: Checkpoint) -> dict[str, Any]:
    dims = desc.dims
    generation = checkpoint.json("generation_config.json") or {}
    eos = _ids(generation.get("eos_token_id")) or list(desc.eos_ids)
    bos = _ids(generation.get("bos_token_id")) or list(desc.bos_ids)
    pad = _ids(generation.get("pad_token_id")) or _ids(checkpoint.config.get("pad_token_id")) or eos
    special = {"bos_token_id": bos[:1], "pad_token_id": pad[:1]}
    model: dict[str, Any] = {name: ids[0] for name, ids in special.items() if ids}
    if eos:
        model["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    model |= {
        "type": desc.arch.model_type,
        "vocab_size": dims.vocab,
        "context_length": desc.max_positions,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": MODEL,
            "head_size": dims.head,
            "hidden_size": dims.hidden,
            "num_attention_heads": dims.n_heads,
            "num_key_value_heads": dims.n_kv_heads,
            "num_hidden_layers": dims.n_layers,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search: dict[str, Any] = {
        name: generation[name] for name in _SEARCH if isinstance(generation.get(name), bool | int | float)
    }
    search |= {
        "max_length": min(desc.max_positions, MAX_LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}


def _ids(value: Any) -> list[int]:
    """Token ids from one, a list or nothing."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
