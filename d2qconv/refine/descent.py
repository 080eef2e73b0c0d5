"""Adam over batches of sequences, the gradient of one block, and whether to keep the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.refine.attention import SteadyBlock
from d2qconv.refine.parameters import Pool, TrainedBlock
from d2qconv.refine.settings import RefineNotes, RefineSettings, Share

#: How often the reserved sequences are looked at.
LOOKS = 12
#: Bytes of the activations that one block keeps for its gradient.
BLOCK_BYTES = 1 << 30


def token_bytes(desc: ModelDesc) -> int:
    """Bytes that a block keeps of one token between forward and backward, about: f32 values at every operation."""
    dims = desc.dims
    heads = (dims.n_heads + dims.n_kv_heads) * dims.head
    return 4 * (10 * dims.hidden + 8 * heads + 5 * dims.ffn)


def parts(desc: ModelDesc, x: Tensor) -> Iterator[slice]:
    """Slices of x's sequences, whose activations take about BLOCK_BYTES."""
    n_seq, length, _ = x.shape
    each = max(BLOCK_BYTES // (token_bytes(desc) * length), 1)
    return (slice(start, start + each) for start in range(0, n_seq, each))


@torch.no_grad()
def forward(block: SteadyBlock, x: Tensor) -> Tensor:
    """What comes out of a block, a part of the sequences at a time."""
    y = torch.empty_like(x)
    for rows in parts(block.desc, x):
        y[rows] = block(x[rows])
    return y


def backward(trained: TrainedBlock, x: Tensor, d_out: Tensor) -> Tensor:
    """Compute a block again, add the gradient of its parameters to them, and return that of its input.

    x, d_out: f32[n_seq, length, hidden]; d_out is the gradient by the block's output, and is overwritten.
    """
    block = trained.computed()
    trained.require_grad(block)
    for rows in parts(block.desc, x):
        with torch.enable_grad():
            leaf = x[rows].detach().requires_grad_()
            torch.autograd.backward(block(leaf), d_out[rows])
        assert leaf.grad is not None, "a block's output depends on its input"
        d_out[rows] = leaf.grad
    trained.backward(block)
    return d_out


def descend(
    pool: Pool,
    gradient: Callable[[slice], Tensor],
    reserved: Callable[[], float],
    share: Share,
    settings: RefineSettings,
    on_step: Callable[[int, str], None],
) -> tuple[int, bool]:
    """Take all steps; returns how many were taken and whether every loss was finite: at the first other it ends.

    gradient: adds the gradient of some sequences to the pool and returns their loss, a scalar. reserved: the loss
    on the reserved sequences now; it is looked at LOOKS times on the way, and the pool is left as it was best.
    """
    best, best_loss = pool.snapshot(), math.inf
    every = max(settings.steps // LOOKS, 1)
    for step, rows in enumerate(share.batches(settings)):
        loss = float(gradient(rows))
        if not math.isfinite(loss):
            return step, False
        pool.step(settings, settings.slope(step))
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            unseen = reserved()
            if unseen < best_loss:
                best, best_loss = pool.snapshot(), unseen
        on_step(step + 1, f"loss {loss:.4g}, reserved at best {best_loss:.4g}")
    pool.restore(best)
    return settings.steps, True


def judge(
    steps: int, before: tuple[float, float], after: tuple[float, float] | None, what: str
) -> RefineNotes:
    """The notes. before, after: losses on (sample of the trained, reserved); after is None if one was not finite."""
    if after is None:
        return RefineNotes(
            steps,
            False,
            f"{what} was not finite after {steps} steps",
            before[0],
            before[0],
            before[1],
            before[1],
        )
    kept = after[1] < before[1]
    why = "" if kept else f"{what} on the reserved sequences did not fall"
    return RefineNotes(steps, kept, why, before[0], after[0], before[1], after[1])
