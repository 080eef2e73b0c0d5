"""The decoder as an ONNX graph that holds no weights: every tensor is a place in the data file.

Contract of ONNX Runtime GenAI (its docs, and read from models its builder makes): `input_ids` and `attention_mask`
i64[batch, …], `past_key_values.N.key`/`.value` f32[batch, kv_heads, past, head]; `logits` f32[batch, sequence, vocab],
`present.N.key`/`.value`. Nodes, versions and traps: RMSNormalization is opset 23 and passes the checker, where
SimplifiedLayerNormalization does not; SkipSimplifiedLayerNormalization adds and normalises in one; GroupQueryAttention
turns q and k itself. On the CPU it takes no gains for q and k, so these norms are nodes of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from d2qconv.arch.spec import ModelDesc
from d2qconv.exporters.base import TargetPlan
from d2qconv.grids.affine import AffineGrid
from d2qconv.names import Part, Role, TensorId
from d2qconv_onnx import types
from d2qconv_onnx.data import DATA, Place
from d2qconv_onnx.names import ROPE_COS, ROPE_SIN, node_name, stored_name

OPSET, CONTRIB, IR_VERSION = 23, "com.microsoft", 11
#: Keys of the model's metadata, from which a reader rebuilds what is computed.
VERSION, ARCHITECTURE, ROPE, CODE_BITS = (
    f"d2qconv.{key}" for key in ("version", "architecture", "rope", "code_bits")
)
_TYPES = {np.dtype(np.float32): ir.DataType.FLOAT, np.dtype(np.uint8): ir.DataType.UINT8}
Attribute: TypeAlias = int | float | str | Sequence[int]


@dataclass(frozen=True)
class Settings:
    """What the graph needs beside plan and places. version: of d2qconv. is_exact: multiply in f32."""

    version: str
    is_exact: bool

    @property
    def accuracy_level(self) -> int:
        """MatMulNBits' attribute: 1 computes in f32, 4 with activations rounded to int8 in blocks."""
        return 1 if self.is_exact else 4


def build(desc: ModelDesc, plan: TargetPlan, places: Mapping[str, Place], settings: Settings) -> ir.Model:
    """The whole graph. places: of every initializer, by name."""
    return _Builder(desc, plan, places, settings).model()


@dataclass
class _Builder:
    desc: ModelDesc
    plan: TargetPlan
    places: Mapping[str, Place]
    settings: Settings
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, ir.Value] = field(default_factory=dict)

    def model(self) -> ir.Model:
        dims = self.desc.dims
        ids = _input("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        mask = _input("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
        cache = ("batch_size", dims.n_kv_heads, "past_sequence_length", dims.head)
        pasts = [
            tuple(
                _input(f"past_key_values.{i}.{kind}", ir.DataType.FLOAT, cache) for kind in ("key", "value")
            )
            for i in range(dims.n_layers)
        ]
        lengths = self._lengths(mask)
        x, skip = self._embed(ids), None
        presents: list[ir.Value] = []
        for index, past in enumerate(pasts):
            x, skip, new = self._block(index, x, skip, (*past, *lengths))
            presents += new
        assert skip is not None, "a model has at least one block"
        logits = self._linear(
            Role.HEAD, None, self._skip_norm("final_norm", x, skip, TensorId(Role.FINAL_NORM))[0]
        )
        logits.name = "logits"
        logits.shape = ir.Shape(["batch_size", "sequence_length", dims.vocab])
        logits.dtype = ir.DataType.FLOAT
        graph = ir.Graph(
            [ids, mask, *(value for past in pasts for value in past)],
            [logits, *presents],
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, CONTRIB: 1},
            name=self.desc.arch.id,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="d2qconv",
            producer_version=self.settings.version,
            metadata_props=self._metadata(),
        )

    def _metadata(self) -> dict[str, str]:
        wider = {
            planned.stored_as: planned.storage.bits
            for planned in self.plan.tensors
            if isinstance(planned.storage, AffineGrid)
            and types.container(planned.storage) != planned.storage.bits
        }
        return {
            VERSION: self.settings.version,
            ARCHITECTURE: self.desc.arch.id,
            ROPE: json.dumps(asdict(self.desc.rope)),
            CODE_BITS: json.dumps(wider),
        }

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """GroupQueryAttention's seqlens_k, i32[batch], keys of every sequence less one; and all keys, an i32 scalar."""
        sums = self._op("ReduceSum", [mask, self._constant("one_axis", [1])], "mask.sum", keepdims=0)
        less = self._op("Sub", [sums, self._constant("one", [1])], "mask.less")
        seqlens = self._op("Cast", [less], "seqlens_k", to=int(ir.DataType.INT32))
        total = self._op("Shape", [mask], "mask.total", start=1, end=2)
        scalar = self._op("Squeeze", [total], "mask.scalar")
        return seqlens, self._op("Cast", [scalar], "total_sequence_length", to=int(ir.DataType.INT32))

    def _embed(self, ids: ir.Value) -> ir.Value:
        tensor = TensorId(Role.EMBED)
        grid, (_, n_in), name = *self._matrix(tensor), stored_name(tensor)
        shape = (self.desc.dims.vocab, n_in * types.container(grid) // 8)
        data = self._weight(f"{name}.codes", shape)
        scales, zeros = self._weight(f"{name}.scales"), self._weight(f"{name}.zeros")
        return self._op(
            "GatherBlockQuantized", [data, ids, scales, zeros], node_name(Role.EMBED, None), CONTRIB,
            gather_axis=0, quantize_axis=1, block_size=grid.group, bits=types.container(grid),
        )  # fmt: skip

    def _block(
        self, index: int, x: ir.Value, skip: ir.Value | None, attention: tuple[ir.Value, ...]
    ) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        """One block: (stream before the last addition, what is added, the new keys and values)."""
        norm = TensorId(Role.ATTN_NORM, index)
        if skip is None:
            h, stream = self._norm(f"blk.{index}.attn_norm", x, norm), x
        else:
            h, stream = self._skip_norm(f"blk.{index}.attn_norm", x, skip, norm)
        mixed, new = self._attention(index, h, attention)
        out = self._linear(Role.O, index, mixed)
        h, stream = self._skip_norm(f"blk.{index}.ffn_norm", stream, out, TensorId(Role.FFN_NORM, index))
        gate, up = self._linear(Role.GATE, index, h), self._linear(Role.UP, index, h)
        name = f"blk.{index}.silu"
        sigmoid = self._op("Sigmoid", [gate], f"{name}.sigmoid")
        silu = self._op("Mul", [gate, sigmoid], name)
        return stream, self._linear(Role.DOWN, index, self._op("Mul", [silu, up], f"blk.{index}.gated")), new

    def _attention(
        self, index: int, h: ir.Value, given: tuple[ir.Value, ...]
    ) -> tuple[ir.Value, list[ir.Value]]:
        dims = self.desc.dims
        q, k, v = (self._linear(role, index, h) for role in (Role.Q, Role.K, Role.V))
        if self.desc.arch.has_qk_norm:
            q = self._head_norm(Role.Q_NORM, index, q, dims.n_heads)
            k = self._head_norm(Role.K_NORM, index, k, dims.n_kv_heads)
        cos, sin = self._weight(ROPE_COS), self._weight(ROPE_SIN)
        node = ir.node(
            "GroupQueryAttention", [q, k, v, *given, cos, sin],
            {"num_heads": dims.n_heads, "kv_num_heads": dims.n_kv_heads, "do_rotary": 1, "rotary_interleaved": 0,
             "scale": 1.0 / math.sqrt(dims.head)},
            domain=CONTRIB, num_outputs=3, name=f"blk.{index}.attention",
        )  # fmt: skip
        self.nodes.append(node)
        mixed, *new = node.outputs
        mixed.name = f"blk.{index}.attention.out"
        for value, kind in zip(new, ("key", "value"), strict=True):
            value.name, value.dtype = f"present.{index}.{kind}", ir.DataType.FLOAT
            value.shape = ir.Shape(["batch_size", dims.n_kv_heads, "total_sequence_length", dims.head])
        return mixed, list(new)

    def _head_norm(self, role: Role, index: int, x: ir.Value, n_heads: int) -> ir.Value:
        """RMS norm of every head of x [batch, sequence, heads · head]."""
        name, head = node_name(role, index), self.desc.dims.head
        apart = self._constant(f"heads.{n_heads}", [0, 0, n_heads, head])
        split = self._op("Reshape", [x, apart], f"{name}.split")
        normed = self._norm(name, split, TensorId(role, index))
        return self._op("Reshape", [normed, self._constant("flat", [0, 0, -1])], f"{name}.joined")

    def _norm(self, name: str, x: ir.Value, gain: TensorId) -> ir.Value:
        inputs = [x, self._weight(stored_name(gain))]
        return self._op("RMSNormalization", inputs, name, axis=-1, epsilon=self.desc.norm_eps)

    def _skip_norm(self, name: str, x: ir.Value, skip: ir.Value, gain: TensorId) -> tuple[ir.Value, ir.Value]:
        """(norm of x + skip, x + skip)."""
        node = ir.node(
            "SkipSimplifiedLayerNormalization", [x, skip, self._weight(stored_name(gain))],
            {"epsilon": self.desc.norm_eps}, domain=CONTRIB, num_outputs=4, name=name,
        )  # fmt: skip
        self.nodes.append(node)
        normed, mean, deviation, total = node.outputs
        normed.name, mean.name, deviation.name, total.name = f"{name}.out", "", "", f"{name}.sum"
        return normed, total

    def _linear(self, role: Role, index: int | None, x: ir.Value) -> ir.Value:
        """W x + b. A tied head reads the embedding's bytes, in MatMulNBits' shape."""
        is_tied = role is Role.HEAD and self.desc.is_tied
        tensor = TensorId(Role.EMBED if is_tied else role, index)
        grid, (n_out, n_in) = self._matrix(tensor)
        source, name, bits = stored_name(tensor), node_name(role, index), types.container(grid)
        blocks = n_in // grid.group
        codes = self._weight(
            f"{name}.weight.codes", (n_out, blocks, grid.group * bits // 8), f"{source}.codes"
        )
        scales = self._weight(f"{name}.weight.scales", None, f"{source}.scales")
        zeros = self._weight(f"{name}.weight.zeros", None, f"{source}.zeros")
        inputs: list[ir.Value | None] = [x, codes, scales, zeros]
        bias = TensorId(role, index, Part.BIAS)
        if bias in self.plan.by_id:
            inputs += [None, self._weight(stored_name(bias))]
        return self._op(
            "MatMulNBits", inputs, name, CONTRIB,
            K=n_in, N=n_out, bits=bits, block_size=grid.group, accuracy_level=self.settings.accuracy_level,
        )  # fmt: skip

    def _matrix(self, tensor: TensorId) -> tuple[AffineGrid, tuple[int, int]]:
        planned = self.plan.by_id[tensor]
        assert isinstance(planned.storage, AffineGrid), "matrices are planned on affine grids"
        return planned.storage, (planned.shape[0], planned.shape[1])

    def _op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """Append a node of one output, called `name`.out."""
        node = ir.node(kind, inputs, attributes, domain=domain, name=name)
        self.nodes.append(node)
        node.outputs[0].name = f"{name}.out"
        return node.outputs[0]

    def _weight(self, name: str, shape: Sequence[int] | None = None, source: str | None = None) -> ir.Value:
        """The initializer `name`, an array of the data file (`source` there). shape: another view of its bytes."""
        if name in self.initializers:
            return self.initializers[name]
        place = self.places[source or name]
        tensor = ir.ExternalTensor(
            DATA, place.offset, place.n_bytes, _TYPES[place.dtype], name=name,
            shape=ir.Shape(place.shape if shape is None else shape), base_dir=Path(),
        )  # fmt: skip
        return self._keep(name, tensor)

    def _constant(self, name: str, values: Sequence[int]) -> ir.Value:
        """A small i64 vector inside the graph."""
        name = f"const.{name}"
        return self.initializers.get(name) or self._keep(
            name, ir.tensor(np.array(values, np.int64), name=name)
        )

    def _keep(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers[name] = value
        return value


def _input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
