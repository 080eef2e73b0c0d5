"""From what a run knows at its end to its `Report`."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import torch

from d2qconv import __version__
from d2qconv.budget import Peaks
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.exporters.base import Check, Exporter, FloatType, Sizing, TensorPlan
from d2qconv.exporters.contents import contents
from d2qconv.fold.corrections import FoldRecord
from d2qconv.ir.model import Provenance
from d2qconv.job import Destination, Planned
from d2qconv.measure.metrics import Divergence
from d2qconv.measure.spread import kl_spread
from d2qconv.outcome import Outcome
from d2qconv.refine.settings import RefineNotes
from d2qconv.report.schema import (
    LARGEST,
    VERSION,
    AllocationEntry,
    BlockEntry,
    CheckEntry,
    Contribution,
    Environment,
    FileEntry,
    FoldEntry,
    LastPassEntry,
    Measured,
    MemoryEntry,
    PackageEntry,
    Quality,
    Report,
    SourceEntry,
    Spread,
    TensorEntry,
)
from d2qconv.walk.memory import Footprint, MemoryPart, peak
from d2qconv.walk.model import WalkResult

#: Distributions that take part in every run.
LIBRARIES = ("torch", "numpy", "safetensors", "msgspec", "tokenizers", "sentencepiece", "triton")


@dataclass(frozen=True)
class RunFacts:
    """What a run knows at its end. stages: their seconds. n_processes: of the team."""

    planned: Planned
    tokens: CalibrationTokens
    about: Provenance
    result: WalkResult
    outcome: Outcome
    stages: Mapping[str, float]
    n_processes: int


def collect(run: RunFacts) -> Report:
    """The report of a run whose packages are in their places; reads every file of them once.

    Raises InputError for a file that cannot be read.
    """
    planned, outcome = run.planned, run.outcome
    sizes = _sizes(planned.exporter, outcome.path)
    tensors = _tensors(run, sizes)
    return Report(
        report=VERSION,
        digest="",
        package=_package(planned.main, outcome.path, sizes, outcome.checks, run.about),
        also=[
            _package(to, written.path, _sizes(to.exporter, written.path), written.checks, run.about)
            for to, written in zip(planned.also, outcome.also, strict=True)
        ],
        source=_source(planned),
        bits_per_weight=outcome.bits_per_weight,
        carrier=planned.target.carrier.value,
        carrier_note=planned.target.carrier_note,
        warnings=list(planned.target.warnings),
        quality=_quality(run),
        contribution=_contribution(run.result),
        blocks=_blocks(run.result, tensors),
        tensors=tensors,
        folds=[_fold(f) for f in outcome.folds],
        allocation=_allocation(planned),
        last_pass=outcome.last_pass,
        last_pass_notes=_last_pass(run.result.refined),
        calibration=run.tokens.description,
        tokens_sha256=run.tokens.digest,
        recipe=run.about.recipe,
        options=_options(planned),
        command=list(planned.job.command),
        fingerprint=outcome.fingerprint,
        memory=_memory(outcome.peaks, outcome.footprint),
        activations=outcome.footprint.place.value,
        stages=dict(run.stages),
        seconds=outcome.seconds,
        resumed_blocks=outcome.resumed_blocks,
        environment=_environment(planned, run.n_processes),
    )


def measured(number: float | None) -> Measured:
    """What the report has for a number: itself, or None if it is not finite or beyond `LARGEST`."""
    return number if number is not None and abs(number) <= LARGEST else None


def _package(
    to: Destination, package: Path, sizes: Mapping[str, int], checks: Sequence[Check], about: Provenance
) -> PackageEntry:
    """package: its folder, its file, or the first of its files. sizes: see `_sizes`."""
    found = contents(package)
    return PackageEntry(
        format=to.info.name,
        name=to.output.name,
        is_folder=to.info.is_folder,
        layout=to.target.layout,
        n_bytes=found.n_bytes,
        tensor_bytes=to.target.n_bytes,
        written=sum(sizes.values()) if sizes else None,
        files=[FileEntry(name, record.n_bytes, record.sha256) for name, record in found.files.items()],
        loads_in=list(to.target.loads_in),
        checks=[CheckEntry(c.name, c.detail, c.is_passed, c.is_skipped) for c in checks],
        provenance=about.facts(),
    )


def _sizes(exporter: Exporter, package: Path) -> Mapping[str, int]:
    """Bytes of the package's tensors by stored name, as the file says; empty where its exporter does not tell."""
    return exporter.tensor_bytes(package) if isinstance(exporter, Sizing) else {}


def _source(planned: Planned) -> SourceEntry:
    checkpoint = planned.checkpoint
    return SourceEntry(
        name=checkpoint.name,
        revision=checkpoint.revision,
        license=checkpoint.license,
        architecture=planned.desc.arch.id,
        n_weights=planned.n_weights,
        sha256=planned.content,
    )


def _quality(run: RunFacts) -> Quality:
    judged: Divergence = run.result.divergence
    spread = kl_spread(torch.cat(judged.kl))
    return Quality(
        kld=measured(run.outcome.kld),
        kld_unrefined=measured(run.outcome.kld_unrefined),
        perplexity_source=measured(run.outcome.perplexity_source),
        perplexity=measured(run.outcome.perplexity),
        same_top=run.outcome.same_top,
        n_tokens=run.outcome.n_tokens,
        held_out_sha256=run.tokens.held_out_digest,
        spread=Spread(
            {f"{p:g}": measured(value) for p, value in spread.quantiles.items()},
            list(spread.edges),
            list(spread.counts),
        ),
    )


def _contribution(result: WalkResult) -> Contribution | None:
    found = result.contributions
    if found is None:
        return None
    return Contribution(
        measured(found.embedding),
        [measured(nats) for nats in found.blocks],
        measured(found.output),
        measured(found.last_pass),
        measured(found.total),
        found.n_tokens,
    )


def _tensors(run: RunFacts, written: Mapping[str, int]) -> list[TensorEntry]:
    """written: see `_sizes`."""
    planned = run.planned
    errors = {e.tensor: e for e in run.outcome.errors}
    chosen = {} if planned.allocation is None else planned.allocation.tensors

    def entry(t: TensorPlan) -> TensorEntry:
        error = None if isinstance(t.storage, FloatType) else errors.get(str(t.id))
        return TensorEntry(
            id=str(t.id),
            role=str(t.id.role),
            part=str(t.id.part),
            block=t.id.block,
            stored_as=t.stored_as,
            shape=list(t.shape),
            type=t.type_name,
            n_bytes=t.n_bytes,
            written=written.get(t.stored_as),
            bits_per_weight=8 * t.n_bytes / math.prod(t.shape),
            weight_error=None if error is None else measured(error.weight),
            output_error=None if error is None else measured(error.output),
            kld=measured(chosen[t.id].kld) if t.id in chosen else None,
            note=t.note,
        )

    return [entry(t) for t in planned.target.tensors]


def _blocks(result: WalkResult, tensors: Sequence[TensorEntry]) -> list[BlockEntry]:
    found = []
    for record in result.blocks:
        own = [t for t in tensors if t.block == record.index]
        matrices = [t for t in own if len(t.shape) > 1]
        n_weights = sum(math.prod(t.shape) for t in matrices)
        found.append(
            BlockEntry(
                index=record.index,
                error=measured(record.error),
                seconds=record.seconds,
                n_bytes=sum(t.n_bytes for t in own),
                bits_per_weight=8 * sum(t.n_bytes for t in matrices) / max(n_weights, 1),
                last_pass=_last_pass(record.refined),
            )
        )
    return found


def _fold(fold: FoldRecord) -> FoldEntry:
    residual, explained = measured(fold.residual), measured(fold.explained)
    return FoldEntry(fold.name, fold.block, fold.carrier, residual, fold.meaning, explained)


def _last_pass(notes: RefineNotes | None) -> LastPassEntry | None:
    if notes is None:
        return None
    trained = measured(notes.trained_before), measured(notes.trained_after)
    reserved = measured(notes.reserved_before), measured(notes.reserved_after)
    return LastPassEntry(notes.steps, notes.kept, notes.why, *trained, *reserved)


def _allocation(planned: Planned) -> AllocationEntry | None:
    found = planned.allocation
    if found is None:
        return None
    return AllocationEntry(found.asked, found.budget, found.kld, found.n_tokens, list(found.curve))


def _options(planned: Planned) -> dict[str, Any]:
    """Every option that is in force, of the exporter under its name."""
    job = planned.job
    own = asdict(job.options) if is_dataclass(job.options) and not isinstance(job.options, type) else {}
    found: dict[str, Any] = {
        "recipe": asdict(job.recipe),
        "calibration": asdict(job.calibration) | {"source": _public(job.calibration.source)},
        "carrier": None if job.carrier is None else job.carrier.value,
        "also": [f"{also.exporter.name}={also.output.name}" for also in job.also],
        "requantize": job.requantize,
        "revision": job.revision,
        "device": planned.device.type if job.device is None else job.device,
        "last_pass": {"scope": planned.last_pass.scope, "steps": planned.last_pass.steps},
        job.exporter.name: {name: _public(value) for name, value in own.items()},
    }
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(found, enc_hook=str))
    return decoded


def _public(value: Any) -> Any:
    """A path without the folders in which it lies: a report is given away with its package."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str) and os.sep in value and Path(value).exists():
        return Path(value).name
    return value


def _memory(peaks: Peaks, footprint: Footprint) -> list[MemoryEntry]:
    found = []
    if peaks.gpu_reserved is not None:
        found.append(_kind("GPU", footprint.gpu, peaks.gpu_reserved, footprint.budget.gpu_bytes))
    found.append(_kind("host", footprint.host, peaks.host, footprint.budget.host_bytes))
    return found


def _kind(kind: str, parts: Sequence[MemoryPart], measured: int, budget: int | None) -> MemoryEntry:
    phase, predicted = peak(parts)
    sizes: dict[str, int] = {}
    for part in parts:
        if phase in part.phases and part.n_bytes:
            sizes[part.name] = sizes.get(part.name, 0) + part.n_bytes
    return MemoryEntry(kind, predicted, phase.value, sizes, measured, budget)


def _environment(planned: Planned, n_processes: int) -> Environment:
    job = planned.job
    names = dict.fromkeys(
        (*LIBRARIES, *job.exporter.requires, *(r for a in job.also for r in a.exporter.requires))
    )
    versions = {"python": platform.python_version(), "d2qconv": __version__}
    versions |= {name: found for name in names if (found := _version(name))}
    device = planned.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Environment(
        versions=versions,
        system=f"{platform.system()} {platform.release()}",
        device=f"{device.type}: {name}",
        threads=torch.get_num_threads(),
        processes=n_processes,
    )


def _version(name: str) -> str:
    """Of an installed distribution, '' for none of that name."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
