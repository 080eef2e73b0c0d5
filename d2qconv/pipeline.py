"""The whole way: plan → calibrate → quantize → write → verify.

Everything that can be refused is refused in `plan`, before any weight is read.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import msgspec
import torch

from d2qconv import __version__
from d2qconv.allocate.allocation import Measurement, activation_bytes, refusals
from d2qconv.allocate.allocation import allocate as choose_types
from d2qconv.arch.bind import bind
from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import PeakMeter, Peaks, choose_budget, gibibytes, host_limit, limit_allocator
from d2qconv.calibrate.tokens import (
    HELD_OUT_SHARE,
    CalibrationTokens,
    check_spec,
)
from d2qconv.checkpoint.open import Checkpoint, open_checkpoint
from d2qconv.errors import InputError, Refusal, RunError, refuse
from d2qconv.exporters.base import (
    Allocating,
    Carrier,
    FloatType,
    Padder,
    PaddingChoice,
    TargetPlan,
)
from d2qconv.exporters.beside import check_report
from d2qconv.fold.padding import padded
from d2qconv.fold.rotation import Rotation, rotated
from d2qconv.foreign.read import read_foreign
from d2qconv.gather import Source, calibration_tokens, read_weights
from d2qconv.grids.base import Grid
from d2qconv.ir.model import QuantizedModel
from d2qconv.ir.recoded import recoded
from d2qconv.ir.store import Store
from d2qconv.ir.workdir import read_begun
from d2qconv.job import Job, Planned, check_places
from d2qconv.outcome import AlsoWritten, Outcome, outcome_of, provenance
from d2qconv.packaging import check_all_places, grids_of, plan_also, written_package
from d2qconv.progress import Stages, Unwatched, Watch
from d2qconv.report.collect import RunFacts
from d2qconv.report.write import write_report
from d2qconv.run import CalibrationSpec, Recipe, RunSpec, check_recipe
from d2qconv.team import Team
from d2qconv.walk.activations import Placement
from d2qconv.walk.last_pass import LastPass, choose_last_pass, own_sequences
from d2qconv.walk.memory import Footprint, choose_place, predict
from d2qconv.walk.model import Walk
from d2qconv.walk.refusals import fold_refusals
from d2qconv.walk.rounding import Rounder
from d2qconv.walk.sharing import SharedStore


def plan(job: Job, opened: Checkpoint | None = None) -> Planned:
    """Open the checkpoint, choose every tensor's storage, refuse what cannot be done.

    opened: the job's checkpoint, where it is open already. Storages that follow from a measurement are chosen by
    `allocate`; that a choice exists is seen here. Reads headers and configs, no weights. Raises InputError, PlanError,
    PluginError.
    """
    check_recipe(job.recipe)
    check_places(job)
    if not job.recipe.dac and job.carrier in (Carrier.BIAS, Carrier.RANK1):
        raise InputError(
            "a carrier was asked for and no shift to carry",
            where=f"--carrier {job.carrier}",
            todo="add --dac",
        )
    device = choose_device(job.device)
    checkpoint = _floats(opened or open_checkpoint(job.model, revision=job.revision), job)
    bound = bind(checkpoint)
    kind = job.recipe.rotation
    desc = bound if kind == "none" else rotated(bound, Rotation(kind))
    check_spec(job.calibration, desc)
    exporter = job.exporter.load(job.options)
    choice = exporter.choose_padding(desc) if isinstance(exporter, Padder) else PaddingChoice(None)
    desc = desc if choice.padding is None else padded(desc, choice.padding)
    target = exporter.plan(desc, _carrier(job))
    source = exporter.check_source(checkpoint)
    target = replace(target, warnings=(*target.warnings, *source.warnings), widths=choice.note)
    budget = choose_budget(job.max_gpu_mem, job.max_host_mem, device)
    n_all = job.calibration.sequences + own_sequences(job.calibration, job.recipe, bound, device)
    seen = replace(job.calibration, sequences=n_all)
    n_held = n_held_out(job.calibration)
    footprint = predict(desc, seen, n_held, job.recipe, budget, device, is_attributed=job.is_reported)
    last_pass, no_room = _last_pass(job, checkpoint, desc, target, footprint, device)
    if last_pass.steps:
        footprint = predict(
            desc, seen, n_held, job.recipe, budget, device, last_pass, is_attributed=job.is_reported
        )
    refuse(
        [
            *target.refusals,
            *source.refusals,
            *fold_refusals(desc, job.recipe, target),
            *footprint.refusals,
        ]
    )
    candidates = None
    if isinstance(exporter, Allocating):
        candidates = exporter.candidates(desc, checkpoint, _carrier(job))
    # Of other types than the smallest a last pass takes other memory.
    refuse(no_room if candidates is None else refusals(candidates, job.recipe))
    if job.also and candidates is not None:
        why = "the types follow from a measurement, so what is to be held is not known yet"
        refuse([Refusal("option also", why, "name the types, or leave it out")])
    storages = {planned.id: planned.storage for planned in target.tensors}
    also = tuple(plan_also(wanted, desc, checkpoint, target.carrier, storages) for wanted in job.also)
    return Planned(
        job, checkpoint, bound, desc, target, exporter, device, footprint, last_pass, candidates, also=also
    )


def _last_pass(
    job: Job,
    checkpoint: Checkpoint,
    desc: ModelDesc,
    target: TargetPlan,
    footprint: Footprint,
    device: torch.device,
) -> tuple[LastPass, list[Refusal]]:
    """That of an interrupted run of this job, or what there is room for; why there is none for the first now."""
    free = footprint.free_for_last_pass
    begun = ""
    # What is wrong with the work directory is said once it is opened.
    with suppress(RunError):
        begun = read_begun(job.work_folder)
    asked, scope, own = (*begun.split(), "", "", "")[:3]
    if asked != _asked(job, checkpoint, desc, target, device) or not own.isdecimal():
        return choose_last_pass(job.recipe, desc, target, job.calibration, free, device), []
    chosen = choose_last_pass(job.recipe, desc, target, job.calibration, free, device, scope)
    refusals = []
    if scope == "model" and job.recipe.refine_scope == "auto" and chosen.n_bytes > free:
        why = f"the run in {job.work_folder} began with one over the whole model, which takes about "
        why += f"{gibibytes(chosen.n_bytes)} where {gibibytes(free)} are left now"
        todo = "free some memory, or begin again with --refine-scope block"
        refusals.append(Refusal("last pass", why, todo))
    return replace(chosen, own=int(own)), refusals


def _asked(
    job: Job, checkpoint: Checkpoint, desc: ModelDesc, target: TargetPlan, device: torch.device
) -> str:
    """What an interrupted run of this job is known by, before weights, tokens and measured types are."""
    config = hashlib.sha256(msgspec.json.encode(checkpoint.config, order="sorted")).hexdigest()
    spec = _spec(job, desc, target, device, model=config, recipe=job.recipe)
    return replace(spec, storage={"options": repr(job.options)}).fingerprint()


def _floats(checkpoint: Checkpoint, job: Job) -> Checkpoint:
    """The checkpoint, decoded where another tool has quantized it."""
    foreign = read_foreign(checkpoint)
    if foreign is None:
        if job.requantize:
            raise InputError(
                "the checkpoint is not quantized", where="--requantize", todo="leave the option out"
            )
        return checkpoint
    if not job.requantize:
        why = f"the weights are quantized already ({foreign.dialect})"
        refuse([Refusal(job.model, why, "keep them with `export`, or quantize them again with `requantize`")])
    return foreign.checkpoint


def _carrier(job: Job) -> Carrier | None:
    """What the exporter is asked for."""
    return job.carrier if job.recipe.dac else job.carrier or Carrier.NONE


def allocate(planned: Planned, watch: Watch) -> Planned:
    """Choose the storages that follow from a measurement, if there are any to choose; for one process.

    Reads every weight and measures, unless the work directory keeps what was measured before. Raises any D2qError.
    """
    if planned.candidates is None or planned.allocation is not None:
        return planned
    with _memory_as_run_error(planned):
        limit_allocator(planned.device, planned.footprint.budget)
        _check_work_dir(planned)
        content = read_weights(_source(planned), watch)
        team = Team.alone(planned.device)
        job, own = planned.job, planned.last_pass.own
        tokens = calibration_tokens(_source(planned), job.calibration, own, content, team, watch)
        return _allocated(replace(planned, content=content), tokens, team, watch)


def _allocated(planned: Planned, tokens: CalibrationTokens, team: Team, watch: Watch) -> Planned:
    """The plan with the choice made. The first process measures, all choose alike."""
    candidates, job, desc = planned.candidates, planned.job, planned.desc
    if candidates is None or planned.allocation is not None:
        return planned
    assert isinstance(planned.exporter, Allocating), "an exporter with candidates makes plans of them"
    ids = tokens.calibration
    footprint, device = planned.footprint, planned.device
    place = choose_place(activation_bytes(desc, candidates, *ids.shape), footprint, device)
    measurement = Measurement(
        desc,
        planned.content,
        ids,
        Rounder(replace(job.recipe, asymmetry=0.0)),
        Placement(place, device, job.work_folder),
        job.work_folder,
    )
    measured = team.from_leader(lambda: measurement.sensitivity(candidates, watch))
    allocation = choose_types(candidates, measured)
    target = planned.exporter.plan_chosen(desc, _carrier(job), allocation.storages)
    target = replace(
        target, warnings=(*target.warnings, *planned.exporter.check_source(planned.checkpoint).warnings)
    )
    last_pass, no_room = _last_pass(job, planned.checkpoint, desc, target, footprint, device)
    refuse([*target.refusals, *no_room])
    # The sequences of the last pass are drawn already, and what was drawn is part of the fingerprint.
    last_pass = replace(last_pass, own=planned.last_pass.own)
    if team.size > 1:
        # The plan was announced before the team had met.
        watch.note(
            f"types for {allocation.asked}: {target.n_bytes:,} bytes, predicted KLD {allocation.kld:.4f}"
        )
    return replace(planned, target=target, allocation=allocation, last_pass=last_pass)


def convert(planned: Planned, watch: Watch) -> Outcome | None:
    """Do what was planned; the output appears whole and verified, or not at all. Raises any D2qError.

    Under torchrun every process calls it; the first one alone shows progress, writes the package and gets an outcome.
    """
    started = time.monotonic()
    with _memory_as_run_error(planned), Team.join(planned.device) as team, PeakMeter(team.device) as meter:
        planned = replace(planned, device=team.device)
        limit_allocator(planned.device, planned.footprint.budget)
        watch = stages = Stages(watch if team.is_leader else Unwatched(), meter.figures)
        content = team.from_leader(lambda: _prepare(planned, watch))
        planned = replace(planned, content=content)
        tokens = calibration_tokens(
            _source(planned), planned.job.calibration, planned.last_pass.own, content, team, watch
        )
        planned = _allocated(planned, tokens, team, watch)
        spec = _run_spec(planned, tokens, content)
        team.same("the run's fingerprint", spec.fingerprint())
        with ExitStack() as stack:
            store = _open_store(planned, spec, team, stack, watch)
            result = _walk(planned, tokens, store, team, watch).run()
            peaks = _largest(team.gather(meter.peaks()))
            if not team.is_leader:
                return None
            # The others may go: what follows is one process's work, and may take long.
            n_processes = team.size
            team.leave()
            held = store.leaders
            about = provenance(planned, tokens, spec, result)
            model = QuantizedModel(planned.desc, held.tensors(), about, result.importance)
            overwrite = planned.job.overwrite
            # Left in the opposite order: the package that the job names takes its name when all else is there.
            with host_limit(planned.footprint.budget.host_bytes), ExitStack() as packages:
                written = written_package(planned.main, model, planned.checkpoint, overwrite, watch)
                package, checks = packages.enter_context(written)
                others = _others(planned, model, packages, watch)
            peaks = _largest([peaks, meter.peaks()])
            seconds = time.monotonic() - started
            outcome = replace(outcome_of(planned, package, checks, result, spec, seconds, peaks), also=others)
            if planned.job.is_reported:
                run = RunFacts(planned, tokens, about, result, outcome, stages.seconds, n_processes)
                outcome = replace(outcome, report=write_report(run, watch))
            # Kept until here: after a full disk the same command need not quantize again.
            held.delete()
    return outcome


def _prepare(planned: Planned, watch: Watch) -> str:
    """Look at output, work directory and every weight before any work; returns the digest of the weights."""
    job = planned.job
    sizes = [(planned.main, planned.most_bytes), *((also, also.target.n_bytes) for also in planned.also)]
    check_all_places(sizes, job.overwrite)
    if job.is_reported:
        check_report(job.output, job.overwrite)
    _check_work_dir(planned)
    return planned.content or read_weights(_source(planned), watch)


def _walk(planned: Planned, tokens: CalibrationTokens, store: SharedStore, team: Team, watch: Watch) -> Walk:
    return Walk(
        planned.desc,
        planned.target,
        Rounder(planned.job.recipe),
        tokens,
        store,
        planned.device,
        watch,
        Placement(planned.footprint.place, planned.device, planned.job.work_folder, team.rank),
        team,
        planned.last_pass,
        planned.job.is_reported,
    )


def _others(
    planned: Planned, model: QuantizedModel, packages: ExitStack, watch: Watch
) -> tuple[AlsoWritten, ...]:
    """Write the further packages of the same codes, each verified by its own format's reader and runtime."""
    found = []
    for also in planned.also:
        same = recoded(model, grids_of(also.target))
        written = written_package(also, same, planned.checkpoint, planned.job.overwrite, watch)
        package, checks = packages.enter_context(written)
        found.append(AlsoWritten(also.info.name, package.path, package.n_bytes, checks))
    return tuple(found)


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


def _source(planned: Planned) -> Source:
    return Source(planned.checkpoint, planned.source, planned.device, planned.job.work_folder)


def _run_spec(planned: Planned, tokens: CalibrationTokens, content: str) -> RunSpec:
    job, last_pass = planned.job, planned.last_pass
    recipe = replace(job.recipe, refine=last_pass.steps, refine_scope="auto")
    spec = _spec(job, planned.desc, planned.target, planned.device, model=content, recipe=recipe)
    return replace(spec, tokens=tokens.digest, last_pass=last_pass.scope)


def _spec(
    job: Job, desc: ModelDesc, target: TargetPlan, device: torch.device, *, model: str, recipe: Recipe
) -> RunSpec:
    """All but the tokens and the last pass."""
    return RunSpec(
        version=__version__,
        torch=str(torch.__version__),
        exporter=job.exporter.name,
        model=model,
        recipe=recipe,
        last_pass="",
        calibration=job.calibration,
        tokens="",
        storage={str(t.id): t.type_name for t in target.tensors},
        carrier=target.carrier.value,
        device=device.type,
        padding=desc.padding,
    )


def _check_work_dir(planned: Planned) -> None:
    """Refuse a work directory that would swallow the source or cannot hold a byte a weight; raises InputError."""
    folder = planned.job.work_folder.resolve()
    source = planned.checkpoint.path.resolve()
    if source.is_relative_to(folder):
        raise InputError(
            f"{source.name} lies in the work directory, which is emptied at the end",
            where=f"--work-dir {folder}",
            todo="name a folder of its own",
        )
    if folder.exists() and not folder.is_dir():
        raise InputError("not a folder", where=f"--work-dir {folder}", todo="name a folder of its own")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    # The parts hold packed codes, and the package is written before they go.
    needed = 2 * planned.most_bytes + planned.footprint.disk_bytes
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
        asked = _asked(planned.job, planned.checkpoint, planned.desc, planned.target, planned.device)
        begun = f"{asked} {planned.last_pass.scope} {planned.last_pass.own}"
        folder = planned.job.work_folder
        store = stack.enter_context(Store(folder, spec.fingerprint(), _grids(planned), begun))
        opened.append(store)
        if store.n_discarded:
            watch.note(
                f"{store.n_discarded} finished parts of another job were discarded from "
                f"{planned.job.work_folder}"
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
