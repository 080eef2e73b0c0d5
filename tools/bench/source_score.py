"""Perplexity, KL divergence and same top token of any logits against the float source's, over a held-out text.

The protocol is that of tools/compare_llama_cpp (see measure.py): chunks of n_ctx tokens, each run alone from an empty
cache; token 0 becomes BOS if the tokenizer puts one first; positions n_ctx/2 … n_ctx - 2 are scored against the token
that follows. The reference is d2qconv's own float forward pass over the Hugging Face folder, computed once and cached.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from metrics import Positions, compare, log_softmax
from tokenizers import Tokenizer

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.measure.reference import logits as reference_logits

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


def digest(*files: Path) -> str:
    """Hex SHA-256 over the contents of files."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def chunks_of(model: Path, text: Path, n_ctx: int, n_chunks: int) -> I64:
    """i64[n_chunks, n_ctx]: the first chunks of the tokenized text; fewer if it is shorter.

    model: a folder with tokenizer.json. Raises ValueError when the text holds not even one chunk.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8")).ids, np.int64)
    n = min(n_chunks, len(ids) // n_ctx)
    if n < 1:
        raise ValueError(f"{text}: {len(ids)} tokens are less than one chunk of {n_ctx}")
    chunks = ids[: n * n_ctx].reshape(n, n_ctx).copy()
    first = tokenizer.encode("").ids
    if first:
        chunks[:, 0] = first[0]
    return chunks


def key_of(model: Path, text: Path, n_ctx: int, n_chunks: int) -> str:
    """16 hex digits: the same for the same model, text and protocol."""
    weights = sorted(model.glob("*.safetensors"))
    what = [digest(*weights, model / "config.json", model / "tokenizer.json"), digest(text), n_ctx, n_chunks]
    what.append(version("torch"))
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


class Reference:
    """Tokens and log-probabilities of the float source, f32[n_chunks, n_ctx/2 - 1, vocab] in a file of ``folder``."""

    def __init__(self, model: Path, text: Path, n_ctx: int, n_chunks: int, folder: Path) -> None:
        self.first = n_ctx // 2
        self.tokens = chunks_of(model, text, n_ctx, n_chunks)
        file = folder / f"reference-{key_of(model, text, n_ctx, n_chunks)}.npy"
        if not file.exists():
            self._fill(model, file)
        self.log_p = np.load(file, mmap_mode="r")

    def _fill(self, model: Path, file: Path) -> None:
        desc = bind(open_checkpoint(str(model)))
        part = file.with_suffix(".part")
        n_scored = self.tokens.shape[1] - 1 - self.first
        out = None
        for i, chunk in enumerate(self.tokens):
            found = reference_logits(desc, torch.from_numpy(chunk)[None])[0, self.first : -1].float().numpy()
            if out is None:
                shape = (len(self.tokens), n_scored, found.shape[-1])
                out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
            out[i] = log_softmax(found)
        del out
        part.replace(file)

    def own(self) -> list[Positions]:
        """The source against itself: its perplexity, KLD 0."""
        return [self._compared(i, np.asarray(log_p, np.float64)) for i, log_p in enumerate(self.log_p)]

    def compared(self, logits: Callable[[I64], F32]) -> list[Positions]:
        """One Positions a chunk. logits: i64[n] → f32[n, vocab], from an empty cache."""
        return [
            self._compared(i, log_softmax(logits(chunk)[self.first : -1]))
            for i, chunk in enumerate(self.tokens)
        ]

    def _compared(self, index: int, log_q: npt.NDArray[np.float64]) -> Positions:
        next_tokens = self.tokens[index, self.first + 1 :].astype(np.int32)
        return compare(np.asarray(self.log_p[index], np.float64), log_q, next_tokens)
