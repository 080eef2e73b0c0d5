"""Where the time goes: seconds by name, for `tools/bench_quantize`. Off by default, and then it costs nothing.

Code that is worth knowing about stands in a span::

    with timed("sweep"):
        ...

A span counts its own time only: what spans inside it take is theirs, so the seconds of one thread never add up to
more than the wall clock. Spans of other threads run beside the main one and are kept under `<name> (beside)`.
torch is never imported here; a span synchronizes the GPU if the program has imported it.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType

#: Seconds by name since `enable`; `reset` empties it.
spans: dict[str, float] = {}
#: How many spans of each name were entered.
counts: dict[str, int] = {}


@dataclass
class _Stack(threading.local):
    """The open spans of a thread: for each the seconds that spans inside it took."""

    inner: list[float] = field(default_factory=list)


@dataclass
class _State:
    is_on: bool = False
    synchronize: bool = False


_STATE = _State()
_STACK = _Stack()
_LOCK = threading.Lock()
_NOTHING = nullcontext()


class _Span:
    """One visit of a span."""

    __slots__ = ("_name", "_started")

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = 0.0

    def __enter__(self) -> None:
        _wait_for_device()
        _STACK.inner.append(0.0)
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            _wait_for_device()
        seconds = time.perf_counter() - self._started
        own = seconds - _STACK.inner.pop()
        if _STACK.inner:
            _STACK.inner[-1] += seconds
        name = self._name if _is_main() else f"{self._name} (beside)"
        with _LOCK:
            spans[name] = spans.get(name, 0.0) + own
            counts[name] = counts.get(name, 0) + 1


def timed(name: str) -> AbstractContextManager[None]:
    """A span of that name; does nothing while timing is off."""
    return _Span(name) if _STATE.is_on else _NOTHING


def enable(*, synchronize: bool) -> None:
    """Start timing, from zero. synchronize: wait for the GPU at both ends of every span of the main thread.

    Without it a span that only launches kernels looks short and the one that waits for them long.
    """
    reset()
    _STATE.is_on, _STATE.synchronize = True, synchronize


def disable() -> None:
    """Stop timing; the numbers stay."""
    _STATE.is_on = False


def reset() -> None:
    """Forget all numbers."""
    with _LOCK:
        spans.clear()
        counts.clear()


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _wait_for_device() -> None:
    """Synchronize; not in other threads, nor while a CUDA graph is recorded, where that is forbidden."""
    if not _STATE.synchronize or not _is_main():
        return
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
