"""The time left, on a terminal and without one."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console as RichConsole
from rich.progress import Progress

from d2qconv.watches import BarWatch, LineWatch, time_column, time_left


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("elapsed", "done", "total", "left"),
    [(10, 0, 4, None), (10, 1, 4, 30), (30, 3, 4, 10), (9, 3, 3, 0), (10, 5, 0, None)],
)
def test_steps_to_come_take_as_long_as_those_done(elapsed, done, total, left):
    assert time_left(elapsed, done, total) == left


def test_lines_say_the_time_left():
    clock, lines = Clock(), []
    watch = LineWatch(lines.append, clock)
    watch.stage("quantize", 4)
    clock.now += 60
    watch.step(1, "block 1")
    clock.now += 5
    watch.step(2, "block 2")
    assert lines == ["quantize … 4 steps", "quantize 1/4 block 1, 3 min 00 s left"]


def test_a_bar_says_the_time_left_after_one_long_block(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("d2qconv.watches.time.monotonic", clock)
    console = RichConsole(file=StringIO(), force_terminal=True, width=80)
    column = time_column()
    with Progress(column, console=console, auto_refresh=False, get_time=clock) as progress:
        watch = BarWatch(progress, clock)
        watch.stage("quantize", 4)
        (task,) = progress.tasks
        assert column.render(task).plain == ""
        clock.now += 120
        watch.step(1, "block 1")
        assert column.render(task).plain == "6 min 00 s left"
        clock.now += 30
        assert column.render(task).plain == "5 min 30 s left"
        clock.now += 1000
        assert column.render(task).plain == "0 s left"
        watch.stage("write", 2)
        assert column.render(task).plain == "19 min 10 s"
