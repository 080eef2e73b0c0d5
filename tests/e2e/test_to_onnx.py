"""From a checkpoint to a folder that ONNX Runtime and ONNX Runtime GenAI load, by one command."""

import json
from pathlib import Path

import pytest
import torch

import d2qconv
from d2qconv.cli import main
from d2qconv.names import Part, Role, TensorId
from d2qconv.report.deep import deep_checks
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.reader import read_model as read_gguf
from d2qconv_onnx import INFO, types
from d2qconv_onnx.container import open_model
from d2qconv_onnx.reader import desc_of, read_model

LLAMA = Path(__file__).parent.parent / "data" / "tiny-llama-5m"
QWEN3 = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
QUICK = ("--sequences", "8", "--length", "48", "--device", "cpu", "--json")


def to_onnx(capsys, model, out, *options):
    """Run the command in this process; returns (exit code, the JSON object that it printed)."""
    given = QUICK[QUICK.index("--device") :] if "--sequences" in options else QUICK
    code = main(["to-onnx", str(model), "-o", str(out), *given, *options])
    printed = capsys.readouterr().out
    return code, json.loads(printed)


@pytest.mark.parametrize("model", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_the_default_command_gives_a_verified_2_bit_folder(capsys, tmp_path, model):
    out = tmp_path / "m-onnx"
    code, report = to_onnx(capsys, model, out, "--sequences", "32", "--length", "64")
    assert code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "m-onnx",
        "m-onnx.report.html",
        "m-onnx.report.json",
    ]
    exporter = INFO.load(INFO.options())
    deep = deep_checks(out, tmp_path / "m-onnx.report.json", exporter, str(model))
    assert [c.name for c in deep if not c.is_passed or c.is_skipped] == []
    (out / "more").touch()
    assert [
        c.name for c in deep_checks(out, tmp_path / "m-onnx.report.json", exporter) if not c.is_passed
    ] == ["files"]
    (out / "more").unlink()
    manifest = json.loads((out / "d2qconv.json").read_text())
    assert report["n_bytes"] == sum(record["n_bytes"] for record in manifest["files"].values())
    assert {f.name for f in out.iterdir()} == {*manifest["files"], "d2qconv.json"}
    checks = {check["name"]: check for check in report["checks"]}
    assert all(check["is_passed"] and not check["is_skipped"] for check in checks.values())
    # The source knows English; a wrong fold would make its text as unlikely as any.
    assert report["perplexity"] < 6 * report["perplexity_source"]
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert manifest["requires"]["onnxruntime"] == types.RUNTIME[2]
    assert main(["verify", str(out), "--quiet"]) == 0
    assert main(["inspect", str(out), "--json"]) == 0


# Every architecture with every fold, every type with every fold; all combinations without folds are unit tests.
@pytest.mark.parametrize(
    ("model_type", "bits"), [("llama", "int2"), ("qwen2", "int3"), ("qwen3", "int4"), ("mistral", "int2")]
)
@pytest.mark.parametrize("folds", [("--dsq",), ("--dsq", "--dac"), ("--dac", "--carrier", "biases")])
def test_folds_are_in_the_codes_and_biases(capsys, tmp_path, model_type, bits, folds):
    model = make_checkpoint(tmp_path / "model", model_type, vocab=8192, tokenizer=LLAMA, layers=1, ffn=256)
    code, report = to_onnx(capsys, model, tmp_path / "p", "--type", bits, "--block-size", "32", *folds)
    assert code == 0
    assert all(check["is_passed"] and not check["is_skipped"] for check in report["checks"])


def test_a_changed_byte_is_found(capsys, tmp_path):
    out = tmp_path / "m-onnx"
    assert to_onnx(capsys, LLAMA, out, "--type", "int4", "--rounding", "nearest")[0] == 0
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[-100] ^= 1
    (out / "model.onnx.data").write_bytes(data)
    assert main(["verify", str(out), "--quiet"]) == 6


def test_what_does_not_fit_is_refused_before_any_work(capsys, tmp_path):
    model = make_checkpoint(tmp_path / "model", "llama", ffn=288, tokenizer=LLAMA, vocab=8192, layers=1)
    assert main(["to-onnx", str(model), "-o", str(tmp_path / "p"), "--block-size", "128"]) == 3
    assert "use --block-size 32" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_folder_of_somebody_else_is_not_replaced(capsys, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert main(["to-onnx", str(LLAMA), "-o", str(out), "--overwrite", *QUICK]) == 2
    assert (out / "letter.txt").read_text() == "dear"


def test_one_quantization_gives_two_packages_of_equal_values(capsys, tmp_path):
    gguf, onnx = tmp_path / "m.gguf", tmp_path / "m-onnx"
    options = ["--type", "q4_0", "--tensor-type", "down=q8_0", "--dsq", "--dac", "--also", f"onnx={onnx}"]
    sizes = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32}
    model = make_checkpoint(tmp_path / "model", "llama", vocab=8192, tokenizer=LLAMA, layers=2, **sizes)
    code = main(["to-gguf", str(model), "-o", str(gguf), *QUICK, *options])
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    (also,) = report["also"]
    assert also["path"] == str(onnx)
    assert all(check["is_passed"] and not check["is_skipped"] for check in also["checks"])
    ours, theirs = desc_of(read_model(open_model(onnx))), read_gguf(gguf)
    assert set(ours.tensors) == set(theirs.tensors)
    assert TensorId(Role.UP, 0, Part.BIAS) in ours.tensors
    for tensor, dense in theirs.tensors.items():
        assert torch.equal(ours.tensors[tensor].load(), dense.load()), tensor


def test_what_the_other_format_cannot_hold_is_refused_before_any_work(capsys, tmp_path):
    where = ["-o", str(tmp_path / "m.gguf"), "--also", f"onnx={tmp_path / 'p'}"]
    assert main(["to-gguf", str(LLAMA), *where]) == 3
    assert "no node of ONNX Runtime holds the values of q2_k exactly" in capsys.readouterr().err
    assert main(["to-gguf", str(LLAMA), *where, "--bpw", "4"]) == 3
    assert "follow from a measurement" in capsys.readouterr().err
    assert main(["to-onnx", str(LLAMA), "-o", str(tmp_path / "o"), "--also", f"gguf={tmp_path / 'g'}"]) == 3
    assert "no type of llama.cpp holds the values of affine" in capsys.readouterr().err
    assert main(["to-gguf", str(LLAMA), "-o", str(tmp_path / "m.gguf"), "--also", "onnx"]) == 2
    assert "not FORMAT=PATH" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
