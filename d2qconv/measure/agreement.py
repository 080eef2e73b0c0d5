"""How far a runtime's logits are from the float reference's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Positions that are compared at a time: 16 of a vocabulary of 150,000 take some 150 MB.
_POSITIONS = 16


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
    """How far `seen` is from `wanted`, both f32[..., vocab] logits; infinite if either is not finite.

    In f64, _POSITIONS at a time.
    """
    a, b = (x.reshape(-1, x.shape[-1]) for x in (wanted, seen))
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Distance(float("inf"), float("inf"), float("inf"), len(a))
    parts = np.array(
        [
            _sums(a[at : at + _POSITIONS].astype(np.float64), b[at : at + _POSITIONS].astype(np.float64))
            for at in range(0, len(a), _POSITIONS)
        ]
    )
    (off, high), (kl, noise, power) = parts[:, :2].max(axis=0), parts[:, 2:].sum(axis=0)
    least = 1e-30 * a.size
    return Distance(
        float(kl / len(a)), float(np.sqrt(noise / max(power, least))), float(off / max(high, 1e-30)), len(a)
    )


def _sums(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float, float]:
    """Of some positions: largest difference, largest logit; sums of KL, of squared differences and squared logits.

    The squares are those of the centred logits.
    """
    off, high = float(np.abs(a - b).max()), float(np.abs(a).max())
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    log_p, log_q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) for x in (a, b))
    log_p, log_q = log_p - a.max(-1, keepdims=True), log_q - b.max(-1, keepdims=True)
    kl = float((np.exp(log_p) * (log_p - log_q)).sum())
    return off, high, kl, float(((a - b) ** 2).sum()), float((a**2).sum())
