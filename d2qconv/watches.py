"""Progress as a person sees it, lines or a bar on a terminal, and as a program reads it. `console` gives them a place.

All tell the stage, what is done of how much, the time left, and the figures of the work: the error that the quantized
model has reached, and the memory's peaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from d2qconv.budget import gibibytes
from d2qconv.progress import duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn, TaskID

#: Seconds between two progress lines where there is no terminal.
LINE_EVERY = 10.0
#: Seconds between two steps as JSON; the last one of a stage is always told.
JSON_EVERY = 0.5


def in_words(figures: Mapping[str, float]) -> str:
    """`error 1.2e-02, peak 3.1 GiB of GPU, 0.9 GiB of host`."""
    parts = [f"error {figures['error']:.1e}"] if "error" in figures else []
    peaks = [
        f"{gibibytes(int(figures[name]))} of {kind}"
        for name, kind in (("gpu_bytes", "GPU"), ("host_bytes", "host"))
        if name in figures
    ]
    return ", ".join([*parts, *(["peak " + ", ".join(peaks)] if peaks else [])])


class LineWatch:
    """Plain lines, one at a stage's beginning and then at most one every `LINE_EVERY` seconds."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._name = ""
        self._total = 0
        self._began = self._last = clock()
        self._figures: dict[str, float] = {}

    def stage(self, name: str, total: int) -> None:
        """Say that the stage begins."""
        self._name, self._total = name, total
        self._began = self._last = self._clock()
        self._write(f"{name} …" if total == 0 else f"{name} … {total} steps")

    def step(self, done: int, what: str) -> None:
        """Say how far it is, if the last line is old enough."""
        now = self._clock()
        if now - self._last < LINE_EVERY:
            return
        self._last = now
        of = f"{done}/{self._total}" if self._total else str(done)
        left = time_left(now - self._began, done, self._total) or 0.0
        ahead = f", {duration(left)} left" if left else ""
        figures = in_words(self._figures)
        self._write(f"{self._name} {of} {what}{ahead}".rstrip() + (f", {figures}" if figures else ""))

    def figure(self, name: str, value: float) -> None:
        """Say it with the next line."""
        self._figures[name] = value

    def note(self, text: str) -> None:
        """Print it."""
        self._write(text)


def time_left(elapsed: float, done: int, total: int) -> float | None:
    """Seconds, if the steps to come take as long as those done took on average; None where that is not known."""
    return elapsed / done * (total - done) if done and total else None


class BarWatch:
    """One bar a stage, with the time left. `ends`: when the stage will end, by `clock`; None if not known yet."""

    def __init__(self, progress: RichProgress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._task: TaskID | None = None
        self._total = 0
        self._began = clock()
        self._figures: dict[str, float] = {}

    def stage(self, name: str, total: int) -> None:
        """Complete the last bar, draw the next."""
        self.close()
        self._total, self._began = total, self._clock()
        self._task = self._progress.add_task(name, total=total or None, what="", ends=None, figures="")

    def step(self, done: int, what: str) -> None:
        """Move the bar."""
        if self._task is not None:
            now = self._clock()
            left = time_left(now - self._began, done, self._total)
            ends = None if left is None else now + left
            figures = in_words(self._figures)
            self._progress.update(self._task, completed=done, what=what, ends=ends, figures=figures)

    def figure(self, name: str, value: float) -> None:
        """Show it with the next step."""
        self._figures[name] = value

    def note(self, text: str) -> None:
        """Print it above the bars."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the clock of the last bar."""
        if self._task is not None:
            self._progress.update(self._task, what="", figures="")
            self._progress.stop_task(self._task)


class JsonWatch:
    """One JSON object a line, for a program: `{"event": "stage" | "step" | "note", …}`.

    A step has `done`, `total`, `what`, `seconds` since the stage began, `seconds_left` if that is known, and the
    figures so far: `error`, `gpu_bytes`, `host_bytes`.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._name, self._total = "", 0
        self._began = clock()
        self._last: float | None = None
        self._figures: dict[str, float] = {}

    def stage(self, name: str, total: int) -> None:
        """Tell that the stage begins."""
        self._name, self._total = name, total
        self._began, self._last = self._clock(), None
        self._emit({"event": "stage", "stage": name, "total": total})

    def step(self, done: int, what: str) -> None:
        """Tell how far it is, unless it was told just now."""
        now = self._clock()
        if self._last is not None and now - self._last < JSON_EVERY and done != self._total:
            return
        self._last = now
        left = time_left(now - self._began, done, self._total)
        facts: dict[str, object] = {"event": "step", "stage": self._name, "done": done, "total": self._total}
        facts |= {"what": what, "seconds": now - self._began, "seconds_left": left}
        self._emit(facts | self._figures)

    def figure(self, name: str, value: float) -> None:
        """Tell it with the next step."""
        self._figures[name] = value

    def note(self, text: str) -> None:
        """Tell it."""
        self._emit({"event": "note", "text": text})

    def _emit(self, facts: Mapping[str, object]) -> None:
        import msgspec

        self._write(msgspec.json.encode(facts).decode())


def time_column() -> ProgressColumn:
    """The time left, and of a finished stage the time it took.

    rich's own column averages the last 30 seconds, and knows nothing while one block takes longer than that.
    """
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class TimeColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.finished or task.stop_time is not None:
                return Text(duration(task.elapsed or 0.0))
            ends = task.fields["ends"]
            return Text("" if ends is None else f"{duration(max(ends - time.monotonic(), 0.0))} left")

    return TimeColumn()
