"""`report`: the page of a run's report.json again, or of several runs side by side."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from d2qconv.commands.parameters import TALK, ReportOptions
from d2qconv.console import Console
from d2qconv.errors import InputError
from d2qconv.exporters.beside import page_of
from d2qconv.exporters.discover import Found
from d2qconv.exporters.package import check_output
from d2qconv.report_options import Flag, OutputPath

Reports = Annotated[Path, Parameter(help="PACKAGE.report.json, of one run or of several.")]


def add(app: App, _: Collection[Found], console: Console) -> None:
    """Add it."""

    def report(
        file: Reports,
        /,
        *more: Annotated[Path, Parameter(show=False)],
        output: Annotated[
            OutputPath, Parameter(help="The page. By default that beside the report; of several none.")
        ] = None,
        overwrite: Annotated[Flag, Parameter(help="Replace an existing page.")] = False,
        talk: ReportOptions = TALK,
    ) -> None:
        talk.tell(console)
        if more and output is None:
            raise InputError(
                "a page of several reports has no place of its own", todo="name a file for it with -o"
            )
        page = output or page_of(file)
        check_output(page, overwrite)
        console.show_page(page, write_page([file, *more], page, overwrite=overwrite))

    app.command(
        report,
        help="Make the page of a run from its report.json again; of several reports, set the runs side by side: "
        "divergence over size, and a ladder.",
        help_epilogue="Example:\n  d2qconv report q2.gguf.report.json q3.gguf.report.json -o compared.html",
    )


def write_page(files: list[Path], page: Path, *, overwrite: bool) -> int:
    """Write the page, whole or not at all; returns its bytes. Raises InputError, ExportError."""
    from d2qconv.exporters.package import atomic_output
    from d2qconv.report.compare import render_several
    from d2qconv.report.page import render
    from d2qconv.report.schema import read_intact

    read = [read_intact(file) for file in files]
    made = render(*read[0]) if len(read) == 1 else render_several([report for report, _ in read])
    with atomic_output(page, overwrite=overwrite) as partial:
        partial.write_bytes(made)
    return len(made)
