"""How long work tells how far it is. The console implements it; nothing else prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Watch(Protocol):
    """Receives progress. Stages follow each other; within one, `done` counts up to its total."""

    def stage(self, name: str, total: int) -> None:
        """A new stage of `total` steps begins."""

    def step(self, done: int, what: str) -> None:
        """`done` steps of the stage are done; `what` is being worked on."""

    def figure(self, name: str, value: float) -> None:
        """A number about the work, which holds until the next one of that name.

        `error`: relative squared error of the activations that the quantized model has reached. `gpu_bytes` and
        `host_bytes`: most memory so far.
        """

    def note(self, text: str) -> None:
        """Something that the user should know, once."""


class Unwatched:
    """A Watch that ignores everything."""

    def stage(self, name: str, total: int) -> None:
        """Ignored."""

    def step(self, done: int, what: str) -> None:
        """Ignored."""

    def figure(self, name: str, value: float) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""


def by_steps(watch: Watch, name: str) -> Callable[[int, int, str], None]:
    """A progress callback (done, total, what) that tells a watch; the stage begins with the first call."""
    totals: list[int] = []

    def progress(done: int, total: int, what: str) -> None:
        if totals != [total]:
            totals[:] = [total]
            watch.stage(name, total)
        watch.step(done, what)

    return progress


class Stages:
    """A Watch that hands everything on, keeps the seconds of every stage, and adds the memory's peaks.

    memory: bytes by the name of their figure, asked for at every step.
    """

    def __init__(
        self,
        watch: Watch,
        memory: Callable[[], dict[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watch, self._memory, self._clock = watch, memory, clock
        self._seconds: dict[str, float] = {}
        self._name, self._began = "", clock()

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, in their order, up to now; what is before the first stage is `prepare`."""
        found = dict(self._seconds)
        name = self._name or "prepare"
        found[name] = found.get(name, 0.0) + self._clock() - self._began
        return found

    def stage(self, name: str, total: int) -> None:
        """The last stage ends, the next one begins."""
        self._seconds = self.seconds
        self._name, self._began = name, self._clock()
        self._watch.stage(name, total)

    def step(self, done: int, what: str) -> None:
        """Hand the peaks on, then the step."""
        for name, n_bytes in self._memory().items():
            self._watch.figure(name, n_bytes)
        self._watch.step(done, what)

    def figure(self, name: str, value: float) -> None:
        """Handed on."""
        self._watch.figure(name, value)

    def note(self, text: str) -> None:
        """Handed on."""
        self._watch.note(text)


def resumed(n_resumed: int, n_blocks: int) -> str:
    """What times and memory of a run that went on do not tell."""
    return (
        f"{n_resumed} of {n_blocks} blocks were done by an earlier process, which was cut off; "
        "times and memory are of the last one"
    )


def duration(seconds: float) -> str:
    """`1 h 05 min`, `2 min 10 s`, `8 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
