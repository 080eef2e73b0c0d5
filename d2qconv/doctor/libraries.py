"""The libraries of every extra: which are here, in which version, and whether they import."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from d2qconv.doctor.probe import Seen
from d2qconv.errors import PluginError
from d2qconv.exporters.base import Runtime
from d2qconv.exporters.diagnosis import Finding

PROJECT = "d2qconv"
#: Extras that are only others put together.
_SUMS = ("all",)
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)\s*(?:>=\s*(?P<least>[0-9.]+))?[^;]*(?:;.*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?"
)


@dataclass(frozen=True)
class Wanted:
    """A library as the project's own metadata ask for it. extra: empty for what is always needed."""

    distribution: str
    least: str
    extra: str

    @property
    def module(self) -> str:
        """What is imported."""
        return module_of(self.distribution)


def module_of(distribution: str) -> str:
    """The module of a distribution; all of ours are called alike."""
    return distribution.replace("-", "_").replace(".", "_")


def wanted(lines: Iterable[str] | None = None) -> tuple[Wanted, ...]:
    """Every requirement of the installed project, by extra. lines: as `importlib.metadata.requires` gives them."""
    if lines is None:
        try:
            lines = requires(PROJECT) or ()
        except PackageNotFoundError:
            lines = ()
    found = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match and match["name"] != PROJECT and match["extra"] not in _SUMS:
            found.append(Wanted(match["name"], match["least"] or "", match["extra"] or ""))
    return tuple(sorted(found, key=lambda w: (w.extra, w.distribution)))


def installed(distribution: str) -> str:
    """Its version by pip's own record, '' if there is none. Imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def is_older(found: str, least: str) -> bool:
    """Whether a version is older than the least one; parts that are no numbers are not compared."""
    return bool(least) and numbers(found) < numbers(least)


def numbers(text: str) -> tuple[int, ...]:
    """`1.28.0rc1` → (1, 28): the leading numbers of a version, no zeros at its end."""
    parts = []
    for part in text.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def states(libraries: Collection[Wanted], seen: Mapping[str, Seen]) -> dict[str, dict[str, str]]:
    """Per extra and library its version, or what is the matter. seen: by module, of those that were imported."""
    found: dict[str, dict[str, str]] = {}
    for library in libraries:
        found.setdefault(library.extra or "base", {})[library.distribution] = state(library, seen)
    return found


def state(library: Wanted, seen: Mapping[str, Seen]) -> str:
    """`1.32.0`, `1.20.0, too old: needs 1.28`, `missing`, or `2.13.0, broken: …`."""
    about = seen.get(library.module, Seen())
    here = installed(library.distribution) or about.version
    if not here:
        return f"broken: {about.error}" if about.error and "ModuleNotFound" not in about.error else "missing"
    if about.error:
        return f"{here}, broken: {about.error}"
    return f"{here}, too old: needs {library.least}" if is_older(here, library.least) else here


def findings(libraries: Collection[Wanted], seen: Mapping[str, Seen]) -> list[Finding]:
    """Per extra what is broken or too old, which is wrong, and what is missing, which is not."""
    found = []
    for extra, each in states(libraries, seen).items():
        todo = _pip(extra)
        bad = {name: text for name, text in each.items() if "broken: " in text or "too old: " in text}
        absent = [name for name, text in each.items() if text == "missing"]
        found += [Finding(name, text, PluginError, _mend(text, todo, name)) for name, text in bad.items()]
        if absent:
            is_base = extra == "base"
            about = "d2qconv itself" if is_base else f"extra {extra}"
            found.append(
                Finding(about, f"{', '.join(absent)} not installed", PluginError if is_base else None, todo)
            )
    # The same library may belong to several extras.
    return list({(f.subject, f.detail): f for f in reversed(found)}.values())[::-1]


def _mend(text: str, todo: str, name: str) -> str:
    if "too old: " in text:
        return todo.replace("install ", "install --upgrade ", 1)
    return f"pip install --force-reinstall {name}, or read what its import says"


def _pip(extra: str) -> str:
    return f"pip install '{PROJECT}'" if extra == "base" else f"pip install '{PROJECT}[{extra}]'"


def runtime_state(runtime: Runtime, libraries: Collection[Wanted], seen: Mapping[str, Seen]) -> str:
    """Versions of a runtime's libraries with its own facts, or what is the matter and what to do."""
    least = {library.distribution: library.least for library in libraries}
    each = {
        name: state(Wanted(name, least.get(name, ""), runtime.extra), seen) for name in runtime.distributions
    }
    text = ", ".join(f"{name} {about}" for name, about in each.items())
    if any(about == "missing" for about in each.values()):
        return f"{text}: {runtime.pip}"
    facts = seen.get(module_of(runtime.distributions[0]), Seen()).facts
    return text + "".join(f", {key} {value}" for key, value in facts.items())
