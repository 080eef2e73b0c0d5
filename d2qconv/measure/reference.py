"""The float reference: logits of a model whose weights are all known, in f32.

One matrix is in memory at a time; of embedding and head, which a large vocabulary makes larger than a block, only the
rows that are asked for, or some at a time. So what it needs does not grow with the model's depth or vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as fn
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.dense import Dense
from d2qconv.decoder.block import Block, rms_norm
from d2qconv.names import Part, Role, TensorId

#: Weights of the head that are in memory at a time: 64 MiB as f32.
HEAD_PIECE = 1 << 24


@torch.inference_mode()
def logits(model: ModelDesc, tokens: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """Logits of every position. tokens: i64[n_seq, length]. Returns f32[n_seq, length, vocab] on `device`."""
    x = _embed(model.tensors[TensorId(Role.EMBED)], tokens).to(device)
    for index in range(model.dims.n_layers):
        x = _block(model, index, device)(x)
    gain = _load(model.tensors[TensorId(Role.FINAL_NORM)], device)
    x = rms_norm(x, gain, model.norm_eps)
    found = x.new_empty(*x.shape[:-1], model.dims.vocab)
    at = 0
    for rows in model.tensors[TensorId(Role.EMBED if model.is_tied else Role.HEAD)].slices(HEAD_PIECE):
        found[..., at : at + len(rows)] = fn.linear(x, rows.to(device=device, dtype=torch.float32))
        at += len(rows)
    return found


def needed_bytes(model: ModelDesc, n_positions: int) -> int:
    """About the bytes that `logits` and a comparison with its result take.

    The largest matrix of a block while it is read, put in order and used; logits in f32 of both sides.
    """
    blocks = [dense.n_elements for tensor, dense in model.tensors.items() if tensor.block is not None]
    activations = n_positions * (4 * model.dims.ffn + 8 * model.dims.hidden)
    logits_ = 3 * n_positions * model.dims.vocab
    return 4 * (2 * max([*blocks, HEAD_PIECE]) + activations + logits_)


def _embed(embedding: Dense, tokens: Tensor) -> Tensor:
    """f32[n_seq, length, hidden] of i64[n_seq, length], reading the rows of the tokens that occur."""
    used, place = torch.unique(tokens.cpu(), return_inverse=True)
    return embedding.rows(used).float()[place]


class _OnDemand(dict[Role, Tensor]):
    """Weights of a block, each read when it is asked for, and not kept."""

    def __init__(self, model: ModelDesc, index: int, device: torch.device | str) -> None:
        self._model, self._index, self._device = model, index, device

    def __missing__(self, role: Role) -> Tensor:
        return _load(self._model.tensors[TensorId(role, self._index)], self._device)


def _block(model: ModelDesc, index: int, device: torch.device | str) -> Block:
    """Block `index`, its matrices not read yet."""
    biases = {
        tensor.role: _load(dense, device)
        for tensor, dense in model.tensors.items()
        if tensor.block == index and tensor.part is Part.BIAS
    }
    return Block(model, _OnDemand(model, index, device), biases)


def _load(dense: Dense, device: torch.device | str) -> Tensor:
    return dense.load().to(device=device, dtype=torch.float32)
