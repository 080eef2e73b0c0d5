"""A plan as people read it: tables of its tensors, and the lines below them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from d2qconv.views import allocation

if TYPE_CHECKING:
    from d2qconv.exporters.base import TargetPlan, TensorPlan
    from d2qconv.job import Planned
    from d2qconv.names import TensorId
    from d2qconv.walk.last_pass import LastPass
    from d2qconv.walk.memory import Footprint


def size(n_bytes: float) -> str:
    """`4.27 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def _bits(tensor: TensorPlan, n_elements: int) -> str:
    return f"{tensor.n_bytes * 8 / n_elements:.2f}"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def each_tensor(target: TargetPlan) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Names of the columns, and one row for each tensor."""
    names = ("tensor", "stored as", "shape", "type", "bits/weight", "size", "note")
    rows: list[Sequence[str]] = [
        (
            str(t.id),
            t.stored_as,
            _shape(t.shape),
            t.type_name,
            _bits(t, math.prod(t.shape)),
            f"{t.n_bytes:,}",
            t.note,
        )
        for t in target.tensors
    ]
    return names, rows


def by_role(target: TargetPlan) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Names of the columns, and one row for all tensors of a role that are stored alike."""
    alike: dict[tuple[str, str, str], list[TensorPlan]] = {}
    for tensor in target.tensors:
        key = (f"{tensor.id.role}.{tensor.id.part}", _shape(tensor.shape), tensor.type_name)
        alike.setdefault(key, []).append(tensor)
    rows: list[Sequence[str]] = []
    for (role, shape, type_name), tensors in alike.items():
        notes = ", ".join(sorted({t.note for t in tensors if t.note}))
        bits = _bits(tensors[0], math.prod(tensors[0].shape))
        rows.append(
            (role, str(len(tensors)), shape, type_name, bits, size(sum(t.n_bytes for t in tensors)), notes)
        )
    return ("role", "n", "shape", "type", "bits/weight", "size", "note"), rows


def weights(target: TargetPlan) -> Mapping[TensorId, int]:
    """How many numbers each tensor has."""
    return {t.id: math.prod(t.shape) for t in target.tensors}


def _carrier(target: TargetPlan) -> str:
    return f"{target.carrier}: {target.carrier_note}" if target.carrier_note else str(target.carrier)


def plan_pairs(planned: Planned) -> Iterator[tuple[str, str]]:
    """The lines below the table."""
    target = planned.target
    yield "source", planned.checkpoint.source
    yield "architecture", planned.desc.arch.id
    yield "weights", f"{planned.n_weights:,}"
    yield "mean shift", _carrier(target)
    if target.widths:
        yield "widths", target.widths
    yield "last pass", _last_pass(planned.last_pass)
    if planned.allocation is not None:
        yield from allocation.pairs(planned.allocation, target.n_bytes)
    yield "loads in", ", ".join(target.loads_in)
    yield from _footprint_pairs(planned.footprint)
    for warning in target.warnings:
        yield "warning", warning


def _last_pass(last_pass: LastPass) -> str:
    if last_pass.scope == "none":
        return "none"
    scope = (
        "the whole model, against the source's logits"
        if last_pass.scope == "model"
        else "each block by itself"
    )
    own = f", {last_pass.own} sequences sampled for it" if last_pass.own else ""
    return f"{last_pass.steps} steps over {scope}{own}"


def _footprint_pairs(footprint: Footprint) -> Iterator[tuple[str, str]]:
    """Predicted peaks beside the budget, and where the activations will be."""
    from d2qconv.budget import gibibytes

    budget = footprint.budget
    if budget.gpu_bytes is not None:
        yield (
            "GPU memory",
            f"at most about {gibibytes(footprint.gpu_peak)}, budget {gibibytes(budget.gpu_bytes)}",
        )
    yield (
        "host memory",
        f"at most about {gibibytes(footprint.host_peak)}, budget {gibibytes(budget.host_bytes)}",
    )
    where = {"device": "on the GPU", "host": "in host memory", "disk": "on disk"}[footprint.place]
    on_disk = f", {gibibytes(footprint.disk_bytes)}" if footprint.disk_bytes else ""
    yield "activations", where + on_disk
