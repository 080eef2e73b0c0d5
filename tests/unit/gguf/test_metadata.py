"""Hyper-parameter keys, as llama.cpp reads them; RoPE against transformers' own formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from tokenizer_help import checkpoint_of, greedy_model, load, split_bpe, tiny_desc, value, write_gguf

from d2qconv.arch.spec import Rope
from d2qconv.decoder.rope import attention_factor
from d2qconv.errors import PlanError
from d2qconv.ir.model import Provenance
from d2qconv_gguf.metadata import (
    KV,
    metadata_refusals,
    model_metadata,
    provenance_metadata,
    rope_freqs,
)
from d2qconv_gguf.tokenizer import tokenizer_metadata

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
YARN = Rope(1e6, "yarn", factor=4.0, original_max_positions=1024)
LLAMA3 = Rope(
    5e5, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def scaling(rope: Rope, layout: str = "llama") -> dict:
    keys = model_metadata(tiny_desc(100, rope), layout=layout, file_type=0)
    start = f"{layout}.rope.scaling."
    return {kv.key.removeprefix(start): kv.value for kv in keys if kv.key.startswith(start)}


@pytest.mark.parametrize("layout", ["llama", "qwen2", "qwen3"])
def test_keys_of_each_layout(layout):
    keys = model_metadata(tiny_desc(100), layout=layout, file_type=21, name="Tiny", license_id="mit")
    found = {kv.key: (kv.value, kv.type.name) for kv in keys}
    assert len(found) == len(keys)
    assert found == {
        "general.architecture": (layout, "STRING"),
        "general.type": ("model", "STRING"),
        "general.name": ("Tiny", "STRING"),
        "general.size_label": (found["general.size_label"][0], "STRING"),
        "general.license": ("mit", "STRING"),
        "general.quantization_version": (2, "UINT32"),
        "general.file_type": (21, "UINT32"),
        f"{layout}.block_count": (1, "UINT32"),
        f"{layout}.context_length": (4096, "UINT32"),
        f"{layout}.embedding_length": (32, "UINT32"),
        f"{layout}.feed_forward_length": (32, "UINT32"),
        f"{layout}.attention.head_count": (2, "UINT32"),
        f"{layout}.attention.head_count_kv": (1, "UINT32"),
        f"{layout}.attention.layer_norm_rms_epsilon": (1e-5, "FLOAT32"),
        f"{layout}.attention.key_length": (16, "UINT32"),
        f"{layout}.attention.value_length": (16, "UINT32"),
        f"{layout}.vocab_size": (100, "UINT32"),
        f"{layout}.rope.dimension_count": (16, "UINT32"),
        f"{layout}.rope.freq_base": (1e4, "FLOAT32"),
    }


def test_name_and_license_may_be_unknown():
    keys = model_metadata(tiny_desc(100), layout="llama", file_type=0)
    assert value(keys, "general.name") is None
    assert value(keys, "general.license") is None


def test_llama_cpp_reads_the_numbers(tmp_path):
    hf = split_bpe(greedy_model(), GPT2)
    model = load(tmp_path / "x.gguf", tokenizer_metadata(checkpoint_of(tmp_path, hf), hf.get_vocab_size()))
    assert (model.n_ctx_train, model.n_embd, model.n_layer, model.n_head, model.n_head_kv) == (
        4096,
        32,
        1,
        2,
        1,
    )
    assert model.rope_freq_scale_train == 1.0
    assert model.meta_val_str("llama.rope.freq_base").startswith("10000")


def test_scaling_keys():
    assert scaling(Rope(1e4)) == {}
    assert scaling(LLAMA3) == {}
    assert scaling(Rope(1e4, "linear", factor=2.5)) == {"type": "linear", "factor": 2.5}
    expected = {"type": "yarn", "factor": 4.0, "original_context_length": 1024}
    assert scaling(YARN, "qwen2") == expected


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention_factor": 1.0},
        {"attention_factor": 0.7},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 1.2},
        {"mscale": 0.707},
        {"factor": 1.0},
        {"factor": 0.5, "attention_factor": 1.25},
    ],
)
def test_the_attention_factor_is_that_of_transformers(more):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {"factor": 4.0, **more}
    rope = Rope(1e6, "yarn", original_max_positions=1024, **given)
    parameters = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 1024, **given}
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, rope_parameters=parameters)
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert attention_factor(rope) == pytest.approx(expected, rel=1e-12)
    # what llama.cpp makes of the keys: get_mscale(factor, 1) times attn_factor
    factor = given["factor"]
    of_itself = 1.0 if factor <= 1 else 1 + 0.1 * math.log(factor)
    assert of_itself * scaling(rope).get("attn_factor", 1.0) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("rope", "layout", "said"),
    [
        (LLAMA3, "qwen2", "rope_freqs"),
        (LLAMA3, "qwen3", "rope_freqs"),
        (Rope(1e4, "dynamic", factor=2.0), "llama", "no key"),
        (Rope(1e4, "longrope", factor=2.0), "llama", "no key"),
        (Rope(1e4, "linear", factor=0.0), "llama", "positive"),
        (Rope(1e4, "yarn", factor=float("nan"), original_max_positions=1024), "llama", "positive"),
        (Rope(1e4, "yarn", factor=4.0), "llama", "original_max_position_embeddings"),
        (Rope(1e4, "yarn", factor=4.0, original_max_positions=1024, beta_fast=16.0), "llama", "beta_fast"),
        (Rope(1e4, "yarn", factor=4.0, original_max_positions=1024, beta_slow=2.0), "qwen3", "beta_slow"),
    ],
)
def test_what_no_key_can_say_is_refused(rope, layout, said):
    desc = tiny_desc(100, rope)
    (refusal,) = metadata_refusals(desc, layout)
    assert said in refusal.why
    with pytest.raises(PlanError, match=said):
        model_metadata(desc, layout=layout, file_type=0)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_no_rope_tensor_but_for_llama3(kind):
    assert rope_freqs(tiny_desc(100, Rope(1e4, kind, factor=2.0, original_max_positions=1024))) is None


@pytest.mark.parametrize(("low", "high", "context"), [(1.0, 4.0, 8192), (1.0, 4.0, 64), (2.0, 32.0, 500)])
def test_rope_freqs_are_those_of_transformers(low, high, context):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = Rope(5e5, "llama3", 8.0, low, high, context)
    divisors = rope_freqs(tiny_desc(100, rope))
    assert divisors is not None
    assert (divisors.dtype, divisors.shape) == (np.float32, (8,))
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / divisors, expected.numpy(), rtol=2e-6)
    assert divisors.min() == 1.0
    assert divisors.max() == 8.0


def test_provenance():
    p = Provenance("0.1", "f" * 64, "org/model", "mit", "gptq dsq", "self 128x512", {"mean_shift": "bias"})
    keys = provenance_metadata(p, {"a.weight": "0" * 64, "b.weight": "1" * 64})
    assert {kv.key: kv.value for kv in keys} == {
        "d2qconv.version": "0.1",
        "d2qconv.fingerprint": "f" * 64,
        "d2qconv.source": "org/model",
        "d2qconv.source_license": "mit",
        "d2qconv.recipe": "gptq dsq",
        "d2qconv.calibration": "self 128x512",
        "d2qconv.carrier.mean_shift": "bias",
        "d2qconv.tensor_names": ["a.weight", "b.weight"],
        "d2qconv.decoded_sha256": ["0" * 64, "1" * 64],
    }
    assert keys[-1] == KV(keys[-1].key, ["0" * 64, "1" * 64], GGUFValueType.ARRAY, GGUFValueType.STRING)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}
OLD = {"original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, **OLD},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, **OLD},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 2.0, **OLD},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **OLD},
    ],
)
def test_llama_cpp_rotates_as_transformers(tmp_path, parameters):
    """Logits of a random one-block model in f32, 48 positions; a wrong RoPE moves them by far more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from d2qconv_gguf.runtime import LlamaCpp

    hf = split_bpe(greedy_model(), GPT2)
    tokenizer = tokenizer_metadata(checkpoint_of(tmp_path, hf), hf.get_vocab_size())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=hf.get_vocab_size(),
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1e4, **parameters},
        initializer_range=0.7,
    )
    model = LlamaForCausalLM(config).eval()
    given = {key: parameters[key] for key in parameters if key not in ("rope_type", *OLD)}
    rope = Rope(1e4, parameters["rope_type"], original_max_positions=32, **given)
    desc = tiny_desc(hf.get_vocab_size(), rope)
    tensors = {}
    for name, stored in NAMES.items():
        tensor = model.get_parameter(f"{name}.weight").detach()
        if stored.endswith(("attn_q", "attn_k")):
            tensor = tensor.reshape(-1, 2, 8, 32).swapaxes(1, 2).reshape(tensor.shape)
        tensors[f"{stored}.weight"] = tensor.contiguous().numpy()
    extra = rope_freqs(desc)
    if extra is not None:
        tensors["rope_freqs.weight"] = extra
    write_gguf(tmp_path / "x.gguf", [*model_metadata(desc, layout="llama", file_type=0), *tokenizer], tensors)
    ids = torch.randint(0, 256, (48,)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
        config.rope_parameters = {"rope_theta": 3e4, "rope_type": "default"}
        other = LlamaForCausalLM(config).eval()
        other.load_state_dict(model.state_dict())
        moved = np.abs(other(torch.tensor([ids])).logits[0].numpy() - expected).max()
    with LlamaCpp(tmp_path / "x.gguf", n_context=64) as runtime:
        error = np.abs(runtime.logits(ids) - expected).max()
    assert error < 1e-3 * moved
