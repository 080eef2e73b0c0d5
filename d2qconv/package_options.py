"""The options of commands on packages that are there: `evaluate`, `verify --deep`. Light, as `report_options`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from d2qconv.errors import InputError
from d2qconv.report_options import Flag, OutputPath, group


@group("Measure", 1)
@dataclass(frozen=True)
class Measure:
    """What a package is measured with."""

    source: str | None = None
    """Folder or hub id of the model that the package was made from; without it only the package's own perplexity is
    measured."""
    text: str | None = None
    """A text, JSONL or token file, or a hub data set org/name[:split]; by default tokens sampled from the source."""
    chunks: int | None = None
    """Chunks to read, the first ones. By default the whole text, or 20 sampled ones."""
    context: int | None = None
    """Tokens of a chunk, by default 512; what its second half says of the next tokens is judged, as llama-perplexity
    does. With --tasks: of the longest prompt, by default 2048."""
    baseline: Path | None = None
    """Another package, measured at the same tokens and compared."""
    tasks: str | None = None
    """Tasks of lm-evaluation-harness to score the package by, such as arc_easy,hellaswag; those whose output is chosen
    or scored, not written."""
    limit: int | None = None
    """Samples of each task, its first ones. By default all."""
    shots: int | None = None
    """Examples before each sample. By default the task's own number."""
    task_folder: Path | None = None
    """A folder with task files of one's own."""
    seed: int = 0
    """Seed of the sampling."""
    device: str | None = None
    """Where the source is computed: cpu, cuda, cuda:1, … By default the first GPU, or the CPU if there is none."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    output: OutputPath = None
    """Write what --json prints into this file too."""
    overwrite: Flag = False
    """Replace that file if it exists."""

    def check(self) -> None:
        """Raise InputError for options that would do nothing."""
        is_measured = self.tasks is None or self.source is not None or self.text is not None
        groups = (
            (("limit", "shots", "task_folder"), self.tasks is not None, "without --tasks", "add --tasks"),
            (("chunks", "baseline"), is_measured, "for tasks alone", "add --text or --source"),
            (("device", "revision"), self.source is not None, "without --source", "add --source"),
            (("seed",), self.text is None and is_measured, "where nothing is sampled", "leave it out"),
        )
        _require_used(self, groups)


@group("Deep", 2)
@dataclass(frozen=True)
class Deep:
    """How far a package is verified."""

    deep: Flag = False
    """Compute again everything that the package's report says, and compare: of package, report and page every byte."""
    report: Path | None = None
    """With --deep: the report. By default PACKAGE.report.json."""
    source: str | None = None
    """With --deep: the model that was quantized; its config and weights are read and compared."""
    revision: str | None = None
    """With --source: branch, tag or commit of a hub checkpoint."""

    def check(self) -> None:
        """Raise InputError for options that would do nothing."""
        _require_used(self, [(("report", "source", "revision"), self.deep, "without --deep", "add --deep")])


def _require_used(options: object, groups: Iterable[tuple[tuple[str, ...], bool, str, str]]) -> None:
    """groups: names of fields, whether they would do something, when not, what to do then. 0 and None say nothing."""
    for names, is_used, when, todo in groups:
        for name in () if is_used else names:
            if getattr(options, name) not in (None, 0):
                raise InputError(f"does nothing {when}", where=f"--{name.replace('_', '-')}", todo=todo)
