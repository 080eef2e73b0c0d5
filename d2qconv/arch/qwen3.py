"""Qwen3, dense (transformers' Qwen3ForCausalLM), without an active sliding window."""

from __future__ import annotations

from d2qconv.arch.config_keys import COMMON_KEYS, must_be, read
from d2qconv.arch.decoder import DECODER_COUPLINGS, DECODER_RESIDUAL, decoder_sites
from d2qconv.arch.spec import Architecture
from d2qconv.names import Role

ARCHITECTURE = Architecture(
    id="qwen3",
    model_type="qwen3",
    class_names=("Qwen3ForCausalLM",),
    # `attention_bias` puts a bias on all four attention matrices; no published Qwen3 has it.
    sites=decoder_sites(can_have_bias=(Role.Q, Role.K, Role.V, Role.O), has_qk_norm=True),
    couplings=DECODER_COUPLINGS,
    residual=DECODER_RESIDUAL,
    config_keys=(
        *COMMON_KEYS,
        *read("attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        *must_be((False,), "Qwen3 has no biases in its feed-forward", "mlp_bias"),
    ),
    config_defaults={
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
)
