"""Conversions as the command line sees them; the pipeline is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from d2qconv import errors, pipeline
from d2qconv.budget import Budget, Peaks
from d2qconv.commands.demo import DEMO_MODEL
from d2qconv.errors import PlanError, Refusal, RunError, refuse
from d2qconv.exporters.base import Carrier, Check, FloatType, TargetPlan, TensorPlan
from d2qconv.fold.corrections import FoldRecord
from d2qconv.names import Part, Role, TensorId
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.walk.activations import Place
from d2qconv.walk.last_pass import LastPass
from d2qconv.walk.memory import Footprint, MemoryPart, Phase
from d2qconv.walk.rounding import TensorError

pytestmark = pytest.mark.usefixtures("fake", "calm")

TENSORS = (
    TensorPlan(TensorId(Role.EMBED), "tok", (8, 4), FloatType.F16, 64, "as [asked]"),
    TensorPlan(TensorId(Role.Q, 0), "q.0", (4, 4), FloatType.F32, 64),
    TensorPlan(TensorId(Role.Q, 1), "q.1", (4, 4), FloatType.F32, 64),
    TensorPlan(TensorId(Role.GATE, 0, Part.BIAS), "g.b", (4,), FloatType.F32, 16),
)
TARGET = TargetPlan("fakery", TENSORS, Carrier.RANK1, "by hand", ("fake.cpp",), warnings=("mind [the] gap",))


GIB = 1 << 30
FOOTPRINT = Footprint(
    Place.DISK,
    (MemoryPart("weights", 3 * GIB, (Phase.SWEEP,)),),
    (MemoryPart("libraries", 2 * GIB, (Phase.SWEEP, Phase.PACKAGE)),),
    9 * GIB,
    Budget(4 * GIB, 5 * GIB),
)


def outcome(job: pipeline.Job) -> pipeline.Outcome:
    """What the pipeline gives back."""
    return pipeline.Outcome(
        path=job.output,
        n_bytes=4_271_104,
        bits_per_weight=2.75,
        kld=0.125,
        perplexity_source=10.0,
        perplexity=11.5,
        same_top=0.75,
        n_tokens=640,
        checks=(Check("decoded values", "7 of 7", True),),
        folds=(
            FoldRecord("mean_shift", 0, "rank-1", 0.01, "of the norm"),
            FoldRecord("mean_shift", 1, "rank-1", 0.02, "of the norm"),
        ),
        errors=(TensorError("blk.0.q.weight", 0.1, 0.01), TensorError("blk.1.q.weight", 0.1, 0.04)),
        loads_in=("fake.cpp",),
        fingerprint="f" * 64,
        seconds=130.0,
        peaks=Peaks(int(2.5 * GIB), int(2.75 * GIB), GIB),
        footprint=FOOTPRINT,
        last_pass="40 steps, KL divergence 0.2500 → 0.1250",
        kld_unrefined=0.25,
    )


@pytest.fixture
def calm(tmp_path, monkeypatch):
    """Jobs end at once, in an empty folder; the list holds the jobs that were asked for."""
    jobs = []

    def convert(planned, watch):
        job = planned.job
        watch.stage("quantize", 2)
        watch.step(1, "blk.0")
        watch.note("a note [with] brackets")
        job.output.write_text("good")
        return outcome(job)

    def plan(job, _opened):
        jobs.append(job)

        asked = job

        class Planned:
            job = asked

            class checkpoint:  # noqa: N801
                source = job.model

            class desc:  # noqa: N801
                class arch:  # noqa: N801
                    id = "fake3"

            target = TARGET
            device = "cpu"
            n_weights = 64
            bits_per_weight = 26.0
            footprint = FOOTPRINT
            last_pass = LastPass("model", 40, 1, 7)
            candidates = allocation = None

        return Planned

    monkeypatch.setattr(pipeline, "convert", convert)
    monkeypatch.setattr(pipeline, "plan", plan)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return jobs


def fail_with(monkeypatch, error):
    def convert(planned, watch):
        raise error

    monkeypatch.setattr(pipeline, "convert", convert)


def test_defaults_are_those_of_the_contracts(d2q, calm):
    assert d2q("to-fake", "models/Some-8B").code == 0
    job = calm[0]
    assert job.recipe == Recipe()
    assert job.calibration == CalibrationSpec()
    assert (job.model, job.output, job.carrier, job.overwrite) == (
        "models/Some-8B",
        Path("Some-8B.fake"),
        None,
        False,
    )
    assert (job.options.width, job.options.seed, job.options.loud) == (2, "acorn", False)


def test_every_option_arrives(d2q, calm):
    words = "to-fake org/m -o x.bin --overwrite --width 3 --fake-seed oak --loud --revision v1 --device cpu"
    words += (
        " --calibration t.txt --sequences 5 --length 6 --seed 7 --work-dir w --rounding nearest --no-refit"
    )
    words += " --dsq --dac --own 3 --polish 1 --damping 0.5 --asymmetry 0.75 --carrier bias"
    words += (
        " --rotation walsh --asymmetry-form gptaq --order natural --norm-scales --value-scales --dac-gate 0.1"
    )
    words += " --dac-final --attention-weights --refine 9 --refine-scope block"
    words += " --max-gpu-mem 24GiB --max-host-mem 30GB"
    assert d2q(*words.split()).code == 0
    job = calm[0]
    assert job.recipe == Recipe(
        rounding="nearest",
        refit=False,
        rotation="walsh",
        asymmetry=0.75,
        asymmetry_form="gptaq",
        polish=1,
        order="natural",
        dsq=True,
        norm_scales=True,
        value_scales=True,
        dac=True,
        dac_gate=0.1,
        dac_final=True,
        attention_weights=True,
        damping=0.5,
        refine=9,
        refine_scope="block",
    )
    assert not [f.name for f in fields(Recipe) if getattr(job.recipe, f.name) == f.default]
    assert (job.max_gpu_mem, job.max_host_mem) == ("24GiB", "30GB")
    assert job.calibration == CalibrationSpec("t.txt", 5, 6, 7, 3)
    assert (job.options.width, job.options.seed, job.options.loud) == (3, "oak", True)
    assert (job.revision, job.device, job.work_dir, job.overwrite) == ("v1", "cpu", Path("w"), True)
    assert (job.output, job.carrier) == (Path("x.bin"), Carrier.BIAS)


def test_summary_says_what_was_made(d2q):
    result = d2q("to-fake", "m")
    for text in (
        "0.1250 nats",
        "11.500 (source 10.000)",
        "40 steps, KL divergence 0.2500 → 0.1250",
        "75.0%",
        "blk.1.q.weight",
        "2 blocks, residual ≤ 2.0e-02",
    ):
        assert text in result.out
    assert "ok      decoded values: 7 of 7" in result.out
    assert "2 min 10 s" in result.out
    assert "a note [with] brackets" in result.err


def test_memory_predicted_and_measured(d2q):
    plan = d2q("plan", "m", "--to", "fake").out
    assert "GPU memory    at most about 3.0 GiB, budget 4.0 GiB\n" in plan
    assert "host memory   at most about 2.0 GiB, budget 5.0 GiB\n" in plan
    assert "activations   on disk, 9.0 GiB\n" in plan
    facts = d2q("plan", "m", "--to", "fake", "--json").json["memory"]
    assert (facts["activations"], facts["disk_bytes"]) == ("disk", 9 * GIB)
    assert (facts["gpu"]["peak"], facts["gpu"]["budget"], facts["gpu"]["phase"]) == (
        3 * GIB,
        4 * GIB,
        "sweep",
    )
    done = d2q("to-fake", "m").out
    assert "peak 2.5 GiB, with the allocator's reserve 2.8 GiB; predicted 3.0 GiB" in done
    assert "peak 1.0 GiB; predicted 2.0 GiB" in done
    assert d2q("to-fake", "m", "--json", "--overwrite").json["memory"] == {
        "activations": "disk",
        "gpu_allocated": int(2.5 * GIB),
        "gpu_reserved": int(2.75 * GIB),
        "gpu_predicted": 3 * GIB,
        "host": GIB,
        "is_host_with_files": False,
        "host_predicted": 2 * GIB,
        "disk_bytes": 9 * GIB,
    }


def test_quiet_prints_the_last_line_alone(d2q):
    result = d2q("to-fake", "m", "--quiet")
    assert result.out == "m.fake: 4.27 MB, 2.75 bits per weight without metadata, KL divergence 0.1250\n"
    assert result.err == ""


def test_json_is_one_object_and_nothing_else(d2q):
    result = d2q("to-fake", "m", "--json")
    assert result.err == ""
    assert result.json["path"] == "m.fake"
    assert (result.json["n_bytes"], result.json["kld"], result.json["n_tokens"]) == (4_271_104, 0.125, 640)
    checks = [{"name": "decoded values", "detail": "7 of 7", "is_passed": True, "is_skipped": False}]
    assert result.json["checks"] == checks
    assert [f["block"] for f in result.json["folds"]] == [0, 1]


@pytest.mark.parametrize("words", [("plan", "m", "--to", "fake"), ("to-fake", "m", "--dry-run")])
def test_plan_by_role(d2q, words):
    result = d2q(*words)
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()]
    assert ["q.weight", "2", "4×4", "f32", "32.00", "128", "B"] in rows
    assert ["gate.bias", "1", "4", "f32", "32.00", "16", "B"] in rows
    for text in ("as [asked]", "rank1: by hand", "mind [the] gap", "208 B of tensors, 26.00 bits per weight"):
        assert text in result.out
    assert not list(Path().iterdir())


def test_plan_of_every_tensor_with_the_exporters_options(d2q, calm):
    result = d2q("plan", "m", "--width", "3", "--to", "fake", "--all")
    assert calm[0].options.width == 3
    assert "blk.1.q.weight   q.1        4×4    f32 " in result.out


def test_plan_as_json(d2q):
    plan = d2q("plan", "m", "--to", "fake", "--json").json
    assert (plan["carrier"], plan["n_bytes"], plan["architecture"]) == ("rank1", 208, "fake3")
    assert plan["tensors"][1] == {
        "id": "blk.0.q.weight",
        "stored_as": "q.0",
        "shape": [4, 4],
        "type": "f32",
        "n_bytes": 64,
        "note": "",
    }


def test_refusals_are_all_shown(d2q, monkeypatch):
    def plan(job, _opened):
        refuse([Refusal("here", "too [wide]"), Refusal("there", "too long", "cut it")])

    monkeypatch.setattr(pipeline, "plan", plan)
    result = d2q("plan", "m", "--to", "fake")
    assert result.code == 3
    assert result.out == ""
    assert "here: too [wide]" in result.err
    assert "there: too long\n  → cut it" in result.err


ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.D2qError)]


@pytest.mark.parametrize("kind", [e for e in ERRORS if e is not errors.D2qError])
def test_exit_code_of_each_error(d2q, monkeypatch, kind):
    fail_with(monkeypatch, kind("it [broke]", where="blk.0", todo="mend it"))
    result = d2q("to-fake", "m", "--json")
    assert result.code == kind.exit_code
    assert result.err == "d2qconv: blk.0: it [broke]\n  → mend it\n"
    assert result.json["error"] == {
        "kind": kind.__name__,
        "message": "blk.0: it [broke]\n  → mend it",
        "exit_code": kind.exit_code,
    }


def test_a_bug_is_one_line_and_exit_1(d2q, monkeypatch):
    fail_with(monkeypatch, ZeroDivisionError("oh"))
    result = d2q("to-fake", "m")
    assert result.code == 1
    assert result.err.startswith("d2qconv: ZeroDivisionError: oh\n  → this is a bug")


def test_traceback_on_request(capsys, monkeypatch):
    from d2qconv.cli import main

    monkeypatch.setenv("D2QCONV_TRACEBACK", "1")
    fail_with(monkeypatch, RunError("stopped"))
    assert main(["to-fake", "m"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt(d2q, monkeypatch, by):
    def convert(planned, watch):
        os.kill(os.getpid(), by)
        for _ in range(10**7):
            pass

    monkeypatch.setattr(pipeline, "convert", convert)
    handler = signal.getsignal(signal.SIGTERM)
    # A process that a shell starts in the background ignores SIGINT from birth.
    at_birth = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = d2q("to-fake", "m")
    finally:
        signal.signal(signal.SIGINT, at_birth)
    assert result.code == 130
    assert result.err == "d2qconv: interrupted; the same command goes on where this one stopped\n"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_existing_output_is_refused_before_the_work(d2q, calm):
    Path("m.fake").write_text("old")
    result = d2q("to-fake", "m")
    assert result.code == 2
    assert "--overwrite" in result.err
    assert Path("m.fake").read_text() == "old"
    assert calm == []


@pytest.mark.parametrize("output", [".", "missing/x.fake", "/dev/null", "/proc/x.fake"])
def test_impossible_output_is_refused_before_the_work(d2q, calm, output):
    result = d2q("to-fake", "m", "-o", output, "--overwrite")
    assert result.code == 2
    assert output in result.err or "missing" in result.err
    assert calm == []


def test_no_partial_output_after_a_failure(d2q, monkeypatch):
    from d2qconv.exporters.package import atomic_output

    def convert(planned, watch):
        with atomic_output(planned.job.output, overwrite=planned.job.overwrite) as path:
            path.write_text("half")
            raise PlanError("no")

    monkeypatch.setattr(pipeline, "convert", convert)
    Path("m.fake").write_text("old")
    assert d2q("to-fake", "m", "--overwrite").code == 3
    assert [p.name for p in Path().iterdir()] == ["m.fake"]
    assert Path("m.fake").read_text() == "old"


def test_demo_converts_the_model_of_the_package_and_samples(d2q, calm):
    result = d2q("demo", "--to", "fake", "--prompt", "Once")
    assert result.code == 0
    assert calm[0].model == str(DEMO_MODEL)
    assert (DEMO_MODEL / "config.json").is_file()
    assert "Once there was a fake." in result.out


def test_demo_as_json_is_one_object(d2q):
    assert d2q("demo", "--to", "fake", "--json").json["sample"].endswith("there was a fake.")


def test_a_process_that_has_imported_pydantic_takes_the_same_commands(tmp_path):
    """cyclopts then checks defaults too; compressed-tensors and others import it."""
    words = ["to-gguf", str(DEMO_MODEL), "-o", str(tmp_path / "m.gguf"), "--dry-run", "--json"]
    code = f"import pydantic, sys; from d2qconv.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
