"""What --json prints: plans, outcomes, checks and exporters as objects for scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from d2qconv.views import allocation

if TYPE_CHECKING:
    from d2qconv.exporters.base import Check, TargetPlan
    from d2qconv.exporters.diagnosis import Diagnosis
    from d2qconv.exporters.discover import Found
    from d2qconv.importing import Imported
    from d2qconv.job import Planned
    from d2qconv.measure.result import Evaluated, Tasked
    from d2qconv.outcome import AlsoWritten, Outcome


def check_facts(check: Check) -> dict[str, Any]:
    """One check as JSON."""
    return {
        "name": check.name,
        "detail": check.detail,
        "is_passed": check.is_passed,
        "is_skipped": check.is_skipped,
    }


def diagnosis_facts(diagnosis: Diagnosis) -> dict[str, Any]:
    """What `doctor` found, as JSON."""
    return {
        "about": diagnosis.about,
        "is_well": not diagnosis.wrong,
        "facts": diagnosis.facts,
        "findings": [
            {
                "subject": f.subject,
                "detail": f.detail,
                "is_wrong": f.is_wrong,
                "error": f.error.__name__ if f.error else None,
                "todo": f.todo,
            }
            for f in diagnosis.findings
        ],
    }


def exporter_facts(found: Found) -> dict[str, Any]:
    """One exporter as JSON."""
    info = found.info
    return {
        "name": found.name,
        "summary": info.summary if info else "",
        "origin": found.origin,
        "is_ready": found.is_ready,
        "state": found.state,
        "architectures": list(info.architectures) if info else [],
    }


def plan_facts(planned: Planned) -> dict[str, Any]:
    """A plan as JSON."""
    from d2qconv.walk.memory import footprint_facts

    target = planned.target
    return {
        "source": planned.checkpoint.source,
        "architecture": planned.desc.arch.id,
        "layout": target.layout,
        "n_weights": planned.n_weights,
        "n_bytes": target.n_bytes,
        "bits_per_weight": planned.bits_per_weight,
        "carrier": target.carrier,
        "carrier_note": target.carrier_note,
        "loads_in": target.loads_in,
        "warnings": target.warnings,
        "widths": target.widths,
        "memory": footprint_facts(planned.footprint),
        "allocation": None if planned.allocation is None else allocation.facts(planned.allocation),
        "last_pass": {
            "scope": planned.last_pass.scope,
            "steps": planned.last_pass.steps,
            "own": planned.last_pass.own,
        },
        "tensors": tensor_facts(target),
    }


def tensor_facts(target: TargetPlan) -> list[dict[str, Any]]:
    """Every planned tensor as JSON."""
    return [
        {
            "id": str(t.id),
            "stored_as": t.stored_as,
            "shape": t.shape,
            "type": t.type_name,
            "n_bytes": t.n_bytes,
            "note": t.note,
        }
        for t in target.tensors
    ]


def _also_facts(also: AlsoWritten) -> dict[str, Any]:
    """A further package as JSON."""
    return {
        "format": also.format,
        "path": str(also.path),
        "n_bytes": also.n_bytes,
        "checks": [check_facts(c) for c in also.checks],
    }


def written_facts(done: Outcome | Imported) -> dict[str, Any]:
    """The packages that were written, of whatever source, as JSON."""
    return {
        "path": str(done.path),
        "n_bytes": done.n_bytes,
        "bits_per_weight": done.bits_per_weight,
        "checks": [check_facts(c) for c in done.checks],
        "also": [_also_facts(also) for also in done.also],
        "loads_in": done.loads_in,
        "fingerprint": done.fingerprint,
        "seconds": done.seconds,
    }


def outcome_facts(outcome: Outcome) -> dict[str, Any]:
    """What a conversion gave, as JSON."""
    return written_facts(outcome) | {
        "kld": outcome.kld,
        "perplexity_source": outcome.perplexity_source,
        "perplexity": outcome.perplexity,
        "same_top": outcome.same_top,
        "n_tokens": outcome.n_tokens,
        "last_pass": outcome.last_pass,
        "kld_unrefined": outcome.kld_unrefined,
        "allocation": None if outcome.allocation is None else allocation.facts(outcome.allocation),
        "folds": [
            {
                "name": f.name,
                "block": f.block,
                "carrier": f.carrier,
                "residual": f.residual,
                "meaning": f.meaning,
                "explained": f.explained,
            }
            for f in outcome.folds
        ],
        "errors": [{"tensor": e.tensor, "weight": e.weight, "output": e.output} for e in outcome.errors],
        "resumed_blocks": outcome.resumed_blocks,
        "report": None if outcome.report is None else str(outcome.report),
        "memory": {
            "activations": outcome.footprint.place,
            "gpu_allocated": outcome.peaks.gpu_allocated,
            "gpu_reserved": outcome.peaks.gpu_reserved,
            "gpu_predicted": outcome.footprint.gpu_peak if outcome.footprint.gpu else None,
            "host": outcome.peaks.host,
            "is_host_with_files": outcome.peaks.is_host_with_files,
            "host_predicted": outcome.footprint.host_peak,
            "disk_bytes": outcome.footprint.disk_bytes,
        },
    }


def evaluation_facts(found: Evaluated | None, tasked: Tasked | None) -> dict[str, Any]:
    """What an evaluation found, as JSON: the fields of `d2qconv.measure.result`, those of tasks under `tasks`."""
    import msgspec

    facts: dict[str, Any] = {} if found is None else msgspec.to_builtins(found)
    return facts | ({} if tasked is None else {"tasks": msgspec.to_builtins(tasked)})
