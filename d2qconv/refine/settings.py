"""What a last pass is asked to do, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch

#: One sequence in this many, the last ones, is never trained on.
RESERVED_SHARE = 16


@dataclass(frozen=True)
class RefineSettings:
    """How far and how fast.

    The rates are Adam's largest step, relative: of a scale's multiplier, of a norm gain's multiplier, and of a bias in
    units of the root mean square of its vector. All rise linearly over the first `warmup` of the steps and then fall
    to 0 by half a cosine. batch_tokens: tokens of one step, in whole sequences, at least one. The default
    rates come from short runs, one seed each, of the tiny models at Q2_K: scale rates of 4e-3 and more fitted the
    calibration better and held-out text worse; between 1e-3 and 2e-3 there was no clear difference.
    """

    steps: int = 300
    scale_rate: float = 1e-3
    gain_rate: float = 4e-3
    bias_rate: float = 1e-2
    batch_tokens: int = 8192
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    seed: int = 0

    def slope(self, step: int) -> float:
        """The share of the full rate at step 0 ≤ step < steps."""
        rise = max(round(self.warmup * self.steps), 1)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (self.steps - rise + 1)))


#: For one block at a time.
BLOCK_SETTINGS = RefineSettings(steps=60, scale_rate=2e-3, gain_rate=2e-3)


class RefineNotes(msgspec.Struct, frozen=True):
    """What a last pass did. It has no times in it: equal runs give equal notes.

    steps: those done. kept: whether the new values are used. why: if not. The losses (mean KL divergence in nats, or
    the relative error of a block's output) are those of storable values: on the first sequences that were trained on,
    as many as are reserved, and on the reserved ones. Without any steps they are 0.
    """

    steps: int
    kept: bool
    why: str = ""
    trained_before: float = 0.0
    trained_after: float = 0.0
    reserved_before: float = 0.0
    reserved_after: float = 0.0


def n_reserved(n_seq: int) -> int:
    """Of so many sequences, how many at the end are reserved; none of a single one."""
    return max(n_seq // RESERVED_SHARE, 1) if n_seq > 1 else 0


@dataclass(frozen=True)
class Share:
    """Which sequences are for what. sample: of those trained on, for the notes. batch: sequences of one step."""

    trained: slice
    sample: slice
    reserved: slice
    batch: int

    @classmethod
    def of(cls, n_seq: int, length: int, settings: RefineSettings, n_kept: int | None = None) -> Share | None:
        """n_kept: how many at the end are reserved. None if there are not two sequences: one must be reserved."""
        if n_seq < 2:
            return None
        n_kept = n_reserved(n_seq) if n_kept is None else n_kept
        n_trained = n_seq - n_kept
        batch = min(max(settings.batch_tokens // length, 1), n_trained)
        return cls(slice(0, n_trained), slice(0, min(n_kept, n_trained)), slice(n_trained, n_seq), batch)

    def pieces(self, rows: slice) -> list[slice]:
        """`rows` in slices of at most a batch."""
        return [
            slice(start, min(start + self.batch, rows.stop))
            for start in range(rows.start, rows.stop, self.batch)
        ]

    def batches(self, settings: RefineSettings) -> Iterator[slice]:
        """One slice of `batch` neighbouring sequences a step.

        Each epoch begins at another offset below `batch`, visits the whole batches from there in a new order, and
        leaves out the rest. Drawn on the CPU from the seed.
        """
        generator = torch.Generator().manual_seed(settings.seed)
        n_trained, left = self.trained.stop, settings.steps
        while left > 0:
            offset = int(torch.randint(min(self.batch, n_trained - self.batch + 1), (), generator=generator))
            starts = torch.arange(offset, n_trained - self.batch + 1, self.batch)
            order = torch.randperm(len(starts), generator=generator)[:left]
            left -= len(order)
            for start in starts[order].tolist():
                yield slice(start, start + self.batch)
