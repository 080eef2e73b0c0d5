"""Embedding, final norm and head in the last pass.

Their matrices are on a grid too, so their scales are trained like those of the blocks. A tied matrix gets both
gradients: as embedding and as head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.block import Ends
from d2qconv.ir.coded import Coded, Held, decoded
from d2qconv.refine.parameters import Kind, Pool, TrainedGain, TrainedMatrix, n_scales, plain


@dataclass(frozen=True)
class HeldEnds:
    """Embedding, final norm and head as the package holds them; head: None if it is the embedding."""

    embedding: Held
    final_norm: Tensor
    head: Held | None = None

    def matrices(self) -> Iterator[Held]:
        """The embedding, and the head if it is another."""
        yield self.embedding
        if self.head is not None:
            yield self.head

    def count(self) -> dict[Kind, int]:
        """Parameters by kind."""
        scales = sum(n_scales(held) for held in self.matrices() if isinstance(held, Coded))
        return {Kind.SCALE: scales, Kind.GAIN: self.final_norm.numel(), Kind.BIAS: 0}

    def decoded(self, desc: ModelDesc) -> Ends:
        """The same, ready to compute."""
        embedding = _float(self.embedding)
        return Ends(
            desc,
            embedding,
            plain(self.final_norm.float()),
            embedding if self.head is None else _float(self.head),
        )


@dataclass(frozen=True)
class TrainedEnds:
    """The same while it is trained; a float matrix stays as it is."""

    desc: ModelDesc
    embedding: TrainedMatrix | Tensor
    final_norm: TrainedGain
    head: TrainedMatrix | Tensor | None

    @classmethod
    def of(cls, desc: ModelDesc, ends: HeldEnds, pool: Pool) -> TrainedEnds:
        """Ends whose parameters are the next ones of the pool."""

        def made(held: Held) -> TrainedMatrix | Tensor:
            return TrainedMatrix.of(held, pool) if isinstance(held, Coded) else plain(held.float())

        head = None if ends.head is None else made(ends.head)
        return cls(desc, made(ends.embedding), TrainedGain.of(ends.final_norm, pool), head)

    @torch.no_grad()
    def computed(self) -> Ends:
        """The values as they are now, without gradients."""
        embedding = _value(self.embedding)
        return Ends(
            self.desc,
            embedding,
            self.final_norm.value().detach(),
            embedding if self.head is None else _value(self.head),
        )

    def head_gradient(self) -> Tensor | None:
        """Zeros for the gradient of the matrix that makes the logits, f32[vocab, hidden]; None if it is not trained."""
        head = self._head
        if not isinstance(head, TrainedMatrix):
            return None
        return torch.zeros(head.coded.shape, device=head.coded.codes.device)

    def backward(self, tokens: Tensor, d_x: Tensor, d_gain: Tensor, d_head: Tensor | None) -> None:
        """Carry gradients on to the parameters.

        d_x: f32[n_seq, length, hidden], by the embedded tokens i64[n_seq, length]; d_gain: f32[hidden]; d_head as
        `head_gradient` made it, overwritten.
        """
        with torch.enable_grad():
            torch.autograd.backward(self.final_norm.value(), d_gain)
        if isinstance(self.embedding, TrainedMatrix):
            # Rows are sorted before they are added up, so the order of the sum is fixed.
            looked_up = torch.ops.aten.embedding_dense_backward(
                d_x.flatten(0, -2), tokens.flatten(), self.embedding.coded.shape[0], -1, False
            )
            if self.head is None and d_head is not None:
                d_head += looked_up
            else:
                self.embedding.backward(looked_up)
        head = self._head
        if d_head is not None and isinstance(head, TrainedMatrix):
            head.backward(d_head)

    @property
    def _head(self) -> TrainedMatrix | Tensor:
        return self.embedding if self.head is None else self.head

    def stored(self) -> HeldEnds:
        """Everything rounded to storage precision."""

        def made(trained: TrainedMatrix | Tensor) -> Held:
            return trained.stored() if isinstance(trained, TrainedMatrix) else trained

        head = None if self.head is None else made(self.head)
        return HeldEnds(made(self.embedding), self.final_norm.stored(), head)


def _value(trained: TrainedMatrix | Tensor) -> Tensor:
    return trained.value().detach() if isinstance(trained, TrainedMatrix) else trained


def _float(held: Held) -> Tensor:
    return plain(decoded(held))
