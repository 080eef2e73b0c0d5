"""Spans: nothing while off, own time only while on, other threads apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from d2qconv import timing
from d2qconv.timing import timed


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    timing.disable()
    timing.reset()


def test_off_records_nothing() -> None:
    with timed("sweep"):
        pass
    assert timing.spans == {}
    assert timed("sweep") is timed("disk")


def test_inner_time_is_not_outer_time() -> None:
    timing.enable(synchronize=True)
    started = time.perf_counter()
    for _ in range(2):
        with timed("outer"), timed("inner"):
            time.sleep(0.02)
    wall = time.perf_counter() - started
    assert timing.spans["inner"] >= 0.04
    assert timing.spans["outer"] < 0.02
    assert sum(timing.spans.values()) <= wall
    assert timing.counts == {"outer": 2, "inner": 2}


def test_a_span_ends_with_an_error() -> None:
    timing.enable(synchronize=False)
    with pytest.raises(ValueError, match="x"), timed("a"), timed("b"):
        raise ValueError("x")
    with timed("c"):
        time.sleep(0.01)
    assert set(timing.spans) == {"a", "b", "c"}
    assert timing.spans["c"] >= 0.01


def test_other_threads_stand_beside() -> None:
    timing.enable(synchronize=True)

    def work() -> None:
        with timed("read"):
            time.sleep(0.02)

    with timed("forward"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert timing.spans["read (beside)"] >= 0.02
    assert timing.spans["forward"] >= 0.02, "a span of another thread takes nothing from this one's"


def test_enable_starts_from_zero() -> None:
    timing.enable(synchronize=False)
    with timed("a"):
        pass
    timing.enable(synchronize=False)
    assert timing.spans == {}
