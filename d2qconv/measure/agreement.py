"""How far a runtime's logits are from the float reference's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distance:
    """Runtime against reference over all positions.

    mean_kl: mean KL divergence reference‖runtime, nats. noise: rms difference of the centred logits over the rms of
    the reference's own: free of the scale of the logits, which in a random model is tiny. largest: largest absolute
    difference of a logit over the largest absolute logit of the reference.
    """

    mean_kl: float
    noise: float
    largest: float
    n_positions: int


def distance(wanted: np.ndarray, seen: np.ndarray) -> Distance:
    """How far `seen` is from `wanted`, both f32[..., vocab] logits; infinite if either is not finite."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (wanted, seen))
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Distance(float("inf"), float("inf"), float("inf"), len(a))
    largest = float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    log_p, log_q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) for x in (a, b))
    log_p, log_q = log_p - a.max(-1, keepdims=True), log_q - b.max(-1, keepdims=True)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    noise = float(np.sqrt(((a - b) ** 2).mean() / max((a**2).mean(), 1e-30)))
    return Distance(float(kl.mean()), noise, largest, len(a))
