"""How far one model's next-token distribution is from another's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2qconv.team import Team


@dataclass
class Divergence:
    """Running comparison of a model with its source, over tokens whose successor is known.

    KL divergence is Σ p log(p/q) with p the source, in nats; the perplexities are exp of the mean negative log
    likelihood of the true next token.
    """

    kl: list[Tensor] = field(default_factory=list)
    nll_source: float = 0.0
    nll: float = 0.0
    n_same_top: int = 0
    n_tokens: int = 0

    def add(self, source: Tensor, other: Tensor, targets: Tensor) -> None:
        """source, other: f32[n, vocab] logits; targets: i64[n] the true next tokens."""
        log_p = torch.log_softmax(source.double(), dim=-1)
        log_q = torch.log_softmax(other.double(), dim=-1)
        self.kl.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
        self.nll_source -= log_p.gather(-1, targets[:, None]).sum().item()
        self.nll -= log_q.gather(-1, targets[:, None]).sum().item()
        self.n_same_top += int((source.argmax(-1) == other.argmax(-1)).sum())
        self.n_tokens += len(targets)

    def joined(self, team: Team) -> Divergence:
        """The comparison over the tokens of all processes, in their order."""
        parts = team.gather(self)
        whole = Divergence()
        for part in parts:
            whole.kl += part.kl
            whole.nll_source += part.nll_source
            whole.nll += part.nll
            whole.n_same_top += part.n_same_top
            whole.n_tokens += part.n_tokens
        return whole

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence, nats."""
        return float(torch.cat(self.kl).mean())

    @property
    def perplexity_source(self) -> float:
        """Perplexity of the source."""
        return math.exp(self.nll_source / self.n_tokens)

    @property
    def perplexity(self) -> float:
        """Perplexity of the other model."""
        return math.exp(self.nll / self.n_tokens)

    @property
    def same_top(self) -> float:
        """Share of positions at which both models' likeliest token is the same."""
        return self.n_same_top / self.n_tokens
