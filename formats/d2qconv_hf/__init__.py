"""Hugging Face folders: the same codes in the dialects of compressed-tensors, AutoRound, GPTQ and MLX.

Imports nothing heavy: the exporter itself is loaded when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from d2qconv.exporters.info import ExporterInfo, Runtime


@dataclass(frozen=True)
class HfOptions:
    """How the weights are stored. Embedding, head, norms and biases stay floats.

    type: of the matrices inside the blocks: int2, int3, int4 or int8.
    group_size: columns that share a scale and a zero point; channel is a whole row, where the format has that.
    zero: integer has a zero point of its own in each group; none puts it in the middle of the codes, which more
        runtimes load; auto takes integer for int2 and int3, and none for int4, int8 and for mixed types.
    tensor_type: ROLE=TYPE or ROLE@BLOCKS=TYPE, such as v=int4 or down@0-3,7=int4: the type of some matrices, whatever
        type says; float leaves them as they are. Roles are q, k, v, o, gate, up and down. May be given again; later
        ones win.
    dtype: of scales and of everything that stays float; the runtime computes in it. By default float16; of a checkpoint
        that is quantized already every tensor keeps its own.
    max_shard_size: split the weights into model-00001-of-0000N.safetensors of at most this size, such as 4GiB.
    """

    type: str = "int2"
    group_size: Literal["32", "64", "128", "channel"] = "128"
    zero: Literal["auto", "integer", "none"] = "auto"
    tensor_type: tuple[str, ...] = ()
    dtype: Literal["float16", "bfloat16"] | None = None
    max_shard_size: str = "5GiB"


def _info(
    name: str,
    dialect: str,
    summary: str,
    types: str,
    loads_in: str,
    means: str,
    example: str,
    runtime: Runtime,
) -> ExporterInfo:
    return ExporterInfo(
        name=name,
        summary=summary,
        options=HfOptions,
        target=f"d2qconv_hf.exporter:{dialect}",
        requires=("torch", "safetensors"),
        extra="safetensors",
        suffix=f"-{name}",
        is_folder=True,
        example=example,
        architectures=("llama", "mistral", "qwen2", "qwen3"),
        facts={"types": types, "loads in": loads_in, "mean shift": means},
        runtimes=(runtime,),
    )


_RELABELLED = "exact biases of gate and up: llama by mlp_bias, mistral and qwen2 as llama"

SAFETENSORS = _info(
    "safetensors",
    "CompressedTensorsExporter",
    "a compressed-tensors folder for transformers and vLLM",
    "int2 int3 int4 int8 in groups of 32, 64, 128 or a row; mixed without zero points",
    "transformers with compressed-tensors 0.18, vLLM",
    f"{_RELABELLED}, qwen3 as hy_v3",
    "d2qconv to-safetensors Qwen/Qwen3-8B -o qwen3-8b-w2",
    Runtime("transformers", ("transformers", "compressed-tensors"), "verify-safetensors"),
)
AUTO_ROUND = _info(
    "auto-round",
    "AutoRoundExporter",
    "an AutoRound folder for transformers",
    "int2 int3 int4 int8 in groups of 32, 64, 128 or a row, mixed",
    "transformers with auto-round",
    f"{_RELABELLED}, qwen3 as hy_v3",
    "d2qconv to-auto-round Qwen/Qwen3-8B --tensor-type down=int3",
    Runtime("transformers with auto-round", ("transformers", "auto-round"), "verify-safetensors"),
)
GPTQ = _info(
    "gptq",
    "GptqExporter",
    "a GPTQ v2 folder for GPTQModel",
    "int2 int3 int4 int8 in groups of 32, 64, 128 or a row; mixed in GPTQModel alone",
    "GPTQModel, transformers with optimum and gptqmodel",
    f"{_RELABELLED}, qwen3 as hy_v3",
    "d2qconv to-gptq Qwen/Qwen3-8B --type int4",
    Runtime("transformers with gptqmodel", ("transformers", "optimum", "gptqmodel")),
)
MLX = _info(
    "mlx",
    "MlxExporter",
    "a folder for MLX and mlx-lm",
    "int2 int3 int4 int8 in groups of 32, 64 or 128, mixed",
    "mlx-lm",
    _RELABELLED,
    "d2qconv to-mlx Qwen/Qwen3-8B -o qwen3-8b-mlx",
    Runtime("mlx-lm", ("mlx-lm",), "verify-safetensors"),
)
