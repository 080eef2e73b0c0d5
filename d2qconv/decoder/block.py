"""One decoder block in float, cut where the quantizer looks in.

::

    x ─ attn_norm ─ h ─ q, k, v, RoPE, softmax ─ mixed ─ o ─ (+x) ─ r
    r ─ ffn_norm  ─ h ─ silu(gate) · up ─ gated ─ down ─ (+r) ─ x of the next block

Every linear may have a bias. All arithmetic is in the dtype of the weights, f32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as fn
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.rope import cos_sin, rotate
from d2qconv.names import Part, Role, TensorId


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x²) + eps) · gain over the last axis."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


@dataclass
class Past:
    """Keys and values of the positions seen so far: f32[n_seq, n_kv_heads, capacity, head], `length` of them."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, desc: ModelDesc, n_seq: int, capacity: int, device: torch.device | str) -> Past:
        """Room for `capacity` positions of `n_seq` sequences."""
        shape = (n_seq, desc.dims.n_kv_heads, capacity, desc.dims.head)
        return cls(torch.empty(shape, device=device), torch.empty(shape, device=device))

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v [n_seq, n_kv_heads, n, head]; returns all keys and values so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class Block:
    """Weights of one block, on one device, ready to compute.

    weights: per role, `[n_out, n_in]` or a norm's gain `[n]`. biases: per role `[n_out]`, only those that exist;
    a bias on FFN_NORM is DAC's shift before a fold has carried it elsewhere.
    Shapes below: x, r: [n_seq, length, hidden].
    """

    desc: ModelDesc
    weights: dict[Role, Tensor]
    biases: dict[Role, Tensor] = field(default_factory=dict)

    def norm(self, role: Role, x: Tensor) -> Tensor:
        """RMSNorm with the gain of `role`, and its bias if one was put there."""
        y = rms_norm(x, self.weights[role], self.desc.norm_eps)
        bias = self.biases.get(role)
        return y if bias is None else y + bias

    def linear(self, role: Role, x: Tensor) -> Tensor:
        """W x + b."""
        return fn.linear(x, self.weights[role], self.biases.get(role))

    def mix(self, h: Tensor, past: Past | None = None) -> Tensor:
        """Attention without its output projection: [n_seq, length, n_heads·head].

        With `past`, h is either the start of the sequences or one position each.
        """
        dims, length = self.desc.dims, h.shape[1]
        if not len(h):
            return h.new_empty(0, length, dims.n_heads * dims.head)
        q, k, v = self._heads(h, 0 if past is None else past.length)
        if past is not None:
            k, v = past.append(k, v)
        is_shared = dims.n_heads != dims.n_kv_heads
        if is_shared and q.is_cuda and length > 1:
            # CUDA's kernels for f32 know no shared heads, and without them all scores would be held at once.
            k, v = (t.repeat_interleave(dims.n_heads // dims.n_kv_heads, dim=1) for t in (k, v))
            is_shared = False
        mixed = fn.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=is_shared)
        return mixed.transpose(1, 2).reshape(len(h), length, -1)

    def _heads(self, h: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [n_seq, n_heads or n_kv_heads, length, head], of positions start, start + 1, …"""
        dims = self.desc.dims
        n_seq, length, _ = h.shape
        q = self.linear(Role.Q, h).view(n_seq, length, dims.n_heads, dims.head)
        k = self.linear(Role.K, h).view(n_seq, length, dims.n_kv_heads, dims.head)
        v = self.linear(Role.V, h).view(n_seq, length, dims.n_kv_heads, dims.head)
        if self.desc.arch.has_qk_norm:
            q, k = self.norm(Role.Q_NORM, q), self.norm(Role.K_NORM, k)
        cos, sin = cos_sin(self.desc.rope, dims.head, range(start, start + length), h.device)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        return q, k, v.transpose(1, 2)

    def attention_received(self, x: Tensor) -> Tensor:
        """How much every position counts for those that read it: Σ over heads and readers of the squared attention.

        f32[n_seq, length], mean 1 in every sequence.
        By it the errors of a position's key and value reach the block's output.
        """
        dims = self.desc.dims
        received = torch.empty(x.shape[:2], device=x.device)
        for row, one in enumerate(x):
            q, k, _ = self._heads(self.attention_input(one[None]), 0)
            k = k.repeat_interleave(dims.n_heads // dims.n_kv_heads, dim=1)
            scores = (q @ k.transpose(-1, -2))[0] / dims.head**0.5
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).triu(1)
            seen = scores.masked_fill(future, -torch.inf).softmax(-1).square().sum((0, 1))
            received[row] = seen / seen.mean()
        return received

    def attention_input(self, x: Tensor) -> Tensor:
        """What q, k and v read."""
        return self.norm(Role.ATTN_NORM, x)

    def ffn_input(self, r: Tensor) -> Tensor:
        """What gate and up read."""
        return self.norm(Role.FFN_NORM, r)

    def attend(self, x: Tensor, past: Past | None = None) -> Tensor:
        """R = x + o(mix(attn_norm(x)))."""
        return x + self.linear(Role.O, self.mix(self.attention_input(x), past))

    def gated(self, h: Tensor) -> Tensor:
        """silu(gate h) · up h: [n_seq, length, ffn]."""
        return fn.silu(self.linear(Role.GATE, h)) * self.linear(Role.UP, h)

    def feed(self, r: Tensor) -> Tensor:
        """X of the next block: r + down(gated(ffn_norm(r)))."""
        return r + self.linear(Role.DOWN, self.gated(self.ffn_input(r)))

    def __call__(self, x: Tensor, past: Past | None = None) -> Tensor:
        """The whole block."""
        return self.feed(self.attend(x, past))


def read_block(desc: ModelDesc, index: int) -> dict[TensorId, Tensor]:
    """The tensors of block `index` of the checkpoint, in its dtypes, on the CPU."""
    ids = [TensorId(site.role, index, part) for site in desc.arch.sites for part in Part]
    return {tensor: desc.tensors[tensor].load() for tensor in ids if tensor in desc.tensors}


def build_block(
    desc: ModelDesc, index: int, tensors: Mapping[TensorId, Tensor], device: torch.device | str
) -> Block:
    """Block `index` from its tensors, in f32."""
    block = Block(desc, {})
    for tensor, values in tensors.items():
        assert tensor.block == index, "a tensor of another block"
        into = block.weights if tensor.part is Part.WEIGHT else block.biases
        into[tensor.role] = values.to(device).float()
    return block


def load_block(desc: ModelDesc, index: int, device: torch.device | str) -> Block:
    """Read block `index` of the checkpoint as f32."""
    return build_block(desc, index, read_block(desc, index), device)


@dataclass(frozen=True)
class Ends:
    """What stands before the first block and behind the last: embedding, final norm, head (all f32)."""

    desc: ModelDesc
    embedding: Tensor
    final_norm: Tensor
    head: Tensor

    def embed(self, tokens: Tensor) -> Tensor:
        """i64[n_seq, length] → f32[n_seq, length, hidden]."""
        return fn.embedding(tokens, self.embedding)

    def logits(self, x: Tensor) -> Tensor:
        """f32[..., hidden] → f32[..., vocab]."""
        return fn.linear(rms_norm(x, self.final_norm, self.desc.norm_eps), self.head)


def load_ends(
    desc: ModelDesc, device: torch.device | str, replaced: Mapping[Role, Tensor] | None = None
) -> Ends:
    """Read embedding, final norm and head as f32; `replaced` weights are taken instead of the checkpoint's."""
    given = replaced or {}

    def weight(role: Role) -> Tensor:
        tensor = given[role] if role in given else desc.tensors[TensorId(role)].load()
        return tensor.to(device=device, dtype=torch.float32)

    embedding = weight(Role.EMBED)
    return Ends(desc, embedding, weight(Role.FINAL_NORM), embedding if desc.is_tied else weight(Role.HEAD))
