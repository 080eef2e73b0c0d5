"""tools/compare_llama_cpp: which row a file of another tool is compared with; nothing here needs llama.cpp."""

import importlib.machinery
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]


def load():
    loader = importlib.machinery.SourceFileLoader(
        "compare_llama_cpp", str(ROOT / "tools" / "compare_llama_cpp")
    )
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


tool = load()
metrics = tool.metrics
TensorInfo = sys.modules["llama"].TensorInfo

#: file name → (type of its one matrix, KLD of its two positions)
FILES = {
    "src.gguf": ("F16", (0.0, 0.0)),
    "m-q2_k-stock.gguf": ("q2_K", (0.4, 0.6)),
    "m-q4_k-stock.gguf": ("q4_K", (0.04, 0.06)),
    "mine.gguf": ("q2_K", (0.2, 0.3)),
    "theirs.gguf": ("q4_K", (0.08, 0.12)),
    "alien.gguf": ("q3_K", (0.1, 0.1)),
    "broken.gguf": ("q2_K", None),
}


class FakeLibrary:
    """What llama.cpp would say of FILES; quantizing writes a file."""

    def tensors(self, file):
        name = "blk.0.ffn_up.weight"
        return {name: TensorInfo(name, 0, FILES[file.name][0], (256, 4), 100)}

    def quantize(self, _source, target, *_):
        target.write_bytes(b"peer")


class FakeBase:
    def score(self, _lib, file):
        kld = FILES[file.name][1]
        if kld is None:
            raise tool.LlamaError("cannot load | this")
        return [metrics.Positions(np.array([2.0, 2.0]), np.array(kld), np.array([True, False]))]


@pytest.fixture
def bench(tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes(name.encode())
    settings = tool.ours.Settings(Path("m"), Path("text"), 1, 16, "q8_0", tmp_path)
    return tool.Bench(FakeLibrary(), FakeBase(), tmp_path / "src.gguf", settings, {})


def test_another_tools_file_stands_against_the_stock_file_of_its_majority_type(bench, tmp_path):
    also = [(n, tmp_path / f"{n}.gguf") for n in ("theirs", "alien", "broken")]
    given = {"q2_k": tmp_path / "mine.gguf"}
    rows = tool.comparison(bench, ["q2_k", "q4_k"], given, also, stock_only=True)
    stock = "llama.cpp + imatrix"
    assert [(r.type_name, r.who) for r in rows] == [
        ("q2_k", stock), ("q2_k", "d2qconv"), ("q4_k", stock), ("q4_k", "theirs"), ("q3_k", "alien"),
        ("q2_k", "broken"),
    ]  # fmt: skip
    _, mine, _, theirs, alien, broken = rows
    assert mine.ratio == pytest.approx(0.5)
    assert mine.delta.mean == pytest.approx(-0.25)
    assert theirs.ratio == pytest.approx(2.0)
    assert theirs.delta.mean == pytest.approx(0.05)
    assert theirs.n_bytes == len("theirs.gguf")
    # No stock file of its type was made: measured, but compared with nothing.
    assert alien.score.kld.mean == pytest.approx(0.1)
    assert math.isnan(alien.ratio)
    assert alien.delta is None
    assert (broken.score, broken.note) == (None, "refused: cannot load / this")


def test_stock_only_converts_nothing(bench, monkeypatch):
    def convert(*_):
        raise AssertionError("converted")

    monkeypatch.setattr(tool.ours, "convert", convert)
    assert [r.who for r in tool.comparison(bench, ["q2_k"], {}, [], stock_only=True)] == [
        "llama.cpp + imatrix"
    ]
    with pytest.raises(AssertionError, match="converted"):
        tool.comparison(bench, ["q2_k"], {}, [], stock_only=False)
