"""A checkpoint that is quantized already, as another package: plan → write → verify. Nothing is quantized.

Every matrix keeps its codes and parameters, or becomes others of the same values where the format says them in another
way (`d2qconv.grids.exact`). What no storage holds exactly is refused, with what quantizing it again would cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from d2qconv import __version__
from d2qconv.arch.bind import bind, checkpoint_names
from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.digest import content_digest
from d2qconv.checkpoint.open import Checkpoint, open_checkpoint
from d2qconv.errors import InputError, PluginError, Refusal, VerifyError, refuse
from d2qconv.exporters.base import Adopting, Carrier, Check, FloatType, Package, TargetPlan
from d2qconv.exporters.manifest import read_manifest
from d2qconv.foreign.linear import ForeignLinear
from d2qconv.foreign.read import Foreign, read_foreign
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import Provenance, QuantizedModel, Stored
from d2qconv.ir.recoded import recoded
from d2qconv.job import Destination, Job, check_places
from d2qconv.names import TensorId, shortened
from d2qconv.outcome import AlsoWritten
from d2qconv.packaging import check_all_places, grids_of, plan_also, written_package
from d2qconv.progress import Watch
from d2qconv.quant.sweep import round_to_nearest
from d2qconv.run import CalibrationSpec, Recipe

#: Rows of a matrix whose error is computed at a time.
_ROWS = 4096


@dataclass(frozen=True)
class PlannedImport:
    """What will be written; nothing is refused.

    linears: the matrices that are quantized already. main, also: which packages, and where to.
    """

    job: Job
    foreign: Foreign
    desc: ModelDesc
    linears: Mapping[TensorId, ForeignLinear]
    main: Destination
    also: tuple[Destination, ...]

    @property
    def target(self) -> TargetPlan:
        """Of the package that the job names first."""
        return self.main.target

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors of the package, metadata not counted, per weight of the source."""
        return 8 * self.target.n_bytes / self.desc.n_weights

    @cached_property
    def rounded(self) -> tuple[tuple[Destination, TensorId], ...]:
        """Tensors of floats that a package stores in codes, or in a float type that does not hold theirs.

        An option says so, or its format knows no such floats there.
        """
        return tuple(
            (to, planned.id)
            for to in (self.main, *self.also)
            for planned in to.target.tensors
            if planned.id not in self.linears and _may_round(planned.storage, self.desc.tensors[planned.id])
        )


@dataclass(frozen=True)
class Rounded:
    """A tensor of floats that was rounded to nearest. format: of the package. error: ‖W − Ŵ‖² / ‖W‖²."""

    format: str
    tensor: TensorId
    type_name: str
    error: float


@dataclass(frozen=True)
class Imported:
    """What was done. n_exact: matrices that have the source's values, every one. rounded: floats of
    which any value changed.
    """

    path: Path
    n_bytes: int
    bits_per_weight: float
    dialect: str
    n_exact: int
    rounded: Sequence[Rounded]
    checks: Sequence[Check]
    loads_in: Sequence[str]
    fingerprint: str
    seconds: float
    also: tuple[AlsoWritten, ...] = ()


def open_source(job: Job) -> Checkpoint | Foreign:
    """The job's checkpoint, as one of floats or as what it holds quantized, if that is to be kept.

    Raises InputError, PlanError, PluginError.
    """
    checkpoint = open_checkpoint(job.model, revision=job.revision)
    foreign = None if job.requantize else read_foreign(checkpoint)
    return foreign or checkpoint


def plan_import(job: Job, foreign: Foreign) -> PlannedImport:
    """Choose every tensor's storage, and refuse what no storage holds. Reads scales and zero points, no codes.

    Raises InputError, PlanError, PluginError.
    """
    _require_untouched(job)
    check_places(job)
    desc = bind(foreign.checkpoint)
    names = checkpoint_names(foreign.checkpoint.config)
    linears = {t: foreign.linears[names[t]] for t in desc.tensors if names[t] in foreign.linears}
    exporter = job.exporter.load(job.options)
    if not isinstance(exporter, Adopting):
        raise PluginError(
            f"to-{job.exporter.name} cannot write what others quantized",
            where=job.model,
            todo="quantize it again with --requantize",
        )
    storages = {t: linear.grid for t, linear in linears.items() if linear.grid is not None}
    if len(storages) < len(linears):
        refuse(_refusals(None, job, desc, linears))
    target = exporter.plan_adopted(desc, Carrier.NONE, storages)
    source = exporter.check_source(foreign.checkpoint)
    refuse([*_refusals(target, job, desc, linears), *source.refusals])
    main = Destination(
        job.exporter, job.output, exporter, replace(target, warnings=(*target.warnings, *source.warnings))
    )
    also = tuple(plan_also(a, desc, foreign.checkpoint, Carrier.NONE, storages) for a in job.also)
    return PlannedImport(job, foreign, desc, linears, main, also)


def _require_untouched(job: Job) -> None:
    """Raise InputError for what is asked of a quantization: nothing here would do it."""
    names = [
        _option(field.name, getattr(part, field.name))
        for part, untouched in ((job.recipe, Recipe()), (job.calibration, CalibrationSpec()))
        for field in fields(part)
        if getattr(part, field.name) != getattr(untouched, field.name)
    ]
    machine = ("carrier", "device", "work_dir", "max_gpu_mem", "max_host_mem")
    names += [name for name in machine if getattr(job, name) is not None]
    if names:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InputError(
            f"the checkpoint is quantized already, and nothing is quantized: {given} would do nothing",
            where=job.model,
            todo="add --requantize, or leave it out",
        )


def _option(name: str, value: object) -> str:
    """A field's option as it was given: `no-refit`."""
    if name == "source":
        return "calibration"
    return f"no-{name}" if value is False else name


def convert_import(planned: PlannedImport, watch: Watch) -> Imported:
    """Do what was planned; every package appears whole and verified, or not at all. Raises any D2qError."""
    started = time.monotonic()
    job, checkpoint = planned.job, planned.foreign.checkpoint
    places = (planned.main, *planned.also)
    check_all_places([(to, to.target.n_bytes) for to in places], job.overwrite)
    watch.stage("read", len(planned.desc.tensors))
    content = content_digest(checkpoint.config, planned.desc.tensors, watch.step)
    about = _provenance(planned, content)
    rounded = [*_errors(planned)]
    done: list[tuple[Package, Sequence[Check]]] = []
    # Left in the opposite order: the package that the job names takes its name when all else is there.
    with ExitStack() as packages:
        for to in places:
            model = QuantizedModel(planned.desc, _Tensors(planned, to), about)
            same = recoded(model, grids_of(to.target))
            done.append(packages.enter_context(written_package(to, same, checkpoint, job.overwrite, watch)))
    (package, checks), *rest = done
    others = zip(planned.also, rest, strict=True)
    return Imported(
        path=package.path,
        n_bytes=package.n_bytes,
        bits_per_weight=planned.bits_per_weight,
        dialect=planned.foreign.dialect,
        n_exact=len(planned.linears),
        rounded=rounded,
        checks=checks,
        loads_in=planned.target.loads_in,
        fingerprint=content,
        seconds=time.monotonic() - started,
        also=tuple(
            AlsoWritten(to.info.name, package.path, package.n_bytes, checks)
            for to, (package, checks) in others
        ),
    )


class _Tensors(Mapping[TensorId, Stored]):
    """Every tensor as it is: codes of what is quantized; floats, rounded to nearest where the plan has a grid."""

    def __init__(self, planned: PlannedImport, to: Destination) -> None:
        self._linears, self._tensors = planned.linears, planned.desc.tensors
        self._grids = grids_of(to.target)

    def __getitem__(self, tensor: TensorId) -> Stored:
        if tensor in self._linears:
            return self._linears[tensor].coded()
        dense, grid = self._tensors[tensor], self._grids.get(tensor)
        return dense if grid is None else _nearest(dense.load().to(torch.float32), grid)

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _nearest(w: Tensor, grid: Grid) -> Coded:
    return round_to_nearest(w, torch.ones(w.shape[1]), grid)


def _may_round(storage: Grid | FloatType, dense: Dense) -> bool:
    """Whether a storage has other values than floats of this type."""
    return not isinstance(storage, FloatType) or storage.dtype not in (torch.float32, dense.dtype)


def _errors(planned: PlannedImport) -> Iterator[Rounded]:
    """What was rounded; not what happens to have all its values in the narrower type."""
    for to, tensor in planned.rounded:
        stored = to.target.by_id[tensor]
        cost = _cost(planned.desc.tensors[tensor], stored.storage)
        if cost > 0:
            yield Rounded(to.info.name, tensor, stored.type_name, cost)


def _cost(dense: Dense, storage: Grid | FloatType) -> float:
    """‖W − Ŵ‖² / ‖W‖² of rounding to nearest."""
    lost = whole = 0.0
    stored = dense.load()
    for at in range(0, len(stored), _ROWS):
        w = stored[at : at + _ROWS].to(torch.float32)
        rounded = (
            w.to(storage.dtype).float() if isinstance(storage, FloatType) else _nearest(w, storage).decode()
        )
        lost += float((rounded - w).double().square().sum())
        whole += float(w.double().square().sum())
    return lost / max(whole, 1e-30)


def _refusals(
    target: TargetPlan | None, job: Job, desc: ModelDesc, linears: Mapping[TensorId, ForeignLinear]
) -> Iterator[Refusal]:
    """What cannot be written, matrices that cannot for the same reason together, with what it would cost otherwise."""
    alike: dict[str, list[TensorId]] = {}
    for tensor, linear in linears.items():
        if linear.grid is None:
            alike.setdefault(linear.why_no_grid, []).append(tensor)
    for refusal in () if target is None else target.refusals:
        about = [tensor for tensor in linears if _is_about(refusal, tensor)]
        if about:
            alike.setdefault(refusal.why, []).extend(about)
        else:
            yield refusal
    for why, tensors in alike.items():
        todo = f"quantize it again with --requantize{_cost_again(job, desc, tensors[0])}"
        yield Refusal(shortened(tensors), why, todo)


def _is_about(refusal: Refusal, tensor: TensorId) -> bool:
    """Whether a refusal names this matrix, or its role in several blocks (`once_a_role`)."""
    return refusal.where == str(tensor) or refusal.where.startswith(f"{tensor.role} of ")


def _cost_again(job: Job, desc: ModelDesc, tensor: TensorId) -> str:
    """What rounding a matrix to what this exporter stores otherwise costs, in words; empty if that is refused too."""
    plan = job.exporter.load(job.options).plan(desc, Carrier.NONE)
    storage = None if plan.refusals else plan.storage(tensor)
    if storage is None or isinstance(storage, FloatType):
        return ""
    cost = _cost(desc.tensors[tensor], storage)
    return f": rounding {tensor} to {storage.id} changes its weights by {cost:.2%} of their energy"


def _provenance(planned: PlannedImport, content: str) -> Provenance:
    checkpoint = planned.foreign.checkpoint
    said = _recorded(checkpoint.path)
    before = (
        f"; it says of itself: {said['recipe']}, from {said['source']}"
        if {"recipe", "source"} <= set(said)
        else ""
    )
    return Provenance(
        version=__version__,
        fingerprint=content,
        source=checkpoint.name,
        source_license=checkpoint.license or said.get("source_license", ""),
        recipe=f"imported from {planned.foreign.dialect}: the values of its codes, not quantized again{before}",
        calibration="none",
        carriers={"mean_shift": "none", "column_scale": "none"},
        source_revision=checkpoint.revision,
        # Of another tool's checkpoint nobody says which floats it was made from.
        source_sha256=said.get("source_sha256", ""),
    )


def _recorded(folder: Path) -> Mapping[str, str]:
    """What a package of ours records of its origin; empty for a checkpoint of another tool."""
    try:
        return read_manifest(folder).provenance
    except VerifyError:
        return {}
