"""DAC, the Deviation-Aware Correction (D²Quant, arXiv 2602.02546): the mean by which quantized attention moves the
input of the feed-forward network.

Teacher (this block in full precision) and student (its q, k, v, o quantized) see the SAME block input, so the shift
is the block's own: μ = E[norm(r) − norm(r̃)] over all calibration tokens, clipped to ±10 as the authors do.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest shift of a channel (the authors' released default).
CLIP = 10.0


class ShiftAccumulator:
    """Sums the difference between teacher and student, and its square, in f64."""

    def __init__(self, n: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)
        self._squares = 0.0
        self._n_tokens = 0

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """teacher, student: f32[..., n]."""
        difference = (teacher - student).reshape(-1, teacher.shape[-1])
        self._sum += difference.sum(0, dtype=torch.float64)
        self._squares += float(difference.square().sum(dtype=torch.float64))
        self._n_tokens += len(difference)

    def finish(self) -> tuple[Tensor, float]:
        """(μ f32[n], ‖μ‖² / E‖difference‖²: the share of the mean squared error that μ removes)."""
        mu = (self._sum / self._n_tokens).clamp(-CLIP, CLIP)
        per_token = self._squares / self._n_tokens
        return mu.float(), float(mu.square().sum()) / per_token if per_token else 0.0
