"""The last pass over one block, for models that do not fit: against the source's output of the same block.

Loss = mean over tokens of ‖block(x̃) - y‖² / ‖y‖², x̃ the quantized stream's input and y the source's output on its own
stream. Relative to each token's own size, since the norms that read the residual stream divide by it: a few tokens
with huge activations (the first of a sequence, in many models) would otherwise be all that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.ir.block import QuantizedBlock
from d2qconv.precision import tensor_cores
from d2qconv.refine.attention import SteadyBlock
from d2qconv.refine.descent import backward, descend, forward, judge
from d2qconv.refine.parameters import Pool, TrainedBlock, computed, count, plain
from d2qconv.refine.settings import RefineNotes, RefineSettings, Share

#: Some sequences of a stream, f32[n, length, hidden], on the device.
Rows = Callable[[slice], Tensor]


@dataclass(frozen=True)
class _Task:
    """inputs: x̃. targets: y."""

    inputs: Rows
    targets: Rows
    share: Share

    def loss(self, block: SteadyBlock, rows: slice) -> float:
        """The loss on sequences `rows`."""
        total, n_seq = 0.0, len(range(*rows.indices(rows.stop)))
        for piece in self.share.pieces(rows):
            miss, target = forward(block, self.inputs(piece)), self.targets(piece)
            total += float(_relative(miss.sub_(target), target).sum(dtype=torch.float64))
        return total / (n_seq * target.shape[1])

    def losses(self, block: SteadyBlock) -> tuple[float, float]:
        """On the sample of the trained sequences and on the reserved ones."""
        with tensor_cores(False):
            return self.loss(block, self.share.sample), self.loss(block, self.share.reserved)

    def gradient(self, trained: TrainedBlock, rows: slice) -> Tensor:
        """Add the gradient of sequences `rows` to the parameters; returns the loss, f64[]."""
        x, target = plain(self.inputs(rows)), self.targets(rows)
        miss = forward(trained.computed(), x).sub_(target)
        n_tokens = miss.shape[0] * miss.shape[1]
        loss = _relative(miss, target).sum(dtype=torch.float64) / n_tokens
        backward(trained, x, miss.mul_(2 / n_tokens).div_(_size(target)))
        return loss


@torch.inference_mode(False)
def refine_block(
    desc: ModelDesc,
    block: QuantizedBlock,
    inputs: Rows,
    targets: Rows,
    shape: tuple[int, int],
    settings: RefineSettings,
    on_step: Callable[[int, str], None],
    n_kept: int | None = None,
) -> tuple[QuantizedBlock, RefineNotes]:
    """Better scales, gains and biases of one block, and what was done.

    inputs, targets: x̃ and y, read a few sequences at a time. shape: (n_seq, length); the last n_kept are reserved.
    On CUDA the steps multiply in TF32; the losses in the notes are f32's. If the loss on the reserved sequences does
    not fall, or a loss is not finite, the block is returned as it came.
    """
    share = Share.of(*shape, settings, n_kept)
    if share is None or settings.steps < 1:
        why = "no steps were asked for" if share else "one sequence is not enough to train and to judge"
        return block, RefineNotes(0, False, why)
    device = next(iter(block.norms.values())).device
    task = _Task(inputs, targets, share)
    before = task.losses(computed(desc, block))
    pool = Pool(count(block), device)
    trained = TrainedBlock.of(desc, block, pool)
    with tensor_cores():
        steps, is_finite = descend(
            pool,
            lambda rows: task.gradient(trained, rows),
            lambda: task.loss(trained.computed(), share.reserved),
            share,
            settings,
            on_step,
        )
    if not is_finite:
        return block, judge(steps, before, None, "the error of the block's output")
    new = trained.stored()
    notes = judge(steps, before, task.losses(computed(desc, new)), "the error of the block's output")
    return (new if notes.kept else block), notes


def _size(target: Tensor) -> Tensor:
    """‖y‖² of every token, not 0."""
    return target.square().sum(-1, keepdim=True).clamp_min(1e-30)


def _relative(miss: Tensor, target: Tensor) -> Tensor:
    """‖miss‖² / ‖target‖² of every token."""
    return miss.square().sum(-1, keepdim=True) / _size(target)
