"""What tensors and nodes are called in the graph."""

from __future__ import annotations

from d2qconv.names import Part, Role, TensorId

#: cos and sin of every position: f32[max_positions, head / 2].
ROPE_COS, ROPE_SIN = "rope.cos", "rope.sin"


def node_name(role: Role, block: int | None) -> str:
    """`blk.0.gate`, `head`: the node that multiplies by a matrix, and the stem of its initializers."""
    return f"{role}" if block is None else f"blk.{block}.{role}"


def stored_name(tensor: TensorId) -> str:
    """`blk.0.gate.weight`, `blk.0.gate.bias`, `final_norm.weight`."""
    return f"{node_name(tensor.role, tensor.block)}.{Part(tensor.part)}"
