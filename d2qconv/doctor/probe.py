"""Which libraries really import here, and what they say of themselves.

A library that is installed may still be broken: a shared object that is not found, an instruction that the processor
does not have. The second kind ends the process. So libraries are imported in a process of their own; if that ends, the
one that was being imported is the culprit, and another process goes on with the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

#: What the process runs. Its path is that of this one, so that the folder it is started in counts for nothing.
_CODE = "import sys, json; given = json.load(sys.stdin); sys.path[:] = given['path']; " \
    "from d2qconv.doctor.probe import answer; answer(given['modules'], given['details'])"  # fmt: skip
#: Seconds that a library may take to be imported.
SECONDS = 120.0
_MOST_SAID = 300


@dataclass(frozen=True)
class Seen:
    """A library that was imported: its `__version__`, if it has one; or why not. facts: what its details gave."""

    version: str = ""
    error: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def examine(
    modules: Sequence[str], details: Mapping[str, str] | None = None, *, seconds: float = SECONDS
) -> dict[str, Seen]:
    """Import every module by name. details: per module a `module:function` that is then asked for facts.

    Never raises for what a library does. seconds: that all of them together may take in one process.
    """
    found: dict[str, Seen] = {}
    left = list(modules)
    while left:
        seen, ended = _ask(left, details or {}, seconds)
        found |= seen
        left = [name for name in left if name not in seen]
        if left:
            # They are imported in their order: the first without an answer is the one that never gave it.
            found[left.pop(0)] = Seen(error=f"importing it {ended}")
    return found


def _ask(left: Sequence[str], details: Mapping[str, str], seconds: float) -> tuple[dict[str, Seen], str]:
    """The answers of one process, and how it ended."""
    import msgspec

    given = msgspec.json.encode({"path": sys.path, "modules": left, "details": details})
    try:
        done = subprocess.run(  # noqa: S603 our own code, in this interpreter
            [sys.executable, "-I", "-c", _CODE],
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
        said, ended = done.stdout, _end(done.returncode)
    except subprocess.TimeoutExpired as error:
        said, ended = error.stdout or b"", f"took more than {seconds:g} s"
    found: dict[str, Seen] = {}
    # The last line may be cut.
    for line in said.split(b"\n")[:-1]:
        name, seen = msgspec.json.decode(line, type=tuple[str, Seen])
        found[name] = seen
    return found, ended


def _end(code: int) -> str:
    return f"ends the process by signal {-code}" if code < 0 else f"ends the process with code {code}"


def answer(modules: Sequence[str], details: Mapping[str, str]) -> None:
    """Import each module and write a line about it: what `_ask` starts. Whatever else is printed is dropped."""
    import msgspec

    out = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    for name in modules:
        out.write(msgspec.json.encode((name, _import(name, details.get(name, "")))) + b"\n")


def _import(name: str, details: str) -> Seen:
    try:
        version = str(getattr(import_module(name), "__version__", ""))
        module, _, function = details.partition(":")
        facts = getattr(import_module(module), function)() if details else {}
    # Somebody else's module may raise anything; the reason is shown.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        said = " ".join(str(error).split())
        return Seen(error=f"{type(error).__name__}: {said}"[:_MOST_SAID])
    return Seen(version, "", facts)
