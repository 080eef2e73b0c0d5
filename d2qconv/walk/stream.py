"""Activations on their way through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from d2qconv.calibrate.statistics import InputAccumulator, InputStatistics
from d2qconv.ir.coded import Coded, Held, decoded
from d2qconv.team import Team
from d2qconv.timing import timed
from d2qconv.walk.activations import Activations, Placement

#: From activations to activations, batch by batch.
Function: TypeAlias = Callable[[Tensor], Tensor]

#: Tokens that go through a block at once. Fixed: sums are taken in this order whatever memory there is.
BATCH_TOKENS = 8192
#: Positions of a held-out sequence whose log-probabilities are in memory at once.
JUDGED_TOKENS = 512


@dataclass
class Stream:
    """Activations of some sequences, visited and replaced batch by batch.

    x: f32[n_seq, length, hidden], through quantized blocks. source: the same sequences through the source's blocks,
    or None if nobody asks for them. team: whose other processes hold the other sequences; statistics are over all.
    n_measured: statistics are taken of that many sequences, the first ones; None for all.
    The batches are the same sequences wherever the activations lie.
    """

    x: Activations
    source: Activations | None = None
    team: Team = field(default_factory=Team.alone)
    n_measured: int | None = None

    @classmethod
    def of(cls, x: Tensor, source: Tensor | None = None) -> Stream:
        """Of tensors, where they are."""
        return cls(Activations.of(x), None if source is None else Activations.of(source))

    @classmethod
    def embedded(
        cls,
        tokens: Tensor,
        embedding: Held,
        source_embedding: Held | None,
        placement: Placement,
        team: Team,
    ) -> Stream:
        """The rows of the embedding that i64[n_seq, length] names, and those of the source's if it runs along.

        Tokens and embeddings are on the CPU, the embeddings as they are stored; only a batch's rows go to the
        device, and are decoded there. Raises RunError if there is no room.
        """
        x = _embed(tokens, embedding, placement)
        source = None if source_embedding is None else _embed(tokens, source_embedding, placement)
        return cls(x, source, team)

    @property
    def device(self) -> torch.device:
        """Where the batches are computed."""
        return self.x.device

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(x, source) of some of the measured sequences at a time, about BATCH_TOKENS tokens."""
        n = len(self.x) if self.n_measured is None else self.n_measured
        # A process of a team may have no sequence; its sums are zeros as wide as the others'.
        for rows in _pieces(self.x, n) or [slice(0, 0)]:
            yield self.x.rows(rows), None if self.source is None else self.source.rows(rows)

    def advance(self, function: Function, source_function: Function) -> None:
        """Replace every batch by function(x) and source_function(source)."""
        for rows in _pieces(self.x):
            with timed("forward"):
                self.x.set(rows, function(self.x.rows(rows)))
                if self.source is not None:
                    self.source.set(rows, source_function(self.source.rows(rows)))

    def advance_source(self, source_function: Function) -> None:
        """Replace every batch of the source by source_function(source), the other activations staying."""
        assert self.source is not None, "the source runs along"
        for rows in _pieces(self.source):
            self.source.set(rows, source_function(self.source.rows(rows)))

    def restart(self, start: Activations, function: Function) -> None:
        """Let x be function(start)."""
        for rows in _pieces(self.x):
            self.x.set(rows, function(start.rows(rows)))

    def measure(self, function: Function, source_function: Function) -> InputStatistics:
        """Statistics of function(x) against source_function(source), both staying where they are."""
        return self._measured(function, source_function, None)

    def measure_weighed(
        self, function: Function, source_function: Function, weight: Function
    ) -> InputStatistics:
        """The same with every token counted weight(x) times, f32[n_seq, length], not negative, of mean 1 in a batch.

        E w y yᵀ is the second moment of √w ⊙ y. The means are E w y.
        """
        return self._measured(function, source_function, weight)

    def _measured(
        self, function: Function, source_function: Function, weight: Function | None
    ) -> InputStatistics:
        statistics: InputAccumulator | None = None
        sums = torch.zeros(0)
        for x, source in self.batches():
            with timed("forward"):
                y = function(x)
                source_y = None if source is None else source_function(source)
            with timed("statistics"):
                if statistics is None:
                    statistics = InputAccumulator(y.shape[-1], y.device, is_source_seen=source is not None)
                    sums = torch.zeros(2, y.shape[-1], dtype=torch.float64, device=y.device)
                if weight is not None:
                    w = weight(x)[..., None]
                    _add_sums(sums, w, y, source_y)
                    y, source_y = y * w.sqrt(), None if source_y is None else source_y * w.sqrt()
                statistics.add(y, source_y)
        assert statistics is not None, "a stream has at least one sequence"
        found = statistics.finish(self.team)
        if weight is None:
            return found
        self.team.sum_(sums)
        n_seq = len(self.x) if self.n_measured is None else self.n_measured
        n = self.team.total(n_seq * self.x.shape[1])
        mean, source_mean = (sums / n).float()
        return replace(found, mean=mean, source_mean=None if found.cross is None else source_mean)

    def close(self) -> None:
        """Give the memory back."""
        self.x.close()
        if self.source is not None:
            self.source.close()


def _embed(tokens: Tensor, embedding: Held, placement: Placement) -> Activations:
    n_seq, length = tokens.shape
    x = placement.empty(n_seq, length, embedding.shape[1])
    for rows in _pieces(x):
        ids, place = torch.unique(tokens[rows], return_inverse=True)
        held = embedding.take_rows(ids) if isinstance(embedding, Coded) else embedding[ids]
        x.set(rows, torch.nn.functional.embedding(place.to(x.device), decoded(held.to(x.device))))
    return x


def _add_sums(sums: Tensor, w: Tensor, y: Tensor, source_y: Tensor | None) -> None:
    """Add Σ w y and Σ w source_y to the rows of f64[2, n]."""
    for row, values in enumerate((y, source_y)):
        if values is not None:
            sums[row] += (values * w).sum((0, 1), dtype=torch.float64)


def _pieces(x: Activations, n: int | None = None) -> list[slice]:
    """Slices of whole sequences of the first n, or of all, about BATCH_TOKENS tokens each."""
    n_seq = max(BATCH_TOKENS // x.shape[1], 1)
    end = len(x) if n is None else n
    return [slice(start, min(start + n_seq, end)) for start in range(0, end, n_seq)]
