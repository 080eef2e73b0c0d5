"""One measured run of the pipeline, in a process of its own: `quantize_run.py REQUEST.json RESULT.json`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from quantize_flops import chip_rates
from quantize_memory import Peaks, Sampler

from d2qconv import timing
from d2qconv.pipeline import Job, Planned, convert, plan
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv_gguf import INFO, GgufOptions


@dataclass(frozen=True)
class RunRequest:
    """What to run. recipe, job: `name=value` settings of Recipe and Job over their defaults.

    phases: time the spans inside a block, with a synchronization at each, which costs a little.
    """

    model: str
    output: str
    device: str
    type: str
    sequences: int
    length: int
    refine: int
    recipe: list[str] = field(default_factory=list)
    job: list[str] = field(default_factory=list)
    phases: bool = True
    rates: bool = True


@dataclass(frozen=True)
class RunResult:
    """What was measured. seconds: of `convert`, which is everything after planning.

    stages: seconds by stage. blocks: seconds by step of the stage `quantize`. phases: see `d2qconv.timing`.
    predicted: peaks that the plan foretold, bytes, {} if it does not. rates: operations a second.
    """

    seconds: float
    seconds_planning: float
    stages: dict[str, float]
    blocks: list[float]
    phases: dict[str, float]
    peaks: Peaks
    predicted: dict[str, int]
    rates: dict[str, float]
    n_bytes: int
    n_weights: int
    bits_per_weight: float
    kld: float
    checks: list[str]
    notes: list[str]
    device: str
    torch: str


class StampingWatch:
    """Stamps every stage and every step with the time; waits for the GPU before it looks at the clock."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []
        self.steps: list[tuple[str, int, str, float]] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int) -> None:  # noqa: ARG002  the protocol has it
        now = _now()
        print(f"  {name}", flush=True)
        self.stages.append((name, now))

    def step(self, done: int, what: str) -> None:
        name = self.stages[-1][0] if self.stages else ""
        if name == "quantize":
            self.steps.append((name, done, what, _now()))

    def figure(self, name: str, value: float) -> None:
        """Not stamped."""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def seconds(self, end: float) -> dict[str, float]:
        """Seconds of each stage, summed if a name comes twice; the last one ends at `end`."""
        ends = [at for _, at in self.stages[1:]] + [end]
        out: dict[str, float] = {}
        for (name, begun), stopped in zip(self.stages, ends, strict=True):
            out[name] = out.get(name, 0.0) + stopped - begun
        return out

    def block_seconds(self, end: float) -> list[float]:
        """Seconds from one block's first step to the next one's; the last is the output's."""
        firsts: dict[int, float] = {}
        for _, done, _, at in self.steps:
            firsts.setdefault(done, at)
        starts = [firsts[done] for done in sorted(firsts)]
        after = [at for _, at in self.stages if starts and at > starts[-1]]
        return [b - a for a, b in zip(starts, [*starts[1:], (after or [end])[0]], strict=True)]


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def settings(cls: type, given: list[str]) -> dict[str, Any]:
    """`name=value` settings as constructor arguments of a dataclass; raises ValueError on an unknown name.

    A value is read as JSON where it is such, else as text.
    """
    known = {f.name for f in fields(cls)}
    out: dict[str, Any] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(f"{cls.__name__} has no {name}; it has {', '.join(sorted(known))}")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


def run(asked: RunRequest) -> RunResult:
    """Plan and convert under the sampler, then measure the chip."""
    recipe = replace(Recipe(), **{"refine": asked.refine, **settings(Recipe, asked.recipe)})
    folder = Path(asked.model)
    job = Job(
        model=str(folder),
        exporter=INFO,
        options=GgufOptions(type=asked.type),
        output=Path(asked.output),
        recipe=recipe,
        calibration=CalibrationSpec(str(folder / "tokens.npy"), asked.sequences, asked.length),
        device=asked.device,
        overwrite=True,
    )
    job = replace(job, **settings(Job, asked.job))
    if asked.phases:
        timing.enable(synchronize=True)
    watch = StampingWatch()
    with Sampler() as sampler:
        begun = time.perf_counter()
        planned = plan(job)
        started = time.perf_counter()
        outcome = convert(planned, watch)
        ended = _now()
    phases = dict(timing.spans)
    timing.disable()
    return RunResult(
        seconds=ended - started,
        seconds_planning=started - begun,
        stages=watch.seconds(ended),
        blocks=watch.block_seconds(ended),
        phases=phases,
        peaks=sampler.peaks,
        predicted=predicted(planned),
        rates=dict(chip_rates(asked.device)) if asked.rates else {},
        n_bytes=outcome.n_bytes,
        n_weights=planned.n_weights,
        bits_per_weight=outcome.bits_per_weight,
        kld=outcome.kld,
        checks=[f"{c.name}: {'skipped' if c.is_skipped else 'passed'}" for c in outcome.checks],
        notes=[*planned.target.warnings, *watch.notes],
        device=torch.cuda.get_device_name() if asked.device.startswith("cuda") else "CPU",
        torch=str(torch.__version__),
    )


def predicted(planned: Planned) -> dict[str, int]:
    """The peaks of the plan's `footprint`, if it has one."""
    footprint = getattr(planned, "footprint", None)
    if callable(footprint):
        footprint = footprint()
    found = {name: getattr(footprint, name, None) for name in ("gpu_peak", "host_peak", "disk_bytes")}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def main() -> None:
    asked = RunRequest(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(asdict(run(asked))), encoding="utf-8")


if __name__ == "__main__":
    main()
