"""config.json against the tables: compared with transformers' own reading, and refused where it must be."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2qconv.arch.config import ConfigFacts, read_config
from d2qconv.arch.registry import BUILT_IN, architecture_of
from d2qconv.errors import PlanError

TYPES = tuple(BUILT_IN)
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}


def config(model_type: str = "llama", **changes: object) -> dict[str, Any]:
    """The least that a config.json needs, with changes; `...` removes a key."""
    full = {
        "model_type": model_type,
        **SIZES,
        **({"sliding_window": None} if model_type == "mistral" else {}),
    }
    return {k: v for k, v in {**full, **changes}.items() if v is not ...}


def read(model_type: str = "llama", **changes: object) -> ConfigFacts:
    found = config(model_type, **changes)
    return read_config(architecture_of(found), found)


def refused(model_type: str = "llama", **changes: object) -> str:
    with pytest.raises(PlanError) as found:
        read(model_type, **changes)
    text = str(found.value)
    assert all(line.startswith(("- config.json: ", "  →")) for line in text.splitlines()[1:])
    return text


def theirs(model_type: str, **changes: object) -> Any:
    from transformers import AutoConfig

    options = config(model_type, **changes)
    return AutoConfig.for_model(**options)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        {"bos_token_id": 5, "eos_token_id": [1, 2], "max_position_embeddings": 100, "rope_theta": 5e5},
        {"bos_token_id": None, "eos_token_id": None},
    ],
)
def test_numbers_and_defaults_are_those_of_transformers(
    model_type: str, changes: Mapping[str, object]
) -> None:
    facts, hf = read(model_type, **changes), theirs(model_type, **changes)
    assert facts.dims.n_kv_heads == hf.num_key_value_heads
    assert facts.dims.head == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert facts.norm_eps == hf.rms_norm_eps
    assert facts.is_tied == hf.tie_word_embeddings
    assert facts.max_positions == hf.max_position_embeddings
    assert facts.rope.theta == hf.rope_parameters["rope_theta"]
    assert facts.rope.kind == hf.rope_parameters["rope_type"]
    for ours, name in ((facts.bos_ids, "bos_token_id"), (facts.eos_ids, "eos_token_id")):
        value = getattr(hf, name)
        assert list(ours) == (value if isinstance(value, list) else [] if value is None else [value])


@pytest.mark.parametrize("model_type", TYPES)
def test_every_key_that_transformers_writes_is_known(model_type: str) -> None:
    from transformers import AutoConfig

    hf = AutoConfig.for_model(model_type, architectures=list(BUILT_IN[model_type].class_names[:1]))
    if hasattr(hf, "sliding_window"):
        hf.sliding_window = None
    written = hf.to_dict()
    written["dtype"] = "bfloat16"
    read_config(BUILT_IN[model_type], written)


def test_null_means_the_default() -> None:
    dims = read(head_dim=None, num_key_value_heads=None).dims
    assert (dims.head, dims.n_kv_heads) == (8, 32)
    dims = read("mistral", head_dim=None, num_key_value_heads=None).dims
    assert (dims.head, dims.n_kv_heads) == (8, 32)


@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024, "beta_fast": 16}
        | {"beta_slow": 2.0, "attention_factor": 1.25, "mscale": 0.5, "mscale_all_dim": 0.75},
    ],
)
def test_rope_of_both_styles(style: str, parameters: Mapping[str, object]) -> None:
    rope_parameters = {**parameters, **({"rope_theta": 5e5} if style == "rope_parameters" else {})}
    changes = {style: rope_parameters} | ({"rope_theta": 5e5} if style == "rope_scaling" else {})
    rope = read("llama", **changes).rope
    expected = theirs("llama", **{k: dict(v) if isinstance(v, dict) else v for k, v in changes.items()})
    for name, value in expected.rope_parameters.items():
        field = {"rope_type": "kind", "rope_theta": "theta"}.get(name, name)
        field = "original_max_positions" if field == "original_max_position_embeddings" else field
        assert getattr(rope, field) == value, name
    old = {("type" if k == "rope_type" else k): v for k, v in rope_parameters.items()}
    assert read("llama", **{**changes, style: old}).rope == rope


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "depend on the length"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "depend on the length",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "multimodal"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "multimodal"),
        ({"use_mrope": True}, "multimodal"),
        ({"rope_scaling": {"type": "new"}}, "only default, linear, llama3, yarn are known"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "must be one name"),
        ({"rope_scaling": {"type": 3}}, "must be one name"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "not null"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "positive number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "positive number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}},
            "does not belong to kind 'linear'",
        ),
        ({"rope_scaling": {"type": "default", "factor": 2}}, "does not belong to kind 'default'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
            "positive int",
        ),
        ({"rope_scaling": [1]}, "must be an object"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor must be greater",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_interleaved": True}, "neighbouring pairs"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per kind of layer"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 2e4}, "outside and 10000.0 inside"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "default"}}, "different things"),
        ({"rope_theta": 1}, "greater than 1"),
        ({"rope_theta": "10000"}, "greater than 1"),
        ({"rope_theta": 10**400}, "greater than 1"),
    ],
)
def test_rope_refusals(changes: Mapping[str, object], why: str) -> None:
    assert why in refused("llama", **changes)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}),
        ("mistral", {"sliding_window": ...}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_active_sliding_windows(model_type: str, changes: Mapping[str, object]) -> None:
    assert "sliding window" in refused(model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
        ("qwen3", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_inactive_sliding_windows(model_type: str, changes: Mapping[str, object]) -> None:
    read(model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("llama", {"wormhole": None}, "unknown key 'wormhole'; it may change the function"),
        ("llama", {"sliding_window": 5}, "unknown key 'sliding_window'"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "unknown key 'layer_types'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu': only SiLU"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "code that comes with the checkpoint"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ("llama", {"pruned_heads": {"0": [1]}}, "heads were removed"),
        ("llama", {"is_encoder_decoder": True}, "only a decoder by itself"),
        ("llama", {"is_encoder_decoder": 0}, "only a decoder by itself"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
        ("llama", {"mlp_bias": None}, "mlp_bias must be true or false"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be"),
        ("mistral", {"attention_bias": True}, "Mistral has no biases"),
        ("qwen2", {"attention_bias": False}, "Qwen2 always has biases"),
        ("qwen3", {"mlp_bias": True}, "Qwen3 has no biases"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must be 2 times"),
        ("qwen3", {"layer_types": ["linear_attention"] * 2}, "layer_types must be 2 times"),
        ("qwen3", {"max_window_layers": -1}, "max_window_layers must be"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": "64"}, "sliding_window must be"),
        ("llama", {"hidden_size": ...}, "key 'hidden_size' is missing"),
        ("llama", {"vocab_size": "512"}, "vocab_size must be an integer"),
        ("llama", {"vocab_size": True}, "vocab_size must be an integer"),
        ("llama", {"vocab_size": 2**40}, "vocab_size must be an integer"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads must be an integer"),
        ("llama", {"num_attention_heads": 24}, "not a multiple of num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ("llama", {"head_dim": 7}, "odd"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps must be"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be"),
        ("llama", {"eos_token_id": 512}, "below vocab_size = 512"),
        ("llama", {"eos_token_id": [1, "2"]}, "below vocab_size = 512"),
        ("llama", {"bos_token_id": -1}, "below vocab_size = 512"),
        ("llama", {"bos_token_id": False}, "below vocab_size = 512"),
    ],
)
def test_refusals(model_type: str, changes: Mapping[str, object], why: str) -> None:
    text = refused(model_type, **changes)
    assert why in text
    assert text.count("- config.json") == 1


def test_all_refusals_at_once() -> None:
    text = refused(wormhole=1, hidden_act="gelu", rope_scaling={"type": "dynamic"}, head_dim=7)
    assert [w in text for w in ("'wormhole'", "gelu", "dynamic", "odd")] == [True] * 4


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = (
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "mscale",
    "truncate",
)
ROPE = st.dictionaries(
    st.sampled_from(ROPE_KEYS), JSON | st.sampled_from(["yarn", "llama3", "linear"]), max_size=4
)


@settings(max_examples=300, deadline=None)
@given(
    model_type=st.sampled_from(TYPES),
    changes=st.dictionaries(
        st.sampled_from(sorted({k.name for a in BUILT_IN.values() for k in a.config_keys})), JSON
    ),
    rope=ROPE,
)
def test_any_value_is_read_or_refused(model_type: str, changes: dict[str, Any], rope: dict[str, Any]) -> None:
    found = {**config(model_type), "rope_scaling": rope, **changes, "model_type": model_type}
    try:
        facts = read_config(BUILT_IN[model_type], found)
    except PlanError:
        return
    assert facts.dims.head % 2 == 0
    assert facts.rope.theta > 1
    assert facts.rope.factor > 0


def test_keys_of_real_files_are_harmless() -> None:
    keys = {
        "_name_or_path": "x",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.31.0",
        "pretraining_tp": 2,
        "use_cache": True,
        "initializer_range": 0.02,
        "attention_dropout": 0.1,
        "pad_token_id": -1,
        "temperature": 0.6,
        "do_sample": True,
        "max_length": 4096,
        "rope_scaling": None,
        "quantization_config": None,
        "auto_map": {},
        "is_llama_config": True,
        "rope_interleaved": False,
        "partial_rotary_factor": 1,
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert read("llama", **keys) == read("llama")
