"""Mistral (transformers' MistralForCausalLM), without an active sliding window."""

from __future__ import annotations

from d2qconv.arch.config_keys import COMMON_KEYS, must_be, read
from d2qconv.arch.decoder import DECODER_COUPLINGS, DECODER_RESIDUAL, decoder_sites
from d2qconv.arch.spec import Architecture

ARCHITECTURE = Architecture(
    id="mistral",
    model_type="mistral",
    class_names=("MistralForCausalLM",),
    sites=decoder_sites(),
    couplings=DECODER_COUPLINGS,
    residual=DECODER_RESIDUAL,
    config_keys=(
        *COMMON_KEYS,
        *read("sliding_window"),
        *must_be((False,), "Mistral has no biases", "attention_bias", "mlp_bias"),
    ),
    config_defaults={
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
)
