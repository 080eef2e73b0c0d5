"""Activations on their way through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.calibrate.statistics import InputAccumulator, InputStatistics

#: Tokens that go through a block at once.
BATCH_TOKENS = 8192


@dataclass
class Stream:
    """Activations of some sequences, f32[n_seq, length, hidden], visited and replaced batch by batch."""

    x: Tensor

    def batches(self) -> Iterator[Tensor]:
        """Some sequences at a time, about BATCH_TOKENS tokens."""
        n_seq = max(BATCH_TOKENS // self.x.shape[1], 1)
        for start in range(0, len(self.x), n_seq):
            yield self.x[start : start + n_seq]

    def advance(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every batch by function(batch)."""
        self.x = torch.cat([function(batch) for batch in self.batches()])

    def measure(self, function: Callable[[Tensor], Tensor]) -> InputStatistics:
        """Statistics of function(x), x staying where it is."""
        statistics: InputAccumulator | None = None
        for batch in self.batches():
            y = function(batch)
            if statistics is None:
                statistics = InputAccumulator(y.shape[-1], y.device)
            statistics.add(y)
        assert statistics is not None, "a stream has at least one sequence"
        return statistics.finish()
