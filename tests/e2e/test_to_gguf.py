"""The product: one command, from a checkpoint to a file that stock llama.cpp loads."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch
import xllamacpp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import d2qconv
from d2qconv.cli import main
from d2qconv.measure.reference import logits
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.reader import read_model
from d2qconv_gguf.runtime import LlamaCpp

LLAMA = Path(__file__).parent.parent / "data" / "tiny-llama-5m"
QWEN3 = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
QUICK = ("--sequences", "8", "--length", "48", "--device", "cpu", "--json")


def to_gguf(capsys, model, out, *options):
    """Run the command in this process; returns (exit code, the JSON object that it printed)."""
    code = main(["to-gguf", str(model), "-o", str(out), *QUICK, *options])
    printed = capsys.readouterr().out
    return code, json.loads(printed)


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def tensor_types(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def other_llama_cpp(path, prompt):
    """What a second build of llama.cpp, from other hands, holds for the likeliest next token: (id, log p)."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 128
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 1})
    (first,) = answer["choices"][0]["logprobs"]["content"]
    return first["id"], first["logprob"]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Makes a random checkpoint with a real tokenizer."""

    def make(model_type, layers=1, **sizes):
        folder = tmp_path_factory.mktemp(model_type) / "model"
        return make_checkpoint(folder, model_type, vocab=8192, tokenizer=LLAMA, layers=layers, **sizes)

    return make


@pytest.mark.parametrize("model", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_the_default_command_gives_a_verified_2_bit_file(capsys, tmp_path, model):
    out = tmp_path / "m.gguf"
    code, report = to_gguf(capsys, model, out)
    assert code == 0
    assert names(tmp_path) == ["m.gguf", "m.gguf.report.html", "m.gguf.report.json"]
    assert report["n_bytes"] == out.stat().st_size
    assert all(check["is_passed"] for check in report["checks"])
    types = tensor_types(out)
    linears = {
        n: t
        for n, t in types.items()
        if re.search(r"(attn_(q|k|v|output)|ffn_\w+)\.weight", n) and "norm" not in n
    }
    assert set(linears.values()) == {"Q2_K"}
    assert len(linears) == 4 * 7
    assert types["token_embd.weight"] == "Q8_0"
    assert "blk.0.ffn_gate.bias" not in types
    # The source knows English; a wrong permutation or fold would make its text as unlikely as any.
    assert report["perplexity"] < 6 * report["perplexity_source"]
    with LlamaCpp(out) as runtime:
        tokens = runtime.tokenize("The little dog ran over the hill")
        theirs = torch.from_numpy(runtime.logits(tokens))
    ours = logits(read_model(out), torch.tensor([tokens]))[0]
    assert float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().mean()) < 0.2
    token, log_p = other_llama_cpp(out, "The little dog ran over the hill")
    likely = ours[-1].log_softmax(-1)
    assert log_p == pytest.approx(float(likely[token]), abs=0.3)
    assert float(likely[token]) > float(likely.max()) - 0.3
    assert main(["verify", str(out), "--quiet"]) == 0


def test_every_type_in_one_file_runs_in_both_llama_cpps(capsys, tmp_path):
    """All but Q2_0, which the older of the two does not know; each in the same place of a trained model."""
    out = tmp_path / "m.gguf"
    wanted = {
        "q@0": "iq2_xxs", "k@0": "iq2_xs", "v@0": "iq2_s", "o@0": "iq3_xxs", "q@1": "iq3_s", "k@1": "tq2_0",
        "v@1": "iq4_xs", "o@1": "iq4_nl", "q@2": "q5_k", "k@2": "q6_k", "v@2": "q3_k", "o@2": "q4_k", "q@3": "q2_k",
        "k@3": "q4_0", "v@3": "q8_0", "o@3": "q4_1", "gate@3": "q5_0", "up@3": "iq3_xxs",
    }  # fmt: skip
    rules = [part for place, name in wanted.items() for part in ("--tensor-type", f"{place}={name}")]
    code, report = to_gguf(capsys, LLAMA, out, "--type", "q4_k", "--rounding", "nearest", *rules)
    assert code == 0, report
    assert set(GRIDS) - {"q2_0"} == set(wanted.values())
    parts = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
    }
    types = tensor_types(out)
    for place, name in wanted.items():
        role, _, block = place.partition("@")
        assert types[f"blk.{block}.{parts[role]}.weight"] == name.upper()
    assert {"llama.cpp loads it", "llama.cpp computes it"} <= {c["name"] for c in report["checks"]}
    assert all(check["is_passed"] for check in report["checks"])
    prompt = "The little dog ran over the hill"
    with LlamaCpp(out) as runtime:
        tokens = runtime.tokenize(prompt)
        theirs = torch.from_numpy(runtime.logits(tokens))
    ours = logits(read_model(out), torch.tensor([tokens]))[0]
    assert float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().mean()) < 0.2
    token, log_p = other_llama_cpp(out, prompt)
    assert log_p == pytest.approx(float(ours[-1].log_softmax(-1)[token]), abs=0.3)


def test_two_bits_for_a_width_without_super_blocks(capsys, tmp_path, random_model):
    """320 columns fit Q2_0 alone, which gguf-py cannot read and only the newer of the two llama.cpps runs."""
    model = random_model("llama", hidden=320, ffn=448, heads=5, kv_heads=1)
    out = tmp_path / "m.gguf"
    code, report = to_gguf(capsys, model, out, "--type", "q2_0")
    assert code == 0
    assert all(check["is_passed"] for check in report["checks"])
    seen = read_model(out)
    token, log_p = other_llama_cpp(out, "The little dog ran over the hill")
    tokenizer = Tokenizer.from_file(str(LLAMA / "tokenizer.json"))
    tokens = tokenizer.encode("The little dog ran over the hill", add_special_tokens=False).ids
    likely = logits(seen, torch.tensor([tokens]))[0, -1].log_softmax(-1)
    assert log_p == pytest.approx(float(likely[token]), abs=0.3)
    assert float(likely[token]) > float(likely.max()) - 0.3


def test_a_split_package_loads_by_its_first_file_and_replaces_an_older_set(capsys, tmp_path):
    out = tmp_path / "m.gguf"
    for older in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (tmp_path / older).touch()
    code = main(["to-gguf", str(LLAMA), "-o", str(out), *QUICK, "--no-report", "--max-shard-size", "500kB"])
    assert code == 2
    assert "the output exists" in capsys.readouterr().err
    nearest = ("--rounding", "nearest", "--overwrite", "--no-report")
    code, report = to_gguf(capsys, LLAMA, out, "--max-shard-size", "500kB", *nearest)
    assert code == 0, report
    n_files = len(names(tmp_path))
    assert n_files > 2
    assert names(tmp_path) == [f"m-{i + 1:05d}-of-{n_files:05d}.gguf" for i in range(n_files)]
    assert report["n_bytes"] == sum(f.stat().st_size for f in tmp_path.iterdir())
    first = tmp_path / f"m-00001-of-{n_files:05d}.gguf"
    assert report["path"] == str(first)
    assert {"llama.cpp loads it", "llama.cpp computes it"} <= {c["name"] for c in report["checks"]}
    prompt = "Once upon a time"
    token, log_p = other_llama_cpp(first, prompt)
    with LlamaCpp(first) as runtime:
        ids = runtime.tokenize(prompt, add_special=True)
    likely = logits(read_model(first), torch.tensor([ids]))[0, -1].log_softmax(-1)
    assert log_p == pytest.approx(float(likely[token]), abs=0.3)
    capsys.readouterr()
    assert main(["verify", str(first), "--quiet"]) == 0
    assert main(["inspect", str(first), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["files"] == n_files


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("mistral", {"tied": False}),
        ("qwen2", {"attention_bias": True}),
        ("qwen3", {"tied": False, "heads": 4, "kv_heads": 1}),
    ],
)
@pytest.mark.parametrize("grid", ["q3_k", "q4_0"])
def test_every_architecture_loads_and_agrees(capsys, tmp_path, random_model, model_type, sizes, grid):
    model = random_model(model_type, ffn=256, **sizes)
    out = tmp_path / "m.gguf"
    code, report = to_gguf(capsys, model, out, "--type", grid)
    assert code == 0, report
    assert {"llama.cpp loads it", "llama.cpp computes it"} <= {c["name"] for c in report["checks"]}


def test_without_dac_qwen2_keeps_its_name(capsys, tmp_path, random_model):
    out = tmp_path / "m.gguf"
    code, _ = to_gguf(
        capsys, random_model("qwen2", attention_bias=True), out, "--no-dac", "--rounding", "nearest"
    )
    assert code == 0
    field = gguf.GGUFReader(out).get_field("general.architecture")
    assert field is not None
    assert field.contents() == "qwen2"


def test_two_runs_give_the_same_bytes(capsys, tmp_path, random_model):
    model = random_model("qwen3", ffn=256)
    for name in ("a.gguf", "b.gguf"):
        assert to_gguf(capsys, model, tmp_path / name)[0] == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_killed_and_started_again_gives_the_same_bytes(capsys, tmp_path, random_model):
    model = random_model("qwen3", layers=3, ffn=256)
    assert to_gguf(capsys, model, tmp_path / "straight.gguf", "--no-report")[0] == 0
    out = tmp_path / "killed.gguf"
    out.write_bytes(b"an earlier file")
    command = [sys.executable, "-m", "d2qconv", "to-gguf", str(model), "-o", str(out), "--overwrite", *QUICK]
    work = out.with_name("killed.gguf.work")
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (work / "block-0001.safetensors").exists():
        assert run.poll() is None, "finished before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert out.read_bytes() == b"an earlier file"
    assert names(tmp_path) == ["killed.gguf", "killed.gguf.work", "straight.gguf"]
    assert to_gguf(capsys, model, out, "--overwrite")[0] == 0
    assert out.read_bytes() == (tmp_path / "straight.gguf").read_bytes()
    assert not work.exists()


def broken(folder, change):
    """A copy of the tiny Llama with `change(tensors, config)` done to it."""
    shutil.copytree(LLAMA, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nan(tensors, config):
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan


def infinite(tensors, config):
    tensors["model.embed_tokens.weight"][7, 7] = torch.inf


def misshapen(tensors, config):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-1].clone()


def missing(tensors, config):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def unknown_architecture(tensors, config):
    config["model_type"] = "mamba"


def unknown_key(tensors, config):
    config["residual_multiplier"] = 0.5


def active_window(tensors, config):
    config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=128)


@pytest.mark.parametrize(
    ("change", "exit_code", "what"),
    [
        (nan, 2, "up_proj"),
        (infinite, 2, "embed_tokens"),
        (misshapen, 2, "up_proj"),
        (missing, 2, "up_proj"),
        (unknown_architecture, 3, "mamba"),
        (unknown_key, 3, "residual_multiplier"),
        (active_window, 3, "sliding"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_error(capsys, tmp_path, change, exit_code, what):
    model = broken(tmp_path / "model", change)
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    out.write_bytes(b"an earlier file")
    code = main(["to-gguf", str(model), "-o", str(out), "--overwrite", "--sequences", "4", "--length", "16"])
    captured = capsys.readouterr()
    assert code == exit_code
    assert what in captured.err
    assert "Traceback" not in captured.err
    assert out.read_bytes() == b"an earlier file"
    assert names(out.parent) == ["m.gguf"]


@pytest.mark.parametrize(
    ("options", "exit_code", "what"),
    [
        (["--type", "q9_k"], 3, "q9_k"),
        (["--calibration", "nowhere.txt"], 2, "nowhere.txt"),
        (["--length", "100000"], 2, "context"),
        (["--device", "cuda:77"], 2, "cuda:77"),
        (["--carrier", "rank2"], 2, "rank2"),
    ],
)
def test_a_bad_option_is_one_clear_error(capsys, tmp_path, options, exit_code, what):
    code = main(["to-gguf", str(LLAMA), "-o", str(tmp_path / "m.gguf"), *options])
    assert code == exit_code
    assert what in capsys.readouterr().err
    assert names(tmp_path) == []


def test_a_calibration_text_that_is_too_short(capsys, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Only a few words.")
    code = main(["to-gguf", str(LLAMA), "-o", str(tmp_path / "m.gguf"), "--calibration", str(text)])
    assert code == 2
    assert "less than one sequence" in capsys.readouterr().err
    assert names(tmp_path) == ["short.txt"]


def test_a_width_that_does_not_fit_is_refused_with_the_types_that_do(capsys, tmp_path, random_model):
    model = random_model("llama", hidden=192, heads=3, kv_heads=3)
    code = main(["to-gguf", str(model), "-o", str(tmp_path / "m.gguf")])
    error = capsys.readouterr().err
    assert code == 3
    assert "q4_0" in error
