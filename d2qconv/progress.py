"""How long work tells how far it is. The console implements it; nothing else prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Watch(Protocol):
    """Receives progress. Stages follow each other; within one, `done` counts up to its total."""

    def stage(self, name: str, total: int) -> None:
        """A new stage of `total` steps begins."""

    def step(self, done: int, what: str) -> None:
        """`done` steps of the stage are done; `what` is being worked on."""

    def note(self, text: str) -> None:
        """Something that the user should know, once."""


class Unwatched:
    """A Watch that ignores everything."""

    def stage(self, name: str, total: int) -> None:
        """Ignored."""

    def step(self, done: int, what: str) -> None:
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
