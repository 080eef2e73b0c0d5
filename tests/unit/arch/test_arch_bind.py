"""Binding checkpoints: the tables against transformers' own model classes, and every contradiction."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2qconv.arch.bind import bind
from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import InputError, PlanError
from d2qconv.names import Part, Role, TensorId
from d2qconv.testing.models import make_checkpoint, write_shards

TYPES = sorted(BUILT_IN)


def bound(folder: Path) -> ModelDesc:
    return bind(open_checkpoint(str(folder)))


def rewrite(folder: Path, changes: dict[str, Tensor | None], config: dict[str, Any] | None = None) -> None:
    """Write the folder's tensors again with some replaced, added or (None) left out; change the config."""
    tensors = {n: d.load() for n, d in open_checkpoint(str(folder)).tensors.items()}
    write_shards(folder, {n: t for n, t in {**tensors, **changes}.items() if t is not None})
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **(config or {})}))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {"tied": tied}) for model_type in TYPES for tied in (True, False)),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tied": False}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"head_dim": 128, "kv_heads": 1}),
    ("mistral", {"heads": 8, "head_dim": 32, "layers": 3, "vocab": 300}),
]


@pytest.mark.parametrize(("model_type", "options"), VARIANTS)
def test_the_tables_name_every_tensor_of_transformers(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    make_checkpoint(tmp_path, model_type, **options)
    model = bound(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    if model.is_tied:
        del shapes["lm_head.weight"]
    assert {name: d.shape for name, d in checkpoint.tensors.items()} == shapes
    assert len(model.tensors) == len(shapes)
    assert {id(d) for d in model.tensors.values()} == {
        id(d) for d in model.tensors.values() if d in checkpoint.tensors.values()
    }
    assert model.n_weights == sum(t.numel() for t in theirs.parameters())
    assert (TensorId(Role.HEAD) in model.tensors) != model.is_tied
    assert (TensorId(Role.Q, 0, Part.BIAS) in model.tensors) == (
        model_type == "qwen2" or "attention_bias" in options
    )
    assert (TensorId(Role.O, 1, Part.BIAS) in model.tensors) == ("attention_bias" in options)
    assert (TensorId(Role.DOWN, 1, Part.BIAS) in model.tensors) == ("mlp_bias" in options)


def test_roles_are_bound_to_the_right_names(tmp_path: Path) -> None:
    model = bound(make_checkpoint(tmp_path, "qwen3", tied=False))
    tensors = open_checkpoint(str(tmp_path)).tensors
    layer = "model.layers.1"
    for role, name in {
        Role.ATTN_NORM: f"{layer}.input_layernorm",
        Role.Q: f"{layer}.self_attn.q_proj",
        Role.K: f"{layer}.self_attn.k_proj",
        Role.V: f"{layer}.self_attn.v_proj",
        Role.Q_NORM: f"{layer}.self_attn.q_norm",
        Role.K_NORM: f"{layer}.self_attn.k_norm",
        Role.O: f"{layer}.self_attn.o_proj",
        Role.FFN_NORM: f"{layer}.post_attention_layernorm",
        Role.GATE: f"{layer}.mlp.gate_proj",
        Role.UP: f"{layer}.mlp.up_proj",
        Role.DOWN: f"{layer}.mlp.down_proj",
    }.items():
        assert torch.equal(model.tensors[TensorId(role, 1)].load(), tensors[f"{name}.weight"].load())
    for role, name in {
        Role.EMBED: "model.embed_tokens",
        Role.FINAL_NORM: "model.norm",
        Role.HEAD: "lm_head",
    }.items():
        assert torch.equal(model.tensors[TensorId(role)].load(), tensors[f"{name}.weight"].load())
    assert [str(t) for t in list(model.tensors)[:2]] == ["embed.weight", "blk.0.attn_norm.weight"]
    assert [str(t) for t in list(model.tensors)[-2:]] == ["final_norm.weight", "head.weight"]


def test_what_the_config_says_is_carried_over(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
    make_checkpoint(
        tmp_path, "qwen2", rope_parameters=yarn, norm_eps=1e-5, bos=None, eos=[3, 4], max_positions=99
    )
    model = bound(tmp_path)
    assert (model.rope.kind, model.rope.theta, model.rope.factor) == ("yarn", 1e6, 4.0)
    assert (model.norm_eps, model.bos_ids, model.eos_ids, model.max_positions) == (1e-5, (), (3, 4), 99)


@pytest.mark.parametrize("name", ["tiny-llama-5m"])
def test_a_trained_model(name: str) -> None:
    model = bound(Path(__file__).parents[2] / "data" / name)
    assert (model.dims.n_layers, model.is_tied, model.n_weights) == (4, True, 5245184)


def test_missing_tensors_are_all_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, {"model.norm.weight": None, "model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(
        InputError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"
    ):
        bound(tmp_path)


def test_missing_bias(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2")
    rewrite(tmp_path, {"model.layers.0.self_attn.k_proj.bias": None})
    with pytest.raises(InputError, match=r"missing: model\.layers\.0\.self_attn\.k_proj\.bias"):
        bound(tmp_path)


def test_wrong_shapes_are_all_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    rewrite(
        tmp_path,
        {"model.norm.weight": torch.ones(255), "model.layers.0.mlp.up_proj.weight": torch.ones(1, 2)},
    )
    with pytest.raises(InputError) as found:
        bound(tmp_path)
    assert "model.norm.weight has shape [255], config.json says [256]" in str(found.value)
    assert "up_proj.weight has shape [1, 2], config.json says [512, 256]" in str(found.value)


def test_head_size_that_contradicts_the_tensors(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, {}, {"head_dim": 32})
    with pytest.raises(
        InputError, match=r"q_proj\.weight has shape \[256, 256\], config\.json says \[128, 256\]"
    ):
        bound(tmp_path)


def test_biases_that_the_config_denies(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", attention_bias=True)
    rewrite(tmp_path, {}, {"attention_bias": False})
    with pytest.raises(
        InputError, match=r"attention_bias or mlp_bias.*: model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        bound(tmp_path)


def test_extra_tensors_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, {"model.layers.2.mlp.up_proj.weight": torch.ones(2), "adapter.weight": torch.ones(2)})
    with pytest.raises(PlanError, match=r"adapter\.weight, model\.layers\.2\.mlp\.up_proj\.weight"):
        bound(tmp_path)


def test_bias_where_the_architecture_has_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "mistral")
    rewrite(tmp_path, {"model.layers.0.mlp.up_proj.bias": torch.ones(512)})
    with pytest.raises(PlanError, match=r"tensors that mistral does not have.*up_proj\.bias"):
        bound(tmp_path)


def test_rotary_buffers_are_harmless(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    before = bound(tmp_path)
    rewrite(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})
    assert bound(tmp_path).tensors.keys() == before.tensors.keys()


def test_head_in_a_tied_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", tied=True)
    embed = open_checkpoint(str(tmp_path)).tensors["model.embed_tokens.weight"].load()
    rewrite(tmp_path, {"lm_head.weight": embed.clone()})
    model = bound(tmp_path)
    assert model.is_tied
    assert TensorId(Role.HEAD) not in model.tensors
    for head in (embed + 1, embed.float(), embed[:-1]):
        rewrite(tmp_path, {"lm_head.weight": head.contiguous()})
        with pytest.raises(PlanError, match="differs from the embedding"):
            bound(tmp_path)


def test_untied_without_a_head(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", tied=True)
    rewrite(tmp_path, {}, {"tie_word_embeddings": False})
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        bound(tmp_path)


def test_made_models_are_seeded_and_finite(tmp_path: Path) -> None:
    a, b = (open_checkpoint(str(make_checkpoint(tmp_path / str(i), "qwen2", shards=i))) for i in (1, 2))
    c = open_checkpoint(str(make_checkpoint(tmp_path / "c", "qwen2", seed=1)))
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(a.tensors[name].load(), b.tensors[name].load())
    assert not torch.equal(a.tensors[name].load(), c.tensors[name].load())
    assert {d.dtype for d in a.tensors.values()} == {torch.bfloat16}


def test_made_models_are_well_conditioned(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    for model_type in TYPES:
        make_checkpoint(tmp_path / model_type, model_type, tied=False, dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / model_type)
        with torch.no_grad():
            logits = model(tokens).logits
        assert 1 < logits.std() < 4


def test_tokenizer_is_copied(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "data" / "tiny-llama-5m"
    make_checkpoint(tmp_path / "m", "llama", vocab=8192, tokenizer=source)
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_shards_that_cannot_be_filled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fill"):
        make_checkpoint(tmp_path, "llama", layers=1, shards=99)
