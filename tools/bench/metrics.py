"""The numbers of ``llama-perplexity --kl-divergence``, in float64, from logits.

Per position t: nll_t = -log softmax(q_t)[next token]; KLD_t = Σ_v p_v (log p_v - log q_v), p the base model;
same top token = argmax q_t == argmax p_t. A mean's standard error is sqrt((E[x²] - E[x]²) / (n - 1)), as that
program prints it. It differs from that program in one point: the program stores log p in 16 bits over a range of
16 below the maximum; here log p is f32.

Own lines in numpy on purpose: what judges d2qconv against its peers shares nothing with d2qconv.measure, which
tools/check_perplexity holds against the program itself.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    se: float


@dataclass(frozen=True)
class Positions:
    """One value a scored position: nll f64[n], kld f64[n], same_top bool[n]."""

    nll: F64
    kld: F64
    same_top: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """What is reported for one file; perplexity's error is ppl·se(nll)."""

    n_positions: int
    perplexity: Estimate
    kld: Estimate
    kld_median: float
    kld_99: float
    kld_max: float
    same_top: Estimate


def log_softmax(logits: F32) -> F64:
    """f64[..., n_vocab]: x - max - log Σ exp(x - max)."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def nll_of(log_q: F64, next_tokens: I32) -> F64:
    """f64[n]: -log q of the token that follows. log_q: f64[n, n_vocab]; next_tokens: i32[n]."""
    return -np.take_along_axis(log_q, next_tokens[:, None].astype(np.int64), axis=1)[:, 0]


def compare(log_p: F64, log_q: F64, next_tokens: I32) -> Positions:
    """Positions of one chunk. log_p, log_q: f64[n, n_vocab], base and candidate.

    A base probability of 0 (log p = -inf) adds 0.
    """
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    same = log_p.argmax(axis=1) == log_q.argmax(axis=1)
    return Positions(nll_of(log_q, next_tokens), terms.sum(axis=1), same)


def estimate(values: F64) -> Estimate:
    """Mean and sqrt((E[x²] - E[x]²) / (n - 1)); an error of nan below two values."""
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()) if n else math.nan, math.nan)
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(n - 1)))


def score(parts: list[Positions]) -> Score:
    """All chunks of one file together. Percentiles interpolate linearly, as llama-perplexity's do."""
    nll = np.concatenate([p.nll for p in parts])
    kld = np.concatenate([p.kld for p in parts])
    same = np.concatenate([p.same_top for p in parts]).astype(np.float64)
    log_ppl = estimate(nll)
    ppl = math.exp(log_ppl.mean)
    return Score(
        n_positions=len(nll),
        perplexity=Estimate(ppl, ppl * log_ppl.se),
        kld=estimate(kld),
        kld_median=float(np.median(kld)),
        kld_99=float(np.quantile(kld, 0.99)),
        kld_max=float(kld.max()),
        same_top=estimate(same),
    )


def paired_difference(a: list[Positions], b: list[Positions]) -> Estimate:
    """Mean KLD of b minus a with the error of the paired difference; both scored at the same positions.

    The errors of two means over the same text are strongly correlated, so this one decides who is better.
    """
    x = np.concatenate([p.kld for p in a])
    y = np.concatenate([p.kld for p in b])
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} and {len(y)} positions cannot be paired")
    return estimate(y - x)
