"""Work on many tensors at a time, with a bound on the memory that they take together.

Threads, not processes: hashing, file reads, numpy and torch all let go of the interpreter's lock while they work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

_J = TypeVar("_J")
_R = TypeVar("_R")


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    jobs: Sequence[_J],
    work: Callable[[_J], _R],
    *,
    cost: Callable[[_J], int],
    budget: int,
    in_order: bool,
    n_threads: int | None = None,
) -> Generator[tuple[int, _R], None, None]:
    """Do `work` on every job, in threads; gives (number of the job, result).

    cost: bytes that a job holds, counted from its start until its result was given and the next one is asked for. Jobs
    start in their order, the next one when it fits into `budget` bytes with those that run, or alone. in_order: results
    are given in the order of the jobs, and those that wait for it still count; otherwise as they come.
    n_threads: None for one a core. What `work` raises is raised here, the first of those that are known; jobs that
    have not started are then dropped, and those that run are waited for: also when the generator is closed, so use it
    within `contextlib.closing`.
    """
    threads = max(1, min(n_threads or n_cores(), len(jobs)))
    with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        running: dict[Future[_R], int] = {}
        ready: dict[int, Future[_R]] = {}
        held, started, given = 0, 0, 0
        try:
            while given < len(jobs):
                # One job waits behind the running ones, so that no thread idles while the caller is busy.
                while started < len(jobs) and len(running) <= threads:
                    need = cost(jobs[started])
                    if held and held + need > budget:
                        break
                    running[pool.submit(work, jobs[started])] = started
                    held, started = held + need, started + 1
                done, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), None)
                ready |= {running.pop(future): future for future in sorted(done, key=running.__getitem__)}
                for future in ready.values():
                    if future.exception() is not None:
                        future.result()
                while ready and (not in_order or given in ready):
                    number = given if in_order else next(iter(ready))
                    yield number, ready.pop(number).result()
                    held, given = held - cost(jobs[number]), given + 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads that torch starts to work in use one core each; threads that run already keep their number.

    torch's own setting: new threads take over what was set last, so it is set back at the end.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
