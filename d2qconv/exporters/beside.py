"""Where the report of a package lies. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from d2qconv.errors import InputError
from d2qconv.exporters.package import check_output

REPORT, PAGE = ".report.json", ".report.html"
#: The names of the files of a split package, `d2qconv.exporters.file_set.member`.
_MEMBER = re.compile(r"(.+)-\d{5}-of-\d{5}(\.[^.]+)")


def report_of(package: Path) -> Path:
    """`m.gguf.report.json` of `m.gguf` or one of its split files, `m.report.json` of a folder `m`.

    Raises InputError.
    """
    package = named(package)
    match = _MEMBER.fullmatch(package.name)
    return package.with_name((match[1] + match[2] if match else package.name) + REPORT)


def page_of(report: Path) -> Path:
    """`m.gguf.report.html` of `m.gguf.report.json`; of another name, the same with `.html`.

    Raises InputError.
    """
    report = named(report)
    stem = report.name.removesuffix(REPORT)
    return report.with_name(stem + PAGE if stem != report.name else report.stem + ".html")


def named(path: Path) -> Path:
    """A path that ends in a name, for `.` and `..` too; raises InputError for one that has none."""
    found = path.resolve() if path.name in ("", "..") else path
    if not found.name:
        raise InputError(
            "is no place of a package or a report", where=str(path), todo="name a file or folder"
        )
    return found


def check_report(package: Path, overwrite: bool) -> None:
    """Refuse, before any work, a report that could not be written at its end.

    Raises InputError.
    """
    report = report_of(package)
    for path in (report, page_of(report)):
        try:
            check_output(path, overwrite)
        except InputError as error:
            todo = "name another output, add --overwrite, or leave the report out with --no-report"
            raise InputError(f"the report: {error.what}", where=error.where, todo=todo) from error
