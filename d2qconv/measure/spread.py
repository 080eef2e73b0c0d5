"""How the KL divergence is spread over tokens: quantiles, and counts in bins of equal width on a log scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.measure.statistics import percentiles

#: Percentages of the quantiles.
PERCENTAGES = (1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
#: Edges are 10^(k/4) nats from the first to the last k: 1e-7 … 31.6.
FIRST, LAST = -28, 6


@dataclass(frozen=True)
class KlSpread:
    """quantiles: nats by percentage. edges: of the bins, one more than counts."""

    quantiles: Mapping[float, float]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def kl_spread(kl: Tensor) -> KlSpread:
    """Of f64[n] divergences, n ≥ 1. The first bin has what is below it too, zeros and rounding below zero among it."""
    values = kl.double()
    quantiles = percentiles(values, [p / 100 for p in PERCENTAGES])
    edges = tuple(10 ** (k / 4) for k in range(FIRST, LAST + 1))
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(values, inner, right=True), minlength=len(edges) - 1)
    return KlSpread(dict(zip(PERCENTAGES, quantiles, strict=True)), edges, tuple(counts.tolist()))
