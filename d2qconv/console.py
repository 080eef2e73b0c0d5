"""Everything a person sees.

The only module that prints. Results go to standard output, progress and errors to standard error. Three ways:
normal; quiet, which prints the last line alone; JSON, which prints one object on standard output and nothing else
there, errors included. Colours and bars only on a terminal. Text is never read as markup: messages hold square
brackets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole

from d2qconv.progress import Unwatched, Watch, duration
from d2qconv.views import allocation, evaluation, imports
from d2qconv.views.facts import (
    check_facts,
    diagnosis_facts,
    evaluation_facts,
    exporter_facts,
    outcome_facts,
    plan_facts,
)
from d2qconv.views.outcome import outcome_pairs, verdict
from d2qconv.views.plan import by_role, each_tensor, plan_pairs, size, weights
from d2qconv.watches import BarWatch, JsonWatch, LineWatch, time_column

if TYPE_CHECKING:
    from d2qconv.exporters.base import Check
    from d2qconv.exporters.diagnosis import Diagnosis
    from d2qconv.exporters.discover import Found
    from d2qconv.importing import Imported, PlannedImport
    from d2qconv.job import Planned
    from d2qconv.measure.result import Evaluated, Tasked
    from d2qconv.outcome import Outcome


class Console:
    """Where one command prints to."""

    def __init__(self, *, is_json: bool = False, is_quiet: bool = False) -> None:
        self._is_json = is_json
        self._is_quiet = is_quiet
        self._progress = "auto"
        self._has_emitted = False
        self._out = _plain(sys.stdout)
        self._err = _plain(sys.stderr)

    def ask(self, *, is_json: bool, is_quiet: bool, progress: str = "auto") -> None:
        """Print like this from now on. progress: one of `bar`, `lines`, `json`, `none`, or `auto` for what suits."""
        self._is_json, self._is_quiet, self._progress = is_json, is_quiet, progress

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Progress on standard error, as far as it is wanted."""
        kind = self._progress
        if kind == "auto":
            is_wanted = not (self._is_json or self._is_quiet)
            kind = ("bar" if self._err.is_terminal else "lines") if is_wanted else "none"
        if kind == "none":
            yield Unwatched()
        elif kind == "json":
            yield JsonWatch(self._tell)
        elif kind == "lines":
            yield LineWatch(lambda line: self._err.print(line, soft_wrap=True))
        else:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description:<12}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                time_column(),
                TextColumn("{task.fields[what]}", markup=False),
                TextColumn("{task.fields[figures]}", markup=False, style="dim"),
            )
            with Progress(*columns, console=self._err) as progress:
                watch = BarWatch(progress)
                yield watch
                watch.close()

    def _tell(self, line: str) -> None:
        """A line for a program: as it is, and at once."""
        self._err.file.write(line + "\n")
        self._err.file.flush()

    def show_plan(self, planned: Planned, *, is_all: bool) -> None:
        """Every tensor's type and size, by role or one by one, and what the whole will be."""
        chosen = planned.allocation
        rows = None if chosen is None else allocation.rows(chosen, weights(planned.target))
        self._show_plan(planned, lambda: plan_facts(planned), plan_pairs(planned), rows, is_all=is_all)

    def show_import_plan(self, planned: PlannedImport, *, is_all: bool) -> None:
        """The same of a checkpoint that is quantized already."""
        pairs = imports.plan_pairs(planned)
        self._show_plan(planned, lambda: imports.plan_facts(planned), pairs, is_all=is_all)

    def _show_plan(
        self,
        planned: Planned | PlannedImport,
        facts: Callable[[], Mapping[str, Any]],
        pairs: Iterable[tuple[str, str]],
        chosen: Sequence[Sequence[str]] | None = None,
        *,
        is_all: bool,
    ) -> None:
        """Facts for scripts, pairs for people. chosen: rows of the types that a measurement chose."""
        target = planned.target
        if self._is_json:
            self._emit(facts())
            return
        if not self._is_quiet:
            self._table(*(each_tensor(target) if is_all else by_role(target)))
            self._line()
            if chosen is not None:
                self._table(allocation.HEADER, chosen)
                self._line()
            self._pairs(pairs)
        self._line(
            f"{size(target.n_bytes)} of tensors, {planned.bits_per_weight:.2f} bits per weight, as {target.layout}"
        )

    def announce_import(self, planned: PlannedImport) -> None:
        """What is about to be imported, in normal mode."""
        if not (self._is_json or self._is_quiet):
            self.show_import_plan(planned, is_all=False)
            self._line(f"into {planned.job.output}")
            self._line()

    def show_imported(self, done: Imported) -> None:
        """What was written of a checkpoint that is quantized already."""
        if self._is_json:
            self._emit(imports.outcome_facts(done))
            return
        if not self._is_quiet:
            self._written(done)
            self._pairs([*imports.outcome_pairs(done), ("took", duration(done.seconds))])
            self._line()
        self._line(
            f"{done.path}: {size(done.n_bytes)}, {done.bits_per_weight:.2f} bits per weight without metadata, "
            f"{done.n_exact} matrices exact, {len(done.rounded)} rounded"
        )

    def announce(self, planned: Planned) -> None:
        """What is about to be done, in normal mode: the plan by role, the recipe, the calibration, the device."""
        if self._is_json or self._is_quiet:
            return
        from d2qconv.run import describe

        self.show_plan(planned, is_all=False)
        job = planned.job
        calibration = job.calibration
        self._line(
            f"{describe(job.recipe)}; {calibration.sequences} × {calibration.length} tokens "
            f"({calibration.source}), on {planned.device}, into {job.output}"
        )
        self._line()

    def show_outcome(self, outcome: Outcome, sample: str = "") -> None:
        """What was written, how far it is from the source, what was exact, where it loads."""
        if self._is_json:
            self._emit(outcome_facts(outcome) | ({"sample": sample} if sample else {}))
            return
        if not self._is_quiet:
            self._written(outcome)
            self._pairs(outcome_pairs(outcome))
            if sample:
                self._line()
                self._line(sample)
            self._line()
        self._line(
            f"{outcome.path}: {size(outcome.n_bytes)}, {outcome.bits_per_weight:.2f} bits per weight without metadata, "
            f"KL divergence {outcome.kld:.4f}"
        )

    def show_checks(self, path: Path, checks: Sequence[Check]) -> None:
        """What `verify` established."""
        failed = sum(not c.is_passed for c in checks)
        if self._is_json:
            self._emit(
                {"path": str(path), "is_passed": not failed, "checks": [check_facts(c) for c in checks]}
            )
            return
        if not self._is_quiet:
            self._checks(checks)
        self._line(f"{path}: {len(checks) - failed} checks passed, {failed} failed")

    def show_evaluation(self, path: Path, found: Evaluated | None, tasked: Tasked | None = None) -> None:
        """How good a package is."""
        if self._is_json:
            self._emit({"path": str(path), **evaluation_facts(found, tasked)})
            return
        if not self._is_quiet and tasked is not None:
            self._table(evaluation.TASKS, evaluation.task_rows(tasked))
            self._line()
        if not self._is_quiet and found is not None:
            self._pairs(evaluation.pairs(found))
            self._line()
        self._line(f"{path}: {evaluation.summary(found, tasked)}")

    def show_page(self, path: Path, n_bytes: int) -> None:
        """What `report` wrote."""
        if self._is_json:
            self._emit({"path": str(path), "n_bytes": n_bytes})
            return
        self._line(f"{path}: {size(n_bytes)}")

    def show_facts(self, path: Path, facts: Mapping[str, Any]) -> None:
        """What `inspect` found."""
        if self._is_json:
            self._emit({"path": str(path), **facts})
            return
        lines = list(_flatten(facts))
        self._pairs(lines[-1:] if self._is_quiet else lines)

    def show_exporters(self, found: Collection[Found]) -> None:
        """Every exporter, the unusable ones with the reason."""
        if self._is_json:
            self._emit({"exporters": [exporter_facts(f) for f in found]})
            return
        if not self._is_quiet:
            rows = [(f.name, f.info.summary if f.info else "", f.origin, f.state) for f in found]
            self._table(("exporter", "writes", "from", "state"), rows)
        self._line(f"{sum(f.is_ready for f in found)} of {len(found)} exporters ready")

    def show_diagnosis(self, diagnosis: Diagnosis) -> None:
        """What `doctor` found: facts, then the findings, what to do under each that has something to be done."""
        if self._is_json:
            self._emit(diagnosis_facts(diagnosis))
            return
        if not self._is_quiet:
            self._pairs(_flatten(diagnosis.facts))
            self._line()
            for finding in diagnosis.findings:
                label = "WRONG" if finding.is_wrong else "note" if finding.todo else "ok"
                self._line(f"{label:<7} {finding.subject}: {finding.detail}")
                if finding.todo:
                    self._line(f"{'':<7}   → {finding.todo}")
        n = len(diagnosis.wrong)
        self._line(f"{diagnosis.about}: " + (f"{n} wrong" if n else "nothing is wrong"))

    def show_error(self, kind: str, message: str, exit_code: int, trace: str = "") -> None:
        """An error, on standard error; in JSON mode on standard output too, if nothing stands there yet."""
        if trace:
            self._err.print(trace, soft_wrap=True)
        self._err.print(f"d2qconv: {message}", style="red" if self._err.is_terminal else None, soft_wrap=True)
        if self._is_json and not self._has_emitted:
            self._emit({"error": {"kind": kind, "message": message, "exit_code": exit_code}})

    def _line(self, text: str = "") -> None:
        self._out.print(text, soft_wrap=True)

    def _pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        listed = list(pairs)
        width = max((len(name) for name, _ in listed), default=0)
        for name, value in listed:
            self._line(f"{name:<{width}}  {value}")

    def _written(self, done: Outcome | Imported) -> None:
        """What was checked of every package."""
        self._checks(done.checks)
        for also in done.also:
            self._line()
            self._line(f"{also.format}, the same codes: {also.path}, {size(also.n_bytes)}")
            self._checks(also.checks)
        self._line()

    def _checks(self, checks: Sequence[Check]) -> None:
        for check in checks:
            self._line(f"{verdict(check):<7} {check.name}: {check.detail}")

    def _table(self, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold" if self._out.is_terminal else "")
        for name in names:
            table.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._out.print(table)

    def _emit(self, facts: Mapping[str, Any]) -> None:
        import msgspec

        self._has_emitted = True
        self._out.file.write(msgspec.json.encode(facts).decode() + "\n")


RIGHT = ("n", "size", "bytes", "bits/weight", "predicted KLD")


def _plain(file: Any) -> RichConsole:
    """A console without markup; wide where no terminal cuts it."""
    console = RichConsole(file=file, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    return console


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{name}", str(value)
