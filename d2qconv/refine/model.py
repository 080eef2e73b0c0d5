"""The last pass over a whole model, against the source's logits.

Loss = KL(source ‖ model), mean over all positions. One block's decoded weights are in memory at a time: the
forward pass keeps each block's input, the backward pass computes the block again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.block import Ends
from d2qconv.ir.block import QuantizedBlock
from d2qconv.precision import tensor_cores
from d2qconv.refine.attention import SteadyBlock
from d2qconv.refine.descent import backward, descend, forward, judge
from d2qconv.refine.divergence import divergence, divergence_backward
from d2qconv.refine.ends import HeldEnds, TrainedEnds
from d2qconv.refine.parameters import Kind, Pool, TrainedBlock, computed, count, plain
from d2qconv.refine.settings import RefineNotes, RefineSettings, Share


@dataclass(frozen=True)
class _Task:
    """What stays fixed. tokens: i64[n_seq, length]. source_final: see `refine_model`."""

    source_ends: Ends
    source_final: Callable[[slice], Tensor]
    tokens: Tensor
    share: Share

    def loss(self, blocks: Sequence[Callable[[], SteadyBlock]], ends: Ends, rows: slice) -> float:
        """Mean KL divergence on sequences `rows`; each block is made when its turn comes."""
        total, n_seq = 0.0, len(range(*rows.indices(rows.stop)))
        for piece in self.share.pieces(rows):
            x = ends.embed(self.tokens[piece])
            for make in blocks:
                x = forward(make(), x)
            loss = divergence(x, self.source_final(piece), ends, self.source_ends)
            total += float(loss) * (piece.stop - piece.start)
        return total / n_seq

    def losses(
        self, desc: ModelDesc, blocks: Sequence[QuantizedBlock], ends: HeldEnds
    ) -> tuple[float, float]:
        """Of everything in storage precision, on the sample of the trained sequences and on the reserved ones."""
        makers = [lambda block=block: computed(desc, block) for block in blocks]
        ready = ends.decoded(desc)
        with tensor_cores(False):
            return self.loss(makers, ready, self.share.sample), self.loss(makers, ready, self.share.reserved)

    def gradient(self, blocks: Sequence[TrainedBlock], trained: TrainedEnds, rows: slice) -> Tensor:
        """Add the gradient of sequences `rows` to the parameters; returns the loss, f64[]."""
        ends, tokens = trained.computed(), self.tokens[rows]
        inputs = [ends.embed(tokens)]
        for block in blocks:
            inputs.append(forward(block.computed(), inputs[-1]))
        d_head = trained.head_gradient()
        loss, d_out, d_gain = divergence_backward(
            inputs.pop(), self.source_final(rows), ends, self.source_ends, d_head
        )
        for block in reversed(blocks):
            d_out = backward(block, inputs.pop(), d_out)
        trained.backward(tokens, d_out, d_gain, d_head)
        return loss


@torch.inference_mode(False)
def refine_model(
    desc: ModelDesc,
    blocks: Sequence[QuantizedBlock],
    ends: HeldEnds,
    source_final: Callable[[slice], Tensor],
    source_ends: Ends,
    tokens: Tensor,
    settings: RefineSettings,
    on_step: Callable[[int, str], None],
    n_kept: int | None = None,
) -> tuple[list[QuantizedBlock], HeldEnds, RefineNotes]:
    """Better scales, gains and biases for all blocks and for the ends, and what was done.

    blocks, ends: the quantized model, on the device. source_final(rows): the source's activations behind its last
    block, before the final norm, f32[n, length, hidden] on the device; source_ends make them logits (their embedding
    is not read).
    tokens: i64[n_seq, length] on the device, of which the last n_kept are reserved. on_step(done, text) after every
    step.
    On CUDA the steps multiply in TF32; the losses in the notes are f32's, as the tensors are stored. If the loss on the
    reserved sequences does not fall, or a loss is not finite, everything is returned as it came.
    """
    share = Share.of(tokens.shape[0], tokens.shape[1], settings, n_kept)
    unchanged = list(blocks), ends
    if share is None or settings.steps < 1:
        why = "no steps were asked for" if share else "one sequence is not enough to train and to judge"
        return *unchanged, RefineNotes(0, False, why)
    source = Ends(desc, source_ends.embedding, plain(source_ends.final_norm), source_ends.head)
    task = _Task(source, source_final, tokens, share)
    before = task.losses(desc, blocks, ends)
    pool = Pool(_count(blocks, ends), tokens.device)
    trained = [TrainedBlock.of(desc, block, pool) for block in blocks]
    trained_ends = TrainedEnds.of(desc, ends, pool)
    with tensor_cores():
        steps, is_finite = descend(
            pool,
            lambda rows: task.gradient(trained, trained_ends, rows),
            lambda: task.loss([b.computed for b in trained], trained_ends.computed(), share.reserved),
            share,
            settings,
            on_step,
        )
    if not is_finite:
        return *unchanged, judge(steps, before, None, "the KL divergence")
    new, new_ends = [block.stored() for block in trained], trained_ends.stored()
    notes = judge(steps, before, task.losses(desc, new, new_ends), "the KL divergence")
    return (new, new_ends, notes) if notes.kept else (*unchanged, notes)


def _count(blocks: Sequence[QuantizedBlock], ends: HeldEnds) -> dict[Kind, int]:
    sizes = ends.count()
    for block in blocks:
        for kind, n in count(block).items():
            sizes[kind] += n
    return sizes
