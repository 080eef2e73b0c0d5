"""How the KL divergence is spread over tokens: quantiles, and counts in bins of equal width on a log scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
    ordered = kl.double().sort().values
    n = len(ordered)
    # The least value that so many of all are not above, in whole per mille.
    ranks = {p: max(-(-round(10 * p) * n // 1000), 1) - 1 for p in PERCENTAGES}
    edges = tuple(10 ** (k / 4) for k in range(FIRST, LAST + 1))
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(ordered, inner, right=True), minlength=len(edges) - 1)
    return KlSpread({p: float(ordered[rank]) for p, rank in ranks.items()}, edges, tuple(counts.tolist()))
