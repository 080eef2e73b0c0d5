"""Every error a user can meet.

::

    D2qError                exit 1   never raised itself
    ├── InputError          exit 2   the checkpoint, a file or an option is not what it should be
    ├── PlanError           exit 3   the job cannot be done as asked; known before any work was spent
    ├── RunError            exit 4   quantization stopped (interrupted, out of memory, not finite)
    ├── ExportError         exit 5   the package could not be written
    ├── VerifyError         exit 6   a written package is not what the quantizer made
    └── PluginError         exit 7   an exporter is unknown, broken, or lacks a library

A message says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class D2qError(Exception):
    """Base of all; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.todo = todo

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  → {self.todo}" if self.todo else text


class InputError(D2qError):
    """The checkpoint, a file or an option is not what it should be."""

    exit_code = 2


class PlanError(D2qError):
    """The job cannot be done as asked. Raised before any work was spent."""

    exit_code = 3


class RunError(D2qError):
    """Quantization stopped: interrupted, out of memory, or a value was not finite."""

    exit_code = 4


class ExportError(D2qError):
    """The package could not be written."""

    exit_code = 5


class VerifyError(D2qError):
    """A written package differs from what the quantizer made."""

    exit_code = 6


class PluginError(D2qError):
    """An exporter is unknown, broken, or lacks a library."""

    exit_code = 7


@dataclass(frozen=True)
class Refusal:
    """One reason why something cannot be done, found before any work was spent."""

    where: str
    why: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.why}" + (f"\n  → {self.todo}" if self.todo else "")


def refuse(refusals: Iterable[Refusal]) -> None:
    """Raise one PlanError that lists every refusal; return if there is none."""
    found = list(refusals)
    if found:
        raise PlanError("this cannot be done:\n" + "\n".join(f"- {r}" for r in found))
