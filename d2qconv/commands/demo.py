"""`demo`: the whole way on a model that comes with the package."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

import d2qconv
from d2qconv.commands.convert import make_job, run_job
from d2qconv.commands.parameters import TALK, ReportOptions
from d2qconv.console import Console
from d2qconv.exporters.discover import Found, find, first_ready
from d2qconv.report_options import Flag, OutputPath

#: The model that `demo` converts; it is part of the package.
DEMO_MODEL = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
#: Sequences and tokens of each: enough for the model of the demo, and quick.
DEMO_SEQUENCES, DEMO_LENGTH = 32, 128
DEMO_PROMPT = "Once upon a time"


def add(app: App, found: Collection[Found], console: Console) -> None:
    """Add it."""

    def demo(
        *,
        to: Annotated[str, Parameter(help="Exporter. By default the first that is ready.")] = "",
        prompt: Annotated[str, Parameter(help="Text that the converted model continues.")] = DEMO_PROMPT,
        output: Annotated[
            OutputPath, Parameter(help="The package. By default demo.* in the current folder.")
        ] = None,
        overwrite: Annotated[Flag, Parameter(help="Replace an existing output.")] = False,
        report: ReportOptions = TALK,
    ) -> None:
        from d2qconv.options import Calibration, Output, Settings

        info = find(to, found) if to else first_ready(found)
        target = Output(output=output or Path(f"demo{info.suffix}"), overwrite=overwrite)
        calibration = Calibration(sequences=DEMO_SEQUENCES, length=DEMO_LENGTH)
        settings = Settings(output=target, calibration=calibration)
        report.tell(console)
        run_job(make_job(info, str(DEMO_MODEL), None, settings), console, prompt=prompt)

    app.command(
        demo,
        help="Convert the small model that comes with d2qconv, then let it write a few words. Needs no network.",
        help_epilogue="Example:\n  d2qconv demo --prompt 'The little dog'",
    )
