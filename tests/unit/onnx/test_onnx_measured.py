"""An ONNX package in ONNX Runtime as `evaluate` asks for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_models import write
from random_models import DIMS, as_stored, make_desc, small_source

from d2qconv.calibrate.text import FolderTokenizer
from d2qconv.errors import VerifyError
from d2qconv.exporters.runtime import Evaluating
from d2qconv.measure.agreement import distance
from d2qconv.measure.reference import logits
from d2qconv_onnx import OnnxOptions
from d2qconv_onnx.exporter import OnnxExporter

pytest.importorskip("onnxruntime")

TOKENS = np.random.default_rng(0).integers(2, DIMS.vocab, (2, 24))


def test_logits_tokens_and_sizes(tmp_path):
    # At the exact level, so that only the order of sums differs.
    package, _, model = write(tmp_path / "p", make_desc("llama"), type="int4", block_size="32", exact=True)
    exporter = OnnxExporter(OnnxOptions())
    assert isinstance(exporter, Evaluating)
    text = "The little dog ran.\n\n It was 3 o'clock. "
    with exporter.runtime(package.path, 24) as judged:
        assert (judged.n_vocab, judged.max_length) == (DIMS.vocab, model.desc.max_positions)
        found = judged.logits(TOKENS, 11)
        tokenizer = FolderTokenizer(small_source(), DIMS.vocab)
        assert list(judged.encode(text)) == list(tokenizer.encode(text))
        assert judged.bos == tokenizer.bos
    wanted = logits(as_stored(model), torch.from_numpy(TOKENS)).numpy()[:, 11:]
    assert found.shape == (2, 13, DIMS.vocab)
    assert distance(wanted, found).noise < 1e-4


def test_a_folder_that_is_damaged(tmp_path):
    package, _, _ = write(tmp_path / "p", make_desc("llama"), type="int4")
    (package.path / "genai_config.json").write_text("{}")
    with pytest.raises(VerifyError, match="is not a config"):
        OnnxExporter(OnnxOptions()).runtime(package.path, 24)
