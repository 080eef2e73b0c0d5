"""`verify --deep`: computes again everything that a package's report says and that can be computed.

- report: report.json is, to the byte, what was written (its own digest);
- page: the page beside it is what the report gives; of a page that another version drew, that it carries the report;
- files: size and SHA-256 of every file of the package, and no file more;
- provenance: what the package's own metadata say of its source and making is what the report says;
- bytes of tensors: the package's own headers give every tensor the bytes that the report says;
- source: the SHA-256 over the config and every weight of the source, if it is there to be read.

So a changed byte in the package, the report or the page is found; who changed all of them alike, and knows how, is not:
keep the report's digest elsewhere for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from d2qconv import __version__
from d2qconv.arch.bind import bind
from d2qconv.checkpoint.digest import content_digest
from d2qconv.errors import D2qError, InputError
from d2qconv.exporters.base import Check, Exporter, Sizing
from d2qconv.exporters.beside import named, page_of
from d2qconv.exporters.contents import contents
from d2qconv.exporters.file_set import members
from d2qconv.exporters.manifest import FileRecord, provenance_of
from d2qconv.foreign.read import open_float_source
from d2qconv.report.html import carried, in_script, version_of
from d2qconv.report.page import render
from d2qconv.report.schema import PackageEntry, Report, decode, is_intact, read_bytes

#: Keys of a package's provenance without which there is nothing to compare.
_NEEDED = ("fingerprint", "source")
_SHOWN = 5


def deep_checks(
    package: Path,
    report_path: Path,
    exporter: Exporter,
    source: str | None = None,
    revision: str | None = None,
    progress: Callable[[int, str], None] = lambda _done, _what: None,
) -> list[Check]:
    """package: its file, the first or any of several, or its folder. source: the model, None not to read it.

    Raises InputError if the report cannot be read at all or is of no such package, and what the exporter raises of a
    package that it cannot read. A source that cannot be read is a check that failed.
    """
    package = named(package)
    data = read_bytes(report_path)
    report = decode(data, str(report_path))
    entry = _entry(report, package, report_path)
    checks = [_report_check(report, data), _page_check(report, data, page_of(report_path))]
    checks += [_files_check(entry, package), _provenance_check(entry, exporter.inspect(package))]
    if isinstance(exporter, Sizing):
        sizes = exporter.tensor_bytes(package)
        if entry is report.package:
            checks.append(_sizes_check(report, sizes))
        elif entry.written is not None:
            checks.append(_sum_check(entry, sizes))
    checks.append(_source_check(report, source, revision, progress))
    return checks


def _entry(report: Report, package: Path, where: Path) -> PackageEntry:
    """The package's own entry: by the name that it had, or the only one of its kind."""
    entries = [report.package, *report.also]
    of_name = [e for e in entries if package.name == e.name or package.name in {f.name for f in e.files}]
    alike = [e for e in entries if e.is_folder == package.is_dir()]
    found = of_name or alike
    if len(found) != 1:
        listed = ", ".join(e.name for e in entries)
        raise InputError(
            f"does not tell which of its packages {package.name} is; it is about {listed}",
            where=str(where),
            todo="give the package the name that it had, or name its report with --report",
        )
    return found[0]


def _report_check(report: Report, data: bytes) -> Check:
    if is_intact(data, report):
        return Check(
            "report", f"{len(data):,} bytes with the digest {report.digest[:16]}… that they have", True
        )
    return Check(
        "report", "report.json was changed: its bytes do not have the digest that stands in it", False
    )


def _page_check(report: Report, data: bytes, page: Path) -> Check:
    if not page.exists():
        return Check("page", f"{page.name} is not there", True, is_skipped=True)
    there = read_bytes(page)
    drawn_by = version_of(there)
    if there == render(report, data):
        return Check("page", f"{page.name} is what the report gives, byte for byte", True)
    if carried(there) != in_script(data).encode():
        return Check("page", f"{page.name} does not carry this report: it was changed", False)
    if drawn_by in ("", __version__):
        return Check("page", f"{page.name} is not what this report gives: it was changed", False)
    detail = f"{page.name} carries this report; d2qconv {drawn_by} drew it, and the drawing was not compared"
    return Check("page", detail, True)


def _files_check(entry: PackageEntry, package: Path) -> Check:
    is_alone = not entry.is_folder and len(entry.files) == 1
    first = package if entry.is_folder or is_alone else package.with_name(entry.files[0].name)
    try:
        whole = package if is_alone else package.with_name(entry.name)
        names = {path.name for path in (first.iterdir() if entry.is_folder else members(whole))}
        found = contents(first).files
    except OSError as error:
        return Check("files", f"cannot be read: {error.strerror or error}", False)
    except InputError as error:
        return Check("files", error.what, False)
    # A file that was renamed is the same file.
    wanted = {package.name if is_alone else f.name: FileRecord(f.n_bytes, f.sha256) for f in entry.files}
    every = sorted({*wanted, *found, *names})
    wrong = [name for name in every if name not in wanted or wanted[name] != found.get(name)]
    if wrong:
        return Check("files", f"not as the report has them: {_listed(wrong)}", False)
    n_bytes = sum(f.n_bytes for f in entry.files)
    return Check("files", f"{len(wanted)} with {n_bytes:,} bytes, by SHA-256 as in the report", True)


def _provenance_check(entry: PackageEntry, facts: Mapping[str, Any]) -> Check:
    said = provenance_of(facts)
    missing = [key for key in _NEEDED if key not in said]
    if missing:
        return Check("provenance", f"the package does not say its {', '.join(missing)}", False)
    common = sorted(set(said) & set(entry.provenance))
    wrong = [key for key in common if said[key] != entry.provenance[key]]
    if wrong:
        return Check("provenance", f"package and report differ in {_listed(wrong)}", False)
    return Check("provenance", f"{len(common)} facts in the package's metadata, as in the report", True)


def _sizes_check(report: Report, sizes: Mapping[str, int]) -> Check:
    wrong = [t.stored_as for t in report.tensors if sizes.get(t.stored_as) != t.n_bytes]
    if wrong:
        return Check("bytes of tensors", f"not as planned: {_listed(wrong)}", False)
    total = sum(t.n_bytes for t in report.tensors)
    return Check("bytes of tensors", f"{len(report.tensors)} take {total:,} bytes, each as planned", True)


def _sum_check(entry: PackageEntry, sizes: Mapping[str, int]) -> Check:
    """Of a further package the report has the sum alone."""
    total = sum(sizes.values())
    detail = f"{len(sizes)} take {total:,} bytes, as the report says"
    if total != entry.written:
        detail = f"{total:,} in all, and the report says {entry.written:,}"
    return Check("bytes of tensors", detail, total == entry.written)


def _source_check(
    report: Report, source: str | None, revision: str | None, progress: Callable[[int, str], None]
) -> Check:
    if source is None:
        return Check("source", "not read; name it with --source", True, is_skipped=True)
    try:
        checkpoint = open_float_source(source, revision)
        digest = content_digest(checkpoint.config, bind(checkpoint).tensors, progress)
    except D2qError as error:
        # What the other checks have found is not lost for it.
        return Check("source", f"cannot be read: {error.where or source}: {error.what}", False)
    if digest == report.source.sha256:
        return Check("source", f"config and weights of {checkpoint.name} have the report's SHA-256", True)
    return Check("source", f"{checkpoint.name} is not the model that was quantized: SHA-256 {digest}", False)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
