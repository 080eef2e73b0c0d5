"""What a folder for onnxruntime-genai holds: bits, bytes and ends, read from its graph; and a copy at another level.

Only the graph is read; tensors stay where they are. Works on folders of any maker: the head is the matrix that
`logits` comes from, the embedding the one that `input_ids` looks up, every other constant matrix is a linear of a
block.
"""

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import get_node_attr_value

#: Key of the model's metadata_props: JSON {tensor: bits} of matrices whose container is wider than their codes.
CODE_BITS = "d2qconv.code_bits"
#: Nodes that only rename or reorder a constant on its way to its reader.
_VIEWS = ("Reshape", "Transpose", "Identity", "Cast")
_FLOAT_BITS = {TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}


@dataclass(frozen=True)
class Facts:
    """One package.

    bits: of the codes of most weights of the blocks' linears, 32 or 16 if these are float. block: weights that share
    a scale, 0 for float. linear_bytes: all constants of the blocks' linears, scales, zeros and biases included.
    total_bytes: the graph and its data. ends: embedding and head, for people. levels: accuracy_level of the blocks'
    linears, 0 where the attribute is absent. float_zeros: some zero points are floats.
    """

    bits: int
    block: int
    linear_bytes: int
    linear_weights: int
    total_bytes: int
    ends: str
    levels: tuple[int, ...]
    float_zeros: bool

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.linear_bytes / self.linear_weights


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return int(get_node_attr_value(node, name)) if any(a.name == name for a in node.attribute) else default


def graph_of(folder: Path) -> ModelProto:
    """The graph without its external data."""
    return onnx.load(folder / "model.onnx", load_external_data=False)


def n_bytes(tensor: TensorProto) -> int:
    """Bytes of a constant, wherever it lies. Types below a byte count as packed."""
    if tensor.data_location == TensorProto.EXTERNAL:
        for entry in tensor.external_data:
            if entry.key == "length":
                return int(entry.value)
    if tensor.raw_data:
        return len(tensor.raw_data)
    width = {TensorProto.INT4: 4, TensorProto.UINT4: 4}.get(tensor.data_type)
    if width is None:
        width = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.ceil(math.prod(tensor.dims) * width / 8)


class Graph:
    """Look-ups in one graph."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {t.name: t for t in model.graph.initializer}
        self._makers = {name: node for node in self.nodes for name in node.output}

    def constant(self, name: str) -> TensorProto | None:
        """The initializer behind a name, through nodes that only view it."""
        while name not in self.constants:
            node = self._makers.get(name)
            if node is None or node.op_type not in _VIEWS:
                return None
            name = node.input[0]
        return self.constants[name]

    def head(self) -> NodeProto:
        """The matrix that makes the logits. Raises ValueError."""
        name = "logits"
        while (node := self._makers.get(name)) is not None:
            if node.op_type in {"MatMul", "MatMulNBits"}:
                return node
            name = node.input[0]
        raise ValueError("no MatMul or MatMulNBits makes the output `logits`")

    def embedding(self) -> NodeProto:
        """The node that looks `input_ids` up. Raises ValueError."""
        for node in self.nodes:
            if node.op_type in {"Gather", "GatherBlockQuantized"} and node.input[1] == "input_ids":
                return node
        raise ValueError("no Gather or GatherBlockQuantized looks `input_ids` up")

    def linears(self) -> list[NodeProto]:
        """Every constant matrix but head and embedding, in order."""
        head = self.head().output[0]
        return [
            node
            for node in self.nodes
            if node.op_type in {"MatMul", "MatMulNBits"}
            and node.output[0] != head
            and self.constant(node.input[1]) is not None
        ]


def _place(tensor: TensorProto) -> tuple[str, str]:
    """Where the bytes of a constant are: equal for two constants that share them."""
    external = {entry.key: entry.value for entry in tensor.external_data}
    return (external.get("location", ""), external.get("offset", "0")) if external else ("", tensor.name)


def _end_bits(graph: Graph, node: NodeProto, index: int) -> str:
    tensor = graph.constant(node.input[index])
    if tensor is None:
        return "computed"
    if node.op_type in {"MatMul", "Gather"}:
        return f"f{_FLOAT_BITS.get(tensor.data_type, 0)}"
    return f"{attribute(node, 'bits', 4)}-bit"


def _ends(graph: Graph) -> str:
    embedding, head = graph.embedding(), graph.head()
    texts = _end_bits(graph, embedding, 0), _end_bits(graph, head, 1)
    tensors = graph.constant(embedding.input[0]), graph.constant(head.input[1])
    shared = None not in tensors and _place(tensors[0]) == _place(tensors[1])  # type: ignore[arg-type]
    both = texts[0] if texts[0] == texts[1] else f"{texts[0]} / {texts[1]}"
    return f"{both}, {'shared' if shared else 'apart'}"


def _bits(graph: Graph, node: NodeProto, code_bits: dict[str, int]) -> int:
    if node.op_type == "MatMulNBits":
        name = node.input[1]
        stored = code_bits.get(name, code_bits.get(name.removesuffix(".codes")))
        return attribute(node, "bits", 4) if stored is None else stored
    tensor = graph.constant(node.input[1])
    return 32 if tensor is None else _FLOAT_BITS[tensor.data_type]


def _zeros_are_float(graph: Graph, node: NodeProto) -> bool:
    tensor = graph.constants.get(node.input[3]) if len(node.input) > 3 else None
    return tensor is not None and tensor.data_type != TensorProto.UINT8


def _size(graph: Graph, node: NodeProto) -> int:
    """Weights of a linear: K · N."""
    if node.op_type == "MatMulNBits":
        return attribute(node, "K", 0) * attribute(node, "N", 0)
    tensor = graph.constant(node.input[1])
    return 0 if tensor is None else math.prod(tensor.dims)


def facts(folder: Path) -> Facts:
    """Read one package. Raises ValueError for a graph without embedding, head or linears."""
    graph = Graph(graph_of(folder))
    metadata = {entry.key: entry.value for entry in graph.model.metadata_props}
    code_bits = json.loads(metadata.get(CODE_BITS, "{}"))
    linears = graph.linears()
    if not linears:
        raise ValueError(f"{folder}: no constant matrix besides embedding and head")
    kinds: Counter[tuple[int, int]] = Counter()
    stored = 0
    for node in linears:
        kinds[_bits(graph, node, code_bits), attribute(node, "block_size", 0)] += _size(graph, node)
        constants = (graph.constant(name) for name in node.input[1:] if name)
        stored += sum(n_bytes(tensor) for tensor in constants if tensor is not None)
    (bits, block), _ = kinds.most_common(1)[0]
    data = {
        entry.value for t in graph.constants.values() for entry in t.external_data if entry.key == "location"
    }
    return Facts(
        bits=bits,
        block=block,
        linear_bytes=stored,
        linear_weights=kinds.total(),
        total_bytes=sum((folder / name).stat().st_size for name in {"model.onnx", *data}),
        ends=_ends(graph),
        levels=tuple(sorted({attribute(n, "accuracy_level", 0) for n in linears if n.op_type == "MatMulNBits"})),
        float_zeros=any(_zeros_are_float(graph, n) for n in linears if n.op_type == "MatMulNBits"),
    )  # fmt: skip


def at_level(folder: Path, level: int, out: Path) -> Path:
    """A copy of the package whose every MatMulNBits has this accuracy_level; data files are linked, else copied."""
    model = graph_of(folder)
    out.mkdir(parents=True, exist_ok=True)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    (out / "model.onnx").write_bytes(model.SerializeToString())
    for file in folder.iterdir():
        target = out / file.name
        if file.name == "model.onnx" or not file.is_file():
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
    return out
