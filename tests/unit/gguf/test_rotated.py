"""A rotated model as a GGUF: an ordinary file with an output matrix of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gguf_models import FAST, PLAIN, make_desc, write

from d2qconv.exporters.base import Carrier, silent
from d2qconv.fold.rotation import Rotation, rotated
from d2qconv.measure.reference import logits
from d2qconv.names import Role, TensorId
from d2qconv_gguf import GgufOptions
from d2qconv_gguf.container import read
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.reader import read_model
from d2qconv_gguf.verify import verify_file

ROTATION = Rotation("hadamard", 1)
HEAD = TensorId(Role.HEAD)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_is_planned_like_any_other(arch):
    desc = make_desc(arch)
    made = GgufExporter(FAST).plan(rotated(desc, ROTATION), None)
    plain = GgufExporter(FAST).plan(desc, None)
    assert made.refusals == ()
    assert made.by_id[HEAD].stored_as == "output.weight"
    assert [t for t in made.tensors if t.id != HEAD] == list(plain.tensors)
    assert (made.layout, made.carrier) == (plain.layout, plain.carrier)


def test_the_bytes_of_an_untied_head_are_said():
    tied, untied = make_desc("llama"), make_desc("llama", is_tied=False)
    exporter = GgufExporter(FAST)
    made = exporter.plan(rotated(tied, ROTATION), None)
    (warning,) = made.warnings
    extra = made.n_bytes - exporter.plan(tied, None).n_bytes
    assert extra == made.by_id[HEAD].n_bytes
    assert f"output.weight takes {extra:,} bytes (q8_0)" in warning
    assert exporter.plan(rotated(untied, ROTATION), None).warnings == ()
    assert exporter.plan(tied, None).warnings == ()


def test_a_base_file_is_refused(tmp_path):
    desc = make_desc("llama")
    base = tmp_path / "base.gguf"
    write(base, desc, GgufOptions(type="bf16", embedding="bf16"), Carrier.NONE)
    exporter = GgufExporter(replace(FAST, base_gguf=base))
    assert exporter.plan(desc, None).refusals == ()
    (refusal,) = exporter.plan(rotated(desc, ROTATION), None).refusals
    assert "rotation" in refusal.where
    assert "--base-gguf" in refusal.todo


@pytest.mark.parametrize("kind", ["hadamard", "walsh"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_its_file_computes_the_source(tmp_path, arch, kind):
    """Written unquantized, in f32: the file's own reading gives the logits of the checkpoint."""
    desc = make_desc(arch)
    turned = rotated(desc, Rotation(kind, 1))
    options = replace(PLAIN, type="f32", embedding="f32", head="f32")
    path = tmp_path / "m.gguf"
    # `write` has `require_same_function` compare the metadata with the rotated model
    write(path, turned, options, shift=0.0)
    assert "output.weight" in read(path).tensors
    tokens = torch.arange(40).reshape(2, 20) * 7 % desc.dims.vocab
    wanted, found = logits(desc, tokens), logits(read_model(path), tokens)
    assert float((found - wanted).abs().max() / wanted.pow(2).mean().sqrt()) < 5e-5


def test_a_quantized_one_passes_every_check(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, rotated(make_desc("llama"), ROTATION), FAST)
    checks = verify_file(path, silent)
    assert all(c.is_passed for c in checks), checks
