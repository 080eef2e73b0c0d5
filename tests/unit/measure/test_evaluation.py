"""An evaluation with a runtime that computes what it is told, against the same numbers in one go."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import small_source

from d2qconv import evaluation, scoring
from d2qconv.arch.bind import bind
from d2qconv.checkpoint.digest import content_digest
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import InputError, PluginError, RunError, VerifyError
from d2qconv.evaluation import Evaluation, Target
from d2qconv.exporters.base import ExporterInfo
from d2qconv.measure.metrics import Divergence, paired
from d2qconv.measure.reference import logits
from d2qconv.progress import Unwatched
from d2qconv.testing.models import make_checkpoint

CONTEXT = 16
#: What the runtimes do to the source's logits, by the package's text.
SCALES = {"good": 0.9, "bad": 0.5}


@dataclass(frozen=True)
class Options:
    """None."""


class FakeRuntime:
    """Logits of the source, scaled; the package's name says by what."""

    name, version, settings, max_length = "fake", "1", "scaled", 32

    def __init__(self, path, model):
        self.path, self.model = path, model
        self.n_vocab = model.dims.vocab
        self.bos = None

    def encode(self, text):
        return [ord(letter) % self.n_vocab for letter in text]

    def logits(self, tokens, first):
        found = logits(self.model, torch.from_numpy(tokens)).numpy()[:, first:]
        return found * SCALES.get(self.path.read_text(), np.nan)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        CLOSED.append(self.path.name)


LOADED: list[str] = []
CLOSED: list[str] = []


class FakeExporter:
    model = None
    source = "s"

    def __init__(self, options):
        pass

    def inspect(self, path):
        return {"context_length": 32, "provenance": {"d2qconv.source_sha256": self.source}}

    def runtime(self, path, length):
        LOADED.append(path.name)
        return FakeRuntime(path, self.model)


class Mute:
    def __init__(self, options):
        pass

    def inspect(self, path):
        raise VerifyError("says nothing")


def info(target="FakeExporter"):
    return ExporterInfo("fake", "a fake", Options, f"{__name__}:{target}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = Path(small_source().path)
    made = tmp_path_factory.mktemp("evaluation") / "m"
    return make_checkpoint(made, "llama", layers=2, hidden=64, ffn=64, heads=2, head_dim=32, tokenizer=source)


@pytest.fixture(scope="module")
def model(folder):
    FakeExporter.model = bind(open_checkpoint(str(folder)))
    return FakeExporter.model


@pytest.fixture
def asked(tmp_path, folder, model):
    (tmp_path / "p.fake").write_text("good")
    np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, model.dims.vocab, 200))
    return Evaluation(
        package=Target(tmp_path / "p.fake", info()),
        source=str(folder),
        text=str(tmp_path / "t.npy"),
        n_chunks=5,
        context=CONTEXT,
    )


def wanted(model, tokens, scale):
    """The judged positions of all chunks at once."""
    found = logits(model, tokens)[:, CONTEXT // 2 : -1].reshape(-1, model.dims.vocab)
    divergence = Divergence()
    divergence.add(found, found * scale, tokens[:, CONTEXT // 2 + 1 :].reshape(-1))
    return divergence


def chunks_of(text):
    return torch.from_numpy(np.load(text)[: 5 * CONTEXT].astype(np.int64)).view(5, CONTEXT)


@pytest.mark.parametrize("pieces", [None, (1, 3)])
def test_the_numbers_are_those_of_all_positions_at_once(asked, model, monkeypatch, pieces):
    if pieces:
        # Two chunks a group, three rows a piece.
        monkeypatch.setattr(scoring, "GROUP_BYTES", 2 * 4 * CONTEXT * model.dims.hidden)
        monkeypatch.setattr(scoring, "PIECE_LOGITS", 3 * model.dims.vocab)
    got = evaluation.evaluate(asked, Unwatched())
    divergence = wanted(model, chunks_of(asked.text), 0.9)
    statistics = divergence.statistics()
    assert got.judged.divergence is not None
    assert got.judged.divergence.kl.value == pytest.approx(statistics.kl.value, rel=1e-5)
    assert got.judged.divergence.p99 == pytest.approx(statistics.p99, rel=1e-5)
    assert got.judged.perplexity.value == pytest.approx(divergence.perplexity.value, rel=1e-6)
    assert got.judged.divergence.perplexity_source.value == pytest.approx(
        divergence.perplexity_source.value, rel=1e-6
    )
    assert got.text.n_judged == divergence.n_tokens == 5 * 7


def test_what_is_needed_to_repeat_it(asked, folder, model):
    got = evaluation.evaluate(asked, Unwatched())
    assert got.source is not None
    assert got.source.digest == content_digest(
        open_checkpoint(str(folder)).config, model.tensors, lambda *_: None
    )
    text = Path(asked.text)
    assert got.text.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    tokens = chunks_of(text).numpy().astype("<i8").tobytes()
    assert got.text.tokens_sha256 == hashlib.sha256(tokens).hexdigest()
    assert (got.text.name, got.text.n_chunks, got.text.context) == ("t.npy", 5, CONTEXT)
    assert got.judged.package.sha256 == hashlib.sha256(b"good").hexdigest()
    assert got.judged.package.n_bytes == 4
    assert (got.judged.package.runtime, got.judged.package.runtime_version) == ("fake", "1")


def test_a_baseline_is_measured_at_the_same_tokens(asked, model, tmp_path):
    other = tmp_path / "o.fake"
    other.write_text("bad")
    got = evaluation.evaluate(replace(asked, baseline=Target(other, info())), Unwatched())
    good, bad = (wanted(model, chunks_of(asked.text), scale) for scale in (0.9, 0.5))
    assert got.difference is not None
    assert got.difference.value == pytest.approx(paired(good, bad).value, rel=1e-5)
    assert got.difference.error == pytest.approx(paired(good, bad).error, rel=1e-4)
    assert got.difference.value < -5 * got.difference.error
    assert got.log_ratio is not None
    assert got.log_ratio.value == pytest.approx(
        math.log(good.perplexity.value / bad.perplexity.value), rel=1e-4
    )
    assert CLOSED[-2:] == ["o.fake", "p.fake"]


def test_without_a_source_only_the_perplexity(asked, tmp_path, model):
    text = tmp_path / "t.txt"
    text.write_text("A text whose letters are its tokens, and no more than that. ")
    got = evaluation.evaluate(replace(asked, source=None, text=str(text), n_chunks=None), Unwatched())
    assert got.source is None
    assert got.judged.divergence is None
    tokens = torch.tensor([ord(letter) % model.dims.vocab for letter in text.read_text()])[:48].view(3, 16)
    assert got.text.n_chunks == 3
    good = wanted(model, tokens, 0.9)
    assert got.judged.perplexity.value == pytest.approx(good.perplexity.value, rel=1e-6)
    assert (got.difference, got.log_ratio) == (None, None)
    other = tmp_path / "o.fake"
    other.write_text("bad")
    two = replace(asked, source=None, text=str(text), n_chunks=None, baseline=Target(other, info()))
    got = evaluation.evaluate(two, Unwatched())
    bad = wanted(model, tokens, 0.5)
    ratio = torch.cat(bad.log_q) - torch.cat(good.log_q)
    assert got.difference is None
    assert got.log_ratio.value == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert got.log_ratio.error == pytest.approx(float(ratio.std() / len(ratio) ** 0.5), rel=1e-4)


def test_without_a_text_the_source_is_sampled(asked):
    drawn = replace(asked, text=None, n_chunks=2)
    got, again = (evaluation.evaluate(drawn, Unwatched()) for _ in range(2))
    other = evaluation.evaluate(replace(drawn, seed=1), Unwatched())
    assert (got.text.name, got.text.sha256, got.text.n_chunks) == ("self", "", 2)
    assert got.text.tokens_sha256 == again.text.tokens_sha256 != other.text.tokens_sha256
    assert got.judged == again.judged


def test_the_sources_tokenizer_cuts_the_text(asked, tmp_path, folder):
    text = tmp_path / "t.txt"
    text.write_text("The little dog ran over the hill. " * 20)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(
        text.read_text(), add_special_tokens=False
    )
    got = evaluation.evaluate(replace(asked, text=str(text), n_chunks=None), Unwatched())
    assert got.text.n_chunks == len(ids.ids) // CONTEXT
    tokens = np.array(ids.ids[: got.text.n_chunks * CONTEXT], dtype="<i8")
    assert got.text.tokens_sha256 == hashlib.sha256(tokens.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"source": None, "text": None}, InputError, "nothing to read"),
        ({"source": None, "revision": "main"}, InputError, "belongs to a source"),
        ({"text": "no/such/file"}, InputError, "no such file"),
        ({"context": 33}, InputError, "longer than the 32"),
        ({"context": 3}, InputError, "at least 4 tokens"),
        ({"n_chunks": 0}, InputError, "at least one chunk"),
        ({"text": None, "n_chunks": 0}, InputError, "at least one chunk"),
        ({"seed": -1}, InputError, "a seed is between"),
        ({"device": "abacus"}, InputError, "no such device"),
    ],
)
def test_what_is_refused(asked, changes, kind, said):
    LOADED.clear()
    with pytest.raises(kind, match=said):
        evaluation.evaluate(replace(asked, **changes), Unwatched())
    if "context" in changes:
        # A runtime would have made room for it.
        assert not LOADED


def test_a_package_of_other_weights_is_told(asked, model, folder, monkeypatch):
    got = evaluation.evaluate(asked, Unwatched())
    assert got.judged.package.source_sha256 == "s"
    assert len(got.warnings) == 1
    assert "p.fake says that it was made from another model than m" in got.warnings[0]
    digest = content_digest(open_checkpoint(str(folder)).config, model.tensors, lambda *_: None)
    monkeypatch.setattr(FakeExporter, "source", digest)
    assert not evaluation.evaluate(asked, Unwatched()).warnings


def test_a_package_of_another_model_is_refused(asked, tmp_path):
    other = make_checkpoint(tmp_path / "m", "llama", layers=1, vocab=300)
    with pytest.raises(InputError, match="512 tokens in its vocabulary"):
        evaluation.evaluate(replace(asked, source=str(other)), Unwatched())


def test_tokens_of_another_vocabulary_are_refused(asked, tmp_path):
    np.save(tmp_path / "t.npy", np.full(64, 512))
    with pytest.raises(InputError, match="512 is outside the vocabulary of 512"):
        evaluation.evaluate(asked, Unwatched())


def test_logits_that_are_not_finite(asked):
    asked.package.path.write_text("broken")
    with pytest.raises(RunError, match="fake gives logits that are not finite"):
        evaluation.evaluate(asked, Unwatched())


def test_an_exporter_that_runs_nothing(asked):
    package = Target(asked.package.path, info("Mute"))
    with pytest.raises(PluginError, match="cannot run its packages"):
        evaluation.evaluate(replace(asked, package=package), Unwatched())
