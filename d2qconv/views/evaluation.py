"""What an evaluation found, as people read it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2qconv.measure.result import Evaluated, Judged, Tasked
    from d2qconv.measure.statistics import DivergenceStatistics, Estimate

#: Columns of `task_rows`.
TASKS = ("task", "version", "shots", "samples", "metric", "value")


def pairs(found: Evaluated) -> Iterator[tuple[str, str]]:
    """All lines, the packages one behind the other."""
    text = found.text
    name = "tokens sampled from the source" if text.name == "self" else text.name
    yield "text", f"{name}, {text.n_chunks} chunks of {text.context} tokens, {text.n_judged:,} tokens judged"
    if found.source is not None:
        yield "source", f"{found.source.name}, as floats on {found.source.device}"
    yield from _package(found.judged, "package")
    if found.baseline is not None:
        yield from _package(found.baseline, "baseline")
    if found.difference is not None:
        yield (
            "difference",
            f"{plus_minus(found.difference)} nats per token to the baseline; negative is nearer to the source",
        )
    if found.log_ratio is not None:
        yield "perplexities", f"logarithm of the ratio to the baseline's {plus_minus(found.log_ratio)}"
    for warning in found.warnings:
        yield "warning", warning


def task_rows(tasked: Tasked) -> Iterator[Sequence[str]]:
    """One row a metric of each task."""
    for score in tasked.scores:
        for metric, estimate in score.metrics.items():
            sizes = str(score.n_shots), str(score.n_samples)
            yield score.task, score.version, *sizes, metric, plus_minus(estimate)


def summary(found: Evaluated | None, tasked: Tasked | None) -> str:
    """The last line."""
    parts = []
    if found is not None and found.judged.divergence is not None:
        parts.append(f"KL divergence {plus_minus(found.judged.divergence.kl)}")
    if found is not None:
        parts.append(f"perplexity {plus_minus(found.judged.perplexity)}")
    for score in () if tasked is None else tasked.scores:
        metric, estimate = next(iter(score.metrics.items()), ("no metric", None))
        parts.append(f"{score.task} {metric}" + ("" if estimate is None else f" {plus_minus(estimate)}"))
    return ", ".join(parts)


def plus_minus(estimate: Estimate, unit: float = 1.0) -> str:
    """A number and its error, to the error's second digit and the number's fourth: `12.345 ± 0.053`.

    unit: what 1 is called.
    """
    value, error = estimate.value * unit, estimate.error * unit
    if not (0 < error < math.inf and math.isfinite(value)):
        return f"{value:.5g}"
    digits = max(1 - _exponent(error), 3 - _exponent(value), 0) if value else max(1 - _exponent(error), 0)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _exponent(number: float) -> int:
    """Of ten, of the number's first digit."""
    return int(f"{number:e}".partition("e")[2])


def _package(judged: Judged, what: str) -> Iterator[tuple[str, str]]:
    package = judged.package
    yield what, f"{package.name}, {package.n_bytes:,} bytes"
    yield "runtime", f"{package.runtime} ({package.runtime_version}), {package.runtime_settings}"
    if judged.divergence is None:
        yield "perplexity", plus_minus(judged.perplexity)
    else:
        yield from _divergence(judged.divergence, judged.perplexity)


def _divergence(found: DivergenceStatistics, perplexity: Estimate) -> Iterator[tuple[str, str]]:
    yield "KL divergence", f"{plus_minus(found.kl)} nats per token from the source"
    points = {"median": found.median, "90 %": found.p90, "99 %": found.p99, "maximum": found.maximum}
    yield "of single tokens", ", ".join(f"{name} {value:.4g}" for name, value in points.items())
    yield (
        "perplexity",
        f"{plus_minus(perplexity)} (source {plus_minus(found.perplexity_source)}, "
        f"logarithm of the ratio {plus_minus(found.log_ratio)})",
    )
    yield "same top token", f"{plus_minus(found.same_top, 100)} %"
    yield "RMS Δp", f"{plus_minus(found.rms_dp, 100)} % (mean {plus_minus(found.mean_dp, 100)} %)"
