"""The protocol: which tokens are run, which positions are scored, and the base model's cached probabilities.

As llama-perplexity --kl-divergence: the text is tokenized once with special tokens; chunks of n_ctx tokens, each
run alone from an empty cache; token 0 becomes BOS if the vocabulary asks for it; positions n_ctx/2 … n_ctx - 2
are scored against the token that follows.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama import I32, Library, Model, opened
from metrics import Positions, compare, log_softmax


@dataclass(frozen=True)
class Protocol:
    """What is measured: chunks of n_ctx tokens, the first n_chunks of the text."""

    text: Path
    n_ctx: int = 512
    n_chunks: int = 40


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def chunks_of(model: Model, text: Path, n_ctx: int, n_chunks: int) -> I32:
    """i32[n_chunks, n_ctx]: the first chunks of the tokenized text; fewer if it is shorter.

    Raises ValueError when the text holds not even one chunk.
    """
    tokens = model.tokenize(text.read_text(encoding="utf-8"))
    n = min(n_chunks, len(tokens) // n_ctx)
    if n < 1:
        raise ValueError(f"{text}: {len(tokens)} tokens are less than one chunk of {n_ctx}")
    return tokens[: n * n_ctx].reshape(n, n_ctx)


class Base:
    """The source model's tokens and log-probabilities, cached in a file of ``folder``."""

    def __init__(self, lib: Library, gguf: Path, protocol: Protocol, folder: Path) -> None:
        self.gguf, self.protocol = gguf, protocol
        self.first = protocol.n_ctx // 2
        what = {
            "gguf": sha256(gguf),
            "text": sha256(protocol.text),
            "n_ctx": protocol.n_ctx,
            "n_chunks": protocol.n_chunks,
            "library": lib.version,
        }
        self.key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"base-{self.key}.npy"
        with opened(lib, gguf, protocol.n_ctx) as model:
            self.tokens = chunks_of(model, protocol.text, protocol.n_ctx, protocol.n_chunks)
            if not file.exists():
                self._fill(model, file)
        self.log_p = np.load(file, mmap_mode="r")

    def _fill(self, model: Model, file: Path) -> None:
        part = file.with_suffix(".part")
        shape = (len(self.tokens), self.protocol.n_ctx - 1 - self.first, model.n_vocab)
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        for i, chunk in enumerate(self.tokens):
            out[i] = log_softmax(model.logits(chunk, self.first)[:-1])
        out.flush()
        del out
        part.replace(file)

    def score(self, lib: Library, gguf: Path) -> list[Positions]:
        """One Positions a chunk of the candidate file. Raises ValueError on another tokenization."""
        parts = []
        with opened(lib, gguf, self.protocol.n_ctx) as model:
            tokens = chunks_of(model, self.protocol.text, self.protocol.n_ctx, self.protocol.n_chunks)
            if not np.array_equal(tokens, self.tokens):
                raise ValueError(
                    f"{gguf}: its tokenizer splits {self.protocol.text} otherwise than {self.gguf}"
                )
            for chunk, log_p in zip(tokens, self.log_p, strict=True):
                log_q = log_softmax(model.logits(chunk, self.first)[:-1])
                parts.append(compare(log_p.astype(np.float64), log_q, chunk[self.first + 1 :]))
        return parts


class _Sums:
    """Σx² f64[n_in] and row counts by weight name."""

    def __init__(self) -> None:
        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, x: npt.NDArray[np.float32]) -> None:
        rows = x.reshape(-1, x.shape[-1])
        square = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        self.sums[name] = self.sums.get(name, np.zeros(len(square))) + square
        self.counts[name] = self.counts.get(name, 0) + len(rows)


def imatrix(lib: Library, gguf: Path, protocol: Protocol, folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Weight name → f32[n_in], mean of x² over all rows: what llama-quantize makes of llama-imatrix's file.

    Collected where llama-imatrix collects: at the MUL_MATs of blk.* while llama.cpp runs the source model.
    Cached in ``folder``; sums in f64 (llama-imatrix: f32).
    """
    what = [sha256(gguf), sha256(protocol.text), protocol.n_ctx, protocol.n_chunks, lib.version]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"imatrix-{key}.npz"
    if not file.exists():
        sums = _Sums()
        with opened(lib, gguf, protocol.n_ctx, sums.add) as model:
            for chunk in chunks_of(model, protocol.text, protocol.n_ctx, protocol.n_chunks):
                model.logits(chunk, 0)
        means = {name: (s / sums.counts[name]).astype(np.float32) for name, s in sums.sums.items()}
        part = file.with_suffix(".part.npz")
        np.savez(part, **means)
        part.replace(file)
    with np.load(file) as data:
        return {name: data[name] for name in data.files}


def described(protocol: Protocol) -> dict[str, str | int]:
    """The protocol for the JSON file: text by hash, not by path."""
    out = asdict(protocol)
    return {**out, "text": protocol.text.name, "sha256": sha256(protocol.text)}
