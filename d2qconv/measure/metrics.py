"""How far one model's next-token distribution is from another's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2qconv.measure.statistics import (
    DivergenceStatistics,
    Estimate,
    mean,
    percentiles,
    perplexity,
    root_mean_square,
    share,
)
from d2qconv.team import Team


@dataclass
class Divergence:
    """Running comparison of a model with its source, over tokens whose successor is known.

    KL divergence is Σ p log(p/q) with p the source, in nats; the perplexities are exp of the mean negative log
    likelihood of the true next token. log_p, log_q: f64 log probabilities of the true next tokens, by source and model.
    """

    kl: list[Tensor] = field(default_factory=list)
    log_p: list[Tensor] = field(default_factory=list)
    log_q: list[Tensor] = field(default_factory=list)
    n_same_top: int = 0
    n_tokens: int = 0

    def add(self, source: Tensor, other: Tensor, targets: Tensor) -> None:
        """source, other: f32[n, vocab] logits; targets: i64[n] the true next tokens."""
        log_p = torch.log_softmax(source.double(), dim=-1)
        log_q = torch.log_softmax(other.double(), dim=-1)
        self.kl.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
        true_p, true_q = (x.gather(-1, targets[:, None])[:, 0] for x in (log_p, log_q))
        self.log_p.append(true_p.cpu())
        self.log_q.append(true_q.cpu())
        self.n_same_top += int((source.argmax(-1) == other.argmax(-1)).sum())
        self.n_tokens += len(targets)

    def joined(self, team: Team) -> Divergence:
        """The comparison over the tokens of all processes, in their order."""
        parts = team.gather(self)
        whole = Divergence()
        for part in parts:
            whole.kl += part.kl
            whole.log_p += part.log_p
            whole.log_q += part.log_q
            whole.n_same_top += part.n_same_top
            whole.n_tokens += part.n_tokens
        return whole

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence, nats."""
        return float(torch.cat(self.kl).mean())

    @property
    def perplexity_source(self) -> Estimate:
        """Perplexity of the source."""
        return perplexity(torch.cat(self.log_p))

    @property
    def perplexity(self) -> Estimate:
        """Perplexity of the other model."""
        return perplexity(torch.cat(self.log_q))

    @property
    def same_top(self) -> float:
        """Share of positions at which both models' likeliest token is the same."""
        return self.n_same_top / self.n_tokens

    def statistics(self) -> DivergenceStatistics:
        """All that llama-perplexity prints of a comparison, and the 95 % and 99.9 % points."""
        kl, log_p, log_q = (torch.cat(x) for x in (self.kl, self.log_p, self.log_q))
        dp = log_q.exp() - log_p.exp()
        median, p90, p95, p99, p999, maximum = percentiles(kl, (0.5, 0.9, 0.95, 0.99, 0.999, 1.0))
        return DivergenceStatistics(
            kl=mean(kl),
            median=median,
            p90=p90,
            p95=p95,
            p99=p99,
            p999=p999,
            maximum=maximum,
            same_top=share(self.n_same_top, self.n_tokens),
            rms_dp=root_mean_square(dp),
            mean_dp=mean(dp),
            perplexity_source=self.perplexity_source,
            log_ratio=mean(log_p - log_q),
        )


@dataclass
class Likelihood:
    """Log probabilities that a model gives the true next tokens: f64, piece by piece."""

    log_q: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits: f32[n, vocab]; targets: i64[n] the true next tokens."""
        log_q = torch.log_softmax(logits.double(), dim=-1)
        self.log_q.append(log_q.gather(-1, targets[:, None])[:, 0].cpu())

    @property
    def perplexity(self) -> Estimate:
        """Of all tokens so far."""
        return perplexity(torch.cat(self.log_q))


def paired(model: Divergence, other: Divergence) -> Estimate:
    """Mean KL divergence of `model` less that of `other` at the same tokens.

    The errors of the two means are alike, since the text is the same; that of the difference is much smaller.
    """
    return mean(torch.cat(model.kl) - torch.cat(other.kl))


def paired_log_ratio(model: Divergence | Likelihood, other: Divergence | Likelihood) -> Estimate:
    """ln(perplexity of `model` / perplexity of `other`) at the same tokens, with the error of paired values."""
    return mean(torch.cat(other.log_q) - torch.cat(model.log_q))
