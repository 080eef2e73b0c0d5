"""Which exporters are installed.

An exporter is an entry point of the group `d2qconv.exporters` whose object is an `ExporterInfo`. Ours use the same
door as anybody else's. An entry point that cannot be used is kept, with the reason, so that it can be shown; it
never breaks another exporter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol, get_type_hints, runtime_checkable

from d2qconv.errors import InputError, PluginError
from d2qconv.exporters.info import ExporterInfo

GROUP = "d2qconv.exporters"


@runtime_checkable
class Sampler(Protocol):
    """An exporter that can also run its packages. Optional: `demo` uses it if it is there."""

    def sample(self, path: Path, prompt: str) -> str:
        """Continue `prompt` with the package at `path`, in its own runtime, always in the same way.

        Raises PluginError with the pip command if the runtime is not installed.
        """


@dataclass(frozen=True)
class Found:
    """One entry point. origin: distribution and version. info: None if it is broken, `reason` then says why."""

    name: str
    origin: str
    info: ExporterInfo | None
    reason: str = ""

    @property
    def is_ready(self) -> bool:
        """Whether the exporter can be used here and now."""
        return self.info is not None and not self.info.missing()

    @property
    def state(self) -> str:
        """`ready`, or what stands in the way."""
        if self.info is None:
            return f"broken: {self.reason}"
        absent = self.info.missing()
        return f"needs {', '.join(absent)}: pip install 'd2qconv[{self.info.extra}]'" if absent else "ready"


def discover() -> tuple[Found, ...]:
    """Every exporter entry point, by name."""
    found = [_look(point) for point in entry_points(group=GROUP)]
    names = [f.name for f in found]
    return tuple(
        sorted(
            (
                replace(
                    f, info=None, reason=f"{names.count(f.name)} distributions give an exporter {f.name!r}"
                )
                if names.count(f.name) > 1
                else f
                for f in found
            ),
            key=lambda f: (f.name, f.origin),
        )
    )


def find(name: str, found: Collection[Found]) -> ExporterInfo:
    """The exporter of that name; raises PluginError."""
    for candidate in found:
        if candidate.name == name:
            if candidate.info is None:
                raise PluginError(f"the exporter is broken: {candidate.reason}", where=name)
            return candidate.info
    raise PluginError(f"no exporter is called {name!r}", todo=f"installed are: {_names(found)}")


def first_ready(found: Collection[Found]) -> ExporterInfo:
    """The first exporter, by name, that can be used here; raises PluginError."""
    for candidate in found:
        if candidate.info is not None and candidate.is_ready:
            return candidate.info
    states = "; ".join(f"{f.name} {f.state}" for f in found) or "none is installed"
    raise PluginError(f"no exporter can be used: {states}")


def for_file(path: Path, found: Collection[Found]) -> ExporterInfo:
    """The exporter of a package: by a folder's manifest, or by a file's suffix; raises InputError."""
    if path.is_dir():
        from d2qconv.exporters.manifest import MANIFEST, read_manifest

        if not (path / MANIFEST).is_file():
            raise InputError(
                f"a folder without {MANIFEST}",
                where=str(path),
                todo="name the package's file, or its format with --format",
            )
        return find(read_manifest(path).format, found)
    fits = [f.info for f in found if f.info and _is_named_so(path, f.info)]
    if len(fits) != 1:
        raise InputError(
            f"{len(fits)} exporters write packages with such a name",
            where=str(path),
            todo=f"name the format with --format (installed are: {_names(found)})",
        )
    return fits[0]


def _is_named_so(path: Path, info: ExporterInfo) -> bool:
    return bool(info.suffix) and not info.is_folder and path.name.endswith(info.suffix)


def _names(found: Collection[Found]) -> str:
    return ", ".join(f.name for f in found) or "none"


def _look(point: EntryPoint) -> Found:
    origin = _origin(point)
    try:
        info = point.load()
    except Exception as error:  # noqa: BLE001 somebody else's module may raise anything; the reason is shown
        return Found(
            point.name, origin, None, f"{point.value} does not import: {type(error).__name__}: {error}"
        )
    reason = _fault(point, info)
    return Found(point.name, origin, None if reason else info, reason)


def _origin(point: EntryPoint) -> str:
    """Name and version of its distribution. From the text of its metadata, since parsing that as a mail takes long."""
    text = (point.dist.read_text("METADATA") or point.dist.read_text("PKG-INFO") or "") if point.dist else ""
    header = text.partition("\n\n")[0]
    found = [re.search(rf"^{field}:\s*(\S+)", header, re.MULTILINE) for field in ("Name", "Version")]
    return " ".join(match[1] for match in found if match) or "?"


def _fault(point: EntryPoint, info: object) -> str:
    """What is wrong with an entry point's object, or an empty string."""
    if not isinstance(info, ExporterInfo):
        return f"{point.value} is a {type(info).__name__}, not an ExporterInfo"
    if info.name != point.name:
        return f"the entry point is called {point.name!r} and its ExporterInfo {info.name!r}"
    if not re.fullmatch(r"[a-z][a-z0-9-]*", info.name):
        return f"{info.name!r} is no command name: lower-case letters, digits and hyphens"
    if not dataclasses.is_dataclass(info.options):
        return f"its options, {info.options.__name__}, are no dataclass"
    try:
        get_type_hints(info.options)
    except Exception as error:  # noqa: BLE001 evaluates somebody else's annotations
        return f"the types of its options cannot be looked up: {error}"
    return ""
