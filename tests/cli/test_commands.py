"""Help, the exporters' list, reading packages, usage errors."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from d2qconv import cli
from d2qconv.console import Console
from d2qconv.errors import InputError, VerifyError
from d2qconv.exporters.discover import discover
from d2qconv.options import Calibration, Method
from d2qconv.run import CalibrationSpec, Recipe

COMMANDS = ("plan", "verify", "inspect", "evaluate", "exporters", "doctor", "demo", "to-fake", "to-gguf")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("fake")
def test_every_command_has_help_and_an_example(d2q, command):
    result = d2q(command, "--help")
    assert result.code == 0
    assert "Example:\n  d2qconv " in result.out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("fake")
def test_every_option_has_help(command):
    arguments = cli.make_app(Console())[command].assemble_argument_collection(parse_docstring=True)
    shown = [a for a in arguments if a.parse and a.show and not a.children]
    assert shown
    assert [a.name for a in shown if not a.parameter.help] == []


def test_root_help_lists_commands_and_exit_codes(d2q):
    out = d2q("--help").out
    for text in (
        "to-gguf",
        "plan",
        "verify",
        "inspect",
        "evaluate",
        "exporters",
        "demo",
        "--version",
        "Exit codes:",
    ):
        assert text in out
    for error in (InputError, VerifyError):
        assert f"  {error.exit_code}    " in out


def test_options_mirror_the_contracts():
    assert {f.name: f.default for f in fields(Recipe)} == {
        f.name: f.default for f in fields(Method) if f.name != "carrier"
    }
    renamed = {"calibration" if f.name == "source" else f.name: f.default for f in fields(CalibrationSpec)}
    assert renamed == {f.name: f.default for f in fields(Calibration)}
    assert set(get_args(get_type_hints(Method)["rounding"])) == {"gptq", "nearest"}


@pytest.mark.usefixtures("fake")
def test_a_third_partys_options_and_help(d2q):
    out = " ".join(d2q("to-fake", "--help").out.replace("│", " ").split())
    assert "Write a fake package." in out
    assert "--width INT Bits of a code, in ones. [default: 2]" in out
    assert "--fake-seed STR Has the name of a common option. [default: acorn]" in out
    assert "--loud --no-loud One that is true or false." in out


@pytest.mark.usefixtures("fake")
def test_exporters_lists_ready_ones(d2q):
    listed = {e["name"]: e for e in d2q("exporters", "--json").json["exporters"]}
    assert listed["fake"]["state"] == "ready"
    assert listed["fake"]["origin"] == "fake_exporter 1.0"
    assert listed["gguf"]["summary"]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise SystemError('boom [x]')", "SystemError: boom [x]"),
        ("def broken(:", "SyntaxError"),
        ("INFO = 3", "is a int, not an ExporterInfo"),
        ("from fake_exporter_b import *", "No module named"),
    ],
)
def test_a_broken_plug_in_is_listed_and_breaks_nothing(d2q, install, module, reason):
    install({"fake": "fake_exporter:INFO"}, module)
    result = d2q("exporters")
    assert result.code == 0
    assert reason in result.out
    assert "gguf" in result.out
    assert d2q("to-gguf", "--help").code == 0
    used = d2q("plan", "m", "--to", "fake")
    assert used.code == 7
    assert "broken" in used.err


def test_missing_library_gives_the_pip_command(d2q, install):
    install({"bare": "fake_exporter:NO_LIBRARY"})
    assert "needs no_such_lib: pip install 'd2qconv[bare]'" in d2q("exporters").out
    result = d2q("demo", "--to", "bare", "--output", "/dev/null")
    assert result.code == 2


def test_unknown_exporter(d2q):
    result = d2q("plan", "m", "--to", "gguff")
    assert result.code == 7
    assert "installed are: auto-round, gguf, gptq, mlx, onnx, safetensors" in result.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("nope",), 'Unknown command "nope"'),
        (("to-gguf",), "MODEL requires an argument"),
        (("to-gguf", "m", "--dampingg", "1"), "--damping"),
        (("to-gguf", "m", "--damping", "much"), '"much" into float'),
        (("to-gguf", "m", "--carrier", "pigeon"), "pigeon"),
        (("plan", "m"), "--to requires"),
        (("plan", "m", "--to", "gguf", "--nope"), "--nope"),
        (("verify", "no.gguf"), "no such file"),
    ],
)
def test_usage_errors_exit_2(d2q, words, text):
    result = d2q(*words)
    assert result.code == 2
    assert result.out == ""
    assert text in result.err
    assert d2q(*words, "--json").json["error"]["exit_code"] == 2


def test_usage_errors_point_to_the_right_help(d2q):
    assert d2q("to-gguf").err.endswith("→ see d2qconv to-gguf --help\n")
    assert d2q("nope").err.endswith("→ see d2qconv --help\n")


@pytest.fixture
def package(tmp_path):
    path = tmp_path / "m.fake"
    path.write_text("good")
    return path


@pytest.mark.usefixtures("fake")
def test_verify(d2q, package):
    result = d2q("verify", package)
    assert (result.code, result.err) == (0, "verify … 2 steps\n")
    assert "ok      equal [q2]: 1 of 1" in result.out
    assert result.out.endswith("2 checks passed, 0 failed\n")
    package.write_text("bad")
    result = d2q("verify", package, "--quiet")
    assert result.code == 6
    assert result.out == f"{package}: 1 checks passed, 1 failed\n"
    assert "equal [q2]: 1 of 1" in result.err


@pytest.mark.usefixtures("fake")
def test_verify_as_json(d2q, package):
    facts = d2q("verify", package, "--json").json
    assert facts["is_passed"] is True
    assert [c["name"] for c in facts["checks"]] == ["readable", "equal [q2]"]


@pytest.mark.usefixtures("fake")
def test_failed_verify_as_json_is_still_one_object(d2q, package):
    package.write_text("bad")
    result = d2q("verify", package, "--json")
    assert result.code == 6
    assert result.json["is_passed"] is False


@pytest.mark.usefixtures("fake")
def test_inspect(d2q, package):
    assert d2q("inspect", package).out == "layout      fake\nsizes.q2_k  3\nsizes.f32   4\nlist        1, 2\n"
    assert d2q("inspect", package, "--json").json["sizes"] == {"q2_k": 3, "f32": 4}


@pytest.mark.usefixtures("fake")
def test_format_is_needed_for_an_unknown_suffix(d2q, package):
    other = package.rename(package.with_suffix(".bin"))
    assert d2q("inspect", other).code == 2
    assert d2q("inspect", other, "--format", "fake").code == 0


def test_two_distributions_with_one_name_are_both_refused(install):
    install({"gguf": "fake_exporter:INFO"})
    states = [f.state for f in discover() if f.name == "gguf"]
    assert states == ["broken: 2 distributions give an exporter 'gguf'"] * 2


HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "gguf",
    "onnx",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "d2qconv.pipeline",
}


def test_import_is_light():
    code = "import sys, d2qconv.cli; d2qconv.cli.make_app(d2qconv.cli.Console()); print(*sys.modules)"
    assert "cyclopts" in modules_after(code)
    assert modules_after(code) & HEAVY == set()


@pytest.mark.parametrize("line", ["--help", "--version", "exporters", "doctor --help", "to-gguf --help"])
def test_what_only_tells_loads_nothing_heavy(line):
    code = f"import sys; from d2qconv.cli import main; main({line.split()!r}); print(); print(*sys.modules)"
    assert modules_after(code) & (HEAVY | {"msgspec", "hashlib"}) == set()


def modules_after(code):
    """Names of the modules that are loaded at the end, which the code prints on its last line."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_garbage_collector_runs_again():
    code = "import gc, d2qconv.cli; print(gc.isenabled(), (gc.disable(), d2qconv.startup.end(), gc.isenabled())[2])"
    assert modules_after(code) == {"True"}


def cpu_seconds(*words):
    """User and system time of a Python that runs these words."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def is_quick(line, most):
    """Whether it takes less than `most` s of CPU time, or as much longer as cyclopts takes longer than usual just now.

    cyclopts alone takes 0.10 s to import where this was measured; other work on a machine makes both longer.
    """
    ours, cyclopts = cpu_seconds("-m", "d2qconv", *line.split()), cpu_seconds("-c", "import cyclopts")
    return ours < most * max(1.0, cyclopts / 0.10)


@pytest.mark.parametrize(
    ("line", "most"), [("--help", 0.3), ("--version", 0.3), ("exporters", 0.3), ("doctor --help", 0.4)]
)
def test_what_only_tells_is_quick(line, most):
    assert any(is_quick(line, most) for _ in range(8))


def test_version(d2q):
    assert d2q("--version").out.strip() == cli.d2qconv.__version__


def test_no_traceback_when_the_reader_goes_away():
    command = f"{sys.executable} -m d2qconv to-gguf --help | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
