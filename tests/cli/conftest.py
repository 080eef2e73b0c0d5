"""A third-party exporter `fake`, installed for one test, and a pipeline that answers at once."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from d2qconv import importing
from d2qconv.cli import main

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from d2qconv.errors import PluginError
from d2qconv.exporters.base import Check, ExporterInfo

@dataclass(frozen=True)
class FakeOptions:
    '''How it is stored.

    width: bits of a code,
        in ones.
    seed: has the name of a common option.
    loud: one that is true or false.
    '''

    width: int = 2
    seed: str = "acorn"
    loud: bool = False

class FakeExporter:
    def __init__(self, options):
        self.options = options

    def verify(self, path, progress):
        progress(1, 2, "half")
        is_good = path.read_text() == "good"
        return [Check("readable", "all of it", True), Check("equal [q2]", "1 of 1", is_good)]

    def inspect(self, path):
        return {"layout": "fake", "sizes": {"q2_k": 3, "f32": 4}, "list": [1, 2]}

    def sample(self, path, prompt):
        return " there was a fake."

INFO = ExporterInfo("fake", "a fake package", FakeOptions, "fake_exporter:FakeExporter", suffix=".fake")
NO_LIBRARY = ExporterInfo("bare", "nothing", FakeOptions, "x:y", requires=("no_such_lib",), extra="bare")
"""


@dataclass
class Result:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, read as the one JSON object that it must be."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are of floats; none is opened to find that out."""
    monkeypatch.setattr(importing, "open_source", lambda _job: None)


@pytest.fixture
def d2q(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run one command line in this process."""

    def run(*words: str | Path) -> Result:
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)

    return run


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a distribution with entry points `name = value` and a module on the path."""

    def put(points: Mapping[str, str], module: str = MODULE, name: str = "fake_exporter") -> None:
        site = tmp_path / "site"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "\n".join(f"{key} = {value}" for key, value in points.items())
        (info / "entry_points.txt").write_text(f"[d2qconv.exporters]\n{lines}\n")
        (site / f"{name}.py").write_text(textwrap.dedent(module))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setitem(__import__("sys").modules, name, None)
        monkeypatch.delitem(__import__("sys").modules, name)

    return put


@pytest.fixture
def fake(install: Callable[..., None]) -> None:
    """The exporter `fake`."""
    install({"fake": "fake_exporter:INFO"})
