"""Llama (transformers' LlamaForCausalLM)."""

from __future__ import annotations

from d2qconv.arch.config_keys import COMMON_KEYS, read
from d2qconv.arch.decoder import DECODER_COUPLINGS, DECODER_RESIDUAL, decoder_sites
from d2qconv.arch.spec import Architecture
from d2qconv.names import Role

ARCHITECTURE = Architecture(
    id="llama",
    model_type="llama",
    class_names=("LlamaForCausalLM", "LLaMAForCausalLM"),
    # `attention_bias` puts a bias on all four attention matrices, `mlp_bias` on all three of the feed-forward.
    sites=decoder_sites(
        can_have_bias=(Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN),
    ),
    couplings=DECODER_COUPLINGS,
    residual=DECODER_RESIDUAL,
    config_keys=(*COMMON_KEYS, *read("attention_bias", "mlp_bias")),
    config_defaults={"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048},
)
