"""Quantized checkpoints of other tools through the whole command: the same values in every format, or a refusal."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from foreign_models import Scheme, make_foreign
from random_models import LLAMA_5M
from safetensors.torch import load_file, save_file

import d2qconv
from d2qconv.arch.bind import checkpoint_names
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.cli import main
from d2qconv.errors import PlanError
from d2qconv.foreign.read import read_foreign
from d2qconv_gguf.reader import read_model as read_gguf
from d2qconv_hf import HfOptions
from d2qconv_hf.container import open_folder
from d2qconv_hf.reader import read_model as read_folder
from d2qconv_onnx.container import open_model
from d2qconv_onnx.reader import desc_of
from d2qconv_onnx.reader import read_model as read_onnx

V2 = {"version": 2, "config": {"checkpoint_format": "gptq_v2"}}
#: method, scheme, how it is written → the GGUF type that holds it, folders that do too
CASES = {
    "gptq-sym": ("gptq", Scheme(4, 32), {}, "q4_0", ("onnx", "gptq")),
    "gptq-few-bits": ("gptq", Scheme(4, 64, False, step_bits=7), V2, "q4_1", ("mlx",)),
    "awq": ("awq", Scheme(4, 32, False), {}, "q5_0", ()),
    "auto-round-2": ("auto-round", Scheme(2, 64), {}, "q2_0", ()),
    "ct-3": ("compressed-tensors", Scheme(3, 32, False), {}, "q4_0", ()),
    "ct-8": ("compressed-tensors", Scheme(8, 32), {}, "q8_0", ()),
}
VOCAB = json.loads((LLAMA_5M / "config.json").read_text())["vocab_size"]


def foreign(folder, method, scheme, rows=64, **more):
    """rows: the model's width; 96 has no group of 64."""
    sizes = {"vocab": VOCAB, "hidden": rows, "ffn": 2 * rows}
    made = make_foreign(folder, method, scheme, model=sizes, **more)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA_5M / name, folder / name)
    return made


def run(capsys, *words):
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def read(name, path, arch="llama"):
    """Every tensor of a package, by its own reader."""
    if name == "gguf":
        return read_gguf(path).tensors
    desc = (
        desc_of(read_onnx(open_model(path))) if name == "onnx" else read_folder(open_folder(path), arch).desc
    )
    return desc.tensors


def values_of(wanted):
    """By block and role, as packages call them: `blk.0.q.weight`."""
    return {
        f"blk.{name.split('.')[2]}.{name.split('.')[-2].removesuffix('_proj')}.weight": torch.from_numpy(
            values
        )
        for name, values in wanted.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_an_import_keeps_every_value(tmp_path, capsys, case):
    method, scheme, more, kind, others = CASES[case]
    folder, wanted = foreign(tmp_path / "m", method, scheme, **more)
    also = [f"--also={name}={tmp_path / name}" for name in others]
    code, report = run(capsys, "to-gguf", folder, "-o", tmp_path / "m.gguf", *also)
    assert code == 0, report
    assert report["n_exact"] == 7
    assert {r["format"] for r in report["rounded"]} == {"onnx"} & set(others)
    assert all(r["error"] < 1e-4 for r in report["rounded"])
    checks = [*report["checks"], *(check for other in report["also"] for check in other["checks"])]
    assert all(check["is_passed"] for check in checks)
    _, plan = run(capsys, "to-gguf", folder, "-o", tmp_path / "n.gguf", "--dry-run")
    assert {t["type"] for t in plan["tensors"]} == {kind, "f16", "f32"}
    for name, path in (("gguf", tmp_path / "m.gguf"), *((name, tmp_path / name) for name in others)):
        found = {str(t): dense for t, dense in read(name, path).items()}
        for tensor, values in values_of(wanted).items():
            assert torch.equal(found[tensor].load(), values), (name, tensor)


def test_what_no_type_holds_is_refused_with_its_cost_and_requantized_on_request(tmp_path, capsys):
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32, order=True))
    options = ("--sequences", 2, "--length", 16)
    code, report = run(capsys, "to-onnx", folder, "-o", tmp_path / "o")
    assert code == 3
    message = report["error"]["message"]
    assert "act-order" in message
    assert "6 more" in message
    assert "changes its weights by" in message
    assert not (tmp_path / "o").exists()
    code, report = run(
        capsys, "to-onnx", folder, "-o", tmp_path / "o", "--requantize", "--type", "int8", *options
    )
    assert code == 0, report
    assert 0 < report["kld"] < 1e-3
    code, report = run(capsys, "verify", tmp_path / "o", "--deep", "--source", folder)
    assert code == 0, report
    assert report["checks"][-1]["name"] == "source"
    assert not report["checks"][-1]["is_skipped"]


#: exporter → options that cannot act on what is quantized already, in words and as refusals name them
IDLE = {
    "gguf": (
        [
            "--type",
            "q4_k",
            "--pad",
            "auto",
            "--candidates",
            "q2_k",
            "--imatrix",
            "i.gguf",
            "--tensor-type",
            "v=q4_0",
        ],
        ("type", "pad", "candidates", "imatrix", "tensor-type v=q4_0"),
    ),
    "onnx": (
        ["--type", "int4", "--block-size", 32, "--tensor-type", "v=int4"],
        ("type", "block-size", "tensor-type v=int4"),
    ),
    "gptq": (
        ["--type", "int4", "--group-size", 32, "--zero", "none", "--tensor-type", "v=int4"],
        ("type", "group-size", "zero", "tensor-type"),
    ),
}


@pytest.mark.parametrize("name", IDLE)
def test_options_that_cannot_act_on_an_import_are_refused(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    words, refused = IDLE[name]
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    code, report = run(capsys, f"to-{name}", folder, "-o", tmp_path / "o", *words)
    assert code == 3
    message = report["error"]["message"]
    for option in refused:
        assert f"option {option}: the codes are there already" in message, option
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_a_rule_about_a_matrix_of_floats_acts(tmp_path, capsys):
    """v stays as it was in the checkpoint, so its type is for the options to say."""
    name = "model.layers.0.self_attn.v_proj.weight"
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32), keep=(name,))
    for target, rule, kind in (("gguf", "v=q8_0", "q8_0"), ("onnx", "v=int4", "affine4_g64_int_f32")):
        code, plan = run(
            capsys, f"to-{target}", folder, "-o", tmp_path / target, "--tensor-type", rule, "--dry-run"
        )
        assert code == 0, plan
        assert {t["type"] for t in plan["tensors"] if t["id"] == "blk.0.v.weight"} == {kind}


#: Each is of a quantization, and says another thing than the default.
QUANTIZING = {
    "rotation": "walsh", "carrier": "bias", "refine": "100", "sequences": "5", "calibration": "t.txt", "seed": "3",
    "damping": "0.5", "work-dir": "w", "device": "cpu", "max-gpu-mem": "1GiB", "max-host-mem": "1GiB",
}  # fmt: skip


def test_options_of_a_quantization_are_refused_by_name(tmp_path, capsys):
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    words = [word for option, value in QUANTIZING.items() for word in (f"--{option}", value)]
    code, report = run(capsys, "to-gptq", folder, "-o", tmp_path / "o", *words, "--dac", "--no-refit")
    assert code == 2
    for option in (*QUANTIZING, "dac", "no-refit"):
        assert f"--{option}" in report["error"]["message"], option
    assert "add --requantize, or leave it out" in report["error"]["message"]
    assert not (tmp_path / "o").exists()
    code, report = run(capsys, "to-gptq", folder, "-o", tmp_path / "o", "--sequences", "128", "--dry-run")
    assert code == 0, report
    code, report = run(capsys, "to-gguf", LLAMA_5M, "-o", tmp_path / "m.gguf", "--requantize", "--dry-run")
    assert code == 2
    assert "is not quantized" in report["error"]["message"]


def test_the_library_refuses_them_too_and_takes_defaults(tmp_path):
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    with pytest.raises(PlanError, match="option group-size: the codes are there already"):
        d2qconv.export(folder, tmp_path / "o", to="gptq", options=HfOptions(group_size="32"))
    done = d2qconv.export(folder, tmp_path / "o", to="gptq", options=HfOptions(max_shard_size="60kB"))
    assert done.n_exact == 7
    assert len(list((tmp_path / "o").glob("*.safetensors"))) > 1


def test_a_package_of_ours_becomes_another(tmp_path, capsys):
    options = ("--type", "int4", "--zero", "integer", "--group-size", 32, "--sequences", 2, "--length", 16)
    code, _ = run(capsys, "to-safetensors", LLAMA_5M, "-o", tmp_path / "s", *options)
    assert code == 0
    code, report = run(capsys, "to-mlx", tmp_path / "s", "-o", tmp_path / "x")
    assert code == 0, report
    before, after = read("safetensors", tmp_path / "s"), read("mlx", tmp_path / "x")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[t].load().numpy(), after[t].load().numpy()) for t in before)


def test_people_are_told_what_is_exact(tmp_path, capsys):
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    assert main(["to-onnx", str(folder), "-o", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    for text in (
        "quantized already: gptq, checkpoint_format gptq",
        "7 of 8 matrices keep the values of their codes",
        "embed.weight to affine8_g64_int_f32, for onnx",
        "7 matrices exact, 1 rounded",
    ):
        assert text in out


def floats_of(folder):
    """The tensors that are no part of a quantized linear, by name."""
    parts = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape")
    tensors = load_file(folder / "model.safetensors")
    return {n: t for n, t in tensors.items() if n.rsplit(".", 1)[-1] not in parts}


def names_of(folder):
    """The checkpoint's name of every tensor."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    return checkpoint_names(config)


def as_dtype(folder, dtype):
    """Random floats of a type, so that no other holds them all."""
    tensors = load_file(folder / "model.safetensors")
    for name in floats_of(folder):
        tensors[name] = (torch.randn(tensors[name].shape) * 1e-3).to(dtype)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["gptq", "safetensors", "auto-round", "mlx", "gguf", "onnx"])
def test_an_import_keeps_every_float_or_says_what_it_rounds(tmp_path, capsys, dtype, target):
    """Embedding, norms and biases, of whatever type the checkpoint has them."""
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32), arch="qwen2")
    as_dtype(folder, dtype)
    code, report = run(capsys, f"to-{target}", folder, "-o", tmp_path / "o")
    assert code == 0, report
    # ONNX knows no embedding of floats.
    assert [r["tensor"] for r in report["rounded"]] == (["embed.weight"] if target == "onnx" else [])
    found = {str(t): dense.load() for t, dense in read(target, tmp_path / "o", "qwen2").items()}
    names = names_of(folder)
    wanted = floats_of(folder)
    kept = [t for t, name in names.items() if name in wanted]
    assert len(kept) == 7  # embedding, three norms, three biases
    for tensor in kept:
        is_equal = torch.equal(found[str(tensor)], wanted[names[tensor]].float())
        assert is_equal != (target == "onnx" and str(tensor) == "embed.weight"), tensor


def test_a_type_that_is_asked_for_is_counted_as_rounding(tmp_path, capsys):
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32, step_bits=8), arch="qwen2")
    as_dtype(folder, torch.float32)
    words = ("to-gptq", folder, "-o", tmp_path / "o", "--dtype", "bfloat16")
    _, plan = run(capsys, *words, "--dry-run")
    assert len(plan["rounded"]) == 7
    code, report = run(capsys, *words)
    assert code == 0, report
    assert len(report["rounded"]) == 7
    wanted = floats_of(folder)["model.embed_tokens.weight"]
    error = ((wanted.bfloat16().float() - wanted).square().sum() / wanted.square().sum()).item()
    found = {r["tensor"]: r for r in report["rounded"]}["embed.weight"]
    assert found["type"] == "bf16"
    assert found["error"] == pytest.approx(error, rel=1e-4)
    shutil.rmtree(tmp_path / "o")
    assert main([*map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "7 matrices exact, 7 rounded" in out
    code, report = run(capsys, "to-gguf", folder, "-o", tmp_path / "m.gguf", "--embedding", "f16")
    assert code == 0, report
    assert [(r["tensor"], r["type"]) for r in report["rounded"]] == [("embed.weight", "f16")]


def test_floats_that_a_narrower_type_holds_are_not_rounded(tmp_path, capsys):
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    tensors = load_file(folder / "model.safetensors")
    for name in floats_of(folder):
        tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors")
    code, report = run(capsys, "to-gptq", folder, "-o", tmp_path / "o", "--dtype", "float16")
    assert code == 0, report
    assert report["rounded"] == []


def test_what_the_runtime_computes_in_holds_every_step(tmp_path, capsys):
    """Scales become the type that config.json names when they are loaded."""
    for number, (bits, dtype, wanted) in enumerate(
        [(11, torch.bfloat16, "float16"), (8, torch.bfloat16, "bfloat16"), (8, torch.float16, "float16")]
    ):
        folder, _ = foreign(tmp_path / f"m{number}", "gptq", Scheme(4, 32, step_bits=bits))
        as_dtype(folder, dtype)
        code, report = run(capsys, "to-safetensors", folder, "-o", tmp_path / f"o{number}")
        assert code == 0, report
        assert json.loads((tmp_path / f"o{number}" / "config.json").read_text())["dtype"] == wanted
        _, plan = run(capsys, "to-safetensors", folder, "-o", tmp_path / "p", "--dry-run")
        is_cast = any("it rounds them when it loads" in w for w in plan["warnings"])
        assert is_cast == (wanted == "float16" and dtype is torch.bfloat16)
    code, report = run(capsys, "to-safetensors", tmp_path / "m0", "-o", tmp_path / "q", "--dtype", "bfloat16")
    assert code == 3
    assert (
        "turn scales into bfloat16, which does not hold those of blk.0.q.weight" in report["error"]["message"]
    )


def test_steps_of_bfloat16_are_kept_as_they_are(tmp_path, capsys):
    """As llm-compressor leaves them for models of bfloat16; some are too small for float16."""
    folder, _ = foreign(tmp_path / "m", "compressed-tensors", Scheme(4, 32))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = (tensors[name].float() * 2.0**-20).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    as_dtype(folder, torch.bfloat16)
    before = read_foreign(open_checkpoint(str(folder))).checkpoint.tensors
    for target in ("safetensors", "auto-round", "mlx"):
        code, report = run(capsys, f"to-{target}", folder, "-o", tmp_path / target)
        assert code == 0, report
        assert json.loads((tmp_path / target / "config.json").read_text())["dtype"] == "bfloat16"
        after = read(target, tmp_path / target)
        for tensor, name in names_of(folder).items():
            assert torch.equal(after[tensor].load(), before[name].load().float()), (target, name)


def test_one_group_a_row_becomes_one_group_a_row(tmp_path, capsys):
    folder, wanted = foreign(tmp_path / "m", "gptq", Scheme(4, -1), rows=96)
    for target in ("safetensors", "auto-round", "mlx"):
        code, report = run(capsys, f"to-{target}", folder, "-o", tmp_path / target)
        assert code == 0, report
        found = {str(t): dense for t, dense in read(target, tmp_path / target).items()}
        for tensor, values in values_of(wanted).items():
            assert torch.equal(found[tensor].load(), values), (target, tensor)


def test_steps_whose_offsets_are_too_large_are_refused_before_anything_is_written(tmp_path, capsys):
    folder, _ = foreign(tmp_path / "m", "gptq", Scheme(4, 32))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("scales"):
            tensors[name] = torch.full_like(tensors[name], 60000.0)
    save_file(tensors, folder / "model.safetensors")
    code, report = run(capsys, "to-mlx", folder, "-o", tmp_path / "o", "--dry-run")
    assert code == 3
    assert "stores -zero · step, which f16 does not hold" in report["error"]["message"]
