"""What an evaluation found, and everything that is needed to repeat it. Written as JSON, field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2qconv.measure.statistics import DivergenceStatistics, Estimate


@dataclass(frozen=True)
class SourceFacts:
    """The model that a package is compared with. digest: SHA-256 over config and weights, see `content_digest`."""

    name: str
    revision: str
    digest: str
    device: str


@dataclass(frozen=True)
class TextFacts:
    """What was read.

    name: of the file, or the hub's; `self` for tokens that were sampled from the source. sha256: of the file's bytes,
    '' if there is none. tokenizer: whose. n_chunks × context tokens were read, n_judged of them predicted. bos: put at
    the beginning of every chunk. tokens_sha256: over the tokens of all chunks, little-endian i64.
    """

    name: str
    sha256: str
    tokenizer: str
    n_chunks: int
    context: int
    n_judged: int
    bos: int | None
    tokens_sha256: str
    seed: int | None


@dataclass(frozen=True)
class PackageFacts:
    """A package and what it ran in.

    sha256: see `d2qconv.exporters.contents`. source_sha256: of the model that it was made from, by its own metadata, ''
    if they do not say it.
    """

    name: str
    format: str
    n_bytes: int
    sha256: str
    runtime: str
    runtime_version: str
    runtime_settings: str
    source_sha256: str


@dataclass(frozen=True)
class Judged:
    """One package. divergence: None without a source."""

    package: PackageFacts
    perplexity: Estimate
    divergence: DivergenceStatistics | None


@dataclass(frozen=True)
class Evaluated:
    """All of it.

    difference: mean KL divergence of the package less that of the baseline, with the error of paired values; None
    without both a source and a baseline. log_ratio: ln(perplexity of the package / of the baseline), likewise; None
    without a baseline. warnings: what makes the numbers say something else than one may think. torch: its version.
    seconds: of the whole. began: UTC, ISO 8601.
    """

    judged: Judged
    text: TextFacts
    source: SourceFacts | None
    baseline: Judged | None
    difference: Estimate | None
    log_ratio: Estimate | None
    warnings: Sequence[str]
    version: str
    torch: str
    began: str
    seconds: float


@dataclass(frozen=True)
class TaskScore:
    """One task. metrics: by the harness' names (`acc`, `acc_norm`, `word_perplexity`), with its errors."""

    task: str
    version: str
    n_shots: int
    n_samples: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Tasked:
    """Tasks that a package was given. harness: its version. window: tokens of the longest prompt."""

    package: PackageFacts
    scores: tuple[TaskScore, ...]
    harness: str
    window: int
    version: str
    began: str
    seconds: float
