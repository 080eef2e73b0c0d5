"""Activations on their way through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from d2qconv.calibrate.statistics import InputAccumulator, InputStatistics

#: From activations to activations, batch by batch.
Function: TypeAlias = Callable[[Tensor], Tensor]

#: Tokens that go through a block at once.
BATCH_TOKENS = 8192


@dataclass
class Stream:
    """Activations of some sequences, visited and replaced batch by batch.

    x: f32[n_seq, length, hidden], through quantized blocks. source: the same sequences through the source's blocks,
    or None if nobody asks for them.
    """

    x: Tensor
    source: Tensor | None = None

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(x, source) of some sequences at a time, about BATCH_TOKENS tokens."""
        for rows in _pieces(self.x):
            yield self.x[rows], None if self.source is None else self.source[rows]

    def advance(self, function: Function, source_function: Function) -> None:
        """Replace every batch by function(x) and source_function(source), in place."""
        for rows in _pieces(self.x):
            self.x[rows] = function(self.x[rows])
            if self.source is not None:
                self.source[rows] = source_function(self.source[rows])

    def measure(self, function: Function, source_function: Function) -> InputStatistics:
        """Statistics of function(x) against source_function(source), both staying where they are."""
        statistics: InputAccumulator | None = None
        for x, source in self.batches():
            y = function(x)
            if statistics is None:
                statistics = InputAccumulator(y.shape[-1], y.device, is_source_seen=source is not None)
            statistics.add(y, None if source is None else source_function(source))
        assert statistics is not None, "a stream has at least one sequence"
        return statistics.finish()


def _pieces(x: Tensor) -> list[slice]:
    """Slices of whole sequences, about BATCH_TOKENS tokens each."""
    n_seq = max(BATCH_TOKENS // x.shape[1], 1)
    return [slice(start, start + n_seq) for start in range(0, len(x), n_seq)]
