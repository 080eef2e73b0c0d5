"""`to-gguf --size` from the command line: measured once, chosen, written, within the size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2qconv.cli import main
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.container import read

LLAMA = Path(__file__).parent.parent / "data" / "tiny-llama-5m"
TEXT = "The old man and the little girl walked down to the river, where a dog was waiting for a ball. "


@pytest.fixture
def words(tmp_path):
    """The command, for a small random model with a real tokenizer."""
    sizes = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32}
    model = make_checkpoint(tmp_path / "m", "llama", vocab=8192, tokenizer=LLAMA, **sizes)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Story {i}: {TEXT}" for i in range(40)))
    calibration = ["--calibration", str(text), "--sequences", "4", "--length", "24"]
    return ["to-gguf", str(model), "-o", str(tmp_path / "m.gguf"), *calibration]


def said(capsys, words):
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def test_a_size_is_kept_and_measured_once(capsys, words, tmp_path, monkeypatch):
    size = ["--size", "615kB", "--tensor-type", "v=q8_0", "--tensor-type", "down@1=q8_0", "--json"]
    plan = said(capsys, [*words, *size, "--dry-run"])
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".work")] == ["m.gguf.work"]
    chosen = {name: tensor["type"] for name, tensor in plan["allocation"]["tensors"].items()}
    assert {t["id"]: t["type"] for t in plan["tensors"] if t["id"] in chosen} == chosen
    assert chosen["blk.0.v.weight"] == chosen["blk.1.v.weight"] == chosen["blk.1.down.weight"] == "q8_0"
    assert {"q4_0", "q8_0"} <= set(chosen.values())
    assert plan["n_bytes"] <= plan["allocation"]["budget_bytes"] < 615_000

    def measured_again(self):
        raise AssertionError

    monkeypatch.setattr("d2qconv.allocate.sensitivity.Measuring.run", measured_again)
    done = said(capsys, [*words, *size])
    assert done["allocation"] == plan["allocation"]
    assert 605_000 < (tmp_path / "m.gguf").stat().st_size == done["n_bytes"] <= 615_000
    stored = {t.name: t.type.name.lower() for t in read(tmp_path / "m.gguf").tensors.values()}
    assert stored["blk.0.ffn_up.weight"] == chosen["blk.0.up.weight"]
    assert done["kld"] == pytest.approx(done["allocation"]["kld"], rel=1.0)
    assert not (tmp_path / "m.gguf.work").exists()


def test_the_choice_is_shown_with_what_it_will_cost(capsys, words):
    assert main([*words, "--bpw", "6", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "sensitivity …" in shown.err
    rows = [line.split() for line in shown.out.splitlines()]
    [embed] = [row for row in rows if row[:1] == ["embed"]]
    assert embed[1] in ("q4_0", "q4_1", "q5_0", "q8_0")
    assert any(row[:3] == ["gate", "0-1", embed[1]] or row[:1] == ["gate"] for row in rows)
    assert "chosen for --bpw 6" in shown.out
    assert "predicted" in shown.out


def test_less_than_there_can_be_is_refused_before_any_weight_is_read(capsys, words, tmp_path, monkeypatch):
    def touched(*_):
        raise AssertionError

    monkeypatch.setattr("d2qconv.pipeline.read_weights", touched)
    assert main([*words, "--bpw", "2"]) == 3
    error = capsys.readouterr().err
    assert "--bpw 2: leaves" in error
    assert "the smallest types that fit this model" in error
    assert not (tmp_path / "m.gguf.work").exists()
