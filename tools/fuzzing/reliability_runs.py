"""Runs of the command as processes of their own, forked from one that has imported everything; and a small tmpfs."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2qconv.cli import main

#: What runs import on their way, so that a forked process has it.
_IMPORTS = (
    "d2qconv.pipeline", "d2qconv_gguf.exporter", "d2qconv_onnx.exporter", "d2qconv_hf.exporter", "d2qconv_gguf.runtime",
    "tokenizers", "sentencepiece", "onnxruntime", "onnxruntime_genai", "cyllama.llama.llama_cpp", "transformers",
    "transformers.models.llama.modeling_llama", "compressed_tensors",
)  # fmt: skip
#: Seconds after which a run counts as one that hangs.
LIMIT = 900.0
Setup = Callable[[], None]


def warm_up() -> None:
    """Import everything; no threads, which a fork would lose."""
    torch.set_num_threads(1)
    for name in _IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@dataclass(frozen=True)
class Ended:
    """code: exit code, -9 if it was killed. said: what it wrote."""

    code: int
    said: str

    @property
    def is_killed(self) -> bool:
        """Whether it was ended by us."""
        return self.code == -signal.SIGKILL


class Run:
    """A command in a folder, going on. setup: called in the new process before it."""

    def __init__(self, words: list[str], folder: Path, setup: Setup | None = None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 read when the run has ended
        self._pid = os.fork()
        if self._pid == 0:
            self._be(words, folder, setup)

    def _be(self, words: list[str], folder: Path, setup: Setup | None) -> None:
        """The new process; never returns."""
        code = 1
        try:
            os.chdir(folder)
            for stream in (1, 2):
                os.dup2(self._said.fileno(), stream)
            if setup is not None:
                setup()
            code = main(words)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def end(self, kill_after: float | None = None) -> Ended:
        """Wait until it ends, or kill it after some seconds."""
        until = time.monotonic() + (LIMIT if kill_after is None else kill_after)
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() >= until:
                os.kill(self._pid, signal.SIGKILL)
                _, status = os.waitpid(self._pid, 0)
                break
            time.sleep(0.002)
        self._said.seek(0)
        said = self._said.read().decode("utf-8", "replace")
        self._said.close()
        return Ended(os.waitstatus_to_exitcode(status), said)


def at_open(number: int, do: Setup) -> Setup:
    """In the new process: do something when it opens file `number`, from 0, for writing in its folder."""

    def setup() -> None:
        root = str(Path.cwd())
        n = -1

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal n
            if event != "open" or not isinstance(args[0], str | os.PathLike):
                return
            is_written = any(c in (args[1] or "") for c in "wax+") or bool(
                (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            )
            if is_written and os.path.abspath(args[0]).startswith(root):  # noqa: PTH100 no Path objects in a hook
                n += 1
                if n == number:
                    do()

        sys.addaudithook(hook)

    return setup


def fill_disk(filler: Path, left: int) -> Setup:
    """Fill the file system with a file, but for `left` bytes."""

    def fill() -> None:
        facts = os.statvfs(filler.parent)
        descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
        n_bytes = facts.f_bavail * facts.f_frsize - left
        if n_bytes > 0:
            os.posix_fallocate(descriptor, 0, n_bytes)
        os.close(descriptor)

    return fill


def jumping_clock(seed: float) -> Setup:
    """In the new process: time.time and time.time_ns jump, mostly back; what must not, time.monotonic, does not."""

    def setup() -> None:
        real, n = time.time, 0

        def odd() -> float:
            nonlocal n
            n += 1
            return real() - 3600.0 * n * (1 + seed) + (1e9 if n % 7 == 0 else 0)

        time.time = odd
        time.time_ns = lambda: int(odd() * 1e9)

    return setup


class Tmpfs:
    """A file system of its own, unmounted at the end. Needs root."""

    def __init__(self, place: Path, size: str) -> None:
        self.place, self.size = place, size

    def __enter__(self) -> MountedPath:
        self.place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", self.place], check=True)
        return MountedPath(self.place)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.place], check=True)
        self.place.rmdir()


class MountedPath(type(Path())):  # type: ignore[misc]
    """Where a file system is mounted."""

    def remount(self, how: str) -> None:
        """`ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{how}", str(self)], check=True)
