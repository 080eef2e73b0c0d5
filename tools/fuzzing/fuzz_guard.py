"""Watches one call: which files it opens and changes, what it executes, how long it takes, how much memory.

Python's audit hook sees every `open`, also those of the library, but not what native code opens; a pipe outside, at
which that would hang, and a valid copy, which it would accept, are there for this (`fuzz_places`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

#: Seconds after which it is looked whether a call hangs; seconds of CPU that are too many.
WALL, CPU = 10.0, 4.0
#: A process with less of a share of the CPU waits for something else.
_IDLE = 0.02
#: Memory that a call may take beyond some times the size of its files.
MEMORY = 192 << 20
#: Address space beyond what the process has when it begins.
ADDRESS_SPACE = 2 << 30
_NEVER = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class",
    "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "code.__new__", "marshal.loads", "os.startfile",
}  # fmt: skip
#: Events that change what stands at a path, and how many of their arguments are paths.
_CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.symlink": 0, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "shutil.rmtree": 1, "shutil.move": 2, "os.utime": 1,
}  # fmt: skip


class HangError(BaseException):
    """Raised into a call that takes too long. Not an Exception, so that nobody takes it for his own."""


@dataclass
class Seen:
    """What a call did that it may not."""

    faults: list[str] = field(default_factory=list)


class Guard:
    """The audit hook; one a process, since hooks cannot be removed."""

    def __init__(self, home: Path) -> None:
        """home: the only folder in which this process may change anything from now on, watched or not."""
        self._seen: Seen | None = None
        self._started = (0.0, 0.0)
        self._home = self._root = os.path.realpath(home)
        libraries = {sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[2])}
        self._readable = (*map(os.path.realpath, libraries), "/proc/", "/dev/null", "/dev/urandom")
        sys.dont_write_bytecode = True
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGALRM, self._ring)

    def allow(self, folder: Path) -> None:
        """Let a folder be read."""
        self._readable = (*self._readable, os.path.realpath(folder))

    @contextlib.contextmanager
    def watching(self, root: Path, n_bytes: int, per_byte: int) -> Iterator[Seen]:
        """Watch what the body does. root: the folder that it may read and change; n_bytes: size of its files.

        per_byte: bytes of memory that each of these may take, beyond MEMORY.
        """
        seen = Seen()
        self._root = os.path.realpath(root)
        before, self._started = _reset_peak(), (time.monotonic(), time.process_time())
        self._seen = seen
        signal.setitimer(signal.ITIMER_REAL, WALL, WALL)
        try:
            yield seen
        finally:
            self._seen = None
            self._root = self._home
            signal.setitimer(signal.ITIMER_REAL, 0)
            used, taken = time.process_time() - self._started[1], _peak() - before
            if used > CPU:
                seen.faults.append(f"{used:.1f} s of CPU")
            if taken > MEMORY + per_byte * n_bytes:
                seen.faults.append(f"{taken >> 20} MiB of memory for {n_bytes} bytes of files")

    def _ring(self, _signal: int, _frame: FrameType | None) -> None:
        """End a call that waits, or that has used its CPU; one that only does not get the CPU goes on."""
        if self._seen is None:
            return
        wall, used = time.monotonic() - self._started[0], time.process_time() - self._started[1]
        if used > CPU or used < _IDLE * wall:
            raise HangError

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            self._opened(*args)
        elif event in _CHANGES:
            # rmtree removes by name in an opened folder; that of the whole was looked at before.
            is_relative = event in ("os.remove", "os.rmdir") and args[1] != -1
            for path in () if is_relative else args[: _CHANGES[event]]:
                if isinstance(path, str | bytes | os.PathLike) and not self._is_inside(path, of_parent=True):
                    self._forbid(f"{event} of {path!r:.120}")
        elif self._seen is not None and event in _NEVER:
            if event == "marshal.loads" and _is_importing():
                # A library's own cached module; the hook has seen which file that is.
                return
            self._seen.faults.append(f"{event} {args!r:.120}")
        elif self._seen is not None and event == "exec":
            code = args[0]
            name = code.co_filename if isinstance(code, CodeType) else "?"
            if not name.startswith(self._readable) and name not in (
                "<string>",
                "<__array_function__ internals>",
            ):
                self._seen.faults.append(f"exec of {name!r:.120}")

    def _opened(self, path: object, mode: str | None, flags: int | None) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or self._is_inside(path):
            return
        if (flags or 0) & os.O_NOFOLLOW and os.path.islink(path):  # noqa: PTH114
            # The system refuses it.
            return
        real = os.path.realpath(os.fsdecode(path))
        is_written = any(c in (mode or "") for c in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        if is_written and real != "/dev/null" and not real.endswith("/clear_refs"):
            self._forbid(f"opened {real!r:.120} for writing")
        elif self._seen is not None and not real.startswith(self._readable):
            self._seen.faults.append(f"opened {real!r:.120}")

    def _forbid(self, what: str) -> None:
        """Nothing outside is changed, whatever the fault: an exception in a hook stops what it was asked about."""
        if self._seen is not None:
            self._seen.faults.append(what)
        raise PermissionError(f"the fuzzer forbids: {what}")

    def _is_inside(self, path: str | bytes | os.PathLike[str], *, of_parent: bool = False) -> bool:
        try:
            text = os.fsdecode(path)
            if of_parent and os.path.abspath(text) != self._root:  # noqa: PTH100 no Path objects in a hook
                text = os.path.dirname(os.path.abspath(text))  # noqa: PTH100, PTH120
            real = os.path.realpath(text)
        except ValueError:
            # No system call takes such a name.
            return True
        return real == self._root or real.startswith(self._root + "/")


def _is_importing() -> bool:
    """Whether the import system itself is what calls; frames: this function, the hook, who raised the event."""
    return sys._getframe(2).f_code.co_filename == "<frozen importlib._bootstrap_external>"


def limit_memory() -> None:
    """Let the process take no more than some address space on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE, most))


def _reset_peak() -> int:
    """Bytes in memory now, the peak set to it (Linux, proc(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status(b"VmRSS:")


def _peak() -> int:
    return _status(b"VmHWM:")


def _status(key: bytes) -> int:
    with Path("/proc/self/status").open("rb") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) << 10
    return 0
