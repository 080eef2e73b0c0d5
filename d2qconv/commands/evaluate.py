"""`evaluate`: how good a package is, in the runtime that it was written for."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from d2qconv.commands.packages import exporter_of
from d2qconv.commands.parameters import TALK, File, Format, ReportOptions
from d2qconv.console import Console
from d2qconv.errors import PluginError
from d2qconv.exporters.base import ExporterInfo
from d2qconv.exporters.discover import Found
from d2qconv.exporters.package import check_output
from d2qconv.package_options import Measure
from d2qconv.views.facts import evaluation_facts

if TYPE_CHECKING:
    from d2qconv.evaluation import Evaluation
    from d2qconv.harness import TaskRun

ALL = Measure()


def add(app: App, found: Collection[Found], console: Console) -> None:
    """Add it."""

    def evaluate(
        file: File,
        /,
        *,
        format_name: Format = "",
        measure: Annotated[Measure, Parameter(name="*")] = ALL,
        report: ReportOptions = TALK,
    ) -> None:
        measure.check()
        info = exporter_of(file, format_name, found)
        other = measure.baseline
        baseline = None if other is None else (other, exporter_of(other, "", found))
        absent = [m for m in ("torch", "tokenizers") if find_spec(m) is None]
        if absent:
            raise PluginError(f"measuring needs {', '.join(absent)}", todo="pip install 'd2qconv[quantize]'")
        if measure.output is not None:
            check_output(measure.output, measure.overwrite)
        report.tell(console)
        from d2qconv import evaluation

        with console.watch() as watch:
            result = tasked = None
            if measure.tasks is not None:
                tasked = evaluation.evaluate_tasks(
                    evaluation.Target(file, info),
                    _task_run(measure, measure.tasks),
                    watch,
                    window=measure.context,
                )
            if measure.tasks is None or measure.source is not None or measure.text is not None:
                result = evaluation.evaluate(_asked(file, info, baseline, measure), watch)
        facts = evaluation_facts(result, tasked)
        if measure.output is not None:
            evaluation.write_json(measure.output, facts, overwrite=measure.overwrite)
        console.show_evaluation(file, result, tasked)

    app.command(
        evaluate,
        help="Measure a package in the runtime that it was written for: perplexity, and KL divergence from its source.",
        help_epilogue="Example:\n  d2qconv evaluate qwen3-8b-q2_k.gguf --source Qwen/Qwen3-8B --text wiki.test.raw "
        "--chunks 40",
    )


def _asked(
    file: Path, info: ExporterInfo, baseline: tuple[Path, ExporterInfo] | None, measure: Measure
) -> Evaluation:
    from d2qconv.evaluation import CONTEXT, Evaluation, Target

    return Evaluation(
        package=Target(file, info),
        source=measure.source,
        revision=measure.revision,
        text=measure.text,
        n_chunks=measure.chunks,
        context=CONTEXT if measure.context is None else measure.context,
        device=measure.device,
        seed=measure.seed,
        baseline=None if baseline is None else Target(*baseline),
    )


def _task_run(measure: Measure, tasks: str) -> TaskRun:
    from d2qconv.harness import TaskRun

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    return TaskRun(names, measure.limit, measure.shots, measure.task_folder)
