"""What of the calibration is kept from one process to the next, and what must not be."""

from __future__ import annotations

import json

import pytest
import torch
from random_models import small_source

from d2qconv import gather
from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.gather import Source, calibration_tokens
from d2qconv.progress import Unwatched
from d2qconv.run import CalibrationSpec
from d2qconv.team import Team
from d2qconv.testing.models import make_checkpoint

SENTENCES = "The little dog ran over the hill. ", "A cat sat on a mat and did nothing at all. "


@pytest.fixture
def folder(tmp_path):
    source = small_source().path
    return make_checkpoint(
        tmp_path / "m", "llama", layers=1, hidden=64, ffn=64, heads=1, kv_heads=1, tokenizer=source
    )


@pytest.fixture
def read(folder, tmp_path, monkeypatch):
    """Tokens of a calibration, by a process of its own as far as files tell; `drawn` lists what was sampled."""
    drawn = []
    sample = gather.sample_sequences

    def counted(model, n, *args, **more):
        drawn.append(n)
        return sample(model, n, *args, **more)

    monkeypatch.setattr(gather, "sample_sequences", counted)
    monkeypatch.setattr("d2qconv.calibrate.tokens.sample_sequences", counted)

    def run(spec, n_own):
        checkpoint = open_checkpoint(str(folder))
        source = Source(checkpoint, bind(checkpoint), torch.device("cpu"), tmp_path / "w")
        return calibration_tokens(source, spec, n_own, "content", Team.alone(), Unwatched())

    run.drawn = drawn
    return run


def test_a_text_is_read_again_and_what_was_sampled_beside_it_is_not_drawn_again(read, tmp_path):
    text = tmp_path / "t.txt"
    spec = CalibrationSpec(str(text), 4, 8)
    text.write_text(SENTENCES[0] * 40)
    first = read(spec, 2)
    text.write_text(SENTENCES[1] * 40)
    second = read(spec, 2)
    assert not torch.equal(first.calibration, second.calibration)
    assert first.own is not None
    assert torch.equal(first.own, second.own)
    assert read.drawn == [2]


def test_a_short_text_is_warned_of_each_time(read, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text(SENTENCES[0] * 8)
    spec = CalibrationSpec(str(text), 64, 8)
    first, second = read(spec, 2), read(spec, 2)
    assert first.warnings == second.warnings != ()


def test_sampled_sequences_begin_as_the_tokenizer_says_now(read, folder):
    spec = CalibrationSpec("self", 4, 8)
    first, again = read(spec, 0), read(spec, 0)
    assert first.digest == again.digest
    assert read.drawn == [5]
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    path.write_text(
        json.dumps(said | {"add_bos_token": not said.get("add_bos_token", False), "bos_token": "!"})
    )
    changed = read(spec, 0)
    assert read.drawn == [5, 5]
    assert changed.digest != first.digest
