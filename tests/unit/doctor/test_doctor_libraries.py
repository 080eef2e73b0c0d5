"""Extras and runtimes: which libraries are here, too old, broken or missing."""

import pytest

from d2qconv.doctor import libraries
from d2qconv.doctor.libraries import Wanted, findings, is_older, runtime_state, states, wanted
from d2qconv.doctor.probe import Seen
from d2qconv.errors import PluginError
from d2qconv.exporters.base import Runtime

LINES = (
    "cyclopts>=5",
    "torch>=2.6; extra == 'quantize'",
    'onnx-ir>=0.1.9 ; extra == "onnx"',
    "d2qconv[quantize]; extra == 'all'",
    "torch>=2.6; extra == 'all'",
    "plain; python_version >= '3.11' and extra == 'onnx'",
)


@pytest.fixture
def here(monkeypatch):
    """Versions by pip's record, to be filled."""
    found = {}
    monkeypatch.setattr(libraries, "installed", lambda name: found.get(name, ""))
    return found


def test_requirements_by_extra():
    assert wanted(LINES) == (
        Wanted("cyclopts", "5", ""),
        Wanted("onnx-ir", "0.1.9", "onnx"),
        Wanted("plain", "", "onnx"),
        Wanted("torch", "2.6", "quantize"),
    )


def test_the_projects_own_metadata():
    found = {(w.extra, w.distribution): w.least for w in wanted()}
    assert found["quantize", "torch"]
    assert ("", "cyclopts") in found
    assert not any(extra == "all" for extra, _ in found)


@pytest.mark.parametrize(
    ("found", "least", "older"),
    [
        ("1.28.0", "1.28", False),
        ("1.28", "1.28.0", False),
        ("1.9", "1.28", True),
        ("2.13.0+cpu", "2.6", False),
        ("0.17", "", False),
        ("5.0rc1", "5", False),
    ],
)
def test_versions(found, least, older):
    assert is_older(found, least) is older


def test_states_and_findings(here):
    here.update({"cyclopts": "5.4.0", "torch": "2.5.1", "onnx-ir": "1.1"})
    seen = {
        "cyclopts": Seen("5.4.0"),
        "torch": Seen("2.5.1"),
        "onnx_ir": Seen(error="OSError: libz.so: no such file"),
    }
    assert states(wanted(LINES), seen) == {
        "base": {"cyclopts": "5.4.0"},
        "onnx": {"onnx-ir": "1.1, broken: OSError: libz.so: no such file", "plain": "missing"},
        "quantize": {"torch": "2.5.1, too old: needs 2.6"},
    }
    found = findings(wanted(LINES), seen)
    assert [(f.subject, f.error) for f in found] == [
        ("onnx-ir", PluginError),
        ("extra onnx", None),
        ("torch", PluginError),
    ]
    assert found[1].todo == "pip install 'd2qconv[onnx]'"
    assert found[2].todo == "pip install --upgrade 'd2qconv[quantize]'"


def test_runtimes(here):
    here.update({"lib-a": "1.0"})
    both = Runtime("both", ("lib-a", "lib-b"), "verify")
    assert runtime_state(both, (), {}) == "lib-a 1.0, lib-b missing: pip install 'd2qconv[verify]'"
    one = Runtime("one", ("lib-a",))
    seen = {"lib_a": Seen("1.0", "", {"providers": "CPU"})}
    assert runtime_state(one, (), seen) == "lib-a 1.0, providers CPU"
    assert Runtime("none", ("x", "y")).pip == "pip install x y"


def test_a_wheel_of_another_name_counts(here):
    """onnxruntime-gpu brings the module onnxruntime."""
    runtime = Runtime("ONNX Runtime", ("onnxruntime",), "verify-onnx")
    assert runtime_state(runtime, (), {"onnxruntime": Seen("1.30")}) == "onnxruntime 1.30"
