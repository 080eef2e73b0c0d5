"""Hugging Face folders in their runtimes as `evaluate` asks for them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hf_models import write

from d2qconv.errors import InputError, PluginError, VerifyError
from d2qconv.exporters.runtime import Evaluating
from d2qconv_hf import runtime

TOKENS = np.random.default_rng(0).integers(2, 512, (2, 24))


@pytest.mark.parametrize("dialect", ["safetensors", "mlx"])
def test_logits_from_a_position_on(tmp_path, dialect):
    exporter, _, model, package = write(tmp_path / "p", dialect, "llama", type="int4")
    assert isinstance(exporter, Evaluating)
    with exporter.runtime(package.path, 24) as judged:
        assert (judged.n_vocab, judged.max_length) == (512, model.desc.max_positions)
        found = judged.logits(TOKENS, 11)
        assert judged.name in judged.version
        # The random model has no tokenizer.
        with pytest.raises(InputError, match="no tokenizer"):
            judged.encode("a text")
    assert found.shape == (2, 13, 512)
    # That these are the right logits is what the exporter's tests are about.
    np.testing.assert_array_equal(found, runtime.logits(dialect, package.path, TOKENS)[:, 11:])


def test_what_is_not_there(tmp_path, monkeypatch):
    _, _, _, package = write(tmp_path / "p", "safetensors", "llama", type="int4")
    config = package.path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": "many"}))
    with pytest.raises(VerifyError, match="vocab_size is 'many'"):
        runtime.Measured("safetensors", package.path)
    monkeypatch.setitem(runtime.NEEDS, "gptq", ("no-such-library",))
    with pytest.raises(PluginError, match="no-such-library not installed") as caught:
        runtime.Measured("gptq", package.path)
    assert "pip install" in str(caught.value)
