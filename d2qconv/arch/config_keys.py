"""What is done with the keys of config.json that every decoder may have.

Sources: transformers' PretrainedConfig (versions 4 and 5), its generation defaults, the four configuration
files of our architectures, and the keys that tools leave in published checkpoints. A key that is in no
table is refused: it may change the function.
"""

from __future__ import annotations

from d2qconv.arch.spec import ConfigKey


def read(*names: str) -> tuple[ConfigKey, ...]:
    """Keys that `d2qconv.arch.config` turns into numbers or checks itself."""
    return tuple(ConfigKey(name, "read") for name in names)


def ignored(why: str, *names: str) -> tuple[ConfigKey, ...]:
    """Keys that do not change the function, and why they do not."""
    return tuple(ConfigKey(name, why) for name in names)


def must_be(values: tuple[object, ...], why: str, *names: str) -> tuple[ConfigKey, ...]:
    """Keys whose values are refused unless they are among `values`."""
    return tuple(ConfigKey(name, why, values) for name in names)


#: Sizes and numbers of a decoder with RMSNorm, RoPE and a gated feed-forward.
DECODER_KEYS = (
    *read("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size"),
    *read("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *read("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    *read("rope_theta", "rope_scaling", "rope_parameters"),
    *must_be(("silu", "swish"), "only SiLU is computed", "hidden_act"),
    *must_be((1.0, None), "rotary embedding of a part of a head is not supported", "partial_rotary_factor"),
    *must_be((False, None), "rotary embedding of neighbouring pairs is not supported", "rope_interleaved"),
    *must_be((False, None), "multimodal rotary positions are not supported", "use_mrope"),
)

_REFUSED = (
    *must_be(
        (None,),
        "the weights are quantized already, and are read as such or not at all",
        "quantization_config",
        "compression_config",
    ),
    *must_be(
        (None, {}), "the function is in code that comes with the checkpoint, which is not run", "auto_map"
    ),
    *must_be((None, {}), "attention heads were removed, the sizes differ per block", "pruned_heads"),
    *must_be((None, {}), "settings per block are not supported", "per_layer_config"),
    *must_be(
        (False, None),
        "only a decoder by itself is supported",
        "is_encoder_decoder",
        "add_cross_attention",
        "tie_encoder_decoder",
    ),
    *must_be((None,), "only a decoder by itself is supported", "cross_attention_hidden_size"),
)

_BOOKKEEPING = (
    *ignored("the weights say their own types", "torch_dtype", "dtype"),
    *ignored(
        "a record of where the file comes from",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "license",
        "unsloth_fixed",
        "unsloth_version",
        "is_llama_config",
        "transformers.js_config",
    ),
    *ignored(
        "how a library runs it, not what it computes",
        "use_cache",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "chunk_size_feed_forward",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_decoder",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
    ),
    *ignored("tensor-parallel slices of the pretraining add up to the same function", "pretraining_tp"),
    *ignored(
        "used in training only",
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "dropout",
        "gradient_checkpointing",
    ),
    *ignored(
        "about classification heads, which a causal model has none of",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "classifier_dropout",
    ),
    *ignored(
        "about the tokenizer",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "cls_token_id",
        "mask_token_id",
        "tokenizer_class",
        "prefix",
        "max_sequence_length",
    ),
)

_GENERATION = ignored(
    "a setting of generation, not of the model",
    *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "task_specific_params", "penalty_alpha"),
)

#: Every table begins with these.
COMMON_KEYS = (*DECODER_KEYS, *_REFUSED, *_BOOKKEEPING, *_GENERATION)
