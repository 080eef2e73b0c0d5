"""`--base-gguf`, and our own files, against listings of files that llama.cpp's converter wrote.

The listings in tests/data/gguf were made by tools/gguf_converter.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import FAST, LLAMA_5M, PLAIN, make_desc, small_source, write

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import PlanError
from d2qconv.exporters.base import Carrier, silent
from d2qconv.names import Part, Role, TensorId
from d2qconv_gguf import GgufOptions, base_gguf, exporter
from d2qconv_gguf.container import read
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.names import LAYOUTS, LLAMA, QWEN2
from d2qconv_gguf.verify import verify_file

ROOT = Path(__file__).parents[3]
CHECKPOINTS = {"tiny-llama-5m": LLAMA_5M, "tiny-qwen3-5m": ROOT / "d2qconv" / "data" / "tiny-qwen3-5m"}
#: keys in which we differ from the converter on purpose or by spelling
OUR_OWN = ("d2qconv.", "tokenizer.ggml.add_")
SPELLED_OTHERWISE = {"general.name", "general.basename", "general.size_label"}
#: written for every layout by us, by the converter for llama only
SPELLED_OUT = {"vocab_size", "rope.dimension_count"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_f16_file_is_the_converters(tmp_path, name):
    listing = json.loads((ROOT / "tests" / "data" / "gguf" / f"{name}-f16.json").read_text())
    source = open_checkpoint(str(CHECKPOINTS[name]))
    package, made, _ = write(tmp_path / "x.gguf", bind(source), PLAIN, Carrier.NONE, checkpoint=source)
    file = read(package.path)
    tensors = {
        n: {
            "shape": list(t.shape),
            "type": t.type.name,
            "sha256": hashlib.sha256(np.ascontiguousarray(t.data).tobytes()).hexdigest(),
        }
        for n, t in file.tensors.items()
    }
    assert tensors == listing["tensors"]
    theirs = {k: v["value"] for k, v in listing["keys"].items() if k not in SPELLED_OTHERWISE}
    ours = {k: _listed(v) for k, v in file.keys.items() if not k.startswith(OUR_OWN)}
    extra = ours.keys() - theirs.keys() - SPELLED_OTHERWISE
    assert {k.removeprefix(f"{made.layout}.") for k in extra} <= SPELLED_OUT
    assert {k: ours.get(k) for k in theirs} == theirs


def _listed(value):
    if isinstance(value, list) and len(value) > 8:
        text = json.dumps(value, ensure_ascii=False)
        return {"n": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return value


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A float file of a random model as the base, and that model."""
    folder = tmp_path_factory.mktemp("bases")

    def make(arch, kind="bf16", carrier=Carrier.NONE):
        desc = make_desc(arch)
        path = folder / f"{arch}-{kind}.gguf"
        if not path.exists():
            write(path, desc, GgufOptions(type=kind, embedding=kind), carrier)
        return path, desc

    return make


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_same_weights_are_accepted(bases, arch, kind):
    base, desc = bases(arch, kind)
    made = GgufExporter(replace(FAST, base_gguf=base)).plan(desc, None)
    assert made.refusals == ()


def changed(desc, tensor, value):
    return replace(desc, tensors={**desc.tensors, tensor: Dense.of(value)})


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (TensorId(Role.Q, 1), "blk.1.attn_q.weight"),
        (TensorId(Role.Q, 0, Part.BIAS), "blk.0.attn_q.bias"),
        (TensorId(Role.FINAL_NORM), "output_norm.weight"),
        (TensorId(Role.EMBED), "token_embd.weight"),
    ],
)
def test_one_other_bit_is_refused_by_name(bases, tensor, name):
    base, desc = bases("qwen2")
    value = desc.tensors[tensor].load().clone()
    value.view(torch.int16).reshape(-1)[7] ^= 1
    (refusal,) = base_gguf.refusals(base, changed(desc, tensor, value), QWEN2)
    assert refusal.why.startswith("1 of ")
    assert name in refusal.why


def test_rows_in_another_order_are_refused(bases):
    base, desc = bases("llama")
    tensor = TensorId(Role.K, 0)
    value = desc.tensors[tensor].load()[torch.arange(128).roll(1)]
    assert any(
        "blk.0.attn_k.weight" in r.why for r in base_gguf.refusals(base, changed(desc, tensor, value), LLAMA)
    )


def test_other_hyper_parameters_are_refused(bases):
    base, desc = bases("llama")
    for other, key in (
        (replace(desc, norm_eps=1e-6), "layer_norm_rms_epsilon"),
        (replace(desc, rope=replace(desc.rope, theta=5e5)), "rope.freq_base"),
        (replace(desc, rope=replace(desc.rope, kind="linear", factor=2.0)), "rope.scaling.type"),
    ):
        assert any(key in r.why for r in base_gguf.refusals(base, other, LLAMA))


def test_missing_extra_and_quantized_tensors_are_refused(bases, tmp_path):
    base, desc = bases("llama")
    more = make_desc("llama", biases=(Role.Q,))
    assert any("lacks blk.0.attn_q.bias" in r.why for r in base_gguf.refusals(base, more, LLAMA))
    less = replace(desc, tensors={t: d for t, d in desc.tensors.items() if t.role is not Role.DOWN})
    assert any("holds tensors" in r.why for r in base_gguf.refusals(base, less, LLAMA))
    write(tmp_path / "q.gguf", desc, FAST, Carrier.NONE)
    assert any("blk.0.attn_q.weight" in r.why for r in base_gguf.refusals(tmp_path / "q.gguf", desc, LLAMA))


def test_another_architecture_or_no_file_is_refused(bases, tmp_path):
    base, _ = bases("qwen3")
    assert any("qwen3" in r.why for r in base_gguf.refusals(base, make_desc("llama"), LLAMA))
    assert base_gguf.refusals(tmp_path / "none.gguf", make_desc("llama"), LLAMA)
    with pytest.raises(PlanError, match="cannot be read"):
        base_gguf.keys(tmp_path / "none.gguf", LLAMA, [])


@pytest.mark.parametrize(
    ("arch", "carrier"), [("qwen2", Carrier.BIAS), ("qwen2", Carrier.NONE), ("qwen3", None)]
)
def test_its_keys_go_into_the_file(bases, tmp_path, arch, carrier):
    base, desc = bases(arch)
    package, made, _ = write(tmp_path / "x.gguf", desc, replace(FAST, base_gguf=base), carrier)
    theirs, ours = read(base), read(package.path)
    assert ours.architecture == made.layout
    assert made.layout in LAYOUTS
    assert ours.keys["general.file_type"] == 2
    assert ours.keys["d2qconv.tensor_names"] == list(ours.tensors)
    for key, value in theirs.keys.items():
        if key.startswith("d2qconv.") or key in ("general.file_type", "general.architecture"):
            continue
        name = key.replace(f"{arch}.", f"{made.layout}.", 1) if key.startswith(f"{arch}.") else key
        assert ours.keys[name] == value
        assert ours.types[name] == theirs.types[key]
    assert not [k for k in ours.keys if k.startswith(f"{arch}.") and arch != made.layout]


def test_a_tokenizer_that_we_refuse_comes_from_the_base(tmp_path, monkeypatch):
    """A checkpoint whose tokenizer.json no splitter of llama.cpp equals: refused, and the refusal names the way out.

    With a base the tokenizer code is never asked, and the base's own tokens are in the file.
    """
    desc, known = make_desc("llama"), small_source()
    base = tmp_path / "base.gguf"
    write(base, desc, GgufOptions(type="bf16", embedding="bf16"), Carrier.NONE)
    folder = tmp_path / "unknown"
    shutil.copytree(known.path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    cut = {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, tokenizer["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    source = replace(known, path=folder)
    refusals = GgufExporter(FAST).check_source(source).refusals
    assert refusals
    assert all("--base-gguf" in refusal.todo for refusal in refusals)

    def asked(*_: object, **__: object) -> None:
        pytest.fail("our tokenizer code was asked")

    for name in ("tokenizer_metadata", "tokenizer_refusals", "tokenizer_warnings"):
        monkeypatch.setattr(exporter, name, asked)
    options = replace(FAST, base_gguf=base)
    assert GgufExporter(options).check_source(source).refusals == ()
    package, _, _ = write(tmp_path / "m.gguf", desc, options, checkpoint=source)
    made, wanted = read(package.path), read(base)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.pre", "tokenizer.ggml.merges"):
        assert made.keys[key] == wanted.keys[key]
    assert all(check.is_passed for check in verify_file(package.path, silent))
