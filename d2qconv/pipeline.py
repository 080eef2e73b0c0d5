"""The whole way: plan → calibrate → quantize → write → verify.

Everything that can be refused is refused in `plan`, before any weight is read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from d2qconv import __version__
from d2qconv.arch.bind import bind
from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import CUDA_CONTEXT, PeakMeter, Peaks, choose_budget
from d2qconv.calibrate.tokens import (
    HELD_OUT_SHARE,
    CalibrationTokens,
    check_spec,
)
from d2qconv.checkpoint.open import Checkpoint, open_checkpoint
from d2qconv.errors import InputError, Refusal, RunError, VerifyError, refuse
from d2qconv.export.base import (
    Carrier,
    Check,
    Exporter,
    ExporterInfo,
    FloatType,
    Package,
    Padder,
    PaddingChoice,
    Progress,
    TargetPlan,
)
from d2qconv.export.file_set import atomic_set, check_set
from d2qconv.export.package import atomic_output, check_output
from d2qconv.fold.corrections import FoldRecord
from d2qconv.fold.padding import padded
from d2qconv.fold.rotation import Rotation, rotated
from d2qconv.fold.rules import ScaleIntoGain, ScaleIntoRows, ShiftIntoBiases
from d2qconv.gather import Source, calibration_tokens, read_weights
from d2qconv.grids.base import Grid
from d2qconv.ir.model import Provenance, QuantizedModel
from d2qconv.ir.store import Store
from d2qconv.names import Role
from d2qconv.progress import Unwatched, Watch
from d2qconv.run import CalibrationSpec, Recipe, RunSpec, check_recipe, describe
from d2qconv.team import Team
from d2qconv.walk.activations import Placement
from d2qconv.walk.last_pass import LastPass, choose_last_pass, own_sequences
from d2qconv.walk.memory import Footprint, predict
from d2qconv.walk.model import Walk, WalkResult
from d2qconv.walk.rounding import Rounder, TensorError
from d2qconv.walk.sharing import SharedStore


@dataclass(frozen=True)
class Job:
    """One conversion, as asked for.

    carrier: None for the most exact that the target has. device: None for the first GPU, or the CPU.
    work_dir: None for `<output>.work`. max_gpu_mem, max_host_mem: sizes such as `24GiB`; None for a share of what is
    free, see `d2qconv.budget`. They choose where activations lie, and no bit of the result.
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
    max_gpu_mem: str | None = None
    max_host_mem: str | None = None


@dataclass(frozen=True)
class Planned:
    """What will be done; nothing is refused.

    source: the checkpoint's model. desc: the model that is quantized, the same but for a rotation and a padding.
    footprint: the memory that it is predicted to take.
    """

    job: Job
    checkpoint: Checkpoint
    source: ModelDesc
    desc: ModelDesc
    target: TargetPlan
    exporter: Exporter
    device: torch.device
    footprint: Footprint
    last_pass: LastPass

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
    """What was done, in numbers.

    path: the package, its first file if there are several. kld, perplexities and same_top: on the held-out sequences,
    by the float reference. peaks: memory as measured; footprint: as predicted. last_pass: what came of it, in words,
    empty if there was none; kld_unrefined: before it, where it changed the whole model.
    """

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
    peaks: Peaks
    footprint: Footprint
    last_pass: str = ""
    kld_unrefined: float | None = None


def plan(job: Job) -> Planned:
    """Open the checkpoint, choose every tensor's storage, refuse what cannot be done.

    Reads headers and configs, no weights. Raises InputError, PlanError, PluginError.
    """
    check_recipe(job.recipe)
    if not job.recipe.dac and job.carrier in (Carrier.BIAS, Carrier.RANK1):
        raise InputError(
            "a carrier was asked for and no shift to carry",
            where=f"--carrier {job.carrier}",
            todo="add --dac",
        )
    device = choose_device(job.device)
    checkpoint = open_checkpoint(job.model, revision=job.revision)
    bound = bind(checkpoint)
    kind = job.recipe.rotation
    desc = bound if kind == "none" else rotated(bound, Rotation(kind))
    check_spec(job.calibration, desc)
    exporter = job.exporter.load(job.options)
    choice = exporter.choose_padding(desc) if isinstance(exporter, Padder) else PaddingChoice(None)
    desc = desc if choice.padding is None else padded(desc, choice.padding)
    target = exporter.plan(desc, job.carrier if job.recipe.dac else job.carrier or Carrier.NONE)
    source = exporter.check_source(checkpoint)
    target = replace(target, warnings=(*target.warnings, *source.warnings), widths=choice.note)
    budget = choose_budget(job.max_gpu_mem, job.max_host_mem, device)
    n_all = job.calibration.sequences + own_sequences(job.calibration, job.recipe, bound, device)
    seen = replace(job.calibration, sequences=n_all)
    footprint = predict(desc, seen, n_held_out(job.calibration), job.recipe, budget, device)
    refuse(
        [
            *target.refusals,
            *source.refusals,
            *_fold_refusals(desc, job.recipe, target),
            *footprint.refusals,
        ]
    )
    last_pass = choose_last_pass(
        job.recipe, desc, target, job.calibration, footprint.free_for_last_pass, device
    )
    return Planned(job, checkpoint, bound, desc, target, exporter, device, footprint, last_pass)


def convert(planned: Planned, watch: Watch) -> Outcome | None:
    """Do what was planned; the output appears whole and verified, or not at all. Raises any D2qError.

    Under torchrun every process calls it; the first one alone shows progress, writes the package and gets an outcome.
    """
    started = time.monotonic()
    with _memory_as_run_error(planned), Team.join(planned.device) as team, PeakMeter(team.device) as meter:
        planned = replace(planned, device=team.device)
        _limit(planned)
        watch = watch if team.is_leader else Unwatched()
        content = team.from_leader(lambda: _prepare(planned, watch))
        tokens = calibration_tokens(
            _source(planned), planned.job.calibration, planned.last_pass.own, content, team, watch
        )
        spec = _run_spec(planned, tokens, content)
        team.same("the run's fingerprint", spec.fingerprint())
        with ExitStack() as stack:
            store = _open_store(planned, spec, team, stack, watch)
            result = _walk(planned, tokens, store, team, watch).run()
            peaks = _largest(team.gather(meter.peaks()))
            if not team.is_leader:
                return None
            # The others may go: what follows is one process's work, and may take long.
            team.leave()
            held = store.leaders
            about = _provenance(planned, tokens, spec, result)
            model = QuantizedModel(planned.desc, held.tensors(), about, result.importance)
            package, checks = _package(planned, model, watch)
            held.delete()
            peaks = _largest([peaks, meter.peaks()])
    return _outcome(planned, package, checks, result, spec, time.monotonic() - started, peaks)


def _limit(planned: Planned) -> None:
    """Let PyTorch's allocator keep no more of the GPU than the budget: what it holds and does not use it gives back."""
    budget = planned.footprint.budget.gpu_bytes
    if planned.device.type == "cuda" and budget is not None:
        total = torch.cuda.get_device_properties(planned.device).total_memory
        share = min(max(budget - CUDA_CONTEXT, 0) / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(share, planned.device.index or 0)


def _prepare(planned: Planned, watch: Watch) -> str:
    """Look at output, work directory and every weight before any work; returns the digest of the weights."""
    check = check_set if planned.target.is_split else check_output
    check(planned.job.output, planned.job.overwrite, planned.target.n_bytes)
    _check_work_dir(planned)
    return read_weights(_source(planned), watch)


def _walk(planned: Planned, tokens: CalibrationTokens, store: SharedStore, team: Team, watch: Watch) -> Walk:
    return Walk(
        planned.desc,
        planned.target,
        Rounder(planned.job.recipe),
        tokens,
        store,
        planned.device,
        watch,
        Placement(planned.footprint.place, planned.device, _work_dir(planned.job), team.rank),
        team,
        planned.last_pass,
    )


def _package(planned: Planned, model: QuantizedModel, watch: Watch) -> tuple[Package, Sequence[Check]]:
    """Write the package beside its name and verify it there; only then it takes its name."""
    job, n_tensors = planned.job, len(planned.target.tensors)
    place = atomic_set if planned.target.is_split else atomic_output
    with place(job.output, overwrite=job.overwrite) as path:
        watch.stage("write", 2 * n_tensors)
        package = planned.exporter.write(model, planned.checkpoint, planned.target, path, _steps(watch))
        watch.stage("verify", n_tensors)
        checks = planned.exporter.verify(package.path, _steps(watch))
        _require_passed(checks)
    name = package.path.name if planned.target.is_split else job.output.name
    return replace(package, path=job.output.with_name(name)), checks


def n_held_out(calibration: CalibrationSpec) -> int:
    """Sequences that the closing KL divergence is measured on; fewer if the calibration text is short."""
    return max(calibration.sequences // HELD_OUT_SHARE, 1)


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


def _fold_refusals(desc: ModelDesc, recipe: Recipe, target: TargetPlan) -> Iterator[Refusal]:
    """What the model cannot fold although the recipe asks for it."""
    arch = desc.arch
    if recipe.dac_final and desc.is_tied:
        why = "the head is the embedding, and a change of it would change what the first block reads"
        yield Refusal("dac-final", why, "leave it out, or use --rotation, which unties the head")
    if recipe.dsq:
        yield from ScaleIntoRows().check(arch, Role.DOWN)
    if recipe.value_scales:
        yield from ScaleIntoRows().check(arch, Role.O)
    if recipe.norm_scales:
        yield from ScaleIntoGain().check(arch, Role.ATTN_NORM)
        yield from ScaleIntoGain().check(arch, Role.FFN_NORM)
    if target.carrier is Carrier.BIAS:
        yield from ShiftIntoBiases().check(arch, Role.FFN_NORM)
    if target.carrier is Carrier.BIASES:
        if recipe.rounding == "nearest":
            why = "biases take the means out of a sweep, and rounding to nearest has none"
            yield Refusal("carrier biases", why, "use --rounding gptq or another carrier")
        if recipe.attention_weights:
            why = "means weighed by attention are not those that a bias must carry"
            yield Refusal("carrier biases", why, "leave out --attention-weights or use another carrier")


def _source(planned: Planned) -> Source:
    return Source(planned.checkpoint, planned.source, planned.device, _work_dir(planned.job))


def _run_spec(planned: Planned, tokens: CalibrationTokens, content: str) -> RunSpec:
    return RunSpec(
        version=__version__,
        torch=str(torch.__version__),
        exporter=planned.job.exporter.name,
        model=content,
        recipe=replace(planned.job.recipe, refine=planned.last_pass.steps, refine_scope="auto"),
        last_pass=planned.last_pass.scope,
        calibration=planned.job.calibration,
        tokens=tokens.digest,
        storage={str(t.id): t.type_name for t in planned.target.tensors},
        carrier=planned.target.carrier.value,
        device=planned.device.type,
        padding=planned.desc.padding,
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
    # The parts hold packed codes, and the package is written before they go.
    needed = 2 * planned.target.n_bytes + planned.footprint.disk_bytes
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"the work directory takes about {needed:,} bytes and the disk has {free:,} left",
            where=str(folder),
            todo="name a folder on another disk with --work-dir"
            + (", or use fewer or shorter sequences" if planned.footprint.disk_bytes else ""),
        )


def _open_store(planned: Planned, spec: RunSpec, team: Team, stack: ExitStack, watch: Watch) -> SharedStore:
    """The work directory, opened by the leader; says so if it held finished blocks of another job."""
    opened: list[Store] = []

    def open_it() -> None:
        store = stack.enter_context(Store(_work_dir(planned.job), spec.fingerprint(), _grids(planned)))
        opened.append(store)
        if store.n_discarded:
            watch.note(
                f"{store.n_discarded} finished parts of another job were discarded from "
                f"{_work_dir(planned.job)}"
            )

    team.from_leader(open_it)
    return SharedStore(team, opened[0] if opened else None, _grids(planned))


def _largest(peaks: Sequence[Peaks]) -> Peaks:
    """The largest of every kind, over processes or stages."""

    def most(values: Sequence[int | None]) -> int | None:
        return max((v for v in values if v is not None), default=None)

    return Peaks(
        most([p.gpu_allocated for p in peaks]),
        most([p.gpu_reserved for p in peaks]),
        max(p.host for p in peaks),
        peaks[0].is_host_with_files,
    )


def _grids(planned: Planned) -> dict[str, Grid]:
    """All grids of the plan, by id."""
    storages = [t.storage for t in planned.target.tensors]
    return {s.id: s for s in storages if not isinstance(s, FloatType)}


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
            "column_scale": _carried("column_scale", result.folds, _scaled_places(result.folds)),
        },
    )


def _scaled_places(folds: Sequence[FoldRecord]) -> str:
    return ", ".join(dict.fromkeys(fold.carrier for fold in folds if fold.name == "column_scale"))


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
    peaks: Peaks,
) -> Outcome:
    judged = result.divergence
    return Outcome(
        path=package.path,
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
        peaks=peaks,
        footprint=planned.footprint,
        last_pass=_last_pass(planned, result),
        kld_unrefined=None if result.unrefined is None else result.unrefined.mean_kl,
    )


def _last_pass(planned: Planned, result: WalkResult) -> str:
    """What the last pass did, for people."""
    steps = planned.last_pass.steps
    if result.refined is not None:
        if not result.refined.kept or result.unrefined is None:
            return f"not kept after {result.refined.steps} steps: {result.refined.why}"
        before, after = result.unrefined.mean_kl, result.divergence.mean_kl
        return f"{steps} steps, KL divergence {before:.4f} → {after:.4f}"
    if result.blocks:
        n_kept = sum(notes.kept for notes in result.blocks)
        return f"{steps} steps a block, kept in {n_kept} of {len(result.blocks)} blocks"
    return ""


@contextmanager
def _memory_as_run_error(planned: Planned) -> Iterator[None]:
    """Running out of memory is the user's to mend, not a bug."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(
            error
        ):
            raise
        option = "--max-gpu-mem" if planned.footprint.gpu else "--max-host-mem"
        raise RunError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'host memory'}",
            todo=f"give a smaller budget than what was predicted ({option}), so that activations are kept "
            "elsewhere, or use shorter sequences (--length)",
        ) from error


def _steps(watch: Watch) -> Progress:
    """An exporter's progress as steps of the current stage."""
    return lambda done, _total, what: watch.step(done, what)
