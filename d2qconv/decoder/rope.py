"""Rotary position embedding in Hugging Face's half-split layout.

Frequencies and the attention factor are those of transformers' `modeling_rope_utils.py`; the tests hold each kind
against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from d2qconv.arch.spec import Rope


def inverse_frequencies(rope: Rope, head: int) -> Tensor:
    """θ_k, f32[head/2] on the CPU: the angle that position 1 turns pair k by, in radians."""
    plain = rope.theta ** -(torch.arange(0, head, 2, dtype=torch.int64).float() / head)
    return _FREQUENCIES[rope.kind](rope, plain, head)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by. 1 but for YaRN (arXiv 2309.00071, eq. 22)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor, 1.0)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def cos_sin(rope: Rope, head: int, positions: range, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `positions`, each f32[len(positions), head], the halves repeated. Not to be changed."""
    angles = torch.outer(torch.tensor(positions).float(), inverse_frequencies(rope, head))
    angles = torch.cat([angles, angles], dim=-1)
    factor = attention_factor(rope)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (k, k + head/2) of x [..., length, head] by their position's angle."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def mscale(factor: float, scale: float) -> float:
    """0.1 · scale · ln(factor) + 1: how much sharper attention must be for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _default(rope: Rope, plain: Tensor, head: int) -> Tensor:  # noqa: ARG001 one signature for all kinds
    return plain


def _linear(rope: Rope, plain: Tensor, head: int) -> Tensor:  # noqa: ARG001
    return plain / rope.factor


def _llama3(rope: Rope, plain: Tensor, head: int) -> Tensor:  # noqa: ARG001
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    waves = 2 * math.pi / plain
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_slowed = rope.original_max_positions / rope.low_freq_factor
    share = (rope.original_max_positions / waves - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - share) * plain / rope.factor + share * plain
    slowed = torch.where(waves > shortest_slowed, plain / rope.factor, plain)
    return torch.where((waves <= shortest_slowed) & (waves >= longest_kept), between, slowed)


def _yarn(rope: Rope, plain: Tensor, head: int) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071, eq. 17-20)."""

    def dim_of(turns: float) -> float:
        return (head * math.log(rope.original_max_positions / (turns * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    low, high = max(math.floor(low), 0), min(math.ceil(high), head - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head // 2).float() - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


_FREQUENCIES: dict[str, Callable[[Rope, Tensor, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
