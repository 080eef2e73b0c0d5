"""Qwen2 and Qwen2.5 (transformers' Qwen2ForCausalLM), without an active sliding window."""

from __future__ import annotations

from d2qconv.arch.config_keys import COMMON_KEYS, must_be, read
from d2qconv.arch.decoder import DECODER_COUPLINGS, DECODER_RESIDUAL, decoder_sites
from d2qconv.arch.spec import Architecture
from d2qconv.names import Role

ARCHITECTURE = Architecture(
    id="qwen2",
    model_type="qwen2",
    class_names=("Qwen2ForCausalLM",),
    sites=decoder_sites(can_have_bias=(Role.Q, Role.K, Role.V)),
    couplings=DECODER_COUPLINGS,
    residual=DECODER_RESIDUAL,
    config_keys=(
        *COMMON_KEYS,
        *read("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        *must_be((True,), "Qwen2 always has biases on q, k and v", "attention_bias"),
        *must_be((False,), "Qwen2 has no biases in its feed-forward", "mlp_bias"),
    ),
    config_defaults={
        "attention_bias": True,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
)
