"""config.json of a package: the checkpoint's own, what the dialect adds, and another label where biases need one.

No causal model of transformers has a norm with a bias, but DAC's mean shift is the same as biases of gate and up, which
Llama's code has under `mlp_bias` (`d2quant.md`; modeling_llama.py). Mistral without a window and Qwen2 are Llama with
other defaults, and Qwen3 is HYV3 (transformers 5.6 and newer) with dense blocks only: under that label the same tensors
compute the same function, and the biases have a place. Biases that such a class has besides are written as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2qconv.arch.spec import ModelDesc
from d2qconv.names import Part, Role, TensorId

#: Of the checkpoint's config, what says how its weights are stored; the package's own takes their place.
_STORAGE = ("quantization_config", "compression_config", "torch_dtype", "dtype", "_name_or_path")


#: Carried besides the tokenizer's files.
LICENSES = ("LICENSE", "LICENSE.txt", "NOTICE")


@dataclass(frozen=True)
class Label:
    """What a model with biases of gate and up is called. drop: keys of the old label; add: keys of the new one.

    zeros: roles whose bias the class has and the model has not. transformers: the first version that has the class.
    """

    model_type: str
    class_name: str
    add: Mapping[str, Any]
    zeros: tuple[Role, ...]
    drop: tuple[str, ...] = ()
    transformers: str = "4.45"


_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
LABELS: Mapping[str, Label] = {
    "llama": Label("llama", "LlamaForCausalLM", {"mlp_bias": True}, (Role.DOWN,)),
    "mistral": Label(
        "llama", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": True}, (Role.DOWN,), _WINDOW
    ),
    "qwen2": Label(
        "llama",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True},
        (Role.O, Role.DOWN),
        _WINDOW,
    ),
    "qwen3": Label("hy_v3", "HYV3ForCausalLM", {"mlp_bias": True}, (Role.DOWN,), _WINDOW, "5.6"),
}


@dataclass(frozen=True)
class Labelled:
    """How a model will be called, and the zero biases that this takes. label: None if it keeps its own."""

    model_type: str
    label: Label | None = None
    zeros: Mapping[TensorId, int] = field(default_factory=dict)


def labelled(desc: ModelDesc, has_new_biases: bool) -> Labelled:
    """The label of a package; raises KeyError for an architecture that has none with biases."""
    if not has_new_biases:
        return Labelled(desc.arch.model_type)
    label = LABELS[desc.arch.model_type]
    zeros = {
        TensorId(role, block, Part.BIAS): desc.dims.hidden
        for block in range(desc.dims.n_layers)
        for role in label.zeros
        if TensorId(role, block, Part.BIAS) not in desc.tensors
    }
    return Labelled(label.model_type, label, zeros)


def package_config(
    desc: ModelDesc, source: Mapping[str, Any], label: Label | None, added: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """config.json; `added` are the dialect's keys."""
    found = {key: value for key, value in source.items() if key not in _STORAGE}
    if label is not None:
        found = {key: value for key, value in found.items() if key not in label.drop}
        # Another class has other defaults: what this model means is said.
        found |= _said(desc) | dict(label.add)
        found |= {"model_type": label.model_type, "architectures": [label.class_name]}
        if label.model_type == "hy_v3":
            found["mlp_layer_types"] = ["dense"] * desc.dims.n_layers
    found |= _rope_for_all(found, desc)
    found["dtype"] = found["torch_dtype"] = dtype
    return found | dict(added)


def _rope_for_all(config: Mapping[str, Any], desc: ModelDesc) -> dict[str, Any]:
    """Rotary positions as transformers 4 and mlx-lm read them, beside transformers 5's `rope_parameters`.

    A loader that knows only the old keys would take its own defaults instead, without a word.
    """
    new = config.get("rope_parameters")
    found: dict[str, Any] = {"rope_theta": desc.rope.theta}
    if isinstance(new, Mapping) and desc.rope.kind != "default" and not config.get("rope_scaling"):
        found["rope_scaling"] = dict(new)
    return found


def _said(desc: ModelDesc) -> dict[str, Any]:
    """Sizes and numbers that are defaults of the old class where its config leaves them out."""
    dims = desc.dims
    return {
        "vocab_size": dims.vocab,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "num_hidden_layers": dims.n_layers,
        "num_attention_heads": dims.n_heads,
        "num_key_value_heads": dims.n_kv_heads,
        "head_dim": dims.head,
        "rms_norm_eps": desc.norm_eps,
        "max_position_embeddings": desc.max_positions,
        "tie_word_embeddings": desc.is_tied,
    }
