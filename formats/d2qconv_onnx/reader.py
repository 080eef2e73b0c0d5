"""Decodes a written model from its nodes and bytes, and rebuilds what it computes. Shares no code with the writer.

A matrix is what its node says: MatMulNBits and GatherBlockQuantized with their attributes (onnxruntime's
docs/ContribOperators.md). value = (code - zero) · scale in f32: the difference is exact, the product rounds once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import msgspec
import numpy as np
import onnx
import torch

from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import Dims, ModelDesc, Rope
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import VerifyError
from d2qconv.names import Part, Role, TensorId
from d2qconv_onnx.container import Container, Span
from d2qconv_onnx.genai import CONFIG

#: Values that are decoded at a time.
_PIECE = 1 << 19
_ROPE = ("rope.cos", "rope.sin")
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix in the data file. bits: of a code in the file; code_bits: that it may use."""

    name: str
    shape: tuple[int, int]
    bits: int
    code_bits: int
    block: int
    codes: Span
    scales: Span
    zeros: Span

    def pieces(self) -> Iterator[np.ndarray]:
        """The values, f32[rows, n_in] of some rows at a time; raises VerifyError for a code that is out of range."""
        n_out, n_in = self.shape
        step = max(1, _PIECE // n_in)
        codes, scales, zeros = (
            span.view().reshape(n_out, -1) for span in (self.codes, self.scales, self.zeros)
        )
        for at in range(0, n_out, step):
            rows = slice(at, at + step)
            q, z = self._numbers(codes[rows], n_in), self._numbers(zeros[rows], n_in // self.block)
            blocks = q.reshape(len(q), -1, self.block).astype(np.float32) - z[:, :, None].astype(np.float32)
            yield (blocks * scales[rows][:, :, None]).reshape(len(q), n_in)

    def load(self) -> torch.Tensor:
        """All values, f32[n_out, n_in]."""
        return torch.from_numpy(np.concatenate(list(self.pieces())))

    def _numbers(self, packed: np.ndarray, n: int) -> np.ndarray:
        """u8[rows, n] of a bit stream, lowest bits first; raises VerifyError for what a code may not be."""
        places = 8 // self.bits
        numbers = np.empty((len(packed), packed.shape[1] * places), np.uint8)
        for place in range(places):
            numbers[:, place::places] = packed >> (place * self.bits) & ((1 << self.bits) - 1)
        if numbers[:, :n].max(initial=0) >> self.code_bits or numbers[:, n:].any():
            raise VerifyError(
                f"has codes of more than {self.code_bits} bits, or bits behind a row", where=self.name
            )
        return numbers[:, :n]


@dataclass(frozen=True)
class Vector:
    """A gain or a bias, f32."""

    name: str
    span: Span

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.span.shape

    def pieces(self) -> Iterator[np.ndarray]:
        """The values."""
        yield self.span.view()

    def load(self) -> torch.Tensor:
        """The values."""
        return torch.from_numpy(np.array(self.span.view(), np.float32))


Found: TypeAlias = Matrix | Vector


def digest(found: Found) -> str:
    """SHA-256 of the values, f32 little endian, row by row."""
    sha = hashlib.sha256()
    for piece in found.pieces():
        sha.update(np.ascontiguousarray(piece, "<f4").data)
    return sha.hexdigest()


@dataclass(frozen=True)
class OnnxModel:
    """Everything that the graph holds. tensors: by stored name; a tied head is absent. nodes: by name."""

    container: Container
    tensors: Mapping[str, Found]
    nodes: Mapping[str, onnx.NodeProto]
    is_tied: bool


def read_model(container: Container) -> OnnxModel:
    """Find every tensor through the node that uses it; raises VerifyError for what contradicts itself."""
    nodes = {node.name: node for node in container.proto.graph.node}
    tensors: dict[str, Found] = {}
    wider = _object(container, "d2qconv.code_bits")
    for node in container.proto.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            matrix = _matrix(container, node, wider)
            tensors[matrix.name] = matrix
        if node.op_type == "MatMulNBits" and len(node.input) > 5:
            tensors[f"{node.name}.bias"] = Vector(f"{node.name}.bias", _span(container, node.input[5]))
        if node.op_type in ("RMSNormalization", "SkipSimplifiedLayerNormalization"):
            gain = node.input[1 if node.op_type == "RMSNormalization" else 2]
            tensors[f"{node.name}.weight"] = Vector(f"{node.name}.weight", _span(container, gain))
    embed, head = tensors.get("embed.weight"), tensors.get("head.weight")
    if not isinstance(embed, Matrix) or not isinstance(head, Matrix):
        raise container.error("has no embedding or no head")
    is_tied = head.codes.offset == embed.codes.offset
    if is_tied:
        same = ("codes", "scales", "zeros")
        if (
            any(getattr(head, s).offset != getattr(embed, s).offset for s in same)
            or head.block != embed.block
        ):
            raise container.error("its head shares only a part of the embedding")
        del tensors["head.weight"]
    return OnnxModel(container, tensors, nodes, is_tied)


def desc_of(model: OnnxModel) -> ModelDesc:
    """What the graph computes, its tensors decoded when loaded; raises VerifyError."""
    container = model.container
    architecture = container.metadata.get("d2qconv.architecture", "")
    if architecture not in BUILT_IN:
        raise container.error(f"is of architecture {architecture!r}, which d2qconv does not know")
    attention = model.nodes.get("blk.0.attention")
    if attention is None:
        raise container.error("has no attention in block 0")
    numbers = attributes(attention)
    config = _config(container)
    heads, kv_heads = numbers.get("num_heads", 0), numbers.get("kv_num_heads", 0)
    n_layers = sum(node.op_type == "GroupQueryAttention" for node in model.nodes.values())
    cos = container.array(_ROPE[0])
    matrices = {name: t.shape for name, t in model.tensors.items() if isinstance(t, Matrix)}
    try:
        (vocab, hidden), (ffn, _) = matrices["embed.weight"], matrices["blk.0.gate.weight"]
        head = matrices["blk.0.q.weight"][0] // heads
        dims = Dims(vocab, hidden, ffn, n_layers, heads, kv_heads, head)
        norm = attributes(model.nodes["final_norm"])["epsilon"]
        rope = msgspec.convert(_object(container, "d2qconv.rope"), Rope)
        tensors = {
            TensorId.parse(name): Dense(found.shape, torch.float32, partial(_load, found))
            for name, found in model.tensors.items()
        }
    except (KeyError, ValueError, ZeroDivisionError, msgspec.ValidationError) as error:
        raise container.error(f"its parts do not make a decoder: {error}") from error
    desc = ModelDesc(
        arch=BUILT_IN[architecture],
        dims=dims,
        rope=rope,
        norm_eps=float(np.float32(norm)),
        is_tied=model.is_tied,
        max_positions=len(cos),
        bos_ids=_ids(config.get("bos_token_id")),
        eos_ids=_ids(config.get("eos_token_id")),
        tensors=tensors,
    )
    _check(container, desc)
    return desc


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _load(found: Found) -> torch.Tensor:
    return found.load()


def _matrix(container: Container, node: onnx.NodeProto, wider: Mapping[str, Any]) -> Matrix:
    numbers = attributes(node)
    is_gather = node.op_type == "GatherBlockQuantized"
    order = (0, 2, 3) if is_gather else (1, 2, 3)
    if len(node.input) <= max(order):
        raise container.error(f"{node.name} has too few inputs")
    codes, scales, zeros = (_span(container, node.input[i]) for i in order)
    bits, block = numbers.get("bits", 4), numbers.get("block_size", 0)
    if bits not in _BITS or block < 16 or len(scales.shape) != 2:
        raise container.error(f"{node.name} has {bits} bits in blocks of {block}")
    n_out, n_blocks = scales.shape
    n_in = n_blocks * block if is_gather else numbers.get("K", 0)
    name, row = f"{node.name}.weight", -(-n_blocks * bits // 8)
    wanted = (n_out, n_in * bits // 8) if is_gather else (n_out, n_blocks, block * bits // 8)
    if n_in != n_blocks * block or codes.shape != wanted or zeros.shape != (n_out, row):
        raise container.error(
            f"{node.name}: codes {codes.shape}, scales {scales.shape}, zeros {zeros.shape} do not fit"
        )
    if not is_gather and numbers.get("N") != n_out:
        raise container.error(f"{node.name} has {n_out} rows and says {numbers.get('N')}")
    if [span.dtype.str for span in (codes, scales, zeros)] != ["|u1", "<f4", "|u1"]:
        raise container.error(f"{node.name} is stored in types that d2qconv does not write")
    code_bits = wider.get(name, bits)
    if not isinstance(code_bits, int) or not 0 < code_bits <= bits:
        raise container.error(f"{node.name} has {bits} bits, and its record says {code_bits}")
    return Matrix(name, (n_out, n_in), bits, code_bits, block, codes, scales, zeros)


def _span(container: Container, name: str) -> Span:
    if name not in container.spans:
        raise container.error(f"has no initializer {name!r} in its data file")
    return container.spans[name]


def _object(container: Container, key: str) -> dict[str, Any]:
    """A JSON object of the metadata."""
    try:
        found = json.loads(container.metadata.get(key, "{}"))
    except ValueError as error:
        raise container.error(f"its metadata {key} are not JSON") from error
    if not isinstance(found, dict):
        raise container.error(f"its metadata {key} are no object")
    return found


def _config(container: Container) -> dict[str, Any]:
    """The model's part of genai_config.json."""
    path = container.folder / CONFIG
    try:
        found = json.loads(path.read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerifyError("is not a config of ONNX Runtime GenAI", where=str(path)) from error
    if not isinstance(found, dict):
        raise VerifyError("is not a config of ONNX Runtime GenAI", where=str(path))
    return found


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int))


def _check(container: Container, desc: ModelDesc) -> None:
    """Raise VerifyError unless every site has a tensor of its shape, and every tensor has a site."""
    left = set(desc.tensors)
    for site in desc.arch.sites:
        blocks = range(desc.dims.n_layers) if "{i}" in site.module else (None,)
        for block in blocks:
            weight, bias = TensorId(site.role, block), TensorId(site.role, block, Part.BIAS)
            n_out = desc.dims.size(site.n_out)
            shape = (n_out,) if site.n_in is None else (n_out, desc.dims.size(site.n_in))
            if site.role is Role.HEAD and desc.is_tied:
                continue
            if weight not in desc.tensors or desc.tensors[weight].shape != shape:
                raise container.error(f"has no {weight} of shape {list(shape)}")
            if bias in desc.tensors and desc.tensors[bias].shape != (n_out,):
                raise container.error(f"has a {bias} of another length than {n_out}")
            left -= {weight, bias}
    if left:
        raise container.error(
            f"holds what {desc.arch.id} has not: {', '.join(map(str, sorted(left, key=str)))}"
        )
