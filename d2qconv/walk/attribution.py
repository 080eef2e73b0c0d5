"""Which part of the model the KL divergence comes from.

Let D(j) be the mean divergence from the source of the model whose first j parts are quantized and whose others are the
source's; the parts are the embedding, the blocks in order, and norm and head. Part j contributes D(j) - D(j-1). It may
be negative: a block may make up for errors of those before it. The contributions add up to the divergence of the
whole model on the same tokens, exactly, whatever the interactions.

D(j) needs the source's blocks behind j. So behind every block of the walk a branch is taken off the quantized stream,
and all branches taken so far go through each of the source's blocks while that is there. With L blocks these are
L²/2 passes of a block over `TOKENS` tokens at most, and no further reading of weights. A resumed run takes the same
branches, since the stored blocks give the same activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from d2qconv.measure.metrics import Divergence
from d2qconv.team import Team
from d2qconv.walk.activations import Activations, Placement
from d2qconv.walk.stream import Stream

#: Held-out sequences that branch off, and positions of each: its first ones, which later ones do not change.
SEQUENCES, POSITIONS = 2, 256
#: Most tokens that branch off.
TOKENS = SEQUENCES * POSITIONS
_F32 = 4


@dataclass(frozen=True)
class Contributions:
    """Nats per token, on `n_tokens` held-out tokens. last_pass: None where none changed the whole model.

    embedding + Σ blocks + output + last_pass is the divergence of the finished model on these tokens.
    """

    embedding: float
    blocks: Sequence[float]
    output: float
    last_pass: float | None
    n_tokens: int

    @property
    def total(self) -> float:
        """The divergence on these tokens."""
        return self.embedding + sum(self.blocks) + self.output + (self.last_pass or 0.0)


class Branches:
    """Branches of the held-out sequences; of the team's leader alone."""

    def __init__(self, judged: Stream, n_layers: int, placement: Placement) -> None:
        """judged: the held-out stream behind the embedding, at which the first branch is taken."""
        n_seq, length, hidden = judged.x.shape
        self.n_seq, self.length = min(n_seq, SEQUENCES), min(length, POSITIONS)
        self._room = [placement.empty(self.n_seq, self.length, hidden) for _ in range(n_layers)]
        self._n_taken = 0
        self._take(judged)

    def advance(self, judged: Stream, teacher: Callable[[Tensor], Tensor]) -> None:
        """Move all branches through the source's block, and take one behind it. judged: is behind it already."""
        for branch in self._room[: self._n_taken]:
            branch.set(slice(0, self.n_seq), teacher(branch.rows(slice(0, self.n_seq))))
        self._take(judged)

    def _take(self, judged: Stream) -> None:
        # Behind the last block no branch is needed: that is the quantized model itself.
        if self._n_taken < len(self._room):
            rows = slice(0, self.n_seq)
            self._room[self._n_taken].set(rows, judged.x.rows(rows)[:, : self.length])
            self._n_taken += 1

    def measure(
        self,
        judged: Stream,
        source_logits: Callable[[Tensor], Tensor],
        whole: Divergence,
        refined: Divergence | None = None,
    ) -> Contributions:
        """The contributions, all branches being behind the last block; gives their memory back.

        source_logits: from activations to logits by the source's final norm and head.
        whole: of the finished model over all held-out tokens, the branches' tokens first; refined: after a last pass.
        """
        assert judged.source is not None, "the held-out sequences run through both models"
        assert self._n_taken == len(self._room), "a branch is missing"
        sums = torch.zeros(len(self._room) + 1, dtype=torch.float64)
        behind: list[Activations] = [*self._room, judged.x]
        for i in range(self.n_seq):
            row = slice(i, i + 1)
            # The last position has no successor, and counts no more than in `whole`.
            source = judged.source.rows(row)[0, : self.length - 1]
            log_p = source_logits(source).double().log_softmax(-1)
            p = log_p.exp()
            for k, branch in enumerate(behind):
                x = branch.rows(row)[0, : self.length - 1]
                log_q = source_logits(x).double().log_softmax(-1)
                sums[k] += (p * (log_p - log_q)).sum().cpu()
        n_tokens = self.n_seq * (self.length - 1)
        # Branches 0 … L-1 are D(0) … D(L-1); the quantized stream with the source's norm and head is D(L).
        d = (sums / n_tokens).tolist()
        final = self._mean(whole, judged.x.shape[1])
        after = None if refined is None else self._mean(refined, judged.x.shape[1]) - final
        self.close()
        return Contributions(d[0], [b - a for a, b in pairwise(d)], final - d[-1], after, n_tokens)

    def _mean(self, whole: Divergence, length: int) -> float:
        """Mean divergence over the branches' tokens, of f64 values that stand sequence by sequence."""
        kl = torch.cat(whole.kl)[: self.n_seq * (length - 1)].view(self.n_seq, length - 1)
        return float(kl[:, : self.length - 1].double().mean())

    def close(self) -> None:
        """Give the memory back."""
        for branch in self._room:
            branch.close()


def branch_bytes(n_layers: int, hidden: int, n_held_out: int, length: int) -> int:
    """Memory of all branches together, beside the activations."""
    return n_layers * min(n_held_out, SEQUENCES) * min(length, POSITIONS) * hidden * _F32


def stream_error(judged: Stream, team: Team) -> float:
    """Σ‖x - s‖² / Σ‖s‖² over all held-out activations: how far the quantized model is off at this depth.

    f32 sums of a sequence, added up in f64.
    """
    assert judged.source is not None, "the held-out sequences run through both models"
    sums = torch.zeros(2, dtype=torch.float64, device=judged.device)
    for x, s in zip(judged.x, judged.source, strict=True):
        sums += torch.stack([(x - s).square().sum(), s.square().sum()]).double()
    team.sum_(sums)
    missed, whole = sums.tolist()
    return float(missed / max(whole, 1e-30))
