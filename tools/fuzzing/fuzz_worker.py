"""Runs cases in one process and says what came of each, a line of JSON before and one after it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from fuzz_guard import Guard, HangError, limit_memory
from fuzz_places import change_folder, make_outside
from fuzz_readers import READERS, ImplausibleError, Reader, without_runtimes
from fuzz_seeds import small_source

from d2qconv.errors import D2qError

#: A link to a valid file outside, in the place of one that is opened by native code, where no hook sees it.
_NATIVE = re.compile(r"(tokenizer\.json|tokenizer\.model|\.safetensors|\.onnx|\.data): link out$")
#: Lines of a traceback that are kept.
_N_LINES = 12


class Fuzzer:
    """Pristine folders of readers, made when needed, and one place where each case is played."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._guard = Guard(small_source().path)
        self._expected: dict[str, dict[str, Any]] = {}
        without_runtimes()

    def prepare(self, reader: Reader) -> None:
        """Make the pristine folders of a reader; each of them must be accepted as it is."""
        if reader.name in self._expected:
            return
        place = self._home / reader.name
        pristine = place / "pristine"
        pristine.mkdir(parents=True)
        reader.make(pristine)
        make_outside(pristine, place / "outside")
        found = {}
        for variant in sorted(path.name for path in pristine.iterdir()):
            found[variant] = reader.read(self._fresh(reader, variant))
        self._expected[reader.name] = found

    def run(self, reader: Reader, seed: int, number: int) -> tuple[str, str, str]:
        """Play one case: (`accepted`, `refused` or `finding`, why, what was changed)."""
        self.prepare(reader)
        random = Random(f"{seed} {reader.name} {number}")
        variant = random.choice(sorted(self._expected[reader.name]))
        folder = self._fresh(reader, variant)
        outside = self._home / reader.name / "outside"
        change = change_folder(folder, outside, random, may_link=reader.may_link, is_text=reader.is_text)
        changed = f"{variant}: {change}"
        kind, why = "accepted", ""
        with self._guard.watching(folder) as seen:
            try:
                found = reader.read(folder)
            except D2qError as error:
                kind, why = "refused", f"{type(error).__name__}: {error.what}"
            except HangError:
                kind, why = "finding", "hangs:\n" + _last_lines()
            except ImplausibleError as error:
                kind, why = "finding", f"implausible: {error}"
            except MemoryError:
                kind, why = "finding", "out of memory:\n" + _last_lines()
            # Whatever else it is, it is a finding.
            except BaseException:  # noqa: BLE001
                kind, why = "finding", _last_lines()
        if kind == "accepted" and reader.is_exact and found != self._expected[reader.name][variant]:
            kind, why = "finding", "accepted, with other values than were written"
        if kind == "accepted" and not reader.may_drop and _NATIVE.search(change):
            kind, why = "finding", "a link that leads out of the folder was accepted"
        if seen.faults:
            kind, why = "finding", f"{'; '.join(dict.fromkeys(seen.faults))} ({kind}: {why})"
        return kind, why, changed

    def folder(self, reader: Reader) -> Path:
        """Where the last case was played."""
        return self._home / reader.name / "case"

    def _fresh(self, reader: Reader, variant: str) -> Path:
        case = self.folder(reader)
        if case.is_symlink() or case.exists():
            shutil.rmtree(case)
        shutil.copytree(self._home / reader.name / "pristine" / variant, case, symlinks=True)
        return case


def _last_lines() -> str:
    return "\n".join(traceback.format_exc().rstrip().splitlines()[-_N_LINES:])


def work(home: Path, seed: int, shares: Iterable[tuple[str, int, int]], *, is_limited: bool) -> None:
    """Play cases first … last - 1 of some readers, and print what came of them."""
    fuzzer = Fuzzer(home)
    for name, first, last in shares:
        reader = READERS[name]
        say({"prepare": name})
        fuzzer.prepare(reader)
        if is_limited:
            limit_memory()
        for number in range(first, last):
            say({"begin": [name, number]})
            kind, why, changed = fuzzer.run(reader, seed, number)
            say(
                {"end": [name, number], "kind": kind}
                | ({"why": why, "changed": changed} if kind == "finding" else {})
            )


def say(line: dict[str, Any]) -> None:
    """One line of JSON for the process that waits."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
