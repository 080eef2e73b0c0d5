"""A GGUF in llama.cpp as `evaluate` asks for it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_models import DIMS, as_stored, make_desc, small_source, write

from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import PluginError, VerifyError
from d2qconv.exporters.runtime import Evaluating
from d2qconv.measure.agreement import distance
from d2qconv.measure.reference import logits
from d2qconv_gguf import GgufOptions, runtime
from d2qconv_gguf.exporter import GgufExporter

pytest.importorskip("cyllama")

F32 = GgufOptions(type="f32", embedding="f32", head="f32")
TOKENS = np.random.default_rng(0).integers(2, DIMS.vocab, (2, 24))


def test_logits_from_a_position_on(tmp_path):
    package, _, model = write(tmp_path / "x.gguf", make_desc("llama"), F32)
    exporter = GgufExporter(F32)
    assert isinstance(exporter, Evaluating)
    with exporter.runtime(package.path, 24) as judged:
        assert (judged.n_vocab, judged.max_length) == (DIMS.vocab, model.desc.max_positions)
        found = judged.logits(TOKENS, 11)
        assert judged.version.startswith("cyllama")
    wanted = logits(as_stored(model), torch.from_numpy(TOKENS)).numpy()[:, 11:]
    assert found.shape == (2, 13, DIMS.vocab)
    assert distance(wanted, found).noise < 1e-4


@pytest.mark.parametrize("is_added", [True, False])
def test_texts_are_tokenized_as_the_checkpoint_does(tmp_path, is_added):
    source = small_source()
    folder = tmp_path / "m"
    folder.mkdir()
    source.copy_files(("tokenizer.json",), folder)
    config = source.json("tokenizer_config.json") | {"bos_token": "<|endoftext|>", "add_bos_token": is_added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    checkpoint = replace(Checkpoint(folder, str(folder), "", source.config, {}, ""))
    package, _, _ = write(tmp_path / "x.gguf", make_desc("llama"), F32, checkpoint=checkpoint)
    with runtime.Measured(package.path, 8) as judged:
        from d2qconv.calibrate.text import FolderTokenizer

        tokenizer = FolderTokenizer(checkpoint, DIMS.vocab)
        text = "The little dog ran.\n\n It was 3 o'clock. "
        assert list(judged.encode(text)) == list(tokenizer.encode(text))
        assert judged.bos == tokenizer.bos
        assert (judged.bos is None) != is_added


def test_what_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(VerifyError, match="does not load it"):
        runtime.Measured(tmp_path / "x.gguf", 8)
    monkeypatch.setattr(runtime, "is_installed", lambda: False)
    with pytest.raises(PluginError, match=r"llama.cpp is not installed") as caught:
        runtime.Measured(tmp_path / "x.gguf", 8)
    assert "pip install" in str(caught.value)
