from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from gguf_models import DIMS, FAST, LLAMA_5M, as_stored, make_desc, quantized, small_source, write

from d2qconv.arch.registry import BUILT_IN
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import ExportError
from d2qconv.exporters.base import Carrier, FloatType, silent
from d2qconv.names import Part, Role, TensorId
from d2qconv_gguf import INFO, GgufOptions
from d2qconv_gguf.container import read
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.reader import read_model


def plan(arch, carrier=None, *, desc=None, **options):
    return GgufExporter(GgufOptions(**options)).plan(desc or make_desc(arch), carrier)


def test_info_loads_the_exporter():
    assert isinstance(INFO.load(GgufOptions()), GgufExporter)
    assert set(INFO.architectures) == set(BUILT_IN)


@pytest.mark.parametrize(
    ("arch", "carrier", "layout"),
    [
        ("llama", Carrier.BIAS, "llama"),
        ("mistral", Carrier.BIAS, "llama"),
        ("qwen2", Carrier.BIAS, "llama"),
        ("qwen3", Carrier.RANK1, "qwen3"),
    ],
)
def test_best_carrier(arch, carrier, layout):
    made = plan(arch)
    assert (made.carrier, made.layout, made.refusals) == (carrier, layout, ())
    biases = [t for t in made.tensors if t.stored_as.endswith(("ffn_gate.bias", "ffn_up.bias"))]
    assert len(biases) == (2 * DIMS.n_layers if carrier is Carrier.BIAS else 0)
    assert all(t.storage is FloatType.F32 and t.shape == (DIMS.ffn,) for t in biases)


def test_relabelling_is_said():
    assert "transformers" in plan("qwen2").carrier_note
    assert plan("qwen2").warnings
    own = plan("qwen2", Carrier.RANK1)
    assert (own.layout, own.warnings) == ("qwen2", ())


def test_a_carrier_that_cannot_be_is_refused_with_a_reason():
    made = plan("qwen3", Carrier.BIAS)
    assert [r.where for r in made.refusals] == ["carrier bias"]
    assert "no FFN bias" in made.refusals[0].why
    assert "rank1" in made.refusals[0].todo


def test_biases_that_the_checkpoint_has_are_not_planned_twice():
    made = plan("llama", desc=make_desc("llama", biases=(Role.GATE, Role.UP, Role.DOWN)))
    assert len({t.id for t in made.tensors}) == len(made.tensors)
    assert sum(t.id.part is Part.BIAS for t in made.tensors) == 3 * DIMS.n_layers


def test_storage_follows_the_options():
    made = plan("llama", desc=make_desc("llama", is_tied=False), type="q4_k", embedding="bf16", head="q3_k")
    assert made.by_id[TensorId(Role.EMBED)].type_name == "bf16"
    assert made.by_id[TensorId(Role.HEAD)].type_name == "q3_k"
    assert made.by_id[TensorId(Role.DOWN, 1)].type_name == "q4_k"
    assert made.by_id[TensorId(Role.FFN_NORM, 1)].type_name == "f32"


@pytest.mark.parametrize("option", ["type", "embedding", "head"])
def test_an_unknown_type_is_refused(option):
    refusals = plan("llama", desc=make_desc("llama", is_tied=False), **{option: "q9_z"}).refusals
    assert [r.where for r in refusals] == [f"option {option}"]
    assert "q2_k" in refusals[0].todo


def test_a_width_that_does_not_fit_is_refused_and_what_fits_is_named():
    dims = replace(DIMS, hidden=224, n_heads=7, n_kv_heads=1, head=32)
    refusals = plan("llama", desc=make_desc("llama", dims=dims), type="q2_k", embedding="q8_0").refusals
    assert [r.where for r in refusals] == [
        f"{role} of 2 blocks" for role in ("q", "k", "v", "o", "gate", "up")
    ]
    assert all("q4_0" in r.todo and "q3_k" not in r.todo for r in refusals)
    assert plan("llama", desc=make_desc("llama", dims=dims), type="q4_0").refusals == ()


def test_the_2_bit_type_of_odd_widths(tmp_path):
    """320 columns are 5 blocks of 64. gguf-py cannot read the file; ours says what gguf-py would."""
    dims = replace(DIMS, hidden=320, ffn=448, n_heads=5, n_kv_heads=1)
    desc = make_desc("llama", dims=dims)
    options = GgufOptions(type="q2_0", embedding="q8_0")
    package, made, model = write(tmp_path / "x.gguf", desc, options)
    (warning,) = made.warnings
    assert "b9916" in warning
    assert "x86" in warning
    file = read(package.path)
    assert file.need("general.file_type", int) == 41
    assert file.n_spare < 32
    assert {t.stored_as: t.n_bytes for t in made.tensors} == {n: t.n_bytes for n, t in file.tensors.items()}
    assert file.tensors["blk.1.ffn_down.weight"].type.name == "Q2_0"
    assert file.tensors["blk.1.ffn_down.weight"].n_bytes == 320 * 448 * 9 // 32
    seen, wanted = read_model(package.path), as_stored(model)
    for tensor, dense in wanted.tensors.items():
        assert torch.equal(seen.tensors[tensor].load(), dense.load().float()), tensor
    facts = GgufExporter(GgufOptions()).inspect(package.path)
    assert facts["bits_per_weight_in_blocks"] == pytest.approx(2.25, abs=0.01)


def test_a_type_with_few_kernels_is_warned_about():
    (warning,) = plan("llama", type="tq2_0").warnings
    assert "CUDA" in warning
    assert plan("llama", type="iq4_xs").warnings == ()


def test_a_bias_that_no_layout_takes_is_refused():
    refusals = plan("qwen3", desc=make_desc("qwen3", biases=(Role.O,))).refusals
    assert len(refusals) == DIMS.n_layers


def test_an_unknown_architecture_is_refused():
    desc = make_desc("llama")
    made = plan("", desc=replace(desc, arch=replace(desc.arch, id="gpt9")))
    assert "gpt9" in made.refusals[0].why
    assert made.tensors == ()


def test_rope_that_no_key_says_is_refused():
    assert any("yarn" in r.where for r in plan("llama", desc=_yarn_with_other_beta()).refusals)


def _yarn_with_other_beta():
    desc = make_desc("llama", rope="yarn")
    return replace(desc, rope=replace(desc.rope, beta_fast=16.0))


@pytest.mark.parametrize("kind", ["q2_k", "q4_0", "f16"])
def test_planned_bytes_are_the_files(tmp_path, kind):
    desc = make_desc("llama", is_tied=False)
    package, made, _ = write(tmp_path / "x.gguf", desc, GgufOptions(type=kind, embedding="bf16", head="f32"))
    reader = gguf.GGUFReader(package.path)
    assert {t.stored_as: t.n_bytes for t in made.tensors} == {t.name: int(t.n_bytes) for t in reader.tensors}
    assert [t.stored_as for t in made.tensors] == [t.name for t in reader.tensors]
    assert package.n_bytes == package.path.stat().st_size


def test_inspect_says_what_is_inside(tmp_path):
    package, made, model = write(tmp_path / "x.gguf", make_desc("qwen2"), GgufOptions(embedding="f16"))
    facts = GgufExporter(GgufOptions()).inspect(package.path)
    assert facts["layout"] == "llama"
    assert facts["bytes"]["q2_k"] == sum(t.n_bytes for t in made.tensors if t.type_name == "q2_k")
    assert facts["ffn_biases"] == 2 * DIMS.n_layers
    assert facts["context_length"] == 256
    assert facts["bits_per_weight_in_blocks"] == 2.625
    assert facts["bits_per_weight"] > 4
    assert facts["provenance"]["d2qconv.fingerprint"] == model.provenance.fingerprint
    assert facts["provenance"]["d2qconv.carrier.mean_shift"]


def test_a_model_that_is_not_as_planned_is_not_written(tmp_path):
    desc = make_desc("llama")
    exporter = GgufExporter(FAST)
    made = exporter.plan(desc, Carrier.NONE)
    model = quantized(desc, made)
    source = small_source()
    out = tmp_path / "x.gguf"
    gate = TensorId(Role.GATE, 0)
    less = replace(model, tensors={t: v for t, v in model.tensors.items() if t != gate})
    with pytest.raises(ExportError, match=r"missing \['blk.0.gate.weight'\]"):
        exporter.write(less, source, made, out, silent)
    other = replace(model, tensors={**model.tensors, gate: desc.tensors[gate]})
    with pytest.raises(ExportError, match="planned was q4_0"):
        exporter.write(other, source, made, out, silent)
    refused = exporter.plan(make_desc("qwen3"), Carrier.BIAS)
    with pytest.raises(ExportError, match="refused"):
        exporter.write(model, source, refused, out, silent)
    assert not out.exists()


def test_tokenizer_is_checked_unless_a_base_brings_it(tmp_path):
    source = open_checkpoint(str(LLAMA_5M))
    assert GgufExporter(GgufOptions()).check_source(source).refusals == ()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((LLAMA_5M / name).read_bytes())
    bare = open_checkpoint(str(tmp_path))
    assert GgufExporter(GgufOptions()).check_source(bare).refusals
    assert GgufExporter(GgufOptions(base_gguf=tmp_path / "b.gguf")).check_source(bare).refusals == ()


def test_keys_of_the_file(tmp_path):
    package, _, _ = write(tmp_path / "x.gguf", make_desc("mistral"), FAST)
    file = read(package.path)
    assert file.architecture == "llama"
    assert file.need("general.file_type", int) == int(gguf.LlamaFileType.MOSTLY_Q4_0)
    assert file.keys["d2qconv.tensor_names"] == list(package.decoded_sha256)
    assert len(file.keys["tokenizer.ggml.tokens"]) == DIMS.vocab


def test_file_type_is_the_mixs_or_the_majoritys(tmp_path):
    def file_type(**options):
        package, _, _ = write(
            tmp_path / "x.gguf", make_desc("llama"), GgufOptions(embedding="f16", **options)
        )
        return read(package.path).need("general.file_type", int)

    kinds = gguf.LlamaFileType
    assert file_type(mix="q3_k_s") == int(kinds.MOSTLY_Q3_K_S)
    # down and up are two of seven matrices, and each as large as any other but k and v
    most = ("down=q8_0", "up=q8_0", "gate=q8_0", "q=q8_0")
    assert file_type(type="q4_0", tensor_type=most) == int(kinds.MOSTLY_Q8_0)
    assert file_type(type="q4_0", tensor_type=most[:1]) == int(kinds.MOSTLY_Q4_0)
