"""`evaluate`: how good a package is, in the runtime that it was written for."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import Annotated

from cyclopts import App, Parameter

from d2qconv.commands.packages import exporter_of
from d2qconv.commands.parameters import TALK, File, Format, ReportOptions
from d2qconv.console import Console
from d2qconv.errors import PluginError
from d2qconv.export.discover import Found
from d2qconv.export.package import check_output
from d2qconv.facts import evaluation_facts
from d2qconv.options import Measure

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
        info = exporter_of(file, format_name, found)
        other = measure.baseline
        other_info = None if other is None else exporter_of(other, "", found)
        absent = [m for m in ("torch", "tokenizers") if find_spec(m) is None]
        if absent:
            raise PluginError(f"measuring needs {', '.join(absent)}", todo="pip install 'd2qconv[quantize]'")
        if measure.output is not None:
            check_output(measure.output, measure.overwrite)
        report.tell(console)
        from d2qconv import evaluation

        asked = evaluation.Evaluation(
            package=evaluation.Target(file, info),
            source=measure.source,
            revision=measure.revision,
            text=measure.text,
            n_chunks=measure.chunks,
            context=measure.context,
            device=measure.device,
            seed=measure.seed,
            baseline=None if other is None or other_info is None else evaluation.Target(other, other_info),
        )
        with console.watch() as watch:
            result = evaluation.evaluate(asked, watch)
        if measure.output is not None:
            evaluation.write_json(measure.output, evaluation_facts(result), overwrite=measure.overwrite)
        console.show_evaluation(file, result)

    app.command(
        evaluate,
        help="Measure a package in the runtime that it was written for: perplexity, and KL divergence from its source.",
        help_epilogue="Example:\n  d2qconv evaluate qwen3-8b-q2_k.gguf --source Qwen/Qwen3-8B --text wiki.test.raw "
        "--chunks 40",
    )
