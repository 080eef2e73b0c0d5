"""Jobs of tools/ladder in worker processes: several at a time, and none takes the others down with it.

A worker is this tool with `--worker`: it takes jobs from its standard input and answers on its standard output, one
line of JSON each, so that loading torch and waking the GPU is paid once a worker and not once a job.
"""

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Lines of a dead worker's standard error that go into its job's reason.
N_LAST_LINES = 6


@dataclass
class Pool:
    """Runs lines of JSON. command: starts a worker. seconds: no job is left running after that long.

    done: called with (number of the job, answer) as answers come, from several threads but one at a time.
    """

    command: Sequence[str]
    environment: dict[str, str]
    n_workers: int
    seconds: float
    logs: Path
    done: Callable[[int, dict[str, Any]], None]
    _jobs: queue.SimpleQueue[tuple[int, str]] = field(default_factory=queue.SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _deadline: float = 0.0

    def run(self, lines: Sequence[str]) -> None:
        """All jobs, in that order; returns when every one is answered, or the time is up."""
        self._deadline = time.monotonic() + self.seconds
        for item in enumerate(lines):
            self._jobs.put(item)
        threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True)
            for number in range(min(self.n_workers, len(lines)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, number: int) -> None:
        """One thread: feed one worker, and a new one after it died."""
        worker: subprocess.Popen[str] | None = None
        log = self.logs / f"worker-{number}.log"
        while True:
            try:
                job, line = self._jobs.get_nowait()
            except queue.Empty:
                break
            if time.monotonic() >= self._deadline:
                self._answer(job, {"status": "not run", "reason": "no time left"})
                continue
            if worker is None:
                worker = self._start(log)
            text = self._ask(worker, line)
            if text:
                self._answer(job, json.loads(text))
                continue
            code = _end(worker)
            worker = None
            if time.monotonic() >= self._deadline:
                self._answer(job, {"status": "not run", "reason": "stopped, no time left"})
            else:
                last = " | ".join(log.read_text(errors="replace").splitlines()[-N_LAST_LINES:])
                self._answer(job, {"status": "failed", "reason": f"the worker ended with {code}: {last}"})
        if worker is not None:
            _end(worker)

    def _start(self, log: Path) -> subprocess.Popen[str]:
        with log.open("a") as errors:
            return subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=self.environment,
            )  # fmt: skip

    def _ask(self, worker: subprocess.Popen[str], line: str) -> str:
        """The answer; empty if the worker died or the time is up, when it is killed."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        timer = threading.Timer(
            min(max(self._deadline - time.monotonic(), 0), threading.TIMEOUT_MAX), worker.kill
        )
        timer.start()
        try:
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
            return worker.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            timer.cancel()

    def _answer(self, job: int, answer: dict[str, Any]) -> None:
        with self._lock:
            self.done(job, answer)


def _end(worker: subprocess.Popen[str]) -> int:
    """Close a worker's input, which ends it, and wait; returns its exit code."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(BrokenPipeError):
        worker.stdin.close()
    try:
        return worker.wait(timeout=30)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()
    finally:
        worker.stdout.close()
