"""Metadata and tokenizer out of a GGUF that llama.cpp's own converter made, once it is proved to be the same model.

The proof: every float tensor of the base file equals ours bit for bit, ours being the checkpoint's tensor in the
base's row order and rounded to the base's dtype. So the keys describe the model that is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import InputError, PlanError, Refusal, VerifyError
from d2qconv_gguf.container import GgufFile, StoredTensor, read
from d2qconv_gguf.metadata import KV, model_metadata, rope_freqs
from d2qconv_gguf.names import LAYOUTS, ROPE_FREQS, Layout, gguf_name, row_order

_DTYPES: Mapping[GGMLQuantizationType, torch.dtype] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
#: what a base says of its own storage; ours is said anew. `split.*`: the base's shards
_NOT_COPIED = ("general.file_type", "general.quantization_version", "general.alignment")
_NOT_COPIED_GROUPS = ("quantize.", "d2qconv.", "split.")
_SHOWN = 5
_REMAKE = "make the base from this very checkpoint: convert_hf_to_gguf.py CHECKPOINT --outtype bf16"


def keys(path: Path, layout: Layout, ours: Sequence[KV]) -> list[KV]:
    """The base's keys as they go into our file.

    ours: our own keys for that layout; its `general.file_type` and `general.quantization_version` are taken, and any
    hyper-parameter that the base leaves to a default. Keys of the base's architecture are renamed where we write
    another layout. Raises PlanError if the base cannot be read.
    """
    file = _open(path)
    copied = [_copy(file, key, layout) for key in file.keys if _is_copied(key)]
    names = {kv.key for kv in copied}
    wanted = [kv for kv in ours if kv.key in _NOT_COPIED or kv.key.startswith(f"{layout.name}.")]
    return copied + [kv for kv in wanted if kv.key not in names]


def refusals(path: Path, model: ModelDesc, layout: Layout) -> list[Refusal]:
    """Why that base is not this model's; reads all weights of both, tensor by tensor.

    A rotated or padded model is refused unread: its weights are not those of a file made from the checkpoint.
    """
    if model.rotation:
        why = "its weights are compared with the checkpoint's, and a rotation changes nearly all of them"
        return [Refusal("base-gguf with a rotation", why, "leave out --base-gguf or the rotation")]
    if model.unpadded is not None:
        why = "its weights are compared with the checkpoint's, and a padded model has wider ones"
        return [Refusal("base-gguf with a padding", why, "leave out --base-gguf or the padding")]
    try:
        file = _open(path)
        base_layout = LAYOUTS.get(file.architecture)
    except (PlanError, InputError, VerifyError) as error:
        return [Refusal("base-gguf", error.what, _REMAKE)]
    if base_layout is None or base_layout.arch not in (model.arch.id, LAYOUTS[layout.name].arch):
        why = f"is of architecture {file.architecture}, which is not how a {model.arch.id} is written"
        return [Refusal(str(path), why, _REMAKE)]
    return [
        *_key_refusals(file, model, base_layout),
        *_vocabulary_refusals(file, model),
        *_tensor_refusals(file, model, base_layout),
    ]


def _open(path: Path) -> GgufFile:
    try:
        return read(path)
    except (InputError, VerifyError) as error:
        raise PlanError(f"the base GGUF {error.what}", where=str(path), todo=_REMAKE) from error


def _is_copied(key: str) -> bool:
    return key not in (*_NOT_COPIED, "general.architecture") and not key.startswith(_NOT_COPIED_GROUPS)


def _copy(file: GgufFile, key: str, layout: Layout) -> KV:
    kinds = [GGUFValueType(t) for t in file.types[key]]
    prefix = f"{file.architecture}."
    name = f"{layout.name}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key
    return KV(name, file.keys[key], kinds[0], kinds[-1] if len(kinds) > 1 else None)


def _key_refusals(file: GgufFile, model: ModelDesc, layout: Layout) -> list[Refusal]:
    """Hyper-parameters on which the base and the checkpoint's config do not agree."""
    try:
        ours = {kv.key: kv for kv in model_metadata(model, layout=layout.name, file_type=0)}
    except PlanError as error:
        return [Refusal("base-gguf", error.what)]
    ours = {k: kv for k, kv in ours.items() if k.startswith(f"{layout.name}.")}
    scaling = f"{layout.name}.rope.scaling."
    found = []
    for key, kv in ours.items():
        theirs = file.keys.get(key)
        if theirs is None and key.startswith(scaling):
            found.append(Refusal(str(file.path), f"lacks {key}, which config.json makes {kv.value}", _REMAKE))
        elif theirs is not None and not _agree(theirs, kv):
            found.append(Refusal(str(file.path), f"{key} is {theirs}, config.json says {kv.value}", _REMAKE))
    if (
        f"{scaling}type" in file.keys
        and f"{scaling}type" not in ours
        and file.keys[f"{scaling}type"] != "none"
    ):
        why = f"has {scaling}type {file.keys[f'{scaling}type']}, config.json has no RoPE scaling"
        found.append(Refusal(str(file.path), why, _REMAKE))
    return found


def _agree(theirs: Any, kv: KV) -> bool:
    if kv.type is GGUFValueType.FLOAT32 and isinstance(kv.value, int | float):
        return isinstance(theirs, int | float) and np.float32(theirs) == np.float32(kv.value)
    return bool(theirs == kv.value)


def _vocabulary_refusals(file: GgufFile, model: ModelDesc) -> list[Refusal]:
    tokens = file.keys.get("tokenizer.ggml.tokens")
    n = len(tokens) if isinstance(tokens, list) else 0
    if n == model.dims.vocab:
        return []
    return [Refusal(str(file.path), f"has {n} tokens, the checkpoint {model.dims.vocab}", _REMAKE)]


def _tensor_refusals(file: GgufFile, model: ModelDesc, layout: Layout) -> list[Refusal]:
    """Tensors that are not the same in both."""
    ours = {gguf_name(tensor): (tensor, dense) for tensor, dense in model.tensors.items()}
    found = []
    unknown = sorted(set(file.tensors) - set(ours) - {ROPE_FREQS})
    missing = sorted(set(ours) - set(file.tensors))
    if unknown:
        found.append(
            Refusal(str(file.path), f"holds tensors that the checkpoint has not: {_some(unknown)}", _REMAKE)
        )
    if missing:
        found.append(Refusal(str(file.path), f"lacks {_some(missing)}", _REMAKE))
    other = []
    for name, stored in file.tensors.items():
        if name in ours:
            tensor, dense = ours[name]
            other += [] if _is_same(stored, dense, row_order(tensor, layout, model.dims)) else [name]
    factors = rope_freqs(model)
    if ROPE_FREQS in file.tensors:
        theirs = file.tensors[ROPE_FREQS].values()
        if factors is None or theirs.shape != factors.shape or not np.allclose(theirs, factors, rtol=1e-5):
            other.append(ROPE_FREQS)
    if other:
        why = f"{len(other)} of {len(ours)} tensors are not those of the checkpoint: {_some(other)}"
        found.append(Refusal(str(file.path), why, _REMAKE))
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_same(stored: StoredTensor, dense: Dense, order: torch.Tensor | None) -> bool:
    """Whether the base's bytes are those of our tensor in its row order and dtype. False for a quantized base."""
    if stored.type not in _DTYPES or stored.shape != dense.shape:
        return False
    ours = dense.load()
    ours = (ours if order is None else ours[order]).to(_DTYPES[stored.type]).contiguous()
    theirs = np.ascontiguousarray(stored.data).reshape(-1).view(np.uint8)
    return bool(np.array_equal(ours.reshape(-1).view(torch.uint8).numpy(), theirs))
