"""`verify`, `inspect` and `exporters`: what is there already."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from d2qconv.commands.parameters import SHALLOW, TALK, DeepOptions, File, Format, ReportOptions
from d2qconv.console import Console
from d2qconv.errors import InputError, VerifyError
from d2qconv.exporters.discover import Found, find, for_file
from d2qconv.exporters.info import ExporterInfo
from d2qconv.package_options import Deep
from d2qconv.progress import Watch, by_steps

if TYPE_CHECKING:
    from d2qconv.exporters.base import Check, Exporter

MAX_HOST_MEM = (
    "Host memory to stay within, such as 1GiB; by default 80 % of what is free. The comparison bit for bit needs less "
    "than that; a runtime that would need more is left out, and the check says so."
)


def add(app: App, found: Collection[Found], console: Console) -> None:
    """Add them."""

    def verify(
        file: File,
        /,
        *,
        format_name: Format = "",
        max_host_mem: Annotated[str | None, Parameter(help=MAX_HOST_MEM)] = None,
        deep: DeepOptions = SHALLOW,
        report: ReportOptions = TALK,
    ) -> None:
        from d2qconv.budget import host_limit, parse_size

        deep.check()
        limit = None if max_host_mem is None else parse_size(max_host_mem, "--max-host-mem")
        info = exporter_of(file, format_name, found)
        exporter = info.load(info.default_options())
        report.tell(console)
        with console.watch() as watch, host_limit(limit):
            checks = [*exporter.verify(file, by_steps(watch, "verify"))]
            if deep.deep:
                checks += _deep_checks(file, exporter, deep, watch)
        console.show_checks(file, checks)
        failed = [c for c in checks if not c.is_passed]
        if failed:
            raise VerifyError(
                "not what the quantizer made: " + "; ".join(f"{c.name}: {c.detail}" for c in failed),
                where=str(file),
                todo="convert again; a second failure is a bug in d2qconv",
            )

    def inspect(file: File, /, *, format_name: Format = "", report: ReportOptions = TALK) -> None:
        info = exporter_of(file, format_name, found)
        report.tell(console)
        console.show_facts(file, info.load(info.default_options()).inspect(file))

    def exporters(*, report: ReportOptions = TALK) -> None:
        report.tell(console)
        console.show_exporters(found)

    app.command(
        verify,
        help="Compare every tensor of a package bit for bit with its record, through an independent reader; then "
        "load it in its runtime, where that is installed. With --deep, compute again what its report says: digests of "
        "package, report, page and source.",
        help_epilogue="Example:\n  d2qconv verify qwen3-8b-q2_k.gguf\n"
        "  d2qconv verify qwen3-8b-q2_k.gguf --deep --source Qwen/Qwen3-8B",
    )
    app.command(
        inspect,
        help="Print what is in a package: layout, sizes, where it comes from. Reads no weights.",
        help_epilogue="Example:\n  d2qconv inspect qwen3-8b-q2_k.gguf --json",
    )
    app.command(
        exporters,
        help="List the installed exporters, those that cannot be used with the reason.",
        help_epilogue="Example:\n  d2qconv exporters",
    )


def _deep_checks(file: Path, exporter: Exporter, asked: Deep, watch: Watch) -> list[Check]:
    from d2qconv.exporters.beside import report_of
    from d2qconv.report.deep import deep_checks

    watch.stage("verify deep", 0)
    report = asked.report or report_of(file)
    return deep_checks(file, report, exporter, asked.source, asked.revision, watch.step)


def exporter_of(file: Path, name: str, found: Collection[Found]) -> ExporterInfo:
    """The exporter that wrote a package; raises InputError or PluginError. name: empty to find it out."""
    if not file.exists():
        raise InputError("there is no such file", where=str(file))
    return find(name, found) if name else for_file(file, found)
