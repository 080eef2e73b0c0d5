"""Runs cases in one process and says what came of each, a line of JSON before and one after it."""

from __future__ import annotations

import json
import re
import shutil
import stat
import sys
import tempfile
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

    def __init__(self, home: Path, *, is_kept: bool = False) -> None:
        """is_kept: leave a case's files as they are, at `last`."""
        home.mkdir(parents=True, exist_ok=True)
        self._home = home = home.resolve()
        tempfile.tempdir = str(home)
        self.is_kept = is_kept
        self._guard = Guard(home)
        self._guard.allow(small_source().path)
        self._expected: dict[str, dict[str, Any]] = {}
        self._facts: dict[Path, tuple[list[str], int]] = {}
        self.last = home
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
            folder = pristine / variant
            files = [path for path in folder.rglob("*") if path.is_file()]
            self._facts[folder] = sorted(str(path.relative_to(folder)) for path in files), _n_bytes(folder)
            found[variant] = reader.read(self._case(reader, variant))
        self._expected[reader.name] = found

    def run(self, reader: Reader, seed: int, number: int) -> tuple[str, str, str]:
        """Play one case: (`accepted`, `refused` or `finding`, why, what was changed)."""
        self.prepare(reader)
        random = Random(f"{seed} {reader.name} {number}")
        variant = random.choice(sorted(self._expected[reader.name]))
        folder, pristine = self._case(reader, variant), self._home / reader.name / "pristine" / variant
        outside = self._home / reader.name / "outside"
        files, n_bytes = self._facts[pristine]
        change, touched = change_folder(
            folder, files, outside, random, may_link=reader.may_link, is_text=reader.is_text
        )
        changed = f"{variant}: {change}"
        self.last = folder
        # A change may make a text longer, a hundred times and that again.
        n_bytes = max(n_bytes, _n_bytes(folder))
        found = None
        kind, why = "accepted", ""
        with self._guard.watching(folder, n_bytes, reader.per_byte) as seen:
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
        if not self.is_kept:
            _restore(folder, pristine, touched)
        return kind, why, changed

    def _case(self, reader: Reader, variant: str) -> Path:
        """A folder like the pristine one. It is made once, since `run` restores what it changed."""
        pristine, case = (
            self._home / reader.name / "pristine" / variant,
            self._home / reader.name / f"case-{variant}",
        )
        if reader.may_drop and case.exists():
            # Such a reader changes files itself.
            shutil.rmtree(case)
        if not case.exists():
            shutil.copytree(pristine, case, symlinks=True)
        return case


def _restore(folder: Path, pristine: Path, touched: set[Path]) -> None:
    """Put back what was changed."""
    for path in touched:
        real = pristine / path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if real.is_dir():
            shutil.copytree(real, path)
        elif real.exists():
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(real, path, follow_symlinks=False)


def _n_bytes(folder: Path) -> int:
    """Of the regular files in it; links and pipes have none."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sum(about.st_size for about in found if stat.S_ISREG(about.st_mode))


def _last_lines() -> str:
    return "\n".join(traceback.format_exc().rstrip().splitlines()[-_N_LINES:])


def work(home: Path, seed: int, shares: Iterable[tuple[str, int, int]], *, is_limited: bool) -> Fuzzer:
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
    return fuzzer


def say(line: dict[str, Any]) -> None:
    """One line of JSON for the process that waits."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
