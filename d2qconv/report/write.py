"""Puts a run's report beside its package: `PACKAGE.report.json` and `PACKAGE.report.html`.

Beside it, never in it: a folder's manifest names every file of the package. The package is in its place by then; if its
report cannot be written the run fails and keeps its work directory, so that the same command with --overwrite ends it.
"""

from __future__ import annotations

from pathlib import Path

from d2qconv.errors import D2qError, ExportError
from d2qconv.exporters.beside import page_of, report_of
from d2qconv.exporters.package import atomic_output
from d2qconv.progress import Watch
from d2qconv.report.collect import RunFacts, collect
from d2qconv.report.page import render
from d2qconv.report.schema import decode, encode


def write_report(run: RunFacts, watch: Watch) -> Path:
    """Write both files, the page first; returns the JSON's path. Raises ExportError."""
    job = run.planned.job
    watch.stage("report", 0)
    report = report_of(job.output)
    try:
        data = encode(collect(run))
        # Of what was written, not of what is in memory: the page can be made again from the file.
        page = render(decode(data, str(report)), data)
    except (OSError, D2qError, UnicodeError) as error:
        # The last is the name of a file that is no text.
        why = error.what if isinstance(error, D2qError) else getattr(error, "strerror", None) or error
        raise ExportError(
            f"the package is there, and its report could not be made: {why}",
            where=str(report),
            todo="add --overwrite to the same command, which goes on from the work directory, or --no-report too",
        ) from error
    write_both(page, data, report, overwrite=job.overwrite)
    return report


def write_both(page: bytes, data: bytes, report: Path, *, overwrite: bool) -> None:
    """Each appears whole or not at all; raises ExportError, and InputError for a place that is taken."""
    for path, content in ((page_of(report), page), (report, data)):
        with atomic_output(path, overwrite=overwrite) as partial:
            partial.write_bytes(content)
