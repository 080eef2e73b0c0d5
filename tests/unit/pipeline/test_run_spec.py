"""What makes two runs the same, and what is refused before one begins."""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

import d2qconv
from d2qconv.errors import InputError, PlanError
from d2qconv.exporters.base import Carrier
from d2qconv.fold.corrections import FoldRecord
from d2qconv.gather import calibration_tokens, read_weights
from d2qconv.job import Also, check_places
from d2qconv.outcome import _carried
from d2qconv.pipeline import (
    Job,
    _check_work_dir,
    _open_store,
    _run_spec,
    _source,
    choose_device,
    plan,
)
from d2qconv.progress import Unwatched
from d2qconv.run import CalibrationSpec, Recipe, RunSpec, check_recipe, describe
from d2qconv.team import Team
from d2qconv_gguf import INFO, GgufOptions

MODEL = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
SPEC = RunSpec(
    "0",
    "2.0",
    "gguf",
    "m",
    Recipe(),
    CalibrationSpec(),
    "t",
    {"blk.0.q.weight": "q2_k"},
    "bias",
    "none",
    "cpu",
)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1"},
        {"torch": "3.0"},
        {"exporter": "onnx"},
        {"model": "n"},
        {"recipe": Recipe(damping=0.02)},
        {"recipe": Recipe(asymmetry=0.25)},
        {"recipe": Recipe(refit=False)},
        {"calibration": CalibrationSpec(seed=1)},
        {"tokens": "u"},
        {"storage": {"blk.0.q.weight": "q3_k"}},
        {"carrier": "none"},
        {"last_pass": "model"},
        {"device": "cuda"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_that_matters_changes_the_fingerprint(change):
    fields = dict(vars(SPEC))
    assert RunSpec(**fields).fingerprint() == SPEC.fingerprint()
    assert RunSpec(**(fields | change)).fingerprint() != SPEC.fingerprint()


def job(tmp_path, **changes):
    return replace(Job(str(MODEL), INFO, GgufOptions(), tmp_path / "m.gguf", device="cpu"), **changes)


def weights(asked):
    return read_weights(_source(plan(asked)), Unwatched())


def test_a_copied_model_is_the_same_model_and_a_changed_weight_another(tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(MODEL, copy, copy_function=shutil.copyfile)
    digest = weights(job(tmp_path))
    assert weights(job(tmp_path, model=str(copy))) == digest
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights(job(tmp_path, model=str(copy))) != digest


@pytest.mark.parametrize(
    "recipe",
    [Recipe(damping=0), Recipe(damping=-1), Recipe(damping=float("nan")), Recipe(asymmetry=1.5),
     Recipe(asymmetry=float("nan")), Recipe(dac_gate=-1), Recipe(polish=-1), Recipe(refine=-2)],
)  # fmt: skip
def test_impossible_numbers_are_refused(recipe):
    with pytest.raises(InputError, match=r"must be|a gate is|less than"):
        check_recipe(recipe)


def test_contradictions_are_refused_by_the_plan(tmp_path):
    with pytest.raises(InputError, match="no shift to carry"):
        plan(job(tmp_path, recipe=Recipe(dac=False), carrier=Carrier.RANK1))


def test_a_shift_of_the_final_norm_needs_a_head_of_its_own(tmp_path):
    with pytest.raises(PlanError, match="the head is the embedding"):
        plan(job(tmp_path, recipe=Recipe(dac_final=True)))
    assert not plan(job(tmp_path, recipe=Recipe(dac_final=True, rotation="hadamard"))).desc.is_tied


@pytest.mark.parametrize("device", ["meta", "tpu", "cuda:99"])
def test_devices_that_cannot_work_are_refused(device):
    with pytest.raises(InputError, match=device):
        choose_device(device)


@pytest.mark.parametrize("work_dir", [".", "model"])
def test_a_work_directory_must_not_swallow_the_source(tmp_path, work_dir):
    shutil.copytree(MODEL, tmp_path / "model", copy_function=shutil.copyfile)
    output = tmp_path.with_name("elsewhere") / "m.gguf"
    asked = job(tmp_path, model=str(tmp_path / "model"), output=output, work_dir=tmp_path / work_dir)
    with pytest.raises(InputError, match="emptied at the end"):
        _check_work_dir(plan(asked))


FOLDER = replace(INFO, name="folder", is_folder=True)


@pytest.mark.parametrize(
    ("output", "also", "work_dir", "match"),
    [
        # The output and the work directory.
        ("out", [], "out", r"--work-dir \S+: is the same as the package -o"),
        ("w/out", [], "w", r"-o \S+: lies in the work directory"),
        ("w/a/out", [], "w", r"-o \S+: lies in the work directory"),
        ("out", [], "out/work", r"--work-dir \S+: lies in the package -o"),
        ("link/out", [], "real/out/work", r"--work-dir \S+: lies in the package -o"),
        ("out", [], "real/../out/work", r"--work-dir \S+: lies in the package -o"),
        ("file.gguf", [], "file.gguf/work", r"--work-dir \S+: lies in the package -o"),
        # Two packages.
        ("out", ["out"], None, "is the same as the package -o"),
        ("out", ["out/p"], None, r"--also folder=\S+/out/p: lies in the package -o"),
        ("p/out", ["p"], None, r"-o \S+: lies in the package --also folder"),
        ("link/out", ["real/out"], None, "is the same as the package -o"),
        ("out", ["p", "p"], None, "the package --also"),
        ("out", ["p", "p/q"], None, r"--also folder=\S+/p/q: lies in the package --also"),
        ("out", ["p/q", "p"], None, r"--also folder=\S+/p/q: lies in the package --also"),
        ("out", ["a", "p", "real/p", "link/p"], None, "the package --also"),
        # Another package and the work directory.
        ("out", ["w"], "w", r"--work-dir \S+: is the same as the package --also"),
        ("out", ["w/p"], "w", r"--also folder=\S+: lies in the work directory"),
        ("out", ["p"], "p/w", r"--work-dir \S+: lies in the package --also"),
        ("out", ["out.work"], None, r"--work-dir \S+: is the same as the package --also"),
        ("out", ["out.work/p"], None, r"--also folder=\S+: lies in the work directory"),
    ],
)
def test_places_in_each_other_are_refused_before_the_model_is_opened(tmp_path, output, also, work_dir, match):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    asked = job(
        tmp_path,
        model=str(tmp_path / "no model"),
        exporter=INFO if output.endswith(".gguf") else FOLDER,
        output=tmp_path / output,
        also=tuple(Also(FOLDER, tmp_path / path) for path in also),
        work_dir=work_dir and tmp_path / work_dir,
    )
    with pytest.raises(InputError, match=match) as caught:
        plan(asked)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["m.gguf", "m.gguf.work/i.gguf", "w/i.gguf", "m.gguf.report.json"])
def test_an_importance_matrix_has_a_place_of_its_own(tmp_path, name):
    asked = job(
        tmp_path,
        output=tmp_path / "m.gguf",
        options=GgufOptions(type="q4_0", imatrix=tmp_path / name),
        work_dir=tmp_path / "w" if name.startswith("w/") else None,
        is_reported=True,
    )
    with pytest.raises(InputError, match=r"is the same as|lies in"):
        plan(asked)
    plan(replace(asked, options=GgufOptions(type="q4_0", imatrix=tmp_path / "i.gguf")))


def test_relative_names_are_compared_as_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = job(tmp_path, exporter=FOLDER, output=Path("out"), work_dir=tmp_path / "out" / "work")
    with pytest.raises(InputError, match="the package -o out"):
        check_places(asked)


@pytest.mark.parametrize("path", [".", "..", "/", "a/.."])
def test_a_package_needs_a_name(tmp_path, path):
    for asked in (job(tmp_path, output=Path(path)), job(tmp_path, also=(Also(FOLDER, Path(path)),))):
        with pytest.raises(InputError, match="no name"):
            plan(asked)


def test_a_name_that_is_no_text_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"\\udcff.*not UTF-8") as caught:
        check_places(job(tmp_path, output=tmp_path / "m\udcff.gguf"))
    str(caught.value).encode()


def test_a_calibration_whose_name_is_no_text_is_refused(tmp_path):
    (tmp_path / "c\udce9.txt").write_text("text")
    with pytest.raises(InputError, match="not UTF-8"):
        plan(job(tmp_path, calibration=CalibrationSpec(str(tmp_path / "c\udce9.txt"), 4, 16)))


def test_places_beside_each_other_are_taken(tmp_path):
    also = tuple(Also(FOLDER, tmp_path / name) for name in ("out-onnx", "ou", "out2", "out.workers"))
    asked = job(tmp_path, exporter=FOLDER, output=tmp_path / "out", also=also)
    check_places(asked)
    check_places(replace(asked, work_dir=tmp_path / "w"))
    assert asked.work_folder == tmp_path / "out.work"


def test_sampled_tokens_are_kept_and_another_job_in_the_same_folder_is_said(tmp_path, monkeypatch):
    notes = []

    class Notes(Unwatched):
        def note(self, text):
            notes.append(text)

    spec = CalibrationSpec("self", 4, 16)
    first = plan(job(tmp_path, calibration=spec))
    alone = Team.alone()
    tokens = calibration_tokens(_source(first), spec, 0, "content", alone, Notes())
    monkeypatch.setattr("d2qconv.gather.load_tokens", None)
    assert calibration_tokens(_source(first), spec, 0, "content", alone, Notes()).digest == tokens.digest
    with ExitStack() as stack:
        _open_store(first, _run_spec(first, tokens, "content"), alone, stack, Notes()).write(
            "input", {}, None
        )
    other = replace(first, job=replace(first.job, recipe=Recipe(dsq=True)))
    with ExitStack() as stack:
        _open_store(other, _run_spec(other, tokens, "content"), alone, stack, Notes())
    assert "1 finished parts of another job were discarded" in notes[0]


def test_what_was_carried_is_said_from_what_was_done():
    folds = [FoldRecord("mean_shift", i, "x", r, "E", 0.5) for i, r in enumerate((0.01, 0.03))]
    assert _carried("mean_shift", folds, "rank-1") == "rank-1; residual at most 3.00e-02 (E)"
    assert _carried("column_scale", folds, "rows of up") == "none"
    assert describe(Recipe("nearest", dsq=False, dac=False)) == "nearest"
