"""The library's own door: plan, quantize, export, verify, inspect, evaluate as functions. `import d2qconv` gives them.

::

    planned = d2qconv.plan("path/to/model", "model-q2_k.gguf")
    outcome = d2qconv.quantize(planned)
    found = d2qconv.evaluate(outcome.path, source="path/to/model", text="wiki.test.raw", chunks=40)
    found.judged.divergence.kl.value, found.judged.divergence.kl.error

They are what the commands of the same names do, less the printing, and raise the errors of `d2qconv.errors`. A `watch`
(`d2qconv.progress.Watch`) is told how far long work is. torch is loaded with the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2qconv import evaluation, importing, pipeline
from d2qconv.errors import InputError, RunError
from d2qconv.exporters.base import Carrier, Check, ExporterInfo
from d2qconv.exporters.discover import discover, find, for_file
from d2qconv.foreign.read import Foreign
from d2qconv.harness import TaskRun
from d2qconv.importing import Imported
from d2qconv.job import Also, Job, Planned
from d2qconv.measure.result import Evaluated, Tasked
from d2qconv.outcome import Outcome
from d2qconv.progress import Unwatched, Watch, by_steps
from d2qconv.run import CalibrationSpec, Recipe

_PathLike = str | Path


def plan(
    model: _PathLike,
    output: _PathLike,
    *,
    to: str = "gguf",
    options: object | None = None,
    recipe: Recipe | None = None,
    calibration: CalibrationSpec | None = None,
    carrier: Carrier | None = None,
    also: Mapping[str, _PathLike] | None = None,
    device: str | None = None,
    revision: str | None = None,
    work_dir: _PathLike | None = None,
    overwrite: bool = False,
    requantize: bool = False,
    report: bool = True,
    max_gpu_mem: str | None = None,
    max_host_mem: str | None = None,
) -> Planned:
    """What `quantize` will do: every tensor's storage, sizes, memory. Reads headers and configs, no weights.

    model: folder of a Hugging Face checkpoint, or a hub id. output: the package. to: the exporter's name. options: of
    the exporter, its own dataclass (`GgufOptions`, for one), None for its defaults. recipe, calibration: None for
    the defaults. carrier: of the mean shift, None for the most exact. also: further packages of the same codes, path by
    exporter. requantize: take a checkpoint that another tool has quantized, and quantize its values again. report:
    write one beside the package, and measure for it where the divergence comes from. max_gpu_mem, max_host_mem: sizes
    such as `24GiB`. Raises InputError, PlanError with every refusal, PluginError.
    """
    job = _job(model, output, to, options, also, revision, overwrite)
    return pipeline.plan(
        replace(
            job,
            recipe=Recipe() if recipe is None else recipe,
            calibration=CalibrationSpec() if calibration is None else calibration,
            carrier=carrier,
            device=device,
            work_dir=None if work_dir is None else Path(work_dir),
            max_gpu_mem=max_gpu_mem,
            max_host_mem=max_host_mem,
            requantize=requantize,
            is_reported=report,
        )
    )


def quantize(planned: Planned, *, watch: Watch | None = None) -> Outcome:
    """Calibrate, quantize, write the package and verify it; it appears whole, or not at all.

    A run that was stopped goes on where it stopped, by the same plan. Raises any error of `d2qconv.errors`; RunError
    also in a process of torchrun that is not the first: these have no outcome.
    """
    outcome = pipeline.convert(planned, Unwatched() if watch is None else watch)
    if outcome is None:
        raise RunError("only the first process of a team gets an outcome", todo="use torchrun -m d2qconv")
    return outcome


def export(
    checkpoint: _PathLike,
    output: _PathLike,
    *,
    to: str = "gguf",
    options: object | None = None,
    also: Mapping[str, _PathLike] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> Imported:
    """Write a checkpoint that is quantized already as another package, verified; every value stays as it is.

    checkpoint: folder or hub id of a GPTQ, AWQ, AutoRound or compressed-tensors checkpoint, a package of ours among
    them. options: None for types of the exporter that hold the values. The rest is as for `plan`. Raises any error of
    `d2qconv.errors`; PlanError with what it would cost where no type holds the values exactly.
    """
    job = _job(checkpoint, output, to, options, also, revision, overwrite)
    source = importing.open_source(job)
    if not isinstance(source, Foreign):
        raise InputError(
            "the checkpoint is not quantized", where=str(checkpoint), todo="use plan and quantize"
        )
    planned = importing.plan_import(job, source)
    return importing.convert_import(planned, Unwatched() if watch is None else watch)


def verify(package: _PathLike, *, to: str = "", watch: Watch | None = None) -> Sequence[Check]:
    """Compare every tensor with its record, through an independent reader, then with the package's runtime.

    to: the exporter that wrote it, empty to find it out. A check that failed is no error: look at `is_passed`. Raises
    VerifyError if this is no package of ours at all.
    """
    path, info = _package(package, to)
    progress = by_steps(Unwatched() if watch is None else watch, "verify")
    return info.load(info.default_options()).verify(path, progress)


def inspect(package: _PathLike, *, to: str = "") -> Mapping[str, Any]:
    """Facts of a package: layout, sizes by type, where it comes from. Reads no weights. to: as for `verify`."""
    path, info = _package(package, to)
    return info.load(info.default_options()).inspect(path)


def evaluate(
    package: _PathLike,
    *,
    source: _PathLike | None = None,
    text: _PathLike | None = None,
    chunks: int | None = None,
    context: int = evaluation.CONTEXT,
    baseline: _PathLike | None = None,
    device: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> Evaluated:
    """Perplexity of a package in its own runtime, and KL divergence from its source, as llama-perplexity measures them.

    source: folder or hub id; without it the package is measured alone. text: a text, JSONL or token file, or a hub data
    set; without it tokens are sampled from the source. chunks: its first ones, None for all. context: tokens of a
    chunk. baseline: another package at the same tokens. Raises InputError, PluginError, VerifyError, RunError.
    """
    asked = evaluation.Evaluation(
        package=evaluation.Target(*_package(package, "")),
        source=None if source is None else str(source),
        revision=revision,
        text=None if text is None else str(text),
        n_chunks=chunks,
        context=context,
        device=device,
        seed=seed,
        baseline=None if baseline is None else evaluation.Target(*_package(baseline, "")),
    )
    return evaluation.evaluate(asked, Unwatched() if watch is None else watch)


def evaluate_tasks(
    package: _PathLike,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    folder: _PathLike | None = None,
    window: int | None = None,
    watch: Watch | None = None,
) -> Tasked:
    """Score a package by tasks of lm-evaluation-harness (the extra `tasks`), in its own runtime.

    limit: samples of each task. shots: examples before each, None for the task's own number. folder: with task files of
    one's own. window: tokens of the longest prompt. Raises InputError, PluginError, VerifyError, RunError.
    """
    run = TaskRun(tuple(tasks), limit, shots, None if folder is None else Path(folder))
    target = evaluation.Target(*_package(package, ""))
    return evaluation.evaluate_tasks(target, run, Unwatched() if watch is None else watch, window=window)


def _job(
    model: _PathLike,
    output: _PathLike,
    to: str,
    options: object | None,
    also: Mapping[str, _PathLike] | None,
    revision: str | None,
    overwrite: bool,
) -> Job:
    found = discover()
    info = find(to, found)
    others = {} if also is None else also
    return Job(
        model=str(model),
        exporter=info,
        options=info.default_options() if options is None else options,
        output=Path(output),
        revision=revision,
        overwrite=overwrite,
        also=tuple(Also(find(name, found), Path(path)) for name, path in others.items()),
    )


def _package(package: _PathLike, name: str) -> tuple[Path, ExporterInfo]:
    path = Path(package)
    if not path.exists():
        raise InputError("there is no such file", where=str(path))
    found = discover()
    return path, find(name, found) if name else for_file(path, found)
