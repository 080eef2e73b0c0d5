"""Causal attention whose gradient is the same bits every time, on CUDA too, and needs no score matrix in memory.

torch's fused kernels add their gradients up with atomics (memory-efficient and flash) unless told otherwise. Here
forward and backward are matrix products, softmax and sums, each with a fixed order, over a few heads at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2qconv.decoder.block import Block, Past

#: Bytes of one score matrix; about four of them are in memory at a time.
SCORE_BYTES = 1 << 27


def score_bytes(n_heads: int, n_kv_heads: int, length: int) -> int:
    """Bytes of the score matrix of the heads that share one k and v: the least that is computed at a time."""
    return n_heads // n_kv_heads * length * length * 4


class CausalAttention(torch.autograd.Function):
    """softmax(q kᵀ / √head + causal mask) v.

    q: f32[n, rep, length, head]; k, v: f32[n, length, head], with n = n_seq · n_kv_heads and rep query heads on each.
    Returns f32[n, rep, length, head]. Backward computes the scores again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Also keeps q, k, v and the result."""
        out = torch.empty_like(q)
        for rows in _pieces(q):
            out[rows] = (_shares(q[rows], k[rows]) @ v[rows]).view_as(q[rows])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With P the softmax: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)), dQ = dS K / √head, dK = dSᵀ Q / √head."""
        q, k, v, out = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scale = 1 / math.sqrt(q.shape[-1])
        for rows in _pieces(q):
            d_out, kept = grads[0][rows].flatten(1, 2), out[rows].flatten(1, 2)
            shares = _shares(q[rows], k[rows])
            dv[rows] = shares.transpose(1, 2) @ d_out
            ds = d_out @ v[rows].transpose(1, 2)
            ds.sub_((d_out * kept).sum(-1, keepdim=True)).mul_(shares).mul_(scale)
            dq[rows] = (ds @ k[rows]).view_as(q[rows])
            dk[rows] = ds.transpose(1, 2) @ q[rows].flatten(1, 2)
        return dq, dk, dv


def _pieces(q: Tensor) -> Iterator[slice]:
    """Slices of the first axis whose scores take about SCORE_BYTES."""
    n, rep, length, _ = q.shape
    each = max(SCORE_BYTES // (rep * length * length * 4), 1)
    return (slice(start, start + each) for start in range(0, n, each))


def _shares(q: Tensor, k: Tensor) -> Tensor:
    """The softmax over the keys up to each query's own: f32[n, rep·length, length]."""
    n, rep, length, head = q.shape
    scores = q.reshape(n, rep * length, head) @ k.transpose(1, 2)
    scores.mul_(1 / math.sqrt(head))
    ahead = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
    scores.view(n, rep, length, length).masked_fill_(ahead, -torch.inf)
    return torch.softmax(scores, -1)


@dataclass
class SteadyBlock(Block):
    """A block whose attention is `CausalAttention`."""

    def mix(self, h: Tensor, past: Past | None = None) -> Tensor:
        """See `Block.mix`; whole sequences only."""
        assert past is None, "the last pass computes whole sequences"
        dims = self.desc.dims
        n_seq, length, _ = h.shape
        q, k, v = self._heads(h, 0)
        q = q.reshape(n_seq * dims.n_kv_heads, -1, length, dims.head)
        mixed: Tensor = CausalAttention.apply(q, k.flatten(0, 1), v.flatten(0, 1))  # type: ignore[no-untyped-call]
        return mixed.view(n_seq, dims.n_heads, length, dims.head).transpose(1, 2).reshape(n_seq, length, -1)
