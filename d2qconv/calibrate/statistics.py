"""What the quantizer knows of a linear's input: its Gram matrix and its mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of the input of one or several linears.

    gram: f32[n_in, n_in] = mean x xᵀ over tokens. mean: f32[n_in] = mean x.
    """

    gram: Tensor
    mean: Tensor
    n_tokens: int

    def shifted(self, mu: Tensor) -> InputStatistics:
        """The statistics of x + mu, mu: f32[n_in]: E(x+μ)(x+μ)ᵀ = E xxᵀ + m μᵀ + μ mᵀ + μ μᵀ."""
        cross = torch.outer(self.mean, mu)
        gram = self.gram + cross + cross.T + torch.outer(mu, mu)
        return InputStatistics(gram, self.mean + mu, self.n_tokens)


class InputAccumulator:
    """Sums x xᵀ and x over batches: products in f32, sums over batches in f64."""

    def __init__(self, n_in: int, device: torch.device | str) -> None:
        self._gram = torch.zeros(n_in, n_in, dtype=torch.float64, device=device)
        self._sum = torch.zeros(n_in, dtype=torch.float64, device=device)
        self._n_tokens = 0

    def add(self, x: Tensor) -> None:
        """x: f32[..., n_in]."""
        rows = x.reshape(-1, x.shape[-1])
        self._gram += rows.T @ rows
        self._sum += rows.sum(0)
        self._n_tokens += len(rows)

    def finish(self) -> InputStatistics:
        """Means over all tokens seen, f32."""
        return InputStatistics(
            (self._gram / self._n_tokens).float(), (self._sum / self._n_tokens).float(), self._n_tokens
        )
