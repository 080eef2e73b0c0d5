"""`evaluate` on a real file: written, run in llama.cpp, compared with its source."""

from __future__ import annotations

import json

import pytest
from random_models import quantized, small_source

from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.exporters.base import silent
from d2qconv.testing.models import make_checkpoint

pytest.importorskip("cyllama")


@pytest.fixture
def package(tmp_path):
    """(file of the model's own floats, source folder, text)."""
    from d2qconv.arch.bind import bind
    from d2qconv_gguf import GgufOptions
    from d2qconv_gguf.exporter import GgufExporter

    tokenizer = small_source()
    folder = make_checkpoint(
        tmp_path / "m", "llama", layers=1, hidden=64, ffn=64, heads=1, kv_heads=1, tokenizer=tokenizer.path
    )
    checkpoint = open_checkpoint(str(folder))
    exporter = GgufExporter(GgufOptions(type="f32", embedding="f32", head="f32"))
    plan = exporter.plan(bind(checkpoint), None)
    exporter.write(quantized(bind(checkpoint), plan), checkpoint, plan, tmp_path / "p.gguf", silent)
    (tmp_path / "t.txt").write_text(
        "The little dog ran over the green hill, and nobody knew why.<|endoftext|>" * 20
    )
    return tmp_path / "p.gguf", folder, tmp_path / "t.txt"


def test_a_file_of_the_sources_floats_is_the_source(d2q, package, tmp_path):
    file, folder, text = package
    words = ("evaluate", file, "--source", folder, "--text", text, "--context", 32, "--chunks", 3)
    said = d2q(*words, "--json", "-o", tmp_path / "r.json", "--device", "cpu")
    assert said.code == 0
    got = said.json
    assert json.loads((tmp_path / "r.json").read_text()) == {k: v for k, v in got.items() if k != "path"}
    assert got["judged"]["divergence"]["kl"]["value"] < 1e-7
    assert got["judged"]["divergence"]["same_top"] == {"value": 1, "error": 0}
    source = got["judged"]["divergence"]["perplexity_source"]["value"]
    assert got["judged"]["perplexity"]["value"] == pytest.approx(source, rel=1e-5)
    assert got["judged"]["package"]["runtime"] == "llama.cpp"
    assert got["text"]["n_judged"] == 3 * 15
    assert d2q(*words, "-o", tmp_path / "r.json").code == 2
    assert "the output exists" in d2q(*words, "-o", tmp_path / "r.json").err


def test_a_file_alone(d2q, package):
    """The same tokens by llama.cpp's tokenizer and the source's, also of letters that spell a special token."""
    file, folder, text = package
    alone = d2q("evaluate", file, "--text", text, "--context", 32, "--chunks", 3)
    assert alone.code == 0
    lines = dict(line.split("  ", 1) for line in alone.out.splitlines() if "  " in line)
    both = d2q("evaluate", file, "--source", folder, "--text", text, "--context", 32, "--chunks", 3, "--json")
    expected = both.json["judged"]["perplexity"]["value"]
    assert float(lines["perplexity"].split()[0]) == pytest.approx(expected, rel=1e-3)
    assert "KL divergence" not in alone.out
    assert alone.out.splitlines()[-1].startswith(f"{file}: perplexity ")


def test_nothing_to_read_is_a_usage_error(d2q, package):
    result = d2q("evaluate", package[0], "--json")
    assert result.code == 2
    assert "give a text with --text" in result.json["error"]["message"]


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("--text", "t.txt", "--limit", 3), "--limit: does nothing without --tasks"),
        (("--text", "t.txt", "--task-folder", "f"), "--task-folder: does nothing without --tasks"),
        (("--tasks", "arc_easy", "--baseline", "b.gguf"), "--baseline: does nothing for tasks alone"),
        (("--text", "t.txt", "--device", "cpu"), "--device: does nothing without --source"),
        (("--text", "t.txt", "--seed", 3), "--seed: does nothing where nothing is sampled"),
    ],
)
def test_an_option_that_would_do_nothing_is_a_usage_error(d2q, package, words, where):
    result = d2q("evaluate", package[0], *words)
    assert result.code == 2
    assert where in result.err
