"""The time left, on a terminal and without one."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console as RichConsole
from rich.progress import Progress

from d2qconv.progress import Stages, Unwatched
from d2qconv.watches import BarWatch, JsonWatch, LineWatch, time_column, time_left


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


def test_lines_say_error_and_peaks():
    clock, lines = Clock(), []
    watch = LineWatch(lines.append, clock)
    watch.stage("quantize", 2)
    watch.figure("error", 0.0123)
    watch.figure("host_bytes", 3 << 29)
    watch.figure("gpu_bytes", 1 << 31)
    clock.now += 60
    watch.step(1, "block 1")
    assert (
        lines[1]
        == "quantize 1/2 block 1, 1 min 00 s left, error 1.2e-02, peak 2.0 GiB of GPU, 1.5 GiB of host"
    )


def test_a_bar_shows_error_and_peaks():
    with Progress(console=RichConsole(file=StringIO()), auto_refresh=False) as progress:
        watch = BarWatch(progress)
        watch.stage("quantize", 2)
        watch.figure("error", 0.5)
        watch.step(1, "block 1")
        (task,) = progress.tasks
        assert task.fields["figures"] == "error 5.0e-01"
        watch.close()
        assert task.fields["figures"] == ""


def test_json_lines_are_for_programs_and_not_more_than_two_a_second():
    clock, lines = Clock(), []
    watch = JsonWatch(lines.append, clock)
    watch.stage("quantize", 3)
    watch.figure("error", 0.25)
    for done in (1, 2, 3):
        clock.now += 0.2
        watch.step(done, f"block {done}")
    watch.note("mind [the] gap")
    found = [json.loads(line) for line in lines]
    assert [f["event"] for f in found] == ["stage", "step", "step", "note"]
    assert found[0] == {"event": "stage", "stage": "quantize", "total": 3}
    assert found[2] == {
        "event": "step", "stage": "quantize", "done": 3, "total": 3, "what": "block 3",
        "seconds": pytest.approx(0.6), "seconds_left": 0, "error": 0.25,
    }  # fmt: skip


def test_stages_are_timed_and_peaks_told_with_every_step():
    clock = Clock()
    told = []

    class Seen(Unwatched):
        def figure(self, name, value):
            told.append((name, value))

    watch = Stages(Seen(), lambda: {"host_bytes": 7}, clock)
    for name, seconds in (("read", 2), ("write", 3), ("verify", 1), ("write", 4)):
        watch.stage(name, 1)
        clock.now += seconds
    watch.step(1, "")
    assert watch.seconds == {"prepare": 0, "read": 2, "write": 7, "verify": 1}
    assert told == [("host_bytes", 7)]
