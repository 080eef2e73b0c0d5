"""From a quantized model to packages in their places: looked at before, written beside their names, verified there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import Refusal, VerifyError, refuse
from d2qconv.exporters.base import Adopting, Carrier, Check, FloatType, Package, Progress, TargetPlan
from d2qconv.exporters.file_set import atomic_set, check_set
from d2qconv.exporters.folder import atomic_folder, check_folder
from d2qconv.exporters.package import atomic_output, check_output, sync_files
from d2qconv.grids.base import Grid
from d2qconv.ir.model import QuantizedModel
from d2qconv.job import Also, Destination
from d2qconv.names import TensorId
from d2qconv.progress import Watch


def plan_also(
    wanted: Also,
    desc: ModelDesc,
    checkpoint: Checkpoint,
    carrier: Carrier,
    storages: Mapping[TensorId, Grid | FloatType],
) -> Destination:
    """Plan a further package; raises PlanError with every reason why its format cannot hold these storages."""
    info, place = wanted.exporter, f"--also {wanted.exporter.name}"
    exporter = info.load(info.options())
    if not isinstance(exporter, Adopting):
        refuse([Refusal(place, "this format cannot write what was quantized for another one")])
    assert isinstance(exporter, Adopting), "refused above"
    plan = exporter.plan_adopted(desc, carrier, storages)
    found = [*plan.refusals, *exporter.check_source(checkpoint).refusals]
    refuse([replace(refusal, where=f"{place}, {refusal.where}") for refusal in found])
    return Destination(info, wanted.output, exporter, plan)


def check_all_places(places: Sequence[tuple[Destination, int]], overwrite: bool) -> None:
    """Look at the places of all packages of a run, whose bytes lie on the disk at the same time; raises InputError."""
    taken: dict[int, int] = {}
    for to, n_bytes in places:
        # A folder that is not there is refused below.
        there = next(p for p in to.output.resolve().parents if p.exists())
        disk = there.stat().st_dev
        taken[disk] = taken.get(disk, 0) + n_bytes
        _check_place(to, overwrite, taken[disk])


@contextmanager
def written_package(
    to: Destination, model: QuantizedModel, checkpoint: Checkpoint, overwrite: bool, watch: Watch
) -> Iterator[tuple[Package, Sequence[Check]]]:
    """A package, written beside its name and verified there; it takes its name when the context ends well.

    So packages of one run appear together, once each of them is written and verified. Raises any D2qError.
    """
    n_tensors = len(to.target.tensors)
    with _place_of(to)(to.output, overwrite=overwrite) as path:
        watch.stage("write", 2 * n_tensors)
        package = to.exporter.write(model, checkpoint, to.target, path, _steps(watch))
        watch.stage("verify", n_tensors)
        checks = to.exporter.verify(package.path, _steps(watch))
        _require_passed(checks)
        # Before any package of this run takes its name: a disk that is full says so here.
        folder = path if to.info.is_folder else path.parent if to.target.is_split else None
        sync_files([path] if folder is None else folder.iterdir())
        name = package.path.name if to.target.is_split else to.output.name
        yield replace(package, path=to.output.with_name(name)), checks


def grids_of(target: TargetPlan) -> dict[TensorId, Grid]:
    """The grids of a plan, by tensor."""
    return {t.id: t.storage for t in target.tensors if not isinstance(t.storage, FloatType)}


def _check_place(to: Destination, overwrite: bool, n_bytes: int) -> None:
    if to.info.is_folder:
        check_folder(to.output, overwrite, n_bytes)
    elif to.target.is_split:
        check_set(to.output, overwrite, n_bytes)
    else:
        check_output(to.output, overwrite, n_bytes)


def _place_of(to: Destination) -> Callable[..., AbstractContextManager[Path]]:
    """How such a package is put in its place."""
    if to.info.is_folder:
        return atomic_folder
    return atomic_set if to.target.is_split else atomic_output


def _require_passed(checks: Sequence[Check]) -> None:
    failed = [f"{c.name}: {c.detail}" for c in checks if not c.is_passed]
    if failed:
        raise VerifyError(
            "the package is not what the quantizer made: " + "; ".join(failed),
            todo="no output was kept; this is a bug, please report it with the command",
        )


def _steps(watch: Watch) -> Progress:
    """An exporter's progress as steps of the current stage."""
    return lambda done, _total, what: watch.step(done, what)
