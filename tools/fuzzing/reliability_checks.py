"""The disturbances of tools/reliability, and what must hold after each."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz_seeds import VOCAB, small_source
from reliability_runs import Ended, Run, Tmpfs, at_open, fill_disk, jumping_clock, warm_up

from d2qconv.testing.models import make_checkpoint

#: Exit codes of our own errors, by which a run may end that was disturbed: input, run, export.
OURS = (2, 4, 5)
QUICK = ("--no-report",
    "--sequences", "4", "--length", "16", "--polish", "0", "--own", "0", "--device", "cpu", "--quiet", "--overwrite",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command. outputs: names of what it makes, in the folder where it runs; the first one is `-o`."""

    name: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]


JOBS = (
    Job("to-gguf", ("to-gguf", "--type", "q4_0"), ("m.gguf",)),
    Job("to-gguf set", ("to-gguf", "--type", "q4_0", "--max-shard-size", "60kB"), ("m.gguf",)),
    Job("to-onnx", ("to-onnx", "--type", "int4", "--block-size", "32"), ("m-onnx",)),
    Job("to-safetensors", ("to-safetensors", "--type", "int4", "--group-size", "32"), ("m-hf",)),
    Job(
        "to-gguf --also",
        ("to-gguf", "--type", "q4_0", "--also", "onnx=m-onnx", "--also", "safetensors=m-hf"),
        ("m.gguf", "m-onnx", "m-hf"),
    ),
)


class Bench:
    """A model, and of every job what an undisturbed run makes. faults: everything that was not as it should be."""

    def __init__(self, place: Path, model: Path | None, seed: int) -> None:
        self.place = place
        self.random = Random(seed)
        self.faults: list[str] = []
        if model is not None:
            # Dates of its files are changed.
            shutil.copytree(model, place / "model")
        self.model = place / "model" if model is not None else make_checkpoint(
            place / "model", "llama", hidden=64, ffn=64, layers=2, heads=2, kv_heads=1, head_dim=32, vocab=VOCAB,
            tokenizer=small_source().path,
        )  # fmt: skip
        self.older_model = make_checkpoint(
            place / "older", "llama", hidden=64, ffn=64, layers=1, heads=2, kv_heads=1, head_dim=32, vocab=VOCAB,
            tokenizer=small_source().path,
        )  # fmt: skip
        self._wanted: dict[str, dict[str, bytes]] = {}
        self._older: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self._n = 0
        warm_up()

    def command(self, job: Job, *, is_older: bool = False, more: Sequence[str] = ()) -> list[str]:
        """The words of a job."""
        model = self.older_model if is_older else self.model
        return [job.words[0], str(model), "-o", job.outputs[0], *job.words[1:], *QUICK, *more]

    def folder(self, under: Path | None = None) -> Path:
        """A new, empty one."""
        self._n += 1
        made = (under or self.place) / f"{self._n}"
        made.mkdir()
        return made

    def wanted(self, job: Job) -> dict[str, bytes]:
        """The files of an undisturbed run."""
        if job.name not in self._wanted:
            folder = self.folder()
            started = time.monotonic()
            ended = Run(self.command(job), folder).end()
            self.seconds[job.name] = time.monotonic() - started
            if ended.code:
                raise SystemExit(f"{job.name} does not run undisturbed: {ended.said}")
            self._wanted[job.name] = tree(folder)
            shutil.rmtree(folder)
        return self._wanted[job.name]

    def put_older(self, job: Job, folder: Path) -> dict[str, bytes]:
        """Put an older output of the job into a folder; returns its files."""
        if job.name not in self._older:
            made = self.folder()
            ended = Run(self.command(job, is_older=True), made).end()
            if ended.code:
                raise SystemExit(f"{job.name} does not run: {ended.said}")
            self._older[job.name] = tree(made)
            shutil.rmtree(made)
        for name, data in self._older[job.name].items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return self._older[job.name]

    def fault(self, what: str) -> None:
        """Note that something is not as it should be."""
        self.faults.append(f"FAULT {what}")
        print(self.faults[-1], flush=True)

    def require_wanted(self, job: Job, folder: Path, after: str) -> bool:
        """Whether the folder holds the undisturbed run's output and nothing else."""
        found, wanted = tree(folder), self.wanted(job)
        if found == wanted:
            return True
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        other = [name for name in wanted if name in found and found[name] != wanted[name]]
        self.fault(f"{job.name} after {after}: missing {missing}, left over {extra}, other bytes {other}")
        return False

    def require_ours(self, job: Job, ended: Ended, after: str) -> bool:
        """Whether a run that was disturbed ended well, or by an error of ours."""
        if ended.code == 0 or (ended.code in OURS and "Traceback" not in ended.said):
            return True
        self.fault(f"{job.name} after {after}: exit {ended.code}: {ended.said[-600:]}")
        return False


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too; a folder without files counts as one."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found


def say(what: str) -> None:
    """Progress, so that a run that is stopped has told something."""
    print(what, file=sys.stderr, flush=True)


def kills(bench: Bench, n_kills: int) -> dict[str, int]:
    """Chains of kills, each chain until the command ends by itself."""
    n_killed = n_chains = n_equal = n_older = 0
    while n_killed < n_kills:
        job = JOBS[n_chains % len(JOBS)]
        bench.wanted(job)
        folder = bench.folder()
        older = bench.put_older(job, folder) if n_chains // len(JOBS) % 2 else {}
        n_chains += 1
        for attempt in range(12):
            run, started = Run(bench.command(job), folder), time.monotonic()
            share = bench.random.random()
            # The package is written in the last part: every third kill falls there.
            share = 0.7 + 0.4 * share if attempt % 3 == 2 else 1.1 * share
            is_last = attempt == 11 or (attempt > 2 and bench.random.random() < 0.2)
            ended = run.end() if is_last else run.end(kill_after=share * bench.seconds[job.name])
            if ended.code == 0:
                if attempt == 0:
                    # The machine is faster than it was: kills would come too late.
                    bench.seconds[job.name] = time.monotonic() - started
                n_equal += bench.require_wanted(job, folder, f"{attempt} kills")
                break
            if not ended.is_killed:
                bench.fault(f"{job.name} after {attempt} kills: exit {ended.code}: {ended.said[-600:]}")
                break
            n_killed += 1
            if older and job.outputs[0] == "m.gguf" and len(older) == 1:
                n_older += 1
                now = tree(folder)
                # The new one may be a set of several files.
                if now.get("m.gguf") != older["m.gguf"] and not bench.wanted(job).items() <= now.items():
                    bench.fault(f"{job.name}: a kill left neither the older file nor the new one")
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{n_killed} kills, {n_chains} commands, {n_equal} with equal bytes")
    return {"kills": n_killed, "commands": n_chains, "with equal bytes": n_equal, "older file whole": n_older}


def disk(bench: Bench, _n: int) -> dict[str, int]:
    """A full disk from the n-th file on that is opened for writing, for every n of a job."""
    figures = {"points": 0, "errors of ours": 0, "ended all the same": 0, "equal bytes after": 0}
    if os.geteuid() != 0:
        return figures
    with Tmpfs(bench.place / "disk", "64m") as mounted:
        for job in JOBS:
            bench.wanted(job)
            for left in (0, 20_000):
                point = 0
                while point < 400:
                    folder = bench.folder(mounted)
                    ended = Run(
                        bench.command(job), folder, at_open(point, fill_disk(mounted / "filler", left))
                    ).end()
                    is_reached = (mounted / "filler").exists()
                    (mounted / "filler").unlink(missing_ok=True)
                    after = f"a disk full at file {point} but for {left} bytes"
                    is_ours = bench.require_ours(job, ended, after)
                    figures["points"] += is_reached
                    if ended.code:
                        figures["errors of ours"] += is_ours
                        half = [n for n in tree(folder) if ".partial" in n or n.endswith((".gguf", ".onnx"))]
                        if half and len(job.outputs) == 1:
                            bench.fault(f"{job.name} after {after}: left {half}")
                        again = Run(bench.command(job), folder).end()
                        bench.require_ours(job, again, f"{after}, then room")
                    else:
                        figures["ended all the same"] += 1
                    figures["equal bytes after"] += bench.require_wanted(job, folder, after)
                    shutil.rmtree(folder)
                    if not is_reached:
                        break
                    point += 1
            say(f"{job.name}: {figures}")
    return figures


def read_only(bench: Bench, _n: int) -> dict[str, int]:
    """Nothing can be written where the output or the work directory should be."""
    figures = {"refused": 0}
    if os.geteuid() != 0:
        return figures
    for job in JOBS:
        with Tmpfs(bench.place / "fixed", "64m") as mounted:
            folder = bench.folder(mounted)
            older = bench.put_older(job, folder)
            mounted_work = bench.folder(mounted) / "work"
            mounted.remount("ro")
            ended = Run(bench.command(job), folder).end()
            elsewhere = bench.folder()
            ended_too = Run(bench.command(job, more=("--work-dir", str(mounted_work))), elsewhere).end()
            for what, end, place in (("output", ended, folder), ("work directory", ended_too, elsewhere)):
                is_refused = end.code in OURS and "Traceback" not in end.said
                if not is_refused or tree(place) != (older if place is folder else {}):
                    bench.fault(
                        f"{job.name}: read-only {what}: exit {end.code}, {sorted(tree(place))}: {end.said[-500:]}"
                    )
                figures["refused"] += is_refused
            mounted.remount("rw")
    return figures


def together(bench: Bench, _n: int) -> dict[str, int]:
    """Two runs at once: the same command twice, and two outputs with one work directory."""
    figures = {"pairs": 0, "both ended": 0, "one refused": 0}
    for number in range(2 * len(JOBS)):
        job = JOBS[number % len(JOBS)]
        bench.wanted(job)
        folder = bench.folder()
        first = Run(bench.command(job), folder)
        time.sleep(bench.random.random() * 0.5 * bench.seconds[job.name])
        second = Run(bench.command(job), folder)
        ends = [first.end(), second.end()]
        figures["pairs"] += 1
        codes = sorted(end.code for end in ends)
        if codes[0] != 0 or not all(bench.require_ours(job, end, "two runs at once") for end in ends):
            bench.fault(
                f"{job.name}: two runs at once ended with {codes}: {[end.said[-300:] for end in ends]}"
            )
        figures["both ended" if codes[-1] == 0 else "one refused"] += 1
        bench.require_wanted(job, folder, "two runs at once")
    for number in range(2 * len(JOBS)):
        pair = (JOBS[number % len(JOBS)], JOBS[(number + 1) % len(JOBS)])
        figures["pairs"] += 1
        figures["both ended" if _share_work(bench, pair) else "one refused"] += 1
    return figures


def _share_work(bench: Bench, pair: tuple[Job, Job]) -> bool:
    """Two commands at once with one work directory; whoever is refused ends when it is alone. True if both ended."""
    for job in pair:
        bench.wanted(job)
    work = bench.folder()
    commands = [bench.command(job, more=("--work-dir", str(work))) for job in pair]
    folders = [bench.folder(), bench.folder()]
    first = Run(commands[0], folders[0])
    time.sleep(bench.random.random() * 0.8 * bench.seconds[pair[0].name])
    second = Run(commands[1], folders[1])
    ends = [first.end(), second.end()]
    for job, command, folder, end in zip(pair, commands, folders, ends, strict=True):
        bench.require_ours(job, end, "a shared work directory")
        if end.code:
            again = Run(command, folder).end()
            if again.code:
                bench.fault(
                    f"{job.name} alone after a shared work directory: {again.code}: {again.said[-300:]}"
                )
        bench.require_wanted(job, folder, "a shared work directory")
    if all(end.code for end in ends):
        bench.fault(f"{pair[0].name}, {pair[1].name}: a shared work directory stopped both")
    return not any(end.code for end in ends)


def clock(bench: Bench, _n: int) -> dict[str, int]:
    """A jumping clock in the process, odd dates on the source's and the work directory's files, and a kill between."""
    figures = {"runs": 0, "equal bytes": 0}
    for job in JOBS:
        bench.wanted(job)
        for date in (0, 2**32 + 10**8):
            folder = bench.folder()
            for path in self_files(bench.model):
                os.utime(path, (date, date))
            Run(bench.command(job), folder, jumping_clock(bench.random.random())).end(
                kill_after=0.6 * bench.seconds[job.name]
            )
            for path in self_files(folder):
                os.utime(path, (date, date))
            ended = Run(bench.command(job), folder, jumping_clock(bench.random.random())).end()
            figures["runs"] += 1
            if ended.code:
                bench.fault(f"{job.name} with a jumping clock: exit {ended.code}: {ended.said[-600:]}")
            figures["equal bytes"] += bench.require_wanted(job, folder, "a jumping clock")
    return figures


def self_files(folder: Path) -> list[Path]:
    """Every file under a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def mapped(bench: Bench, _n: int) -> dict[str, int]:
    """What this process has mapped of the older output stays as it was; the new one is whole."""
    figures = {"files mapped": 0, "unchanged": 0}
    for job in JOBS:
        bench.wanted(job)
        folder = bench.folder()
        older = bench.put_older(job, folder)
        maps = {}
        for name, data in older.items():
            if data:
                with (folder / name).open("rb") as file:
                    maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ended = Run(bench.command(job), folder).end()
        if ended.code:
            bench.fault(f"{job.name} over a mapped file: exit {ended.code}: {ended.said[-600:]}")
        bench.require_wanted(job, folder, "mapping the older output")
        for name, held in maps.items():
            figures["files mapped"] += 1
            if held[:] == older[name]:
                figures["unchanged"] += 1
            else:
                bench.fault(f"{job.name}: the mapping of {name} changed")
            held.close()
    return figures


CHECKS: Mapping[str, Callable[[Bench, int], dict[str, int]]] = {
    "kills": kills,
    "disk": disk,
    "read-only": read_only,
    "together": together,
    "clock": clock,
    "mapped": mapped,
}
