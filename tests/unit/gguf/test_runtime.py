"""Our files in a stock llama.cpp, against the float reference on what gguf-py reads from the same file."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_models import DIMS, FAST, LLAMA_5M, PLAIN, ROPES, as_stored, make_desc, write

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import VerifyError
from d2qconv.exporters.base import Carrier, silent
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv_gguf import GgufOptions, verify
from d2qconv_gguf.container import read
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.reader import read_model

pytest.importorskip("cyllama")
from d2qconv_gguf.runtime import LlamaCpp, _draw

TOKENS = np.random.default_rng(0).integers(2, DIMS.vocab, 96).tolist()
F32 = GgufOptions(type="f32", embedding="f32", head="f32")


def runtime_logits(path):
    with LlamaCpp(path, n_context=128) as runtime:
        return runtime.logits(TOKENS)


def noise(desc, seen):
    return verify.distance(logits(desc, torch.tensor([TOKENS]))[0].numpy(), seen).noise


@pytest.mark.parametrize("rope", ROPES)
def test_rope(tmp_path, rope):
    """The window is 64 tokens: positions beyond it are scaled."""
    package, _, model = write(tmp_path / "x.gguf", make_desc("llama", rope=rope), F32)
    seen = runtime_logits(package.path)
    assert noise(read_model(package.path), seen) < 1e-4
    assert noise(as_stored(model), seen) < 1e-4
    other = replace(model.desc, rope=replace(ROPES["default"], theta=20000.0))
    assert noise(replace(as_stored(model), rope=other.rope), seen) > 0.01


ALL_BIASES = (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN)


@pytest.mark.parametrize(
    ("arch", "carrier", "biases", "is_tied"),
    [
        ("llama", Carrier.BIAS, None, True),
        ("llama", Carrier.NONE, ALL_BIASES, False),
        ("mistral", Carrier.BIAS, None, False),
        ("qwen2", Carrier.BIAS, None, True),
        ("qwen2", Carrier.NONE, None, False),
        ("qwen3", Carrier.RANK1, (Role.Q, Role.K, Role.V), True),
        ("qwen3", Carrier.NONE, None, False),
    ],
)
def test_float_files_compute_the_reference(tmp_path, arch, carrier, biases, is_tied):
    """The reference is what was handed to the exporter, in the checkpoint's architecture and row order."""
    desc = make_desc(arch, biases=biases, is_tied=is_tied)
    package, _, model = write(tmp_path / "x.gguf", desc, F32, carrier)
    seen = runtime_logits(package.path)
    assert noise(as_stored(model), seen) < 1e-4
    assert noise(read_model(package.path), seen) < 1e-4
    package, _, model = write(tmp_path / "y.gguf", desc, PLAIN, carrier)
    assert noise(read_model(package.path), runtime_logits(package.path)) < verify.BOUNDS["F16"]


@pytest.mark.parametrize(
    "kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl", "tq2_0", "q4_0", "q8_0"]
)
def test_quantized_files_compute_the_reference(tmp_path, kind):
    package, _, model = write(tmp_path / "x.gguf", make_desc("qwen2"), replace(FAST, type=kind))
    seen = runtime_logits(package.path)
    assert noise(as_stored(model), seen) < verify.QUANTIZED_BOUND / 2


def test_a_type_that_the_runtime_may_be_too_old_for(tmp_path):
    """Q2_0 is either computed or, by a llama.cpp that does not know it, left unchecked with a reason."""
    package, _, _ = write(tmp_path / "x.gguf", make_desc("llama"), replace(FAST, type="q2_0"))
    checks = verify.verify_file(package.path, silent)
    assert all(check.is_passed for check in checks)
    assert "Q2_0: by a second decoder" in checks[0].detail
    assert checks[-1].is_skipped == ("b9916" in checks[-1].detail)
    assert checks[-1].is_skipped or "allowed 10 %" in checks[-1].detail


def test_only_a_type_of_the_file_excuses_the_runtime(tmp_path):
    said = "tensor 'a' has invalid ggml type 42. should be in [0, 41)"
    file = read(write(tmp_path / "x.gguf", make_desc("llama"), replace(FAST, type="q2_0"))[0].path)
    assert verify._too_old(file, said).is_skipped
    assert verify._too_old(file, "tensor 'a' has invalid ggml type 77. should be in [0, 41)") is None
    assert verify._too_old(file, "wrong number of tensors") is None
    assert verify._too_old(read(write(tmp_path / "y.gguf", make_desc("llama"), FAST)[0].path), said) is None


def with_tensor(desc, tensor, change):
    value = Dense.of(change(desc.tensors[tensor].load().float()))
    return replace(desc, tensors={**desc.tensors, tensor: value})


def swapped(w):
    return torch.cat([w[32:64], w[:32], w[64:]])


def pairs(w):
    """Rows of each head as they would stand if the permutation were forgotten."""
    order = torch.arange(64).reshape(2, 32).T.reshape(-1)
    return w.reshape(-1, 64, *w.shape[1:])[:, order].reshape(w.shape)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        (TensorId(Role.Q, 0), pairs),
        (TensorId(Role.Q, 0, Part.BIAS), pairs),
        (TensorId(Role.V, 1), swapped),
        (TensorId(Role.UP, 0), swapped),
        (TensorId(Role.Q, 0, Part.BIAS), torch.zeros_like),
        (TensorId(Role.GATE, 0, Part.BIAS), torch.zeros_like),
        (TensorId(Role.UP, 1, Part.BIAS), torch.zeros_like),
        (TensorId(Role.FFN_NORM, 0), lambda w: 1.2 * w),
    ],
    ids=["q order", "q bias order", "v rows", "up rows", "q bias", "gate bias", "up bias", "norm"],
)
def test_the_bound_catches_a_wrong_file(relabelled, tensor, change):
    desc, seen = relabelled
    assert noise(desc, seen) < verify.QUANTIZED_BOUND / 2
    assert noise(with_tensor(desc, tensor, change), seen) > verify.QUANTIZED_BOUND * 1.3


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("relabelled") / "x.gguf"
    write(path, make_desc("qwen2"), replace(FAST, type="q2_k"), Carrier.BIAS, shift=0.7)
    return read_model(path), runtime_logits(path)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(verify, "N_SEQUENCES", 2)
    monkeypatch.setattr(verify, "N_TOKENS", 24)


def test_verify_passes_a_good_file_and_counts(tmp_path, quick):
    package, made, _ = write(tmp_path / "x.gguf", make_desc("qwen3"), FAST)
    checks = GgufExporter(FAST).verify(package.path, silent)
    assert [c.name for c in checks] == [
        "decoded values",
        "metadata",
        "structure",
        "llama.cpp loads it",
        "llama.cpp computes it",
    ]
    assert all(c.is_passed for c in checks)
    assert f"{len(made.tensors)} tensors" in checks[0].detail
    assert "48 positions" in checks[4].detail


def test_verify_names_a_tensor_that_is_not_as_recorded(tmp_path):
    package, _, _ = write(tmp_path / "x.gguf", make_desc("qwen3"), FAST)
    data = bytearray(package.path.read_bytes())
    data[-5] ^= 1
    package.path.write_bytes(data)
    checks = GgufExporter(FAST).verify(package.path, silent)
    assert [c.is_passed for c in checks] == [False, True, True]
    assert checks[0].detail.startswith("1 of ")
    assert list(read(package.path).tensors)[-1] in checks[0].detail


def test_verify_sees_that_llama_cpp_computes_something_else(tmp_path, quick, monkeypatch):
    """A key that llama.cpp obeys and the record does not cover: every tensor is right, the function is not."""
    package, _, _ = write(tmp_path / "x.gguf", make_desc("qwen3"), FAST)
    wanted = verify.reference_logits
    monkeypatch.setattr(
        verify, "reference_logits", lambda model, tokens, device: wanted(replace(model, norm_eps=0.3), tokens)
    )
    checks = GgufExporter(FAST).verify(package.path, silent)
    assert [c.is_passed for c in checks] == [True, True, True, True, False]


def test_verify_refuses_a_file_without_record(tmp_path):
    package, _, _ = write(tmp_path / "x.gguf", make_desc("qwen3"), PLAIN)
    data = package.path.read_bytes().replace(b"d2qconv.decoded_sha256", b"d2qconv.decoded_sha255")
    package.path.write_bytes(data)
    with pytest.raises(VerifyError, match="no record"):
        GgufExporter(FAST).verify(package.path, silent)


def test_llama_cpp_own_words_are_in_the_error(tmp_path):
    package, _, _ = write(tmp_path / "x.gguf", make_desc("llama"), PLAIN, Carrier.NONE)
    data = package.path.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_uq.weight")
    package.path.write_bytes(data)
    with pytest.raises(VerifyError, match=r"missing tensor 'blk.0.ffn_up.weight'"):
        LlamaCpp(package.path)


def test_a_trained_model_writes_text_and_the_runtime_is_quiet(tmp_path):
    source = open_checkpoint(str(LLAMA_5M))
    package, _, _ = write(tmp_path / "x.gguf", bind(source), PLAIN, Carrier.NONE, checkpoint=source)
    code = (
        "import sys; from pathlib import Path; from d2qconv_gguf.runtime import LlamaCpp, _draw\n"
        "with LlamaCpp(Path(sys.argv[1])) as m:\n"
        "    text = 'The old man'\n"
        "    assert m.detokenize(m.tokenize(text)) == text\n"
        "    assert m.generate('The old man of the', 2)[0] == ' ', m.generate('The old man of the', 2)\n"
        "    assert m.generate(text, 12) == m.generate(text, 12)\n"
        "    assert m.generate(text, 12, 1) == m.generate(text, 12, 1) != m.generate(text, 12, 2)\n"
        "    print(m.n_vocab, m.bos, m.version())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, package.path], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith("8192 0 cyllama, ggml")


def test_distance_of_what_is_not_finite_is_infinite():
    a = np.zeros((2, 4), dtype=np.float32)
    assert verify.distance(a, np.full_like(a, np.nan)).noise == float("inf")
    b = np.random.default_rng(1).normal(size=(5, 9))
    assert verify.distance(b, b + 3).noise == pytest.approx(0, abs=1e-12)
    wanted = np.log(np.array([[0.5, 0.5]]))
    assert verify.distance(wanted, np.log(np.array([[0.9, 0.1]]))).mean_kl == pytest.approx(
        0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_token_is_drawn_of_logits_that_are_not_finite(value):
    with pytest.raises(VerifyError, match="logits that are not finite"):
        _draw(np.array([0.0, value]), np.random.default_rng(0))
