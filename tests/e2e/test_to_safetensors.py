"""From a checkpoint to Hugging Face folders by one command, and to all other formats beside them."""

import json
from pathlib import Path

import pytest
import torch

import d2qconv
from d2qconv.cli import main
from d2qconv.names import Part, Role, TensorId
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.reader import read_model as read_gguf
from d2qconv_hf.container import open_folder
from d2qconv_hf.reader import read_model
from d2qconv_onnx.container import open_model
from d2qconv_onnx.reader import desc_of
from d2qconv_onnx.reader import read_model as read_onnx

LLAMA = Path(__file__).parent.parent / "data" / "tiny-llama-5m"
QWEN3 = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
QUICK = ("--sequences", "8", "--length", "48", "--device", "cpu", "--json")
DIALECTS = ("safetensors", "auto-round", "gptq", "mlx")


def convert(capsys, command, model, out, *options):
    """Run the command in this process; returns (exit code, the JSON object that it printed)."""
    code = main([command, str(model), "-o", str(out), *QUICK, *options])
    return code, json.loads(capsys.readouterr().out)


def values(folder, arch):
    return read_model(open_folder(folder), arch).desc.tensors


@pytest.fixture
def make(tmp_path_factory):
    """Makes a random checkpoint with a real tokenizer."""

    def small(arch):
        folder = tmp_path_factory.mktemp(arch) / "model"
        return make_checkpoint(folder, arch, vocab=8192, tokenizer=LLAMA, layers=1, ffn=256)

    return small


@pytest.mark.parametrize(
    ("arch", "correction"), [("llama", "--dac"), ("qwen2", "--dac"), ("mistral", "--dsq"), ("qwen3", "--dsq")]
)
def test_one_run_writes_all_dialects_with_equal_values(tmp_path, capsys, make, arch, correction):
    also = [f"--also={name}={tmp_path / name}" for name in ("auto-round", "gptq", "mlx")]
    code, report = convert(
        capsys, "to-safetensors", make(arch), tmp_path / "safetensors", "--type", "int3", correction, *also
    )
    assert code == 0
    checks = [*report["checks"], *(check for other in report["also"] for check in other["checks"])]
    assert all(check["is_passed"] for check in checks)
    skipped = {check["name"] for check in checks if check["is_skipped"]}
    assert skipped == {"gptqmodel computes it"}
    first = values(tmp_path / "safetensors", arch)
    assert (TensorId(Role.UP, 0, Part.BIAS) in first) == (correction == "--dac")
    for name in DIALECTS[1:]:
        other = values(tmp_path / name, arch)
        assert first.keys() == other.keys()
        assert all(torch.equal(first[t].load(), other[t].load()) for t in first), name


def test_gguf_onnx_and_every_dialect_hold_the_same_values(tmp_path, capsys, make):
    also = [f"--also={name}={tmp_path / name}" for name in (*DIALECTS, "onnx")]
    code, report = convert(capsys, "to-gguf", make("qwen3"), tmp_path / "m.gguf", "--type", "q4_0", *also)
    assert (code, len(report["also"])) == (0, 5)
    gguf = read_gguf(tmp_path / "m.gguf").tensors
    found = {name: values(tmp_path / name, "qwen3") for name in DIALECTS}
    found["onnx"] = desc_of(read_onnx(open_model(tmp_path / "onnx"))).tensors
    matrices = [t for t, dense in gguf.items() if len(dense.shape) == 2]
    assert len(matrices) == 8
    for name, tensors in found.items():
        assert gguf.keys() == tensors.keys(), name
        assert all(torch.equal(tensors[t].load(), gguf[t].load()) for t in matrices), name


def test_steps_of_other_formats_may_not_fit(tmp_path, capsys):
    where = ["--type", "int2", f"--also=safetensors={tmp_path / 's'}"]
    code, report = convert(capsys, "to-onnx", QWEN3, tmp_path / "o", *where)
    assert code == 3
    assert "holds the values of affine2_g64_int_f32 exactly" in str(report)


def test_a_plan_says_where_it_loads_and_what_a_bias_costs(tmp_path, capsys):
    code, plan = convert(capsys, "to-safetensors", QWEN3, tmp_path / "p", "--dac", "--dry-run")
    assert code == 0, str(plan)[:500]
    assert plan["layout"] == "hy_v3"
    assert any(place.startswith("transformers") for place in plan["loads_in"])
    assert not (tmp_path / "p").exists()
