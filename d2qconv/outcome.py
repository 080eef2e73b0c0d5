"""What a conversion gave: in numbers for people, and in words for the package's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from d2qconv import __version__
from d2qconv.allocate.allocation import Allocation
from d2qconv.budget import Peaks
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.exporters.base import Carrier, Check, Package
from d2qconv.fold.corrections import FoldRecord
from d2qconv.ir.model import Provenance
from d2qconv.job import Planned
from d2qconv.run import RunSpec, describe
from d2qconv.walk.memory import Footprint
from d2qconv.walk.model import WalkResult
from d2qconv.walk.rounding import TensorError


@dataclass(frozen=True)
class AlsoWritten:
    """A further package of the same codes. format: the exporter's name. path: its first file if it has several."""

    format: str
    path: Path
    n_bytes: int
    checks: Sequence[Check]


@dataclass(frozen=True)
class Outcome:
    """What was done, in numbers.

    path: the package, its first file if there are several. kld, perplexities and same_top: on the held-out sequences,
    by the float reference. peaks: memory as measured; footprint: as predicted. last_pass: what came of it, in words,
    empty if there was none; kld_unrefined: before it, where it changed the whole model. allocation: the choice of
    types, where one was made; its `kld` is what was predicted. also: further packages. report: its JSON file, if one
    was written. seconds and peaks are of this process; of the n_blocks of the model, resumed_blocks were done by an
    earlier one that was cut off.
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
    allocation: Allocation | None = None
    also: tuple[AlsoWritten, ...] = ()
    report: Path | None = None
    n_blocks: int = 0
    resumed_blocks: int = 0


def outcome_of(
    planned: Planned,
    package: Package,
    checks: Sequence[Check],
    result: WalkResult,
    spec: RunSpec,
    seconds: float,
    peaks: Peaks,
) -> Outcome:
    """The numbers of a conversion that is done."""
    judged = result.divergence
    return Outcome(
        path=package.path,
        n_bytes=package.n_bytes,
        bits_per_weight=planned.bits_per_weight,
        kld=judged.mean_kl,
        perplexity_source=judged.perplexity_source.value,
        perplexity=judged.perplexity.value,
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
        allocation=planned.allocation,
        n_blocks=len(result.blocks),
        resumed_blocks=sum(block.is_resumed for block in result.blocks),
    )


def _last_pass(planned: Planned, result: WalkResult) -> str:
    """What the last pass did, for people."""
    steps = planned.last_pass.steps
    if result.refined is not None:
        if not result.refined.kept or result.unrefined is None:
            return f"not kept after {result.refined.steps} steps: {result.refined.why}"
        before, after = result.unrefined.mean_kl, result.divergence.mean_kl
        return f"{steps} steps, KL divergence {before:.4f} → {after:.4f}"
    by_block = [block.refined for block in result.blocks if block.refined is not None]
    if by_block:
        n_kept = sum(notes.kept for notes in by_block)
        return f"{steps} steps a block, kept in {n_kept} of {len(by_block)} blocks"
    return ""


def provenance(planned: Planned, tokens: CalibrationTokens, spec: RunSpec, result: WalkResult) -> Provenance:
    """Where the package comes from, for its metadata."""
    recipe = replace(planned.job.recipe, dac=planned.target.carrier is not Carrier.NONE)
    chosen = planned.allocation
    return Provenance(
        version=__version__,
        fingerprint=spec.fingerprint(),
        source=planned.checkpoint.name,
        source_license=planned.checkpoint.license,
        recipe=describe(recipe) + ("" if chosen is None else f"; types chosen for {chosen.asked}"),
        calibration=f"{tokens.description}, sha256 {tokens.digest}",
        carriers={
            "mean_shift": _carried("mean_shift", result.folds, planned.target.carrier_note),
            "column_scale": _carried("column_scale", result.folds, _scaled_places(result.folds)),
        },
        source_revision=planned.checkpoint.revision,
        source_sha256=planned.content,
    )


def _scaled_places(folds: Sequence[FoldRecord]) -> str:
    return ", ".join(dict.fromkeys(fold.carrier for fold in folds if fold.name == "column_scale"))


def _carried(name: str, folds: Sequence[FoldRecord], how: str) -> str:
    """How a correction is carried, with the largest residual over all blocks; `none` if there is none."""
    records = [fold for fold in folds if fold.name == name]
    if not records:
        return "none"
    return f"{how}; residual at most {max(r.residual for r in records):.2e} ({records[0].meaning})"
