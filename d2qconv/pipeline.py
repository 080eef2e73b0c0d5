"""The whole way: plan → calibrate → quantize → write → verify.

Everything that can be refused is refused in `plan`, before any weight is read.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch

from d2qconv import __version__
from d2qconv.arch.bind import bind
from d2qconv.arch.spec import Architecture, ModelDesc
from d2qconv.calibrate.tokens import CalibrationTokens, check_spec, describe_tokens, load_tokens
from d2qconv.checkpoint.open import Checkpoint, open_checkpoint
from d2qconv.errors import InputError, Refusal, RunError, VerifyError, refuse
from d2qconv.export.base import (
    Carrier,
    Check,
    Exporter,
    ExporterInfo,
    FloatType,
    Package,
    Progress,
    TargetPlan,
)
from d2qconv.export.package import atomic_output, check_output
from d2qconv.fold.corrections import FoldRecord
from d2qconv.fold.rules import ScaleIntoRows, ShiftIntoBiases
from d2qconv.ir.model import Provenance, QuantizedModel
from d2qconv.ir.store import Store
from d2qconv.ir.workdir import read_tokens, write_tokens
from d2qconv.names import Role
from d2qconv.progress import Watch
from d2qconv.run import CalibrationSpec, Recipe, RunSpec, check_recipe, describe
from d2qconv.walk.model import Walk, WalkResult
from d2qconv.walk.rounding import Rounder, TensorError


@dataclass(frozen=True)
class Job:
    """One conversion, as asked for.

    carrier: None for the most exact that the target has. device: None for the first GPU, or the CPU.
    work_dir: None for `<output>.work`.
    """

    model: str
    exporter: ExporterInfo
    options: object
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    carrier: Carrier | None = None
    device: str | None = None
    work_dir: Path | None = None
    revision: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Planned:
    """What will be done; nothing is refused."""

    job: Job
    checkpoint: Checkpoint
    desc: ModelDesc
    target: TargetPlan
    exporter: Exporter
    device: torch.device

    @property
    def n_weights(self) -> int:
        """Weights of the source; a tied head counts once."""
        return self.desc.n_weights

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors of the package, metadata not counted, per weight of the source. Exact, not an estimate."""
        return 8 * self.target.n_bytes / self.n_weights


@dataclass(frozen=True)
class Outcome:
    """What was done, in numbers. kld, perplexities and same_top: on the held-out sequences, by the float reference."""

    path: Path
    n_bytes: int
    bits_per_weight: float
    kld: float
    perplexity_source: float
    perplexity: float
    same_top: float
    n_tokens: int
    checks: Sequence[Check]
    folds: Sequence[FoldRecord]
    errors: Sequence[TensorError]
    loads_in: Sequence[str]
    fingerprint: str
    seconds: float


def plan(job: Job) -> Planned:
    """Open the checkpoint, choose every tensor's storage, refuse what cannot be done.

    Reads headers and configs, no weights. Raises InputError, PlanError, PluginError.
    """
    check_recipe(job.recipe)
    if not job.recipe.dac and job.carrier not in (None, Carrier.NONE):
        raise InputError("a carrier was asked for and no shift to carry", where="--no-dac --carrier")
    device = choose_device(job.device)
    checkpoint = open_checkpoint(job.model, revision=job.revision)
    desc = bind(checkpoint)
    check_spec(job.calibration, desc)
    exporter = job.exporter.load(job.options)
    target = exporter.plan(desc, job.carrier if job.recipe.dac else Carrier.NONE)
    source = exporter.check_source(checkpoint)
    target = replace(target, warnings=(*target.warnings, *source.warnings))
    refuse([*target.refusals, *source.refusals, *_fold_refusals(desc.arch, job.recipe, target)])
    return Planned(job, checkpoint, desc, target, exporter, device)


def convert(planned: Planned, watch: Watch) -> Outcome:
    """Do what was planned; the output appears whole and verified, or not at all. Raises any D2qError."""
    started = time.monotonic()
    job = planned.job
    check_output(job.output, job.overwrite, planned.target.n_bytes)
    _check_work_dir(planned)
    with _memory_as_run_error():
        content = _read_all(planned, watch)
        tokens = _calibration(planned, content, watch)
        spec = _run_spec(planned, tokens, content)
        with _open_store(planned, spec, watch) as store:
            walk = Walk(
                planned.desc, planned.target, Rounder(job.recipe), tokens, store, planned.device, watch
            )
            result = walk.run()
            model = QuantizedModel(planned.desc, store.tensors(), _provenance(planned, tokens, spec, result))
            package, checks = _package(planned, model, watch)
            store.delete()
    return _outcome(planned, package, checks, result, spec, time.monotonic() - started)


def _package(planned: Planned, model: QuantizedModel, watch: Watch) -> tuple[Package, Sequence[Check]]:
    """Write the package beside its name and verify it there; only then it takes its name."""
    job, n_tensors = planned.job, len(planned.target.tensors)
    with atomic_output(job.output, overwrite=job.overwrite) as path:
        watch.stage("write", 2 * n_tensors)
        package = planned.exporter.write(model, planned.checkpoint, planned.target, path, _steps(watch))
        watch.stage("verify", n_tensors)
        checks = planned.exporter.verify(path, _steps(watch))
        _require_passed(checks)
    return package, checks


def choose_device(wanted: str | None) -> torch.device:
    """The device to compute on; raises InputError if it is not there."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    todo = "leave it out, or say cpu"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("no such device on this machine", where=f"--device {wanted}", todo=todo) from error
    if device.type not in ("cpu", "cuda"):
        raise InputError("only cpu and cuda are supported", where=f"--device {wanted}", todo=todo)
    return device


def _fold_refusals(arch: Architecture, recipe: Recipe, target: TargetPlan) -> Iterator[Refusal]:
    """What the architecture cannot fold although the recipe asks for it."""
    if recipe.dsq:
        yield from ScaleIntoRows().check(arch, Role.DOWN)
    if target.carrier is Carrier.BIAS:
        yield from ShiftIntoBiases().check(arch, Role.FFN_NORM)


def _read_all(planned: Planned, watch: Watch) -> str:
    """Read every weight once; returns the SHA-256 over the config and all of them, hex.

    A damaged or not finite weight is an error now, not hours later in its block. The digest tells a resumed run
    that it is about the same model, wherever that lies.
    """
    sha = hashlib.sha256(msgspec.json.encode(planned.checkpoint.config, order="sorted"))
    tensors = planned.desc.tensors
    watch.stage("read", len(tensors))
    for done, tensor_id in enumerate(sorted(tensors, key=str), 1):
        values = tensors[tensor_id].load()
        sha.update(f"{tensor_id} {values.dtype} {tuple(values.shape)}".encode())
        sha.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        watch.step(done, str(tensor_id))
    return sha.hexdigest()


def _calibration(planned: Planned, content: str, watch: Watch) -> CalibrationTokens:
    """The calibration tokens. Sampled ones are kept in the work directory, since drawing them again takes long."""
    spec = planned.job.calibration
    folder = _work_dir(planned.job)
    is_kept = spec.source == "self"
    key = f"{content} {spec} {planned.device.type} torch {torch.__version__}"
    watch.stage("calibrate", spec.length)
    found = read_tokens(folder, key) if is_kept else None
    if found is not None:
        tokens = CalibrationTokens(
            found["calibration"], found["held_out"], describe_tokens(spec, found["calibration"])
        )
    else:
        tokens = load_tokens(
            spec,
            planned.checkpoint,
            planned.desc,
            device=planned.device,
            on_step=lambda done: watch.step(done, f"sampling from {planned.checkpoint.name}"),
        )
        if is_kept:
            write_tokens(folder, key, {"calibration": tokens.calibration, "held_out": tokens.held_out})
    watch.step(spec.length, tokens.description)
    for warning in tokens.warnings:
        watch.note(warning)
    return tokens


def _run_spec(planned: Planned, tokens: CalibrationTokens, content: str) -> RunSpec:
    return RunSpec(
        version=__version__,
        torch=str(torch.__version__),
        exporter=planned.job.exporter.name,
        model=content,
        recipe=planned.job.recipe,
        calibration=planned.job.calibration,
        tokens=tokens.digest,
        storage={str(t.id): t.type_name for t in planned.target.tensors},
        carrier=planned.target.carrier.value,
        device=planned.device.type,
    )


def _work_dir(job: Job) -> Path:
    return job.work_dir or job.output.with_name(job.output.name + ".work")


def _check_work_dir(planned: Planned) -> None:
    """Refuse a work directory that would swallow the output or cannot hold a byte a weight; raises InputError."""
    job = planned.job
    folder = _work_dir(job).resolve()
    for path in (job.output.resolve(), planned.checkpoint.path.resolve()):
        if path.is_relative_to(folder):
            raise InputError(
                f"{path.name} lies in the work directory, which is emptied at the end",
                where=f"--work-dir {folder}",
                todo="name a folder of its own",
            )
    if folder.exists() and not folder.is_dir():
        raise InputError("not a folder", where=f"--work-dir {folder}", todo="name a folder of its own")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    needed, free = planned.n_weights + planned.target.n_bytes, shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"the work directory takes about {needed:,} bytes and the disk has {free:,} left",
            where=str(folder),
            todo="name a folder on another disk with --work-dir",
        )


def _open_store(planned: Planned, spec: RunSpec, watch: Watch) -> Store:
    """The work directory; says so if it held finished blocks of another job."""
    storages = [t.storage for t in planned.target.tensors]
    grids = {s.id: s for s in storages if not isinstance(s, FloatType)}
    store = Store(_work_dir(planned.job), spec.fingerprint(), grids)
    if store.n_discarded:
        watch.note(
            f"{store.n_discarded} finished parts of another job were discarded from {_work_dir(planned.job)}"
        )
    return store


def _provenance(planned: Planned, tokens: CalibrationTokens, spec: RunSpec, result: WalkResult) -> Provenance:
    recipe = replace(planned.job.recipe, dac=planned.target.carrier is not Carrier.NONE)
    return Provenance(
        version=__version__,
        fingerprint=spec.fingerprint(),
        source=planned.checkpoint.name,
        source_license=planned.checkpoint.license,
        recipe=describe(recipe),
        calibration=f"{tokens.description}, sha256 {tokens.digest}",
        carriers={
            "mean_shift": _carried("mean_shift", result.folds, planned.target.carrier_note),
            "column_scale": _carried("column_scale", result.folds, "rows of up"),
        },
    )


def _carried(name: str, folds: Sequence[FoldRecord], how: str) -> str:
    """How a correction is carried, with the largest residual over all blocks; `none` if there is none."""
    records = [fold for fold in folds if fold.name == name]
    if not records:
        return "none"
    return f"{how}; residual at most {max(r.residual for r in records):.2e} ({records[0].meaning})"


def _require_passed(checks: Sequence[Check]) -> None:
    failed = [f"{c.name}: {c.detail}" for c in checks if not c.is_passed]
    if failed:
        raise VerifyError(
            "the package is not what the quantizer made: " + "; ".join(failed),
            todo="no output was kept; this is a bug, please report it with the command",
        )


def _outcome(
    planned: Planned,
    package: Package,
    checks: Sequence[Check],
    result: WalkResult,
    spec: RunSpec,
    seconds: float,
) -> Outcome:
    judged = result.divergence
    return Outcome(
        path=planned.job.output,
        n_bytes=package.n_bytes,
        bits_per_weight=planned.bits_per_weight,
        kld=judged.mean_kl,
        perplexity_source=judged.perplexity_source,
        perplexity=judged.perplexity,
        same_top=judged.same_top,
        n_tokens=judged.n_tokens,
        checks=checks,
        folds=result.folds,
        errors=result.errors,
        loads_in=planned.target.loads_in,
        fingerprint=spec.fingerprint(),
        seconds=seconds,
    )


@contextmanager
def _memory_as_run_error() -> Iterator[None]:
    """Running out of memory is the user's to mend, not a bug."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        raise RunError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'host memory'}",
            todo="use fewer or shorter calibration sequences (--sequences, --length)",
        ) from error


def _steps(watch: Watch) -> Progress:
    """An exporter's progress as steps of the current stage."""
    return lambda done, _total, what: watch.step(done, what)
