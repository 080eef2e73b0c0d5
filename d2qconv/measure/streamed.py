"""The float reference for many sequences: their activations stay, and each block of the model is read once for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.block import Ends, load_block, load_ends

#: Tokens that go through a block at once.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Streamed:
    """A model that is read anew, block by block, for every call of `hidden`; embedding and head stay on `device`."""

    model: ModelDesc
    device: torch.device
    ends: Ends

    @classmethod
    def of(cls, model: ModelDesc, device: torch.device | str) -> Streamed:
        """Read embedding, final norm and head."""
        return cls(model, torch.device(device), load_ends(model, device))

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, first: int, on_block: Callable[[int], None]) -> Tensor:
        """What the last block gives at positions first, first + 1, …: f32[n_seq, length - first, hidden].

        tokens: i64[n_seq, length]. The activations of all of them are on the device. on_block: called with the number
        of blocks done.
        """
        x = self.ends.embed(tokens.to(self.device))
        n_seq = max(BATCH_TOKENS // tokens.shape[1], 1)
        for index in range(self.model.dims.n_layers):
            block = load_block(self.model, index, self.device)
            for start in range(0, len(x), n_seq):
                x[start : start + n_seq] = block(x[start : start + n_seq])
            on_block(index + 1)
        return x[:, first:].clone()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """f32[..., hidden] → f32[..., vocab]."""
        return self.ends.logits(hidden)
