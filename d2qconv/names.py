"""What a tensor is called inside d2qconv, whatever its checkpoint or its package calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a weight does in a decoder."""

    EMBED = "embed"
    ATTN_NORM = "attn_norm"
    Q = "q"
    K = "k"
    V = "v"
    Q_NORM = "q_norm"
    K_NORM = "k_norm"
    O = "o"  # noqa: E741 the field calls it so
    FFN_NORM = "ffn_norm"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    FINAL_NORM = "final_norm"
    HEAD = "head"


class Part(StrEnum):
    """Which tensor of a site."""

    WEIGHT = "weight"
    BIAS = "bias"


@dataclass(frozen=True)
class TensorId:
    """One tensor: role, block number (None outside the blocks) and part."""

    role: Role
    block: int | None = None
    part: Part = Part.WEIGHT

    def __str__(self) -> str:
        """`blk.3.down.weight`, `embed.weight`."""
        prefix = "" if self.block is None else f"blk.{self.block}."
        return f"{prefix}{self.role}.{self.part}"

    @classmethod
    def parse(cls, text: str) -> TensorId:
        """Inverse of `str`; raises ValueError."""
        fields = text.split(".")
        match fields:
            case [role, part]:
                return cls(Role(role), None, Part(part))
            case ["blk", block, role, part] if block.isdigit():
                return cls(Role(role), int(block), Part(part))
        raise ValueError(f"not a tensor id: {text!r}")


def shortened(tensors: Sequence[TensorId]) -> str:
    """`blk.0.q.bias and 31 more`."""
    return str(tensors[0]) + (f" and {len(tensors) - 1} more" if len(tensors) > 1 else "")
