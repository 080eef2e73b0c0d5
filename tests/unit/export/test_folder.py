"""A package that is a folder appears whole, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from d2qconv.errors import ExportError, InputError, VerifyError
from d2qconv.export import folder as module
from d2qconv.export.discover import Found, for_file
from d2qconv.export.folder import atomic_folder, check_folder
from d2qconv.export.manifest import (
    MANIFEST,
    Manifest,
    file_records,
    files_check,
    read_manifest,
    write_manifest,
)
from d2qconv.export.package import partial_name


class KillError(BaseException):
    """The process ends here."""


def fill(folder, text):
    (folder / "model").write_text(text)
    manifest = Manifest("toy", "0", file_records(folder), {}, {}, {}, {})
    write_manifest(folder, manifest)


def make(path, text, **options):
    with atomic_folder(path, **options) as partial:
        fill(partial, text)


def content(path):
    return (path / "model").read_text()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_success_and_replacement(tmp_path):
    out = tmp_path / "p"
    make(out, "old")
    assert content(out) == "old"
    with pytest.raises(InputError, match="the output exists"):
        make(out, "new")
    make(out, "new", overwrite=True)
    assert content(out) == "new"
    assert names(tmp_path) == ["p"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "p").mkdir()
    make(tmp_path / "p", "new")
    assert content(tmp_path / "p") == "new"


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "p") as partial:
            fill(partial, "half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []


def test_what_is_no_package_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(InputError):
            check_folder(tmp_path / name, True)
    with pytest.raises(InputError, match="does not exist"):
        check_folder(tmp_path / "no" / "p", True)
    assert (tmp_path / "mine" / "letter").read_text() == "dear"


def test_a_package_without_manifest_is_not_published(tmp_path):
    with pytest.raises(ExportError, match="no manifest"), atomic_folder(tmp_path / "p") as partial:
        (partial / "model").write_text("x")
    assert names(tmp_path) == []


def test_a_full_disk_is_seen_before_any_work(tmp_path):
    with pytest.raises(InputError, match="the disk has"):
        check_folder(tmp_path / "p", False, 1 << 60)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("is_after", [False, True])
def test_a_kill_between_renames_is_mended_by_the_next_run(tmp_path, monkeypatch, at, is_after):
    out = tmp_path / "p"
    make(out, "old")
    calls, rename = [], Path.rename

    def rename_until(self, target):
        calls.append(target)
        if len(calls) == at and not is_after:
            raise KillError
        done = rename(self, target)
        if len(calls) == at:
            raise KillError
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_until)
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KillError):
            make(out, "new", overwrite=True)
    check_folder(out, True)
    assert content(out) == ("new" if (at, is_after) == (2, True) else "old")
    # Of a process that is gone, `remove_stale` takes it away; this one lives.
    shutil.rmtree(partial_name(out), ignore_errors=True)
    make(out, "newest", overwrite=True)
    assert content(out) == "newest"
    assert names(tmp_path) == ["p"]


def test_another_process_that_was_faster_keeps_its_output(tmp_path):
    def be_slow():
        with atomic_folder(tmp_path / "p") as partial:
            fill(partial, "slow")
            (tmp_path / "p").mkdir()
            fill(tmp_path / "p", "fast")

    with pytest.raises(ExportError, match="another process"):
        be_slow()
    assert content(tmp_path / "p") == "fast"


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "model").write_text("other"),
        lambda p: (p / "model").unlink(),
        lambda p: (p / "more").write_text("x"),
    ],
)
def test_files_that_changed_are_found(tmp_path, change):
    make(tmp_path / "p", "new")
    manifest = read_manifest(tmp_path / "p")
    assert files_check(tmp_path / "p", manifest).is_passed
    change(tmp_path / "p")
    assert not files_check(tmp_path / "p", manifest).is_passed


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
        *(
            json.dumps(
                {"format": "f", "version": "", "files": {name: {"n_bytes": 0, "sha256": ""}}}
                | {key: {} for key in ("decoded_sha256", "provenance", "requires", "facts")}
            ).encode()
            for name in ("../x", "/x", "a/b", "..", "", "a\\b", MANIFEST)
        ),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(VerifyError):
        read_manifest(tmp_path)


def test_a_folder_belongs_to_the_exporter_that_its_manifest_names(tmp_path):
    make(tmp_path / "p", "x")
    with pytest.raises(InputError, match="without"):
        for_file(tmp_path, [])
    with pytest.raises(Exception, match="'toy'"):
        for_file(tmp_path / "p", [Found("other", "", None)])
