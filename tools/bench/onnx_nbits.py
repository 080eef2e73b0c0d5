"""Float matrices of an ONNX graph turned into MatMulNBits and GatherBlockQuantized, in place.

What tools/bench_onnx stores itself: codes of onnxruntime's functions that its quantizer cannot store, and embedding and
head in 8 bits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, numpy_helper
from onnx_package import Graph
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: accuracy_level of what is written: activations rounded to int8.
LEVEL = 4


@dataclass(frozen=True)
class Rounded:
    """A matrix rounded. codes: u8[N, K]; scales: f32[N, kb]; zeros: u8 or f32[N, kb]; kb = K / block."""

    codes: U8
    scales: F32
    zeros: U8 | F32


def pack(values: U8, container: int) -> U8:
    """u8[..., n] → u8[..., ceil(n·container/8)], least significant bits first, each row padded with zeros."""
    per = 8 // container
    pad = -values.shape[-1] % per
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)])
    parts = padded.reshape(*values.shape[:-1], -1, per).astype(np.uint16)
    shifts = np.arange(per, dtype=np.uint16) * container
    return (parts << shifts).sum(-1).astype(np.uint8)


def as_nbits(
    model: ModelProto, node: NodeProto, rounded: Rounded, block: int, container: int, level: int
) -> str:
    """Turn a float MatMul into MatMulNBits in place; returns the name of the codes.

    level: its accuracy_level, 0 for none. Raises ValueError where K is no multiple of the block.
    """
    n_out, n_in = rounded.codes.shape
    if n_in % block:
        raise ValueError(f"{node.name}: width {n_in} is no multiple of {block}")
    base = node.input[1]
    zeros = rounded.zeros
    arrays = {
        f"{base}.codes": pack(rounded.codes.reshape(n_out, n_in // block, block), container),
        f"{base}.scales": rounded.scales,
        f"{base}.zeros": pack(zeros, container) if zeros.dtype == np.uint8 else zeros,
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    attributes = {"K": n_in, "N": n_out, "bits": container, "block_size": block}
    if level:
        attributes["accuracy_level"] = level
    node.CopyFrom(
        onnx.helper.make_node(
            "MatMulNBits", [node.input[0], *arrays], list(node.output), name=node.name,
            domain="com.microsoft", **attributes,
        )
    )  # fmt: skip
    return f"{base}.codes"


def _rtn8(table: F32, block: int) -> Rounded:
    """f32[rows, K] in 8 bits, asymmetric, by onnxruntime's rounding to nearest."""
    solver = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, bits=8)
    )
    packed, scales, zeros = solver.qbits_block_quant(np.ascontiguousarray(table.T))
    return Rounded(packed.reshape(len(table), -1)[:, : table.shape[1]], scales, zeros)


def quantize_ends(model: ModelProto, block: int) -> None:
    """Embedding and head in 8 bits; the head's bytes serve the embedding where both read one constant.

    Raises ValueError as `as_nbits` does.
    """
    graph = Graph(model)
    head, embedding = graph.head(), graph.embedding()
    weight, table = graph.constant(head.input[1]), graph.constant(embedding.input[0])
    if weight is None or table is None:
        raise ValueError("embedding or head is not a constant")
    head_codes = as_nbits(model, head, _rtn8(numpy_helper.to_array(weight).T, block), block, 8, LEVEL)
    view: list[NodeProto] = []
    if weight.name == table.name:
        base = head_codes.removesuffix(".codes")
        # MatMulNBits wants three dimensions, the look-up two; the builder puts this node there, too.
        data, shape = (
            f"{base}.table",
            numpy_helper.from_array(np.array(weight.dims[::-1], np.int64), f"{base}.shape"),
        )
        model.graph.initializer.append(shape)
        view = [onnx.helper.make_node("Reshape", [head_codes, shape.name], [data], name="embedding_view")]
    else:
        base, rounded = table.name, _rtn8(numpy_helper.to_array(table), block)
        data = f"{base}.codes"
        arrays = {data: rounded.codes, f"{base}.scales": rounded.scales, f"{base}.zeros": rounded.zeros}
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    gather = onnx.helper.make_node(
        "GatherBlockQuantized", [data, embedding.input[1], f"{base}.scales", f"{base}.zeros"],
        list(embedding.output), name=embedding.name, domain="com.microsoft", gather_axis=0, quantize_axis=1,
        block_size=block, bits=8,
    )  # fmt: skip
    nodes = list(model.graph.node)
    index = next(i for i, node in enumerate(nodes) if node.output[0] == embedding.output[0])
    nodes[index : index + 1] = [*view, gather]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def drop_unread(model: ModelProto) -> None:
    """Take nodes and constants away that nothing reads."""
    while True:
        read = {name for node in model.graph.node for name in node.input} | {
            o.name for o in model.graph.output
        }
        nodes = [node for node in model.graph.node if any(name in read for name in node.output)]
        if len(nodes) == len(model.graph.node):
            break
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
