"""Finding exporters; broken entry points through the command line are in tests/cli."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from d2qconv.errors import InputError, PluginError
from d2qconv.exporters import discover as module
from d2qconv.exporters.base import ExporterInfo
from d2qconv.exporters.discover import GROUP, Found, Sampler, discover, find, first_ready, for_file


@dataclass(frozen=True)
class Options:
    """None."""


class NoDataclass:
    """Options of a careless exporter."""


@dataclass(frozen=True)
class Unresolvable:
    """Options whose types cannot be looked up."""

    x: NoSuchName  # type: ignore[name-defined]  # noqa: F821


class Runs:
    """An exporter's sampling half."""

    def sample(self, path: Path, prompt: str) -> str:
        """Nothing."""
        return prompt


def info(name: str, **more) -> ExporterInfo:
    return ExporterInfo(name, "a", Options, "x:y", **more)


GOOD = info("good", suffix=".good")
NEEDY = info("a-needy", requires=("no_such_lib", "json"), extra="needy", suffix=".needy")
RENAMED = info("other")
SPACED = info("Not A Name")
BARE = ExporterInfo("bare", "a", NoDataclass, "x:y")
LOST = ExporterInfo("lost", "a", Unresolvable, "x:y")


@pytest.fixture
def put(monkeypatch):
    def points(**values):
        made = [
            EntryPoint(name.replace("_", "-"), f"{__name__}:{value}", GROUP) for name, value in values.items()
        ]
        monkeypatch.setattr(module, "entry_points", lambda group: made if group == GROUP else [])

    return points


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("good", "RENAMED", "called 'good' and its ExporterInfo 'other'"),
        ("Not A Name", "SPACED", "no command name"),
        ("bare", "BARE", "no dataclass"),
        ("lost", "LOST", "NoSuchName"),
        ("good", "put", "not an ExporterInfo"),
        ("good", "nothing_here", "AttributeError"),
    ],
)
def test_faults_are_kept_with_their_reason(put, name, value, reason):
    put(**{name: value})
    (found,) = discover()
    assert found.info is None
    assert not found.is_ready
    assert reason in found.state
    with pytest.raises(PluginError, match="broken"):
        find(name, (found,))


def test_sorted_by_name_and_the_first_ready_one(put):
    put(good="GOOD", a_needy="NEEDY")
    found = discover()
    assert [f.name for f in found] == ["a-needy", "good"]
    assert found[0].state == "needs no_such_lib: pip install 'd2qconv[needy]'"
    assert first_ready(found) is GOOD
    assert find("a-needy", found) is NEEDY
    with pytest.raises(PluginError, match="a-needy needs no_such_lib"):
        first_ready(found[:1])
    with pytest.raises(PluginError, match="none is installed"):
        first_ready(())


def test_unknown_name():
    with pytest.raises(PluginError, match="installed are: good"):
        find("x", (Found("good", "", GOOD),))


def test_for_file_wants_exactly_one():
    found = (Found("good", "", GOOD), Found("a-needy", "", NEEDY), Found("broken", "", None, "it is"))
    assert for_file(Path("m.good"), found) is GOOD
    with pytest.raises(InputError, match="0 exporters"):
        for_file(Path("m.other"), found)
    with pytest.raises(InputError, match="2 exporters"):
        for_file(Path("m.good"), (*found, Found("again", "", info("again", suffix=".good"))))


def test_ours_is_found():
    (ours,) = (f for f in discover() if f.name == "gguf")
    assert ours.info is not None
    assert ours.origin.startswith("d2qconv ")


def test_sampling_is_an_optional_ability():
    assert isinstance(Runs(), Sampler)
    assert not isinstance(NoDataclass(), Sampler)
