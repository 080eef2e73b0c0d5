"""Decodes a written model from its nodes and bytes, and rebuilds what it computes. Shares no code with the writer.

A matrix is what its node says: MatMulNBits and GatherBlockQuantized with their attributes (onnxruntime's
docs/ContribOperators.md). value = (code - zero) · scale in f32: the difference is exact, the product rounds once.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from d2qconv.decoder.rope import attention_factor, inverse_frequencies
from d2qconv.errors import VerifyError
from d2qconv.names import Part, Role, TensorId
from d2qconv_onnx.container import Container, Span
from d2qconv_onnx.genai_reader import read_config
from d2qconv_onnx.nodes import check_node, integer, real

#: Values that are decoded at a time.
_PIECE = 1 << 19
#: Cosines and sines of every position, f32[max_positions, head/2].
ROPE_TABLES = ("rope.cos", "rope.sin")
NORMS = ("RMSNormalization", "SkipSimplifiedLayerNormalization")
_BITS = (2, 4, 8)
_MOST_BLOCK = 256
_BYTES, _FLOATS = np.dtype("u1"), np.dtype("<f4")


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
        step, arrays = max(1, _PIECE // n_in), self._arrays()
        for at in range(0, n_out, step):
            yield self._decoded(*(array[at : at + step] for array in arrays))

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows i64[n], f32[n, n_in]; raises VerifyError as `pieces` does."""
        values, arrays = np.empty((len(index), self.shape[1]), np.float32), self._arrays()
        step = max(1, _PIECE // self.shape[1])
        for at in range(0, len(index), step):
            picked = index[at : at + step].numpy()
            values[at : at + len(picked)] = self._decoded(*(array[picked] for array in arrays))
        return torch.from_numpy(values)

    def _arrays(self) -> list[np.ndarray]:
        """Codes, scales and zero points, a row of the matrix in a row."""
        return [span.view().reshape(self.shape[0], -1) for span in (self.codes, self.scales, self.zeros)]

    def _decoded(self, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Values f32[n, n_in] of n rows."""
        n_in = self.shape[1]
        q, z = self._numbers(codes, n_in), self._numbers(zeros, n_in // self.block)
        blocks = q.reshape(len(q), -1, self.block).astype(np.float32) - z[:, :, None].astype(np.float32)
        return np.asarray((blocks * scales[:, :, None]).reshape(len(q), n_in))

    def load(self) -> torch.Tensor:
        """All values, f32[n_out, n_in]."""
        values, at = np.empty(self.shape, np.float32), 0
        for piece in self.pieces():
            values[at : at + len(piece)] = piece
            at += len(piece)
        return torch.from_numpy(values)

    def is_same(self, other: Matrix) -> bool:
        """Whether it is the same bytes with the same meaning, whatever shape and name they have."""
        mine, theirs = (
            [(span.file, span.offset, span.n_bytes) for span in (m.codes, m.scales, m.zeros)]
            for m in (self, other)
        )
        return mine == theirs and (self.shape, self.bits, self.block) == (
            other.shape,
            other.bits,
            other.block,
        )

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
    nodes: dict[str, onnx.NodeProto] = {}
    tensors: dict[str, Found] = {}
    wider = _object(container, "d2qconv.code_bits")
    for node in container.proto.graph.node:
        if node.name in nodes:
            raise container.error(f"two nodes are called {node.name!r}")
        nodes[node.name] = node
        check_node(container, node)
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            matrix = _matrix(container, node, wider)
            tensors[matrix.name] = matrix
        if node.op_type == "MatMulNBits" and len(node.input) > 5 and node.input[5]:
            tensors[f"{node.name}.bias"] = _vector(container, f"{node.name}.bias", node.input[5])
        if node.op_type in NORMS:
            gain = node.input[1 if node.op_type == "RMSNormalization" else 2]
            tensors[f"{node.name}.weight"] = _vector(container, f"{node.name}.weight", gain)
    embed, head = tensors.get("embed.weight"), tensors.get("head.weight")
    if not isinstance(embed, Matrix) or not isinstance(head, Matrix):
        raise container.error("has no embedding or no head")
    spans = [(m.codes, m.scales, m.zeros) for m in (embed, head)]
    is_tied = any((a.file, a.offset) == (b.file, b.offset) for a, b in zip(*spans, strict=True))
    if is_tied:
        if not head.is_same(embed):
            raise container.error("its head shares only a part of the embedding")
        del tensors["head.weight"]
    return OnnxModel(container, tensors, nodes, is_tied)


def desc_of(model: OnnxModel) -> ModelDesc:
    """What the graph computes, its tensors decoded when loaded; raises VerifyError."""
    container = model.container
    architecture = container.metadata.get("d2qconv.architecture", "")
    if architecture not in BUILT_IN:
        raise container.error(f"is of architecture {architecture!r:.80}, which d2qconv does not know")
    dims, max_positions = _dims(model)
    epsilons = {real(container, n, "epsilon", 1e-5) for n in model.nodes.values() if n.op_type in NORMS}
    if len(epsilons) != 1 or min(epsilons) < 0:
        raise container.error(f"its norms add {sorted(epsilons)}, and not all the same")
    config = read_config(container.folder)
    config.check(BUILT_IN[architecture].model_type, dims, max_positions)
    rope = _rope(container, dims)
    try:
        tensors = {
            TensorId.parse(name): Dense(
                found.shape,
                torch.float32,
                partial(_load, found),
                found.rows if isinstance(found, Matrix) else None,
            )
            for name, found in model.tensors.items()
        }
    except ValueError as error:
        raise container.error(f"its parts do not make a decoder: {error}") from error
    desc = ModelDesc(
        arch=BUILT_IN[architecture],
        dims=dims,
        rope=rope,
        norm_eps=epsilons.pop(),
        is_tied=model.is_tied,
        max_positions=max_positions,
        bos_ids=config.bos_ids,
        eos_ids=config.eos_ids,
        tensors=tensors,
    )
    _check(container, desc)
    return desc


def _dims(model: OnnxModel) -> tuple[Dims, int]:
    """Sizes by the shapes and the attention nodes, which must agree; and the positions that have a cos and sin."""
    container = model.container
    layers = [node for node in model.nodes.values() if node.op_type == "GroupQueryAttention"]
    seen = {_attention(container, node) for node in layers}
    if len(seen) != 1:
        raise container.error(f"its {len(layers)} attention nodes are of {len(seen)} kinds")
    n_heads, n_kv_heads, scale = seen.pop()
    shapes = {name: t.shape for name, t in model.tensors.items() if isinstance(t, Matrix)}
    try:
        (vocab, hidden), (ffn, _) = shapes["embed.weight"], shapes["blk.0.gate.weight"]
        head = shapes["blk.0.q.weight"][0] // n_heads
    except KeyError as error:
        raise container.error(f"its parts do not make a decoder: no {error}") from error
    if head < 1:
        raise container.error(f"has {n_heads} heads in {shapes['blk.0.q.weight'][0]} rows of blk.0.q")
    if not math.isclose(scale or head**-0.5, head**-0.5, rel_tol=1e-6):
        raise container.error(f"its scores are scaled by {scale} for heads of {head}")
    cos, sin = (_span(container, name, _FLOATS) for name in ROPE_TABLES)
    if len(cos.shape) != 2 or cos.shape[1] != head // 2 or sin.shape != cos.shape:
        raise container.error(f"its cos and sin are {cos.shape} and {sin.shape} for heads of {head}")
    return Dims(vocab, hidden, ffn, len(layers), n_heads, n_kv_heads, head), cos.shape[0]


def _rope(container: Container, dims: Dims) -> Rope:
    """The rotary embedding as the metadata name it, one that can be computed."""
    found = _object(container, "d2qconv.rope")
    try:
        rope = msgspec.convert(found, Rope)
        inverse_frequencies(rope, dims.head)
        attention_factor(rope)
    except (msgspec.ValidationError, KeyError, ValueError, ArithmeticError, RuntimeError) as error:
        raise container.error(f"its rotary embedding is not known here: {error!r:.200}") from error
    return rope


def _attention(container: Container, node: onnx.NodeProto) -> tuple[int, int, float]:
    """(heads, heads of keys, scale, 0 for the usual one) of an attention node that turns by our tables."""
    heads = integer(container, node, "num_heads"), integer(container, node, "kv_num_heads")
    turns = (
        integer(container, node, "do_rotary", 0),
        integer(container, node, "rotary_interleaved", 0),
        *node.input[7:9],
    )
    if min(heads) < 1 or turns != (1, 0, *ROPE_TABLES):
        raise container.error(f"{node.name} has {heads} heads, or does not turn as our models do")
    return (*heads, real(container, node, "scale", 0.0))


def _load(found: Found) -> torch.Tensor:
    return found.load()


def _matrix(container: Container, node: onnx.NodeProto, wider: Mapping[str, Any]) -> Matrix:
    is_gather = node.op_type == "GatherBlockQuantized"
    at = (0, 2, 3) if is_gather else (1, 2, 3)
    codes, scales, zeros = (_span(container, node.input[i], _FLOATS if i == 2 else _BYTES) for i in at)
    bits, block = integer(container, node, "bits", 4), integer(container, node, "block_size")
    if bits not in _BITS or not 16 <= block <= _MOST_BLOCK or len(scales.shape) != 2:
        raise container.error(f"{node.name} has {bits} bits in blocks of {block}")
    n_out, n_blocks = scales.shape
    axes = integer(container, node, "gather_axis", 0), integer(container, node, "quantize_axis", 1)
    n_in = n_blocks * block if is_gather else integer(container, node, "K")
    name, row = f"{node.name}.weight", -(-n_blocks * bits // 8)
    wanted = (n_out, n_in * bits // 8) if is_gather else (n_out, n_blocks, block * bits // 8)
    if axes != (0, 1) or n_in != n_blocks * block or codes.shape != wanted or zeros.shape != (n_out, row):
        raise container.error(
            f"{node.name}: codes {codes.shape}, scales {scales.shape}, zeros {zeros.shape} do not fit"
        )
    if not is_gather and integer(container, node, "N") != n_out:
        raise container.error(f"{node.name} has {n_out} rows and says {integer(container, node, 'N')}")
    code_bits = wider.get(name, bits)
    if type(code_bits) is not int or not 0 < code_bits <= bits:
        raise container.error(f"{node.name} has {bits} bits, and its record says {code_bits!r:.80}")
    return Matrix(name, (n_out, n_in), bits, code_bits, block, codes, scales, zeros)


def _vector(container: Container, name: str, stored: str) -> Vector:
    span = _span(container, stored, _FLOATS)
    if len(span.shape) != 1:
        raise container.error(f"{name} has {len(span.shape)} dimensions")
    return Vector(name, span)


def _span(container: Container, name: str, dtype: np.dtype) -> Span:
    if name not in container.spans:
        raise container.error(f"has no initializer {name!r:.80} in its data file")
    span = container.spans[name]
    if span.dtype != dtype:
        raise container.error(f"{name} is of {span.dtype}, not of {dtype}")
    return span


def _object(container: Container, key: str) -> dict[str, Any]:
    """A JSON object of the metadata."""
    try:
        found = json.loads(container.metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise container.error(f"its metadata {key} are not JSON") from error
    if not isinstance(found, dict):
        raise container.error(f"its metadata {key} are no object")
    return found


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
