"""Builds a ModelDesc from a GGUF, so that the float reference can run exactly what the file holds.

Metadata is read with the meaning that llama.cpp gives it (src/llama-model.cpp `load_hparams`, src/llama-context.cpp
for YaRN), and rows of q and k go back to the checkpoint's order. Values come from `container`, never from our codecs.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import Dims, ModelDesc, Rope
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import VerifyError
from d2qconv.names import Role, TensorId
from d2qconv_gguf.container import GgufFile, StoredTensor, read, rows_to_torch, to_torch
from d2qconv_gguf.names import LAYOUTS, ROPE_FREQS, Layout, checkpoint_order, gguf_name, tensor_id

_T = TypeVar("_T", int, float)
_UNSCALED = {None, "none", ""}


def read_model(path: Path) -> ModelDesc:
    """The model in a GGUF of one of our layouts, its tensors decoded when loaded; raises VerifyError."""
    return model_of(read(path))


def model_of(file: GgufFile) -> ModelDesc:
    """As `read_model`, of a file that is open already."""
    layout = layout_of(file)
    dims = _dims(file)
    tensors = {}
    for name, stored in file.tensors.items():
        if name == ROPE_FREQS:
            continue
        try:
            tensor = tensor_id(name)
        except ValueError as error:
            raise VerifyError(str(error), where=str(file.path)) from error
        # The order is made when it is needed: by then the sizes are known to be those of the tensors.
        place = (stored, tensor, layout, dims)
        rows = partial(_rows, *place) if len(stored.shape) > 1 else None
        tensors[tensor] = Dense(stored.shape, torch.float32, partial(_load, *place), rows)
    desc = ModelDesc(
        arch=BUILT_IN[layout.arch],
        dims=dims,
        rope=_rope(file, dims),
        norm_eps=_need(file, "attention.layer_norm_rms_epsilon", float),
        is_tied=TensorId(Role.HEAD) not in tensors,
        max_positions=_need(file, "context_length", int),
        bos_ids=_ids(file, "bos"),
        eos_ids=_ids(file, "eos"),
        tensors=tensors,
    )
    _check_shapes(file, desc)
    return desc


def _load(stored: StoredTensor, tensor: TensorId, layout: Layout, dims: Dims) -> torch.Tensor:
    return to_torch(stored, checkpoint_order(tensor, layout, dims))


def _rows(
    stored: StoredTensor, tensor: TensorId, layout: Layout, dims: Dims, index: torch.Tensor
) -> torch.Tensor:
    return rows_to_torch(stored, checkpoint_order(tensor, layout, dims), index)


def layout_of(file: GgufFile) -> Layout:
    """The layout by `general.architecture`; raises VerifyError for one that we do not know."""
    name = file.architecture
    if name not in LAYOUTS:
        raise VerifyError(
            f"is of architecture {name!r}", where=str(file.path), todo=f"known are {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[name]


def _need(file: GgufFile, key: str, kind: type[_T]) -> _T:
    return file.need(f"{file.architecture}.{key}", kind)


def _ids(file: GgufFile, which: str) -> tuple[int, ...]:
    found = file.get(f"tokenizer.ggml.{which}_token_id", int)
    return () if found is None else (found,)


def _dims(file: GgufFile) -> Dims:
    """Sizes; the vocabulary is that of the embedding."""
    hidden = _need(file, "embedding_length", int)
    n_heads = _need(file, "attention.head_count", int)
    embed = file.tensors.get(gguf_name(TensorId(Role.EMBED)))
    if embed is None or min(hidden, n_heads) < 1:
        raise VerifyError("has no embedding, or impossible sizes", where=str(file.path))
    arch = file.architecture
    head = file.get(f"{arch}.attention.key_length", int) or hidden // n_heads
    dims = Dims(
        vocab=embed.shape[0],
        hidden=hidden,
        ffn=_need(file, "feed_forward_length", int),
        n_layers=_need(file, "block_count", int),
        n_heads=n_heads,
        n_kv_heads=file.get(f"{arch}.attention.head_count_kv", int) or n_heads,
        head=head,
    )
    n_rot = file.get(f"{arch}.rope.dimension_count", int)
    if head < 2 or head % 2 or min(dims.n_kv_heads, dims.n_layers, dims.ffn) < 1:
        raise VerifyError(f"has impossible sizes: {dims}", where=str(file.path))
    if n_rot not in {None, head}:
        raise VerifyError(f"rotates {n_rot} of {head} dimensions; we only know all", where=str(file.path))
    return dims


def _check_shapes(file: GgufFile, desc: ModelDesc) -> None:
    """Every site of every block is there, with the shape that its table says; raises VerifyError."""
    for site in desc.arch.sites:
        in_block = "{i}" in site.module
        for block in range(desc.dims.n_layers) if in_block else (None,):
            tensor = TensorId(site.role, block)
            if site.role is Role.HEAD and desc.is_tied:
                continue
            n_out = desc.dims.size(site.n_out)
            shape = (n_out,) if site.n_in is None else (n_out, desc.dims.size(site.n_in))
            found = desc.tensors.get(tensor)
            if found is None or found.shape != shape:
                seen = "missing" if found is None else f"of shape {found.shape}"
                raise VerifyError(f"{gguf_name(tensor)} is {seen}, expected {shape}", where=str(file.path))
    for tensor in desc.tensors:
        if tensor.block is not None and tensor.block >= desc.dims.n_layers:
            raise VerifyError(f"{gguf_name(tensor)} is beyond the last block", where=str(file.path))


def _rope(file: GgufFile, dims: Dims) -> Rope:
    """RoPE as llama.cpp computes it from these keys."""
    arch = file.architecture
    theta = file.get(f"{arch}.rope.freq_base", float) or 10000.0
    scaling = f"{arch}.rope.scaling"
    kind = file.get(f"{scaling}.type", str)
    factor = file.get(f"{scaling}.factor", float) or 1.0
    if not (0 < theta < math.inf and theta != 1 and 0 < factor < math.inf):
        raise VerifyError(f"RoPE has the base {theta} and the factor {factor}", where=str(file.path))
    if ROPE_FREQS in file.tensors:
        if kind not in _UNSCALED:
            raise VerifyError(f"has {ROPE_FREQS} and RoPE scaling {kind!r}", where=str(file.path))
        return llama3_rope(theta, file.tensors[ROPE_FREQS], dims.head)
    if kind in _UNSCALED:
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind != "yarn":
        raise VerifyError(f"RoPE scaling {kind!r} is not known here", where=str(file.path))
    # llama.cpp multiplies cos and sin by attn_factor · (1 + 0.1 ln factor)
    attn = file.get(f"{scaling}.attn_factor", float)
    attention = None if attn is None else attn * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    original = file.get(f"{scaling}.original_context_length", int) or _need(file, "context_length", int)
    betas = [
        file.get(f"{scaling}.yarn_beta_{name}", float) or usual
        for name, usual in (("fast", 32.0), ("slow", 1.0))
    ]
    if original < 1 or not all(0 < beta < math.inf for beta in betas):
        raise VerifyError(f"YaRN of {original} positions with beta {betas}", where=str(file.path))
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=attention,
        beta_fast=betas[0],
        beta_slow=betas[1],
    )


def llama3_rope(theta: float, stored: StoredTensor, head: int) -> Rope:
    """Llama 3's parameters from the factors f_k that a file holds.

    Frequency k is divided by f_k, with 1/f_k = (1 - s)/F + s, s = clamp((P·x_k - low)/(high - low)) and x_k = one
    over the wave length. s is a line in x; two points on its slope give it, and P (the original context) is free:
    8192 is taken. With fewer points on the slope many lines fit; one of them is taken. Raises VerifyError if the
    factors are of no such form.
    """
    where = ROPE_FREQS
    factors = stored.values().astype(np.float64).reshape(-1)
    if factors.shape != (head // 2,) or not np.all(np.isfinite(factors)) or factors.min() < 1 - 1e-6:
        raise VerifyError(f"holds {factors.size} factors, at least {factors.min()}", where=where)
    top = float(factors.max())
    if top < 1 + 1e-6:
        return Rope(theta)
    x = theta ** -(np.arange(0, head, 2) / head) / (2 * math.pi)
    share = np.clip((1 / factors - 1 / top) / (1 - 1 / top), 0.0, 1.0)
    if np.diff(share).max() > 1e-6:
        raise VerifyError("holds factors that fall and rise: not Llama 3's", where=where)
    at_0, at_1 = _line(x, share)
    original = 8192
    rope = Rope(
        theta,
        "llama3",
        top,
        low_freq_factor=at_0 * original,
        high_freq_factor=at_1 * original,
        original_max_positions=original,
    )
    again = np.clip((x - at_0) / (at_1 - at_0), 0.0, 1.0)
    worst = float(np.abs(1 / ((1 - again) / top + again) - factors).max())
    if worst > 1e-4 * top:
        raise VerifyError(f"holds factors that are not Llama 3's (off by {worst:.2g})", where=where)
    return rope


def _line(x: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Where the line through the points with 0 < share < 1 is 0 and 1. x falls, and share with it."""
    on_slope = np.flatnonzero((share > 1e-6) & (share < 1 - 1e-6))
    kept, slowed = x[share >= 1 - 1e-6], x[share <= 1e-6]
    above = float(kept.min()) if kept.size else float(x.max()) * 4
    below = float(slowed.max()) if slowed.size else float(x.min()) / 4
    if on_slope.size == 0:
        return below, above
    first, last = on_slope[0], on_slope[-1]
    if on_slope.size > 1 and share[first] > share[last]:
        slope = (share[first] - share[last]) / (x[first] - x[last])
    else:
        slope = max((1 - share[first]) / (above - x[first]), share[first] / (x[first] - below))
    at_0 = float(x[first] - share[first] / slope)
    return at_0, at_0 + 1 / float(slope)
