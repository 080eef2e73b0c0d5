"""`doctor`: what this machine can do, what a package needs, whether a model can be taken."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from cyclopts import App, Parameter

from d2qconv.commands.parameters import TALK, Format, ReportOptions
from d2qconv.console import Console
from d2qconv.exporters.discover import Found

WHAT = (
    "A package, or a model as a folder or hub id (of which no weights are downloaded). "
    "Left out, this machine is looked at."
)


def add(app: App, found: Collection[Found], console: Console) -> None:
    """Add it."""

    def doctor(
        what: Annotated[str | None, Parameter(name="WHAT", help=WHAT)] = None,
        /,
        *,
        format_name: Format = "",
        report: ReportOptions = TALK,
    ) -> None:
        from d2qconv.doctor.report import diagnose

        report.tell(console)
        diagnosis = diagnose(what, found, format_name=format_name)
        console.show_diagnosis(diagnosis)
        if diagnosis.wrong:
            first = diagnosis.wrong[0]
            assert first.error is not None, "it is wrong"
            more = f", and {len(diagnosis.wrong) - 1} more" if len(diagnosis.wrong) > 1 else ""
            raise first.error(
                f"{first.subject}: {first.detail}{more}", where=diagnosis.about, todo=first.todo
            )

    app.command(
        doctor,
        help="Say what this machine can do: memory, GPUs, libraries, runtimes. Of a package, what it needs to be "
        "loaded and what is wrong with it; of a model, whether it can be taken. Reads no weights.",
        help_epilogue="Example:\n  d2qconv doctor\n  d2qconv doctor qwen3-8b-q2_k.gguf",
    )
