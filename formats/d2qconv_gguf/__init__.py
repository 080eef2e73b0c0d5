"""GGUF, as stock llama.cpp reads it.

Imports nothing heavy: the exporter itself is loaded when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from d2qconv.exporters.info import WRITTEN, ExporterInfo, Runtime


@dataclass(frozen=True)
class GgufOptions:
    """How the weights are stored.

    type: of the matrices inside the blocks, by rising size: tq2_0, iq2_xxs, q2_0, iq2_xs, iq2_s, q2_k, iq3_xxs, iq3_s,
        q3_k, iq4_xs, iq4_nl, q4_k, q4_0, q4_1, q5_0, q5_k, q6_k, q8_0, or unquantized f16, bf16, f32. By default q2_k.
    mix: instead of type, the types that llama-quantize gives every matrix under a name such as Q2_K, IQ2_M or Q4_K_M,
        embedding and head included.
    embedding: of the token embedding, and with it of a tied head; the same choices as for type. By default q8_0, or
        the mix's.
    head: of the output matrix where it is a matrix of its own; the same choices. By default q8_0, or the mix's.
    tensor_type: ROLE=TYPE or ROLE@BLOCKS=TYPE, such as v=q4_k or down@0-3,7=q4_k: the type of some matrices, whatever
        the other options say. Roles are q, k, v, o, gate, up, down, embed and head. May be given again; later ones win.
    size: instead of type, the size that the file may have, such as 3.2GiB or 900MB: every matrix gets the type with
        which, by measurement, the whole comes closest to the source. Embedding and head are among them.
    bpw: the same by bits per weight, of all tensors, without metadata.
    candidates: types that size and bpw choose from, such as q2_k,q3_k,q6_k. By default every quantized type that fits
        a matrix, but those without a fast kernel on x86 CPUs.
    base_gguf: take metadata and tokenizer from this GGUF, made from the same checkpoint by llama.cpp's converter.
    max_shard_size: split the package into NAME-00001-of-0000N.gguf of at most this size, such as 4GiB; llama.cpp loads
    it by its first file. By default one file.
    imatrix: also write what was measured as an importance matrix for llama-quantize: mean squares of the inputs that
    the source model feeds each linear.
    pad: what to do where a row is no whole number of a type's blocks. never refuses it; always fills the hidden and
    feed-forward sizes up with exact zeros; auto does so too, unless another type for what does not fit needs no more
    bytes and makes no more error than these are worth. The plan shows both.
    """

    type: str | None = None
    mix: str | None = None
    embedding: str | None = None
    head: str | None = None
    tensor_type: tuple[str, ...] = ()
    size: str | None = None
    bpw: float | None = None
    candidates: str | None = None
    base_gguf: Path | None = None
    max_shard_size: str | None = None
    imatrix: Path | None = field(default=None, metadata=WRITTEN)
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
        "types": "tq2_0 iq2_xxs q2_0 iq2_xs iq2_s q2_k iq3_xxs iq3_s q3_k iq4_xs iq4_nl q4_k q4_0 q4_1 q5_0 "
        "q5_k q6_k q8_0, embeddings also f16 bf16 f32; the mixes of llama-quantize",
        "loads in": "llama.cpp and all that is built on it",
        "mean shift": "exact FFN biases (llama, mistral; qwen2 as llama), rank-1 fold (qwen3)",
    },
    runtimes=(Runtime("llama.cpp", ("cyllama",), "verify", "d2qconv_gguf.diagnose:llama_cpp_facts"),),
)
