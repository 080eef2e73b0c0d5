"""KL(source ‖ model) of next-token distributions and its gradient, without the logits of all positions at once.

With p the source's softmax and q the model's, both in f32: loss = mean over positions of Σ p (log p - log q), and its
gradient by the model's logits is (q - p) / positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.decoder.block import Ends, rms_norm

#: Bytes of the logits of one chunk of positions; about five such tensors are in memory at a time.
LOGIT_BYTES = 1 << 27


def positions(vocab: int) -> int:
    """How many positions' logits are computed at a time."""
    return max(LOGIT_BYTES // (4 * vocab), 1)


@torch.no_grad()
def divergence(x: Tensor, source: Tensor, ends: Ends, source_ends: Ends) -> Tensor:
    """The loss. x, source: f32[..., hidden] behind the last blocks.

    Returns f64[], a tensor, so that a GPU is not waited for.
    """
    x, source = x.flatten(0, -2), source.flatten(0, -2)
    each = positions(len(ends.head))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), each):
        rows = slice(start, start + each)
        total += _per_position(ends.logits(x[rows]), source_ends.logits(source[rows]))[0].sum(
            dtype=torch.float64
        )
    return total / len(x)


@torch.no_grad()
def divergence_backward(
    x: Tensor, source: Tensor, ends: Ends, source_ends: Ends, d_head: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (f64[]) and its gradients by x (of x's shape) and by the final norm's gain (f32[hidden]).

    d_head: f32[vocab, hidden], to which the gradient by the head is added.
    """
    gain = ends.final_norm
    shape, x, source = x.shape, x.flatten(0, -2), source.flatten(0, -2)
    each = positions(len(ends.head))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    dx, d_gain = torch.empty_like(x), torch.zeros_like(gain)
    for start in range(0, len(x), each):
        rows = slice(start, start + each)
        with torch.enable_grad():
            leaf, gain_leaf = x[rows].detach().requires_grad_(), gain.detach().requires_grad_()
            normed = rms_norm(leaf, gain_leaf, ends.desc.norm_eps)
        losses, d_logits = _per_position(normed.detach() @ ends.head.t(), source_ends.logits(source[rows]))
        total += losses.sum(dtype=torch.float64)
        d_normed = (d_logits @ ends.head).div_(len(x))
        if d_head is not None:
            d_head.addmm_(d_logits.t(), normed.detach(), alpha=1 / len(x))
        dx[rows], d_gain_part = torch.autograd.grad(normed, (leaf, gain_leaf), d_normed)
        d_gain += d_gain_part
    return total / len(x), dx.view(shape), d_gain


def _per_position(logits: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Loss f32[n] and q - p f32[n, vocab] from both models' logits f32[n, vocab], which are overwritten or freed."""
    log_q = torch.log_softmax(logits, -1)
    log_p = torch.log_softmax(source, -1)
    p = log_p.exp()
    losses = log_p.sub_(log_q).mul_(p).sum(-1)
    return losses, log_q.exp_().sub_(p)
