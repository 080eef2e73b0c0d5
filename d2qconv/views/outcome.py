"""What a run wrote and checked, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from d2qconv.progress import duration, resumed
from d2qconv.views import allocation

if TYPE_CHECKING:
    from d2qconv.budget import Peaks
    from d2qconv.exporters.base import Check
    from d2qconv.fold.corrections import FoldRecord
    from d2qconv.outcome import Outcome
    from d2qconv.walk.memory import Footprint


def _peak_pairs(peaks: Peaks, footprint: Footprint) -> Iterator[tuple[str, str]]:
    """Measured peaks beside the predicted."""
    from d2qconv.budget import gibibytes

    if peaks.gpu_allocated is not None and peaks.gpu_reserved is not None:
        yield (
            "GPU memory",
            f"peak {gibibytes(peaks.gpu_allocated)}, with the allocator's reserve "
            f"{gibibytes(peaks.gpu_reserved)}; predicted {gibibytes(footprint.gpu_peak)}",
        )
    note = ", mapped files included" if peaks.is_host_with_files else ""
    yield (
        "host memory",
        f"peak {gibibytes(peaks.host)}{note}; predicted {gibibytes(footprint.host_peak)}",
    )


def outcome_pairs(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """The lines of the closing summary."""
    yield (
        "KL divergence",
        f"{outcome.kld:.4f} nats per token from the source, on {outcome.n_tokens:,} held-out tokens",
    )
    yield (
        "perplexity",
        f"{outcome.perplexity:.3f} (source {outcome.perplexity_source:.3f}), on the same tokens",
    )
    yield "same top token", f"{outcome.same_top:.1%} of them"
    if outcome.allocation is not None:
        yield "predicted", allocation.prediction(outcome.allocation)
    if outcome.last_pass:
        yield "last pass", outcome.last_pass
    if outcome.errors:
        worst = max(outcome.errors, key=lambda e: e.output)
        yield "worst matrix", f"{worst.tensor}: relative squared error of its output {worst.output:.2e}"
    yield from _fold_pairs(outcome.folds)
    yield "loads in", ", ".join(outcome.loads_in)
    yield from _peak_pairs(outcome.peaks, outcome.footprint)
    yield "took", duration(outcome.seconds)
    if outcome.resumed_blocks:
        yield "mind", resumed(outcome.resumed_blocks, outcome.n_blocks)
    if outcome.report is not None:
        from d2qconv.exporters.beside import page_of

        yield "report", f"{outcome.report}, and {page_of(outcome.report).name} to look at"


def _fold_pairs(folds: Sequence[FoldRecord]) -> Iterator[tuple[str, str]]:
    """One line for all blocks in which a correction was carried in the same way, with the largest residual."""
    alike: dict[tuple[str, str, str], list[FoldRecord]] = {}
    for fold in folds:
        alike.setdefault((fold.name, fold.carrier, fold.meaning), []).append(fold)
    for (name, carrier, meaning), records in alike.items():
        explained = [r.explained for r in records if r.explained is not None]
        removes = f", removes up to {max(explained):.0%} of the error it is measured on" if explained else ""
        worst = max(r.residual for r in records)
        yield (
            name.replace("_", " "),
            f"{carrier}, {len(records)} blocks{removes}, residual ≤ {worst:.1e} ({meaning})",
        )


def verdict(check: Check) -> str:
    """One word for what came of a check."""
    if check.is_skipped:
        return "skipped"
    return "ok" if check.is_passed else "FAILED"
