"""What the quantizer knows of a linear's input: its Gram matrix and its mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of the input x̃ of one or several linears, and of x, the input that the source model has there.

    gram: f32[n_in, n_in] = E x̃ x̃ᵀ over tokens. mean: f32[n_in] = E x̃. cross: f32[n_in, n_in] = E x x̃ᵀ and
    source_mean: E x, or both None if the source was not run along.
    """

    gram: Tensor
    mean: Tensor
    cross: Tensor | None = None
    source_mean: Tensor | None = None

    def shifted(self, mu: Tensor) -> InputStatistics:
        """The statistics of x̃ + mu, mu: f32[n_in]: E(x̃+μ)(x̃+μ)ᵀ = E x̃x̃ᵀ + m μᵀ + μ mᵀ + μ μᵀ."""
        product = torch.outer(self.mean, mu)
        gram = self.gram + product + product.T + torch.outer(mu, mu)
        cross = self.cross
        if cross is not None and self.source_mean is not None:
            cross = cross + torch.outer(self.source_mean, mu)
        return InputStatistics(gram, self.mean + mu, cross, self.source_mean)


class InputAccumulator:
    """Sums over batches: products in f32, sums in f64."""

    def __init__(self, n_in: int, device: torch.device | str, *, is_source_seen: bool) -> None:
        self._gram = torch.zeros(n_in, n_in, dtype=torch.float64, device=device)
        self._sum = torch.zeros(n_in, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._gram) if is_source_seen else None
        self._source_sum = torch.zeros_like(self._sum)
        self._n_tokens = 0

    def add(self, x: Tensor, source: Tensor | None = None) -> None:
        """x: f32[..., n_in] of the quantized model; source: the same tokens in the source model."""
        rows = x.reshape(-1, x.shape[-1])
        self._gram += rows.T @ rows
        self._sum += rows.sum(0)
        self._n_tokens += len(rows)
        if self._cross is not None:
            assert source is not None, "this accumulator was made to see the source"
            source_rows = source.reshape(rows.shape)
            self._cross += source_rows.T @ rows
            self._source_sum += source_rows.sum(0)

    def finish(self) -> InputStatistics:
        """Means over all tokens seen, f32."""
        n = self._n_tokens
        gram, mean = (self._gram / n).float(), (self._sum / n).float()
        if self._cross is None:
            return InputStatistics(gram, mean)
        return InputStatistics(gram, mean, (self._cross / n).float(), (self._source_sum / n).float())
