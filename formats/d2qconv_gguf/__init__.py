"""GGUF, as stock llama.cpp reads it.

Imports nothing heavy: the exporter itself is loaded when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d2qconv.export.base import ExporterInfo


@dataclass(frozen=True)
class GgufOptions:
    """How the weights are stored.

    type: of the matrices inside the blocks: q2_k, q3_k, q4_k, q4_0, q8_0, or unquantized f16, bf16, f32.
    embedding: of the token embedding, and with it of a tied head; the same choices.
    head: of the output matrix where it is a matrix of its own; the same choices.
    base_gguf: take metadata and tokenizer from this GGUF, made from the same checkpoint by llama.cpp's converter.
    max_shard_size: split the package into NAME-00001-of-0000N.gguf of at most this size, such as 4GiB; llama.cpp loads
    it by its first file. By default one file.
    imatrix: also write what was measured as an importance matrix for llama-quantize: mean squares of the inputs that
    the source model feeds each linear.
    pad: what to do where a row is no whole number of a type's blocks. never refuses it; always fills the hidden and
    feed-forward sizes up with exact zeros; auto does so too, unless another type for what does not fit needs no more
    bytes and makes no more error than these are worth. The plan shows both.
    """

    type: str = "q2_k"
    embedding: str = "q8_0"
    head: str = "q8_0"
    base_gguf: Path | None = None
    max_shard_size: str | None = None
    imatrix: Path | None = None
    pad: Literal["never", "auto", "always"] = "never"


INFO = ExporterInfo(
    name="gguf",
    summary="one GGUF file that stock llama.cpp loads",
    options=GgufOptions,
    target="d2qconv_gguf.exporter:GgufExporter",
    requires=("torch", "gguf"),
    extra="gguf",
    suffix=".gguf",
    example="d2qconv to-gguf Qwen/Qwen3-8B -o qwen3-8b-q2_k.gguf",
    architectures=("llama", "mistral", "qwen2", "qwen3"),
    facts={
        "types": "q2_k q3_k q4_k q4_0 q8_0, embeddings also f16 bf16 f32",
        "loads in": "llama.cpp and all that is built on it",
        "mean shift": "exact FFN biases (llama, mistral; qwen2 as llama), rank-1 fold (qwen3)",
    },
)
