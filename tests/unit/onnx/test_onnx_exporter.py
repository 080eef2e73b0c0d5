from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx_models import write
from random_models import DIMS, as_stored, make_desc, quantized, small_source

from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import ExportError
from d2qconv.exporters.base import Carrier, silent
from d2qconv.grids.affine import AffineGrid
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv_onnx import OnnxOptions, types
from d2qconv_onnx.data import ALIGNMENT, DATA
from d2qconv_onnx.exporter import OnnxExporter
from d2qconv_onnx.runtime import OrtModel
from d2qconv_onnx.verify import verify_folder

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = torch.randint(DIMS.vocab, (2, 24), generator=torch.Generator().manual_seed(3))


def plan(desc=None, carrier=None, **options):
    return OnnxExporter(OnnxOptions(**options)).plan(desc or make_desc("llama"), carrier)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("type_", ["int2", "int3", "int4"])
@pytest.mark.parametrize("block", ["32", "64", "128"])
@pytest.mark.parametrize("carrier", [Carrier.NONE, Carrier.BIAS])
def test_onnx_runtime_computes_what_was_quantized(tmp_path, arch, type_, block, carrier):
    is_tied = block != "64"
    desc = make_desc(arch, is_tied=is_tied)
    _, _, model = write(tmp_path / "p", desc, carrier, type=type_, block_size=block)
    wanted = logits(as_stored(model), TOKENS).numpy()
    found = OrtModel(tmp_path / "p", accuracy_level=1).logits(TOKENS.numpy())
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 1


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("type_", ["int2", "int3", "int4"])
def test_a_written_package_passes_its_own_verification(tmp_path, arch, type_):
    write(tmp_path / "p", make_desc(arch), type=type_)
    checks = verify_folder(tmp_path / "p", silent)
    assert [c for c in checks if not c.is_passed or c.is_skipped] == []


@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
def test_positions_are_the_models(tmp_path, rope):
    desc = make_desc("llama", rope=rope)
    _, _, model = write(tmp_path / "p", desc, type="int4")
    wanted = logits(as_stored(model), TOKENS).numpy()
    found = OrtModel(tmp_path / "p", accuracy_level=1).logits(TOKENS.numpy())
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_types_follow_the_options_and_single_rules_win():
    found = plan(
        make_desc("llama", is_tied=False), type="int3", head="int4", tensor_type=("v=int8", "down@1=int2")
    )
    bits = {str(t.id): t.storage.bits for t in found.tensors if isinstance(t.storage, AffineGrid)}
    assert bits["blk.0.q.weight"] == 3
    assert bits["blk.1.v.weight"] == 8
    assert (bits["blk.0.down.weight"], bits["blk.1.down.weight"]) == (3, 2)
    assert (bits["embed.weight"], bits["head.weight"]) == (8, 4)
    assert any("3-bit" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"type": "int5"}, "'int5' is not a storage type"),
        ({"embedding": "f16"}, "'f16' is not a storage type"),
        ({"block_size": "16"}, "no fast kernel for blocks of 16"),
        ({"block_size": "256"}, "no fast kernel for blocks of 256"),
        ({"tensor_type": ("down=q4_k",)}, "'q4_k' is not a storage type"),
        ({"tensor_type": ("head=int4",)}, "this model's head is its embedding"),
    ],
)
def test_what_the_nodes_cannot_hold_is_refused(options, why):
    refusals = plan(**options).refusals
    assert len(refusals) == 1
    assert why in refusals[0].why


def test_widths_that_blocks_do_not_fit_are_refused_once_a_role_with_the_way_out():
    desc = make_desc("llama", dims=replace(DIMS, ffn=288))
    refusals = plan(desc, block_size="128").refusals
    assert [r.where for r in refusals] == ["down of 2 blocks"]
    assert refusals[0].todo == "use --block-size 32"
    odd = plan(make_desc("llama", dims=replace(DIMS, ffn=200)), block_size="32").refusals
    assert "no block size" in odd[0].todo


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_carries_the_shift_exactly(arch):
    found = plan(make_desc(arch))
    assert found.carrier is Carrier.BIAS
    biases = {t.id.role for t in found.tensors if t.id.part is Part.BIAS}
    own = {Role.Q, Role.K, Role.V} if arch == "qwen2" else set()
    assert biases == {Role.GATE, Role.UP} | own


def test_predicted_bytes_are_written(tmp_path):
    package, planned, _ = write(
        tmp_path / "p", make_desc("qwen3", is_tied=False), type="int2", block_size="32"
    )
    n_arrays = sum(1 if t.storage == "f32" else 3 for t in planned.tensors) + 2
    size = (tmp_path / "p" / DATA).stat().st_size
    assert planned.n_bytes <= size <= planned.n_bytes + n_arrays * ALIGNMENT
    assert package.n_bytes == sum(f.stat().st_size for f in (tmp_path / "p").iterdir()) - (
        (tmp_path / "p" / "d2qconv.json").stat().st_size
    )


def test_a_tied_head_takes_no_bytes_of_its_own(tmp_path):
    write(tmp_path / "p", make_desc("llama"), type="int4")
    graph = onnx.load(tmp_path / "p" / "model.onnx", load_external_data=False).graph
    places = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    for part in ("codes", "scales", "zeros"):
        assert places[f"head.weight.{part}"] == places[f"embed.weight.{part}"]
    assert all(int(place["offset"]) % ALIGNMENT == 0 for place in places.values())


def test_bytes_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, make_desc("llama"), type="int2")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_genai_config_has_the_models_numbers(tmp_path):
    write(tmp_path / "p", make_desc("qwen3"), type="int4")
    config = json.loads((tmp_path / "p" / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert config["model"]["type"] == "qwen3"
    assert config["model"]["context_length"] == 256
    assert config["model"]["eos_token_id"] == 0
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (
        4,
        2,
        64,
    )
    assert config["search"]["max_length"] == 256


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    source = Checkpoint(tmp_path, "x", "", {}, {}, "")
    refusals = OnnxExporter(OnnxOptions()).check_source(source).refusals
    assert [r.where for r in refusals] == ["tokenizer.json", "tokenizer_config.json"]


def test_special_tokens_that_genai_would_not_load_are_refused(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    source = Checkpoint(tmp_path, "x", "", {"vocab_size": 512}, {}, "")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 511], "pad_token_id": None})
    )
    assert OnnxExporter(OnnxOptions()).check_source(source).refusals == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 512]}))
    (refusal,) = OnnxExporter(OnnxOptions()).check_source(source).refusals
    assert "512 of 512" in refusal.why


def test_minimum_versions_follow_the_bits(tmp_path):
    assert plan(type="int2").loads_in[0] == "onnxruntime 1.28 or newer"
    assert plan(type="int4").loads_in[0] == "onnxruntime 1.23 or newer"
    assert "50 to 100 times slower" in " ".join(plan(exact=True).warnings)


def test_a_runtime_that_is_too_old_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr("d2qconv_onnx.runtime.installed", lambda _: "1.22.1")
    assert any("onnxruntime 1.22.1 is older than 1.28" in w for w in plan(type="int2").warnings)
    assert any("onnxruntime 1.22.1 is older than 1.23" in w for w in plan(type="int4").warnings)
    monkeypatch.setattr("d2qconv_onnx.runtime.installed", lambda _: "1.32.0")
    assert plan(type="int2").warnings == ()


def test_codes_of_another_grid_are_not_written(tmp_path):
    desc = make_desc("llama")
    exporter = OnnxExporter(OnnxOptions(type="int2"))
    planned = exporter.plan(desc, Carrier.NONE)
    other = quantized(desc, OnnxExporter(OnnxOptions(type="int4")).plan(desc, Carrier.NONE))
    with pytest.raises(ExportError, match="was planned as affine2"):
        exporter.write(other, small_source(), planned, tmp_path, silent)


def test_a_model_that_is_not_the_planned_one_is_not_written(tmp_path):
    desc = make_desc("llama")
    exporter = OnnxExporter(OnnxOptions())
    planned = exporter.plan(desc, Carrier.NONE)
    model = quantized(desc, planned)
    less = {k: v for k, v in model.tensors.items() if k != TensorId(Role.UP, 1)}
    with pytest.raises(ExportError, match=r"missing \['blk\.1\.up\.weight'\]"):
        exporter.write(replace(model, tensors=less), small_source(), planned, tmp_path, silent)


def test_every_type_has_a_container():
    for name in types.BITS:
        assert types.container(types.grid(name, 32)) >= types.BITS[name]
