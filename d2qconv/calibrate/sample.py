"""Calibration without a text: sequences sampled from the model itself.

The model's own samples are distributed as the text it models (LLM-QAT, arXiv 2305.17888, uses the same data for
training), need no network and no licence. Temperature 1, no truncation. A sequence starts with the BOS token where
the tokenizer would put one, else with a token drawn uniformly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.block import Past, load_block, load_ends


@torch.inference_mode()
def sample_sequences(
    model: ModelDesc,
    n_seq: int,
    length: int,
    *,
    bos: int | None,
    seed: int,
    device: torch.device | str,
    on_token: Callable[[int], None],
) -> Tensor:
    """Draw n_seq sequences of `length` tokens: i64[n_seq, length] on the CPU.

    The whole model is in memory as f32 while sampling. on_token: called with the number of positions done.
    Random numbers come from the CPU generator, so that every device draws alike up to its rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = load_ends(model, device)
    blocks = [load_block(model, i, device) for i in range(model.dims.n_layers)]
    pasts = [Past.empty(model, n_seq, length, device) for _ in blocks]
    tokens = torch.empty(n_seq, length, dtype=torch.int64)
    if bos is None:
        tokens[:, 0] = torch.randint(model.dims.vocab, (n_seq,), generator=generator)
    else:
        tokens[:, 0] = bos
    for position in range(1, length):
        x = ends.embed(tokens[:, position - 1 : position].to(device))
        for block, past in zip(blocks, pasts, strict=True):
            x = block(x, past)
        logits = ends.logits(x[:, 0])
        # Gumbel-max: argmax(logit + Gumbel noise) is a draw from softmax(logit).
        uniform = torch.rand(logits.shape, generator=generator).clamp_(1e-20, 1 - 1e-7)
        tokens[:, position] = (logits - (-uniform.log()).log().to(device)).argmax(-1).cpu()
        on_token(position)
    return tokens
