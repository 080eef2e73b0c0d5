"""Reports on the command line: asked for or not, made again, compared; the words that ask for a job again."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import pytest
import torch
from report_samples import sample

from d2qconv import pipeline
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.commands.again import command_words
from d2qconv.errors import InputError, RunError
from d2qconv.job import check_places
from d2qconv.options import Settings
from d2qconv.report.compare import differences, pareto
from d2qconv.report.schema import encode
from d2qconv_gguf import INFO, GgufOptions

pytestmark = pytest.mark.usefixtures("fake")


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The jobs that were asked for; they end at once, in an empty folder."""
    found = []

    def plan(job, _opened):
        found.append(job)
        raise RunError("enough")

    monkeypatch.setattr(pipeline, "plan", plan)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return found


def test_a_report_is_written_unless_it_is_not_wanted(d2q, jobs):
    d2q("to-fake", "m")
    d2q("to-fake", "m", "--no-report")
    d2q("demo", "--to", "fake")
    assert [job.is_reported for job in jobs] == [True, False, True]


def test_a_report_in_the_way_is_refused_before_the_work(d2q, jobs):
    Path("m.fake.report.html").write_text("mine")
    result = d2q("to-fake", "m")
    assert result.code == 2
    assert "--no-report" in result.err
    assert jobs == []
    d2q("to-fake", "m", "--overwrite")
    d2q("to-fake", "m", "--no-report")
    assert len(jobs) == 2
    assert Path("m.fake.report.html").read_text() == "mine"


def test_a_package_at_the_place_of_the_report_is_refused(d2q, jobs):
    d2q("to-fake", "m", "--also", "fake=m.fake.report.json")
    with pytest.raises(InputError, match="is the same as the package"):
        check_places(jobs[0])
    check_places(replace(jobs[0], is_reported=False))


WORDS = "to-fake org/m -o x.fake --width 3 --fake-seed oak --loud --calibration t.txt --sequences 5 --seed 7"
WORDS += " --no-refit --dsq --damping 0.5 --carrier bias --revision v1 --device cpu"


@pytest.mark.parametrize("words", [WORDS, "to-fake org/m", "to-fake org/m --also fake=other.fake --polish 0"])
def test_the_words_of_a_report_ask_for_the_same_job(d2q, jobs, words):
    d2q(*words.split(), "--overwrite", "--work-dir", "w", "--max-host-mem", "30GB")
    command = jobs[0].command
    assert command[0] == "d2qconv"
    d2q(*command[1:])
    # Each call makes a class of its own for the options.
    given, again = (asdict(job.options) for job in jobs)
    assert given == again
    plain = {"overwrite": False, "work_dir": None, "max_host_mem": None, "options": None}
    assert replace(jobs[0], **plain) == replace(jobs[1], **plain)


def test_the_words_of_a_report_name_no_folder(d2q, jobs, tmp_path):
    text, model = tmp_path / "secret" / "t.txt", tmp_path / "secret" / "model"
    model.mkdir(parents=True)
    text.touch()
    d2q(
        "to-fake",
        model,
        "-o",
        tmp_path / "x y.fake",
        "--calibration",
        text,
        "--also",
        f"fake={tmp_path}/z.fake",
    )
    joined = shlex.join(jobs[0].command)
    assert joined == "d2qconv to-fake model -o 'x y.fake' --also fake=z.fake --calibration t.txt"


@pytest.mark.parametrize("folder", ["run=3", "a=b/c=d"])
def test_the_words_of_a_report_name_no_folder_with_an_equals_sign(d2q, jobs, tmp_path, folder):
    secret = tmp_path / folder
    (secret / "model").mkdir(parents=True)
    (secret / "t.txt").touch()
    words = ("--calibration", secret / "t.txt", "--also", f"fake={secret}/z.fake", "--fake-seed", "a=b/c")
    d2q("to-fake", secret / "model", "-o", secret / "x.fake", *words)
    joined = "d2qconv to-fake model -o x.fake --also fake=z.fake --calibration t.txt --fake-seed a=b/c"
    assert shlex.join(jobs[0].command) == joined


def test_a_file_that_is_not_there_yet_has_no_folder_in_the_words_of_a_report(tmp_path):
    options = GgufOptions(imatrix=tmp_path / "later.gguf", tensor_type=("v=q4_k",))
    words = command_words(INFO, "org/m", options, Settings(), tmp_path / "m.gguf")
    assert words[5:] == ("--tensor-type", "v=q4_k", "--imatrix", "later.gguf")


def test_a_page_is_made_again(d2q, tmp_path):
    report = tmp_path / "m.gguf.report.json"
    report.write_bytes(encode(sample("m.gguf", 1000, 0.5)))
    result = d2q("report", report, "--json")
    page = tmp_path / "m.gguf.report.html"
    assert result.json == {"path": str(page), "n_bytes": page.stat().st_size}
    made = page.read_bytes()
    assert d2q("report", report).code == 2
    assert d2q("report", report, "--overwrite").code == 0
    assert page.read_bytes() == made


def test_a_report_that_was_changed_is_not_drawn(d2q, tmp_path):
    whole, changed = tmp_path / "a.report.json", tmp_path / "b.report.json"
    whole.write_bytes(encode(sample("a", 1000, 0.5)))
    changed.write_bytes(encode(sample("b", 2000, 0.25)).replace(b'"kld": 0.25', b'"kld": 0.15'))
    page = tmp_path / "page.html"
    for files in ([changed], [whole, changed]):
        result = d2q("report", *files, "-o", page)
        assert (result.code, "the report was changed" in result.err) == (2, True)
        assert str(changed) in result.err
        assert not page.exists()


def test_several_reports_are_set_side_by_side(d2q, tmp_path):
    names = []
    for name, n_bytes, kld in (("b", 2000, 0.25), ("a", 1000, 0.5), ("c", 3000, 0.375)):
        names.append(tmp_path / f"{name}.report.json")
        names[-1].write_bytes(encode(sample(name, n_bytes, kld)))
    assert d2q("report", *names).code == 2
    page = tmp_path / "all.html"
    assert d2q("report", *names, "-o", page).code == 0
    text = page.read_text()
    assert [text.index(f'<th scope="row">{name}<') for name in "abc"] == sorted(
        text.index(f'<th scope="row">{name}<') for name in "abc"
    )
    assert 'data-value="0.5">0.500<' in text
    assert text.count("<circle") == 3


def test_what_is_smaller_and_closer_than_all_others_is_on_the_front():
    reports = [
        sample("a", 1000, 0.5),
        sample("b", 2000, 0.25),
        sample("c", 3000, 0.375),
        sample("d", 2000, 0.5),
    ]
    assert [r.package.name for r in pareto(reports)] == ["a", "b"]


def test_figures_that_cannot_be_compared_are_said_to_be():
    one = sample("a", 1000, 0.5)
    assert differences([one, sample("b", 2000, 0.25)]) == []
    other = msgspec.structs.replace(
        one,
        quality=msgspec.structs.replace(one.quality, held_out_sha256="other"),
        source=msgspec.structs.replace(one.source, sha256="other"),
    )
    assert len(differences([one, other])) == 2


def test_sequences_of_the_last_pass_alone_do_not_make_figures_incomparable():
    """Q2 samples some for its last pass, Q4 has none; both are measured on the same ones."""
    rows = torch.arange(24).reshape(6, 4)
    plain = CalibrationTokens(rows[:4], rows[4:5], "")
    own, other = replace(plain, own=rows[5:]), replace(plain, held_out=rows[5:])
    found = [
        msgspec.structs.replace(
            report,
            tokens_sha256=tokens.digest,
            quality=msgspec.structs.replace(report.quality, held_out_sha256=tokens.held_out_digest),
        )
        for report, tokens in zip(
            [sample(name, 1000, 0.5) for name in "abc"], (plain, own, other), strict=True
        )
    ]
    assert found[0].tokens_sha256 != found[1].tokens_sha256
    assert differences(found[:2]) == []
    (why,) = differences(found)
    assert "not measured on the same tokens" in why


def test_a_report_of_another_version_is_one_clear_error(d2q, tmp_path):
    path = tmp_path / "x.report.json"
    path.write_text('{"report": 1, "digest": "", "whatever": 3}')
    result = d2q("report", path)
    assert (result.code, "a report of version 1, and this d2qconv reads version 2" in result.err) == (2, True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"report": 2}', "\xff", "[" * 100_000])
def test_what_is_no_report_is_one_clear_error(d2q, tmp_path, text):
    path = tmp_path / "x.report.json"
    path.write_text(text, encoding="latin-1")
    result = d2q("report", path)
    assert (result.code, "not a report of d2qconv" in result.err) == (2, True)
    assert not (tmp_path / "x.report.html").exists()


def test_options_of_a_deep_look_want_one(d2q, tmp_path):
    path = tmp_path / "m.fake"
    path.write_text("good")
    result = d2q("verify", path, "--source", "m")
    assert (result.code, "without --deep" in result.err) == (2, True)
    result = d2q("verify", path, "--deep")
    assert (result.code, "there is no such report" in result.err) == (2, True)


def test_a_deep_look_adds_its_checks(d2q, tmp_path):
    path = tmp_path / "m.fake"
    path.write_text("good")
    report = sample("m.fake", 4, 0.5, content=b"good")
    (tmp_path / "m.fake.report.json").write_bytes(encode(report))
    result = d2q("verify", path, "--deep", "--json")
    names = [c["name"] for c in result.json["checks"]]
    assert names == ["readable", "equal [q2]", "report", "page", "files", "provenance", "source"]
    # The fake exporter knows of no provenance.
    assert [c["name"] for c in result.json["checks"] if not c["is_passed"]] == ["provenance"]
    assert result.code == 6


def test_progress_as_json_goes_to_standard_error_beside_json(d2q, tmp_path, monkeypatch):
    path = tmp_path / "m.fake"
    path.write_text("good")
    result = d2q("verify", path, "--json", "--progress", "json")
    assert result.json["is_passed"]
    events = [json.loads(line) for line in result.err.splitlines()]
    assert [e["event"] for e in events] == ["stage", "step"]
    assert events[1]["done"] == 1
    assert d2q("verify", path, "--progress", "none").err == ""
