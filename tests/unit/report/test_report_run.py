"""The report of a whole run: what it says, the page as a browser shows it, and what `verify --deep` finds."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from browser import seen
from report_page import n_equal, require_fits, views

from d2qconv import pipeline
from d2qconv.calibrate.tokens import load_tokens
from d2qconv.errors import ExportError, InputError
from d2qconv.exporters.base import Check
from d2qconv.exporters.beside import page_of, report_of
from d2qconv.measure.reference import logits
from d2qconv.names import Role, TensorId
from d2qconv.pipeline import Job, convert, plan
from d2qconv.progress import Unwatched
from d2qconv.report.collect import RunFacts
from d2qconv.report.deep import deep_checks
from d2qconv.report.page import render
from d2qconv.report.schema import Report, decode, encode, read_report
from d2qconv.report.write import write_report
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.testing.models import make_checkpoint
from d2qconv.views.facts import outcome_facts
from d2qconv.views.outcome import outcome_pairs
from d2qconv.walk import model as walk_model
from d2qconv_gguf import INFO, GgufOptions
from d2qconv_gguf.reader import read_model

LLAMA = Path(__file__).parents[2] / "data" / "tiny-llama-5m"
TEXT = "The old man and the little girl walked down to the river, where a dog was waiting for a ball. "
#: What two equal runs differ in.
TIMES = ("digest", "memory", "stages", "seconds", "resumed_blocks")
#: As large as seeds may be: larger than what a report's other numbers are.
SEED = 5_000_000_000_000_000_000


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Files are not loaded in llama.cpp."""
    with pytest.MonkeyPatch.context() as patch:
        passed = [
            Check("not <looked> at", "1 & 2", is_passed=True),
            Check("left", "out", True, is_skipped=True),
        ]
        patch.setattr("d2qconv_gguf.exporter.verify_file", lambda *_: passed)
        patch.setattr("d2qconv_gguf.exporter.require_same_function", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Job:
    """A run of a random model of two blocks."""
    folder = tmp_path_factory.mktemp("report")
    sizes = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32}
    model = make_checkpoint(folder / "small", "llama", vocab=8192, tokenizer=LLAMA, **sizes)
    text = folder / "text.txt"
    text.write_text("".join(f"Story {i}: {TEXT}" for i in range(80)))
    return Job(
        str(model), INFO, GgufOptions(type="q4_0"), folder / "m.gguf", device="cpu",
        recipe=Recipe(asymmetry=0.25, dsq=True, refine=0),
        calibration=CalibrationSpec(str(text), 20, 24, SEED), is_reported=True, command=("d2qconv", "to-gguf", "a b"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def facts() -> list[RunFacts]:
    """What `made` knew when it wrote its report."""
    return []


@pytest.fixture(scope="module")
def made(asked, facts) -> pipeline.Outcome:
    def keep(run, watch):
        facts.append(run)
        return write_report(run, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_report", keep)
        outcome = convert(plan(asked), Unwatched())
    assert outcome is not None
    assert outcome.report == report_of(asked.output)
    return outcome


@pytest.fixture
def report(made) -> Report:
    return read_report(made.report)


@pytest.fixture
def exporter():
    return INFO.load(GgufOptions())


def test_it_says_what_was_made(asked, made, report):
    assert report.quality.kld == made.kld
    assert report.quality.n_tokens == sum(report.quality.spread.counts) == 2 * 23
    assert report.fingerprint == made.fingerprint
    (file,) = report.package.files
    assert (file.name, file.n_bytes) == ("m.gguf", asked.output.stat().st_size)
    assert file.sha256 == hashlib.sha256(asked.output.read_bytes()).hexdigest()
    assert report.command == list(asked.command)
    assert report.options["recipe"]["asymmetry"] == 0.25
    assert report.options["calibration"]["source"] == "text.txt"
    assert report.options["calibration"]["seed"] == SEED
    wanted = {"carrier": None, "also": [], "requantize": False, "revision": None, "device": "cpu"}
    assert wanted.items() <= report.options.items()
    assert report.package.written == report.package.tensor_bytes == sum(t.n_bytes for t in report.tensors)
    assert str(asked.output.parent) not in made.report.read_text()
    assert {"python", "torch", "d2qconv", "gguf"} <= set(report.environment.versions)
    assert {"read", "calibrate", "quantize", "write", "verify"} <= set(report.stages)
    assert [m.kind for m in report.memory] == ["host"]


def test_every_tensor_has_its_errors_and_its_bytes_as_written(report):
    assert all(t.written == t.n_bytes for t in report.tensors)
    coded = [t for t in report.tensors if t.type not in ("f32", "f16", "bf16")]
    assert len(coded) == 2 * 7 + 1
    assert all(0 < t.weight_error < 0.1 and 0 < t.output_error < 0.1 for t in coded)
    assert all(t.weight_error is None for t in report.tensors if t not in coded)
    assert {(f.name, f.block) for f in report.folds} == {("column_scale", 0), ("column_scale", 1)}


def test_contributions_are_those_of_models_that_are_quantized_up_to_a_part(asked, report):
    """Measured again by the whole models, built of the file's tensors and the source's."""
    planned = plan(asked)
    source, held = planned.source, read_model(asked.output)
    tokens = load_tokens(
        asked.calibration, planned.checkpoint, source, device="cpu", on_step=lambda _: None
    ).held_out
    p = logits(source, tokens)[:, :-1].double().log_softmax(-1)

    def kld(n_blocks: int, *, with_output: bool = False) -> float:
        """Of the model whose embedding and first blocks are the file's, and its head if that is asked for."""

        def is_held(t: TensorId) -> bool:
            return t.role is Role.EMBED or (t.block is not None and t.block < n_blocks)

        mixed = {t: held.tensors[t] if is_held(t) else dense for t, dense in source.tensors.items()}
        head = held if with_output else source
        mixed[TensorId(Role.HEAD)] = head.tensors[TensorId(Role.EMBED)]
        model = replace(source, tensors=mixed, is_tied=False)
        q = logits(model, tokens)[:, :-1].double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    rises = [kld(0), kld(1), kld(2), kld(2, with_output=True)]
    c = report.contribution
    found = torch.tensor([c.embedding, *c.blocks, c.output], dtype=torch.float64).cumsum(0)
    assert torch.allclose(found, torch.tensor(rises, dtype=torch.float64), rtol=2e-3, atol=1e-7)
    assert c.total == pytest.approx(report.quality.kld, rel=1e-9)


def test_a_run_that_goes_on_says_the_same_but_for_times(asked, made, monkeypatch):
    again = replace(asked, output=asked.output.with_name("again.gguf"))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(walk_model.Walk, "_output", die)
        with pytest.raises(KeyboardInterrupt):
            convert(plan(again), Unwatched())
    assert not report_of(again.output).exists()
    with monkeypatch.context() as patch:
        patch.setattr(walk_model.BlockWalk, "quantize", die)
        outcome = convert(plan(again), Unwatched())
    assert (made.resumed_blocks, outcome.resumed_blocks, outcome.n_blocks) == (0, 2, 2)
    assert [read_report(r).resumed_blocks for r in (made.report, outcome.report)] == [0, 2]
    said = "2 of 2 blocks were done by an earlier process"
    for shown, is_said in ((made, False), (outcome, True)):
        assert (said in page_of(shown.report).read_text()) is is_said
        assert (said in str(list(outcome_pairs(shown)))) is is_said
        assert outcome_facts(shown)["resumed_blocks"] == 2 * is_said
    first, second = (json.loads(r.read_text()) for r in (made.report, outcome.report))
    for found in (first, second):
        for key in TIMES:
            del found[key]
        for block in found["blocks"]:
            seconds = block.pop("seconds")
            assert (seconds > 0) == (found is first)
        for package in (found["package"],):
            del package["name"], package["files"][0]["name"]
    assert first == second


def test_a_report_that_could_not_be_written_is_without_quantizing_again(asked, made, monkeypatch):
    full = replace(asked, output=asked.output.with_name("full.gguf"))

    def fill(*_, **__):
        raise ExportError("No space left on device")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("d2qconv.report.write.write_both", fill)
        with pytest.raises(ExportError):
            convert(plan(full), Unwatched())
    assert full.output.read_bytes() == asked.output.read_bytes()
    assert not report_of(full.output).exists()
    with monkeypatch.context() as patch:
        patch.setattr(walk_model.BlockWalk, "quantize", die)
        outcome = convert(plan(replace(full, overwrite=True)), Unwatched())
    assert read_report(outcome.report).quality == read_report(made.report).quality
    assert not full.work_folder.exists()


def test_a_run_whose_model_is_broken_has_its_report(made, facts, tmp_path):
    """Numbers that are not finite are null in JSON, and a dash on the page."""
    (run,) = facts
    broken = replace(run.outcome, kld=math.nan, perplexity=math.inf, perplexity_source=1e30)
    job = replace(run.planned.job, output=tmp_path / "m.gguf")
    lost = replace(run.result.blocks[0], error=math.nan)
    blocks = (lost, *run.result.blocks[1:])
    where = write_report(
        replace(
            run,
            outcome=broken,
            planned=replace(run.planned, job=job),
            result=replace(run.result, blocks=blocks),
        ),
        Unwatched(),
    )
    report = read_report(where)
    assert (report.quality.kld, report.quality.perplexity, report.blocks[0].error) == (None, None, None)
    assert report.quality.perplexity_source == 1e30
    page = page_of(where).read_text()
    assert '<span id="kld">–</span>' in page
    assert "source 1.00e+30" in page


def test_a_report_that_cannot_be_read_back_tells_how_to_go_on(made, facts, tmp_path, monkeypatch):
    (run,) = facts

    def refuse(*_):
        raise InputError("not a report of d2qconv: Expected `float`", todo="name a PACKAGE.report.json")

    monkeypatch.setattr("d2qconv.report.write.decode", refuse)
    moved = replace(run.planned, job=replace(run.planned.job, output=tmp_path / "m.gguf"))
    with pytest.raises(ExportError, match="its report could not be made") as found:
        write_report(replace(run, planned=moved), Unwatched())
    assert "--overwrite" in found.value.todo
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_in_the_way_is_refused_before_any_work(asked, made):
    other = replace(asked, output=asked.output.with_name("other.gguf"))
    report_of(other.output).write_text("mine")
    with pytest.raises(InputError, match="the report: the output exists"):
        convert(plan(other), Unwatched())
    assert report_of(other.output).read_text() == "mine"
    assert not other.output.exists()
    report_of(other.output).unlink()


@pytest.fixture(scope="module")
def shown(made, tmp_path_factory):
    """The page as Chromium has it, on a phone and on a desk."""
    return views(page_of(made.report).read_bytes(), tmp_path_factory.mktemp("browser"))


def test_a_browser_shows_the_numbers_of_the_report(report, made, shown):
    for view in shown:
        assert n_equal(made.report.read_bytes(), view) > 150
        data, tables, charts = view["data"], view["tables"], view["charts"]
        assert float(data["kld"][1]) == pytest.approx(report.quality.kld, rel=1e-3)
        outputs = {t.id: t.output_error for t in report.tensors}
        assert dict(charts["error-map"])["1 down"] == outputs["blk.1.down.weight"]
        assert tables["predicted"][0][:2] == ["m.gguf", "gguf"]
        assert charts["position"] == [["m.gguf", report.quality.kld]]
        assert data["checks_passed"][0] == 1
        assert view["verdicts"][:2] == ["ok", "not <looked> at: 1 & 2"]
        assert view["command"] == "d2qconv to-gguf 'a b'"


def test_a_number_that_is_another_is_noticed(made, shown):
    (view, *_) = shown
    changed = json.loads(json.dumps(view))
    changed["tables"]["tensors"][3][6] *= 1.0001
    with pytest.raises(AssertionError, match=r"errors: .* on the page, .* in the report"):
        n_equal(made.report.read_bytes(), changed)


def test_a_phone_shows_it_without_scrolling_sideways_and_the_style_is_let_through(shown):
    for view in shown:
        require_fits(view)


def test_what_stands_in_a_report_is_text_on_the_page(report, made, tmp_path):
    """Names are anybody's: of the checkpoint, of the files, of the checks."""
    bad = "</script><script>document.title='x'</script><img src=x onerror=alert(1)>\u2028\"'&"
    evil = msgspec.structs.replace(
        report,
        source=msgspec.structs.replace(report.source, name=bad, license=bad),
        tensors=[msgspec.structs.replace(t, id=bad, stored_as=bad, role=bad) for t in report.tensors],
        package=msgspec.structs.replace(report.package, name=bad, format=bad),
        stages={bad: 1.0},
    )
    page = render(evil, encode(evil))
    assert page.count(b"<script") == page.count(b"</script") == 1
    assert b"<img" not in page
    script = """return {title: document.title, n: document.images.length,
      name: document.querySelector("h1").textContent, json: document.getElementById("report").textContent};"""
    (view,) = seen(page, [375], script, tmp_path)
    assert view["title"] == f"{bad} · d2qconv report"
    assert (view["n"], view["name"]) == (0, bad)
    assert json.loads(view["json"])["source"]["name"] == bad


def test_bytes_and_page_are_those_of_the_report_alone(report, made):
    data = made.report.read_bytes()
    assert encode(report) == data
    assert render(decode(data, ""), data) == page_of(made.report).read_bytes()
    policy = re.search(rb'Content-Security-Policy" content="([^"]*)"', page_of(made.report).read_bytes())[1]
    assert policy.startswith(b"default-src &#x27;none&#x27;; style-src &#x27;sha256-")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"report": 3}, "version 3"),
        ({"tensors": 3}, "Expected `array`"),
        ({"seconds": None}, "Expected `float`"),
        ({"blocks": []}, "contributions of other blocks"),
    ],
)
def test_what_is_no_report_is_refused(made, change, why):
    text = json.dumps(json.loads(made.report.read_text()) | change)
    with pytest.raises(InputError, match=re.escape(why)):
        decode(text.encode(), "here")


@pytest.fixture
def unread(report):
    """An exporter that gives metadata as they should be, at once."""

    class Unread:
        facts = {"provenance": {f"d2qconv.{k}": v for k, v in report.package.provenance.items()}}  # noqa: RUF012

        def inspect(self, path):
            return self.facts

    return Unread()


def failed(checks):
    return {c.name for c in checks if not c.is_passed}


def test_a_whole_package_passes_every_deep_check(asked, made, exporter):
    checks = deep_checks(asked.output, made.report, exporter, asked.model)
    assert failed(checks) == set()
    assert [c.name for c in checks if not c.is_skipped] == [
        "report", "page", "files", "provenance", "bytes of tensors", "source",
    ]  # fmt: skip
    (skipped,) = [c for c in deep_checks(asked.output, made.report, exporter) if c.is_skipped]
    assert skipped.name == "source"


def test_another_source_is_found(asked, made, exporter, tmp_path):
    sizes = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32}
    other = make_checkpoint(tmp_path / "small", "llama", vocab=8192, tokenizer=LLAMA, seed=1, **sizes)
    assert failed(deep_checks(asked.output, made.report, exporter, str(other))) == {"source"}


@pytest.mark.parametrize(
    ("which", "names"), [("package", {"files"}), ("report", {"report", "page"}), ("page", {"page"})]
)
def test_a_changed_byte_anywhere_is_found(asked, made, unread, tmp_path, which, names):
    """At random places of each file; where the file cannot be read any more, that is said."""
    paths = {"package": asked.output, "report": made.report, "page": page_of(made.report)}
    copies = {key: tmp_path / path.name for key, path in paths.items()}
    for key, path in paths.items():
        copies[key].write_bytes(path.read_bytes())
    whole = bytearray(copies[which].read_bytes())
    dice = random.Random(which)
    for _ in range(25):
        place, old = dice.randrange(len(whole)), None
        old = whole[place]
        whole[place] = old ^ (1 << dice.randrange(8))
        copies[which].write_bytes(whole)
        try:
            found = failed(deep_checks(copies["package"], copies["report"], unread))
        except InputError:
            found = {"report"} if which == "report" else set()
        assert found & names, f"byte {place} of the {which}"
        whole[place] = old


def test_a_renamed_file_is_the_same_file_and_a_further_file_of_its_set_is_not(asked, made, unread, tmp_path):
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(asked.output.read_bytes())
    assert failed(deep_checks(renamed, made.report, unread)) == set()
    (tmp_path / "other-00002-of-00002.gguf").write_bytes(b"x")
    assert failed(deep_checks(renamed, made.report, unread)) == {"files"}


def test_a_package_that_says_something_else_of_itself_is_found(asked, made, unread):
    unread.facts["provenance"]["d2qconv.recipe"] = "another"
    assert failed(deep_checks(asked.output, made.report, unread)) == {"provenance"}
    del unread.facts["provenance"]["d2qconv.fingerprint"]
    (check,) = [c for c in deep_checks(asked.output, made.report, unread) if not c.is_passed]
    assert "does not say its fingerprint" in check.detail
