"""The float reference: logits of a model whose weights are all known, in f32."""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.block import load_block, load_ends


@torch.inference_mode()
def logits(model: ModelDesc, tokens: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """Logits of every position, one block of the model in memory at a time.

    tokens: i64[n_seq, length]. Returns f32[n_seq, length, vocab] on `device`.
    """
    ends = load_ends(model, device)
    x = ends.embed(tokens.to(device))
    for index in range(model.dims.n_layers):
        x = load_block(model, index, device)(x)
    return ends.logits(x)
