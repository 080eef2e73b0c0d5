"""ONNX, as ONNX Runtime and ONNX Runtime GenAI read it.

Imports nothing heavy: the exporter itself is loaded when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from d2qconv.exporters.info import ExporterInfo, Runtime


@dataclass(frozen=True)
class OnnxOptions:
    """How the weights are stored.

    type: of the matrices inside the blocks: int2, int3 (in a 4-bit container: ONNX Runtime has no 3-bit node), int4 or
        int8.
    block_size: columns that share a scale and a zero point.
    embedding: of the token embedding, and with it of a tied head; the same choices as for type.
    head: of the output matrix where it is a matrix of its own; the same choices.
    tensor_type: ROLE=TYPE or ROLE@BLOCKS=TYPE, such as v=int4 or down@0-3,7=int4: the type of some matrices,
        whatever the other options say. Roles are q, k, v, o, gate, up, down, embed and head. May be given again; later
        ones win.
    exact: compute in f32 (accuracy_level 1) and not with activations rounded to 8 bits. On a CPU, matrices of 2, 3 and
        8 bits are then decoded anew at every call, 50 to 100 times slower.
    """

    type: str = "int2"
    block_size: Literal["32", "64", "128"] = "64"
    embedding: str = "int8"
    head: str = "int8"
    tensor_type: tuple[str, ...] = ()
    exact: bool = False


INFO = ExporterInfo(
    name="onnx",
    summary="a folder that ONNX Runtime and ONNX Runtime GenAI load",
    options=OnnxOptions,
    target="d2qconv_onnx.exporter:OnnxExporter",
    requires=("torch", "onnx", "onnx_ir"),
    extra="onnx",
    suffix="-onnx",
    is_folder=True,
    example="d2qconv to-onnx Qwen/Qwen3-8B -o qwen3-8b-int2-onnx",
    architectures=("llama", "mistral", "qwen2", "qwen3"),
    facts={
        "types": "int2 int3 int4 int8 in blocks of 32, 64 or 128 (MatMulNBits, GatherBlockQuantized)",
        "loads in": "ONNX Runtime, ONNX Runtime GenAI",
        "mean shift": "exact biases of gate and up (all architectures)",
    },
    runtimes=(
        Runtime("ONNX Runtime", ("onnxruntime",), "verify-onnx", "d2qconv_onnx.diagnose:onnxruntime_facts"),
        Runtime("ONNX Runtime GenAI", ("onnxruntime-genai",), "verify-onnx"),
    ),
)
