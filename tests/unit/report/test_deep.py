"""What `verify --deep` finds, of packages and reports that are made by hand."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from report_samples import sample

from d2qconv.exporters.beside import page_of, report_of
from d2qconv.report.deep import deep_checks
from d2qconv.report.page import render
from d2qconv.report.schema import FileEntry, decode, encode


class Plain:
    """An exporter that says of a package what its report does."""

    def inspect(self, path):
        return {"provenance": PROVENANCE}


PROVENANCE = {"fingerprint": "f", "source": "m"}


def put(package, report):
    """Write the report and its page beside a package."""
    data = encode(report)
    report_of(package).write_bytes(data)
    page_of(report_of(package)).write_bytes(render(decode(data, ""), data))
    return report_of(package)


def of(name, files, *, is_folder=False):
    """The report of a package with these files: contents by name."""
    report = sample(name, sum(map(len, files.values())), 0.5)
    entries = [FileEntry(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in files.items()]
    package = msgspec.structs.replace(
        report.package, is_folder=is_folder, files=entries, provenance=PROVENANCE
    )
    return msgspec.structs.replace(report, package=package)


@pytest.fixture
def folder(tmp_path):
    """A package that is a folder, with its report."""
    package = tmp_path / "m-onnx"
    package.mkdir()
    files = {"a.onnx": b"one", "b.json": b"{}"}
    for name, data in files.items():
        (package / name).write_bytes(data)
    put(package, of("m-onnx", files, is_folder=True))
    return package


def verdicts(checks):
    return {c.name: "skipped" if c.is_skipped else "ok" if c.is_passed else "failed" for c in checks}


WELL = {"report": "ok", "page": "ok", "files": "ok", "provenance": "ok", "source": "skipped"}


@pytest.mark.parametrize("name", [".", "../m-onnx", "../m-onnx/../m-onnx"])
def test_a_folder_is_looked_at_from_inside(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    package = type(folder)(name)
    assert verdicts(deep_checks(package, report_of(package), Plain())) == WELL
