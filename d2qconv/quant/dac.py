"""DAC, the Deviation-Aware Correction (D²Quant, arXiv 2602.02546): the mean by which quantized attention moves the
input of the feed-forward network.

Teacher (this block in full precision) and student (its q, k, v, o quantized) see the SAME block input, so the shift
is the block's own: μ = E[norm(r) − norm(r̃)] over all calibration tokens, clipped to ±10 as the authors do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.team import Team

#: Largest shift of a channel (the authors' released default).
CLIP = 10.0


class ShiftAccumulator:
    """Sums the difference between teacher and student, and its square, channel by channel in f64."""

    def __init__(self, n: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sum)
        self._n_tokens = 0

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """teacher, student: f32[..., n]."""
        difference = (teacher - student).reshape(-1, teacher.shape[-1])
        self._sum += difference.sum(0, dtype=torch.float64)
        self._squares += difference.square().sum(0, dtype=torch.float64)
        self._n_tokens += len(difference)

    def finish(self, team: Team | None = None, gate: float = 0.0) -> tuple[Tensor, float]:
        """(μ f32[n], ‖μ‖² / E‖difference‖²: the share of the mean squared error that μ removes).

        gate: channels whose μ²/σ², the mean against the deviation from it, is below this get no shift: there the
        mean may be chance. With a team, over the tokens of all its processes. Ends the accumulator.
        """
        n_tokens: float = self._n_tokens
        if team is not None:
            team.sum_(self._sum, self._squares)
            n_tokens = team.total(n_tokens)
        mean, square = self._sum / n_tokens, self._squares / n_tokens
        mu = mean.clamp(-CLIP, CLIP)
        if gate > 0:
            mu = torch.where(mean.square() >= gate * (square - mean.square()).clamp_min(0), mu, 0.0)
        total = float(square.sum())
        return mu.float(), float(mu.square().sum()) / total if total else 0.0
