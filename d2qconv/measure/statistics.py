"""Means with their errors, and percentiles, by the formulas of llama-perplexity.

Facts: tools/perplexity/perplexity.cpp of ggml-org/llama.cpp, `kl_divergence` (mean_and_uncertainty, covariance,
percentile). Everything is computed here in f64, where that program keeps single values in f32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number measured on some tokens, and its standard error: 0 where there are too few to say."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.2g}"


@dataclass(frozen=True)
class DivergenceStatistics:
    """A model against its source.

    kl: mean KL divergence of a token, nats; median … maximum: of the same values, percentiles interpolated linearly.
    same_top: share of tokens at which both models' likeliest next token is the same. rms_dp, mean_dp: root mean square
    and mean of Δp, the difference of the probabilities that model and source give the true next token, as a share of 1.
    log_ratio: ln(perplexity / perplexity of the source), its error that of paired values.
    """

    kl: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    maximum: float
    same_top: Estimate
    rms_dp: Estimate
    mean_dp: Estimate
    perplexity_source: Estimate
    log_ratio: Estimate


def mean(values: Tensor) -> Estimate:
    """Mean of f64[n], and sqrt((E[x²] - E[x]²) / (n - 1))."""
    n = len(values)
    error = math.sqrt(float(values.var(correction=0)) / (n - 1)) if n > 1 else 0.0
    return Estimate(float(values.mean()), error)


def share(n_true: int, n: int) -> Estimate:
    """n_true / n, and sqrt(p (1 - p) / (n - 1))."""
    p = n_true / n
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0)


def perplexity(log_p: Tensor) -> Estimate:
    """Exp of the mean of -log_p, f64[n] of the true next tokens; its error is perplexity · error of that mean."""
    nll = mean(-log_p)
    try:
        value = math.exp(nll.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, value * nll.error)


def root_mean_square(values: Tensor) -> Estimate:
    """sqrt(E[x²]) of f64[n], and error(E[x²]) / (2 sqrt(E[x²]))."""
    square = mean(values.square())
    value = math.sqrt(square.value)
    return Estimate(value, square.error / (2 * value) if value else 0.0)


def percentiles(values: Tensor, fractions: Sequence[float]) -> list[float]:
    """Of f64[n], each between its neighbours by linear interpolation at fraction · (n - 1)."""
    ordered = values.sort().values
    found = []
    for fraction in fractions:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        # Between a number and infinity there is none, not even at the number's own place.
        value = ordered[low] if place == low else torch.lerp(ordered[low], ordered[low + 1], place - low)
        found.append(float(value))
    return found
