"""What `doctor` finds: facts, and findings each of which is good, worth knowing, or wrong.

An exporter may look at its own packages (`Diagnosing`): cheaply, by headers and sizes, reading no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from d2qconv.errors import D2qError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. subject: what; detail: what was found there.

    error: the kind of error that it is, whose exit code `doctor` ends with; None where nothing is wrong. todo: what to
    do about it; it may be worth doing where nothing is wrong, too.
    """

    subject: str
    detail: str
    error: type[D2qError] | None = None
    todo: str = ""

    @classmethod
    def of(cls, subject: str, error: D2qError) -> Finding:
        """What an error says."""
        detail = f"{error.where}: {error.what}" if error.where and error.where != subject else error.what
        return cls(subject, detail, type(error), error.todo)

    @property
    def is_wrong(self) -> bool:
        """Whether it stands in somebody's way."""
        return self.error is not None


@dataclass(frozen=True)
class Diagnosis:
    """Everything about a machine, a package or a model. about: which; facts: by name, nested, for a person."""

    about: str
    facts: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that are wrong."""
        return tuple(f for f in self.findings if f.is_wrong)


@runtime_checkable
class Diagnosing(Protocol):
    """An exporter that can tell what is wrong with a package without reading its weights. Optional."""

    def diagnose(self, path: Path) -> Sequence[Finding]:
        """Findings about the package at `path`, of what its runtimes must know among them. Raises no D2qError."""
