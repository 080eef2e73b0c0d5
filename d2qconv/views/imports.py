"""An import as people read it, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from d2qconv.names import shortened
from d2qconv.views.facts import tensor_facts, written_facts

if TYPE_CHECKING:
    from d2qconv.importing import Imported, PlannedImport
    from d2qconv.names import TensorId


def plan_pairs(planned: PlannedImport) -> Iterator[tuple[str, str]]:
    """The lines below the table of a plan."""
    target = planned.target
    n_all = sum(len(t.shape) == 2 for t in target.tensors)
    yield "source", f"{planned.job.model}, quantized already: {planned.foreign.dialect}"
    yield "architecture", planned.desc.arch.id
    yield "weights", f"{planned.desc.n_weights:,}"
    yield (
        "exact",
        f"{len(planned.linears)} of {n_all} matrices keep the values of their codes; nothing is calibrated",
    )
    for (name, type_name, _), tensors in _alike(
        ((to.info.name, to.target.by_id[tensor].type_name), tensor) for to, tensor in planned.rounded
    ).items():
        yield "rounded", f"{shortened(tensors)} to {type_name}, for {name}"
    yield "loads in", ", ".join(target.loads_in)
    for warning in target.warnings:
        yield "warning", warning


def plan_facts(planned: PlannedImport) -> dict[str, Any]:
    """A plan as JSON."""
    target = planned.target
    return {
        "source": planned.job.model,
        "imported": planned.foreign.dialect,
        "architecture": planned.desc.arch.id,
        "layout": target.layout,
        "n_weights": planned.desc.n_weights,
        "n_bytes": target.n_bytes,
        "bits_per_weight": planned.bits_per_weight,
        "n_exact": len(planned.linears),
        "rounded": [
            {"format": to.info.name, "tensor": str(t), "type": to.target.by_id[t].type_name}
            for to, t in planned.rounded
        ],
        "loads_in": target.loads_in,
        "warnings": target.warnings,
        "tensors": tensor_facts(target),
    }


def outcome_pairs(done: Imported) -> Iterator[tuple[str, str]]:
    """The lines of the closing summary."""
    yield "imported", f"{done.dialect}: {done.n_exact} matrices with the source's values, every one"
    errors = {(r.format, r.type_name, r.tensor): r.error for r in done.rounded}
    for (name, type_name, _), tensors in _alike(
        ((r.format, r.type_name), r.tensor) for r in done.rounded
    ).items():
        most = max(errors[name, type_name, tensor] for tensor in tensors)
        bound = "" if len(tensors) == 1 else " at most"
        yield (
            "rounded",
            f"{shortened(tensors)} to {type_name} for {name}: relative squared error{bound} {most:.1e}",
        )
    yield "loads in", ", ".join(done.loads_in)


def outcome_facts(done: Imported) -> dict[str, Any]:
    """What an import gave, as JSON."""
    return written_facts(done) | {
        "imported": done.dialect,
        "n_exact": done.n_exact,
        "rounded": [
            {"format": r.format, "tensor": str(r.tensor), "type": r.type_name, "error": r.error}
            for r in done.rounded
        ],
    }


def _alike(
    rounded: Iterable[tuple[tuple[str, str], TensorId]],
) -> dict[tuple[str, str, str], list[TensorId]]:
    """Those of one role in all blocks together. rounded: (format, type), tensor."""
    found: dict[tuple[str, str, str], list[TensorId]] = {}
    for (name, type_name), tensor in rounded:
        found.setdefault((name, type_name, f"{tensor.role}.{tensor.part}"), []).append(tensor)
    return found
