"""A text in pieces to be judged by, as llama-perplexity cuts it, so that the numbers can be compared.

Facts: tools/perplexity/perplexity.cpp of ggml-org/llama.cpp, `perplexity` and `kl_divergence`:

- the text is tokenized once, with the BOS token before it where the tokenizer puts one there;
- it is cut into chunks of `context` tokens, one behind the other; what is left over is dropped;
- the first token of every chunk is replaced by BOS, again where the tokenizer puts one;
- of each chunk the logits at positions context // 2 … context - 2 are judged, by the token that follows each: all of
  them have at least half a context before them.

That program asks for two whole chunks; one is enough here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.errors import InputError

#: Below it there is no position to be judged.
LEAST_CONTEXT = 4


@dataclass(frozen=True)
class Chunks:
    """tokens: i64[n, context], BOS in its places."""

    tokens: Tensor

    @property
    def context(self) -> int:
        """Tokens of a chunk."""
        return self.tokens.shape[1]

    @property
    def first(self) -> int:
        """The first position that is judged."""
        return self.context // 2

    @property
    def n_judged(self) -> int:
        """Positions that are judged, of all chunks."""
        return len(self.tokens) * (self.context - 1 - self.first)

    @property
    def digest(self) -> str:
        """SHA-256 over the tokens, little-endian i64, hex."""
        return hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    def targets(self, index: int) -> Tensor:
        """i64[context - 1 - first]: what follows each judged position of a chunk."""
        return self.tokens[index, self.first + 1 :]


def check_context(context: int, longest: int, whose: str) -> None:
    """Raise InputError for a context that cannot be used. longest: that `whose` can take."""
    where = "--context"
    if context < LEAST_CONTEXT:
        raise InputError(f"a chunk has at least {LEAST_CONTEXT} tokens, not {context}", where=where)
    if context > longest:
        raise InputError(
            f"chunks of {context} tokens are longer than the {longest} that {whose} takes",
            where=where,
            todo=f"use --context {longest} or less",
        )


def cut(stream: Tensor, context: int, *, n_chunks: int | None, bos: int | None, where: str) -> Chunks:
    """The chunks of i64[n] tokens of a text, the first n_chunks of them or all. where: the text's name, for errors.

    Raises InputError for a text that does not fill one, or a number of chunks below 1.
    """
    if n_chunks is not None and n_chunks < 1:
        raise InputError(f"at least one chunk is needed, not {n_chunks}", where="--chunks")
    if bos is not None:
        stream = torch.cat([torch.tensor([bos]), stream])
    n = len(stream) // context
    if n == 0:
        raise InputError(
            f"the text has {len(stream)} tokens, less than one chunk of {context}",
            where=where,
            todo="give a longer text or a smaller --context",
        )
    tokens = stream[: n * context].view(n, context)[:n_chunks].clone()
    if bos is not None:
        tokens[:, 0] = bos
    return Chunks(tokens)
