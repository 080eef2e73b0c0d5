"""Quantiles and bins of the divergence over tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2qconv.measure.spread import PERCENTAGES, kl_spread


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_quantiles_and_bins_are_numpys(n):
    kl = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).pow(6) * 5
    spread = kl_spread(kl)
    for p in PERCENTAGES:
        wanted = np.quantile(kl.numpy(), p / 100)
        assert spread.quantiles[p] == pytest.approx(wanted, rel=1e-12)
    edges = np.array(spread.edges)
    assert (edges[0], edges[-1]) == pytest.approx((1e-7, 10**1.5))
    counts, _ = np.histogram(np.clip(kl.numpy(), edges[0], edges[-1]), edges)
    assert list(spread.counts) == counts.tolist()


def test_what_lies_outside_is_counted_in_the_outermost_bins():
    spread = kl_spread(torch.tensor([-1e-12, 0.0, 1e-9, 100.0], dtype=torch.float64))
    assert (spread.counts[0], spread.counts[-1], sum(spread.counts)) == (3, 1, 4)
