"""What a node of a read model says of itself, checked: attributes by type, and nothing that changes what it computes.

A hostile model may give an attribute any type, and an option of a node may show only far from where logits are
compared (`local_window_size`), or not at all (`g_idx`, which ONNX Runtime ignores in silence beside zero points).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import onnx

from d2qconv_onnx.container import Container

#: Attributes by which a node is what our models mean by it; any other may change what it computes.
_KNOWN: Mapping[str, Collection[str]] = {
    "MatMulNBits": ("K", "N", "bits", "block_size", "accuracy_level"),
    "GatherBlockQuantized": ("bits", "block_size", "gather_axis", "quantize_axis"),
    "RMSNormalization": ("axis", "epsilon"),
    "SkipSimplifiedLayerNormalization": ("epsilon",),
    "GroupQueryAttention": ("num_heads", "kv_num_heads", "do_rotary", "rotary_interleaved", "scale"),
}
#: Fewest inputs, and the inputs that must be absent: g_idx; the norm's bias; no input of attention behind its tables.
_INPUTS: Mapping[str, tuple[int, Collection[int]]] = {
    "MatMulNBits": (4, (4,)),
    "GatherBlockQuantized": (4, ()),
    "RMSNormalization": (2, ()),
    "SkipSimplifiedLayerNormalization": (3, (3,)),
    "GroupQueryAttention": (9, range(9, 32)),
}
_CONTRIB = "com.microsoft"


def check_node(container: Container, node: onnx.NodeProto) -> None:
    """Raise VerifyError for an attribute or input with which a node is not what our models mean by it."""
    kind = node.op_type
    if kind not in _KNOWN:
        return
    if (node.domain == _CONTRIB) == (kind == "RMSNormalization"):
        raise container.error(f"{node.name}: {kind} of the operators {node.domain!r} is not known here")
    names = [a.name for a in node.attribute]
    strange = sorted(set(names) - set(_KNOWN[kind]))
    if strange or len(set(names)) < len(names):
        raise container.error(f"{node.name}: attributes {strange or names} are not known here")
    least, absent = _INPUTS[kind]
    given = [i for i, name in enumerate(node.input) if name]
    if len(node.input) < least or any(i in absent for i in given):
        raise container.error(f"{node.name} has inputs {given}, which {kind} is not known with here")


def integer(container: Container, node: onnx.NodeProto, name: str, default: int | None = None) -> int:
    """An attribute that is a whole number; raises VerifyError, also where it is absent without a default."""
    for attribute in node.attribute:
        if attribute.name == name:
            if attribute.type != onnx.AttributeProto.INT:
                raise container.error(f"{node.name}: {name} is no whole number")
            return int(attribute.i)
    if default is None:
        raise container.error(f"{node.name} has no attribute {name}")
    return default


def real(container: Container, node: onnx.NodeProto, name: str, default: float | None = None) -> float:
    """An attribute that is a finite number, as f32 has it; raises VerifyError as `integer` does."""
    for attribute in node.attribute:
        if attribute.name == name:
            if attribute.type != onnx.AttributeProto.FLOAT or not math.isfinite(attribute.f):
                raise container.error(f"{node.name}: {name} is no finite number")
            return float(attribute.f)
    if default is None:
        raise container.error(f"{node.name} has no attribute {name}")
    return default
