"""Hyper-parameter and provenance keys of a GGUF.

The keys are those of llama.cpp's converter (conversion/base.py `set_gguf_parameters`, conversion/llama.py) for
the dense layouts `llama`, `qwen2` and `qwen3`; what each one does was read in the loader (src/llama-model.cpp
`load_hparams`, src/llama-context.cpp). One key is written differently on purpose: the converter writes YaRN's
attention factor to `rope.scaling.yarn_attn_factor`, which these three layouts never read. All of them read
`rope.scaling.attn_factor`, so it is written there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFValueType, Keys, RopeScalingType, size_label

from d2qconv.arch.spec import ModelDesc, Rope
from d2qconv.decoder.rope import attention_factor, mscale
from d2qconv.errors import Refusal, refuse
from d2qconv.ir.model import Provenance
from d2qconv_gguf.names import ROPE_FREQS

#: Digest of all other metadata, so that a changed key or token is noticed.
METADATA_SHA256 = "d2qconv.metadata_sha256"
#: The boundaries of YaRN's ramp, which these layouts cannot change (src/llama-hparams.h).
BETA_FAST, BETA_SLOW = 32.0, 1.0

Scalar: TypeAlias = str | bool | int | float


@dataclass(frozen=True)
class KV:
    """One metadata entry. sub_type: type of the elements where `type` is ARRAY, else None."""

    key: str
    value: Scalar | Sequence[str] | Sequence[int] | Sequence[float]
    type: GGUFValueType
    sub_type: GGUFValueType | None = None

    @classmethod
    def text(cls, key: str, value: str) -> KV:
        """A string."""
        return cls(key, value, GGUFValueType.STRING)

    @classmethod
    def count(cls, key: str, value: int) -> KV:
        """A u32."""
        return cls(key, value, GGUFValueType.UINT32)

    @classmethod
    def real(cls, key: str, value: float) -> KV:
        """An f32, rounded when written."""
        return cls(key, value, GGUFValueType.FLOAT32)

    @classmethod
    def flag(cls, key: str, value: bool) -> KV:
        """A bool."""
        return cls(key, value, GGUFValueType.BOOL)

    @classmethod
    def texts(cls, key: str, values: Sequence[str]) -> KV:
        """An array of strings."""
        return cls(key, list(values), GGUFValueType.ARRAY, GGUFValueType.STRING)

    @classmethod
    def ints(cls, key: str, values: Sequence[int]) -> KV:
        """An array of i32."""
        return cls(key, list(values), GGUFValueType.ARRAY, GGUFValueType.INT32)

    @classmethod
    def reals(cls, key: str, values: Sequence[float]) -> KV:
        """An array of f32, rounded when written."""
        return cls(key, list(values), GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def model_metadata(
    desc: ModelDesc, *, layout: str, file_type: int, name: str = "", license_id: str = ""
) -> list[KV]:
    """All keys but the tokenizer's and the provenance.

    layout: `llama`, `qwen2` or `qwen3`, the prefix of the keys. file_type: llama.cpp's LlamaFileType, which it
    only prints. name and license_id: left out if empty. Raises PlanError with `metadata_refusals`.
    """
    refuse(metadata_refusals(desc, layout))
    d = desc.dims
    keys = [KV.text(Keys.General.ARCHITECTURE, layout), KV.text(Keys.General.TYPE, "model")]
    if name:
        keys.append(KV.text(Keys.General.NAME, name))
    keys.append(KV.text(Keys.General.SIZE_LABEL, size_label(desc.n_weights, 0, 0, 0)))
    if license_id:
        keys.append(KV.text(Keys.General.LICENSE, license_id))
    keys += [
        KV.count(_key(Keys.LLM.BLOCK_COUNT, layout), d.n_layers),
        KV.count(_key(Keys.LLM.CONTEXT_LENGTH, layout), desc.max_positions),
        KV.count(_key(Keys.LLM.EMBEDDING_LENGTH, layout), d.hidden),
        KV.count(_key(Keys.LLM.FEED_FORWARD_LENGTH, layout), d.ffn),
        KV.count(_key(Keys.Attention.HEAD_COUNT, layout), d.n_heads),
        KV.count(_key(Keys.Attention.HEAD_COUNT_KV, layout), d.n_kv_heads),
        KV.real(_key(Keys.Attention.LAYERNORM_RMS_EPS, layout), desc.norm_eps),
        KV.count(_key(Keys.Attention.KEY_LENGTH, layout), d.head),
        KV.count(_key(Keys.Attention.VALUE_LENGTH, layout), d.head),
        KV.count(_key(Keys.LLM.VOCAB_SIZE, layout), d.vocab),
        KV.count(_key(Keys.Rope.DIMENSION_COUNT, layout), d.head),
        KV.real(_key(Keys.Rope.FREQ_BASE, layout), desc.rope.theta),
    ]
    keys += _rope_scaling(desc.rope, layout)
    keys.append(KV.count(Keys.General.QUANTIZATION_VERSION, GGML_QUANT_VERSION))
    keys.append(KV.count(Keys.General.FILE_TYPE, file_type))
    return keys


def metadata_refusals(desc: ModelDesc, layout: str) -> list[Refusal]:
    """What of the model no key of that layout can say."""
    rope, where = desc.rope, f"rope {desc.rope.kind!r} in layout {layout}"
    if rope.kind in ("linear", "yarn") and not rope.factor > 0:
        return [Refusal(where, f"factor is {rope.factor}; it must be positive", "check config.json")]
    if rope.kind == "llama3" and layout != "llama":
        why = f"llama.cpp reads the tensor {ROPE_FREQS}, which carries it, in layout llama only"
        return [Refusal(where, why, "choose layout llama if the model fits it")]
    if rope.kind == "yarn":
        return _yarn_refusals(rope, where)
    if rope.kind not in ("default", "linear", "llama3"):
        return [Refusal(where, "llama.cpp has no key for this position embedding in this layout")]
    return []


def _yarn_refusals(rope: Rope, where: str) -> list[Refusal]:
    found = []
    if (rope.beta_fast, rope.beta_slow) != (BETA_FAST, BETA_SLOW):
        found.append(
            Refusal(
                where,
                f"beta_fast {rope.beta_fast:g} and beta_slow {rope.beta_slow:g}: llama.cpp uses "
                f"{BETA_FAST:g} and {BETA_SLOW:g} in this layout and reads no key for them",
            )
        )
    if rope.original_max_positions <= 0:
        found.append(Refusal(where, "original_max_position_embeddings is missing", "add it to config.json"))
    return found


def _rope_scaling(rope: Rope, layout: str) -> list[KV]:
    """Keys of linear and YaRN scaling; nothing for `default` and `llama3`.

    llama.cpp multiplies cos and sin by m(1) times `rope.scaling.attn_factor` (src/llama-context.cpp, rope_yarn in
    ggml-cpu/ops.cpp), so that key is the wanted factor over m(1), left out where it is 1.
    """
    if rope.kind not in ("linear", "yarn"):
        return []
    kind = RopeScalingType.LINEAR if rope.kind == "linear" else RopeScalingType.YARN
    keys = [
        KV.text(_key(Keys.Rope.SCALING_TYPE, layout), kind.value),
        KV.real(_key(Keys.Rope.SCALING_FACTOR, layout), rope.factor),
    ]
    if kind is RopeScalingType.LINEAR:
        return keys
    keys.append(KV.count(_key(Keys.Rope.SCALING_ORIG_CTX_LEN, layout), rope.original_max_positions))
    extra = attention_factor(rope) / mscale(rope.factor, 1.0)
    if not math.isclose(extra, 1.0, rel_tol=1e-7):
        keys.append(KV.real(_key(Keys.Rope.SCALING_ATTN_FACTOR, layout), extra))
    return keys


def rope_freqs(desc: ModelDesc) -> np.ndarray | None:
    """The divisors of the RoPE frequencies for llama3 scaling, f32[head/2], or None for every other kind.

    With f_i = theta^(-2i/head), L_i = 2π/f_i and C = original_max_positions: 1 where L_i < C/high, `factor` where
    L_i > C/low, and 1 / ((1-s)/factor + s), s = (C/L_i - low) / (high - low), between. Computed in f64, rounded to
    f32 at the end. Source: transformers `_compute_llama3_parameters`; conversion/llama.py writes the same tensor.
    """
    rope = desc.rope
    if rope.kind != "llama3":
        return None
    head, context = desc.dims.head, float(rope.original_max_positions)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    frequency = rope.theta ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    wavelength = 2 * math.pi / frequency
    span = high - low if high != low else 1.0
    smooth = np.clip((context / wavelength - low) / span, 0.0, 1.0)
    divisor = 1.0 / ((1.0 - smooth) / rope.factor + smooth)
    divisor = np.where(wavelength < context / high, 1.0, divisor)
    divisor = np.where(wavelength > context / low, rope.factor, divisor)
    return divisor.astype(np.float32)


def provenance_metadata(p: Provenance, digests: Mapping[str, str]) -> list[KV]:
    """Where the file comes from, and the digest of every tensor's decoded f32 values by its name in the file."""
    keys = [KV.text(f"d2qconv.{name}", text) for name, text in p.facts().items()]
    if digests:
        keys.append(KV.texts("d2qconv.tensor_names", list(digests)))
        keys.append(KV.texts("d2qconv.decoded_sha256", list(digests.values())))
    return keys


def metadata_digest(values: Mapping[str, object]) -> str:
    """SHA-256, hex, over all entries but `METADATA_SHA256` itself, by key. Numbers with a fraction count as f32."""

    def plain(value: object) -> object:
        if isinstance(value, float):
            return np.float32(value).tobytes().hex()
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    listed = {key: plain(value) for key, value in values.items() if key != METADATA_SHA256}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _key(template: str, layout: str) -> str:
    return template.format(arch=layout)
