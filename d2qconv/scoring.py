"""Runtimes measured at the tokens of a text, chunk by chunk, alone or against the source.

Memory: one block, the embedding and the head of the source in f32, GROUP_BYTES of its activations, one chunk of logits
of every runtime, and PIECE_LOGITS numbers of them in f64; besides these what the runtimes take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from d2qconv.errors import RunError
from d2qconv.exporters.runtime import LoadedPackage
from d2qconv.measure.chunks import Chunks
from d2qconv.measure.metrics import Divergence, Likelihood
from d2qconv.measure.streamed import Streamed
from d2qconv.progress import Watch

#: Activations of the source that are held at a time, in bytes; its weights are read once for as many chunks as fit.
GROUP_BYTES = 1 << 30
#: Logits of a chunk that are turned into f64 at a time.
PIECE_LOGITS = 1 << 23


def score_alone(runtimes: Sequence[LoadedPackage], chunks: Chunks, watch: Watch) -> list[Likelihood]:
    """What each runtime gives the true next tokens. Raises RunError for logits that are not finite."""
    watch.stage("measure", len(chunks.tokens))
    scores = [Likelihood() for _ in runtimes]
    for index in range(len(chunks.tokens)):
        targets = chunks.targets(index)
        for runtime, score in zip(runtimes, scores, strict=True):
            logits = _logits(runtime, chunks, index)
            for rows in _pieces(logits):
                score.add(logits[rows], targets[rows])
        watch.step(index + 1, f"perplexity {scores[0].perplexity.value:.4f}")
    return scores


def score_against(
    reference: Streamed, runtimes: Sequence[LoadedPackage], chunks: Chunks, watch: Watch
) -> list[Divergence]:
    """Each runtime against the source. Raises RunError for logits that are not finite."""
    scores = [Divergence() for _ in runtimes]
    n_chunks, dims = len(chunks.tokens), reference.model.dims
    n_group = max(GROUP_BYTES // (4 * chunks.context * dims.hidden), 1)
    for start in range(0, n_chunks, n_group):
        group = range(start, min(start + n_group, n_chunks))
        part = f" {start // n_group + 1}/{-(-n_chunks // n_group)}" if n_group < n_chunks else ""
        watch.stage(f"source{part}", dims.n_layers)
        on_block = partial(_say_block, watch)
        hidden = reference.hidden(chunks.tokens[group.start : group.stop], chunks.first, on_block)
        watch.stage(f"measure{part}", len(group))
        for place, index in enumerate(group):
            _compare(runtimes, scores, reference, hidden[place, :-1], chunks, index)
            watch.step(place + 1, f"KL divergence {scores[0].mean_kl:.4f}")
    return scores


def _compare(
    runtimes: Sequence[LoadedPackage],
    scores: Sequence[Divergence],
    reference: Streamed,
    hidden: Tensor,
    chunks: Chunks,
    index: int,
) -> None:
    """Add one chunk. hidden: f32[positions, hidden], what the source's head reads."""
    seen = [_logits(runtime, chunks, index) for runtime in runtimes]
    targets = chunks.targets(index).to(hidden.device)
    for rows in _pieces(seen[0]):
        wanted = reference.logits(hidden[rows])
        if not bool(torch.isfinite(wanted).all()):
            raise RunError("the source gives logits that are not finite", where=f"chunk {index}")
        for found, score in zip(seen, scores, strict=True):
            score.add(wanted, found[rows].to(hidden.device), targets[rows])


def _logits(runtime: LoadedPackage, chunks: Chunks, index: int) -> Tensor:
    """f32[positions, vocab] of the judged positions of a chunk; raises RunError if they are not finite."""
    found = runtime.logits(chunks.tokens[index : index + 1].numpy(), chunks.first)[0, :-1]
    logits = torch.from_numpy(found)
    if not bool(torch.isfinite(logits).all()):
        raise RunError(
            f"{runtime.name} gives logits that are not finite",
            where=f"chunk {index}",
            todo="d2qconv verify says whether the package is damaged",
        )
    return logits


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Some rows at a time, about PIECE_LOGITS numbers."""
    n = max(PIECE_LOGITS // logits.shape[1], 1)
    for start in range(0, len(logits), n):
        yield slice(start, start + n)


def _say_block(watch: Watch, done: int) -> None:
    watch.step(done, f"block {done - 1}")
