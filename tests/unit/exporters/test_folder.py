"""A package that is a folder appears whole, or not at all."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import sys
from itertools import groupby
from pathlib import Path

import pytest

from d2qconv.errors import ExportError, InputError, PluginError, VerifyError
from d2qconv.exporters.discover import Found, for_file
from d2qconv.exporters.folder import atomic_folder, check_folder
from d2qconv.exporters.manifest import (
    MANIFEST,
    Manifest,
    file_records,
    files_check,
    read_manifest,
    write_manifest,
)
from d2qconv.exporters.package import partial_name


def fill(folder, text):
    (folder / "model").write_text(text)
    fill_manifest(folder)


def fill_manifest(folder):
    write_manifest(folder, Manifest("toy", "0", file_records(folder), {}, {}, {}, {}))


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


#: What a run does to the disk, but for the content of files; fsync has no event.
STEPS = {"os.mkdir", "os.rename", "os.rmdir", "os.remove"}


def killed_at(step, do):
    """Whether a process that does this was killed as it came to its system call `step`, from 0; else it is done."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        return os.WIFSIGNALED(status)
    left, fsync = step, os.fsync

    def count(event, _):
        nonlocal left
        if event in STEPS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted_fsync(file):
        count("os.rename", ())
        fsync(file)

    try:
        os.fsync = counted_fsync
        sys.addaudithook(count)
        do()
        os._exit(0)
    finally:
        os._exit(1)


def state(path):
    """`old`, `new`, or `none`; anything between is an error."""
    if not path.exists():
        return "none"
    assert files_check(path, read_manifest(path)).is_passed
    assert (path / "model").read_text() == (path / "data").read_text()
    return content(path)


def make_two_files(path, text):
    with atomic_folder(path, overwrite=True) as partial:
        (partial / "data").write_text(text)
        fill(partial, text)


def test_a_kill_at_any_system_call_leaves_a_whole_package(tmp_path):
    """Also if the run that mends is killed in turn, at any of its own, and the one after it mends."""
    seen = []
    for step in range(100):
        out = tmp_path / str(step) / "p"
        out.parent.mkdir()
        make_two_files(out, "old")
        is_killed = killed_at(step, lambda out=out: make_two_files(out, "new"))
        seen.append(state(out))
        mended = "old" if seen[-1] == "none" else seen[-1]
        if seen[-1] == "new":
            # Somebody takes the new package away before the next run: half of the older one must not take its name.
            taken = tmp_path / f"{step}-taken" / "p"
            shutil.copytree(out.parent, taken.parent)
            shutil.rmtree(taken)
            check_folder(taken, True)
            assert state(taken) in ("old", "none")
        for second in range(100):
            again = tmp_path / f"{step}-{second}" / "p"
            shutil.copytree(out.parent, again.parent)
            is_killed_again = killed_at(second, lambda again=again: check_folder(again, True))
            assert state(again) in (seen[-1], mended)
            check_folder(again, True)
            assert state(again) == mended
            make_two_files(again, "newest")
            assert state(again) == "newest"
            assert names(again.parent) == ["p"]
            if not is_killed_again:
                break
        if not is_killed:
            break
    # Every place was come to: before the renames, between them, and after, where the older package is removed.
    assert [text for text, _ in groupby(seen)] == ["old", "none", "new"]
    assert seen.count("none") == 2
    assert seen.count("new") > 5
    assert not is_killed


def test_a_kill_at_any_system_call_of_a_first_package_leaves_it_or_none(tmp_path):
    seen, is_killed = [], True
    while is_killed:
        out = tmp_path / str(len(seen)) / "p"
        out.parent.mkdir()
        is_killed = killed_at(len(seen), lambda out=out: make_two_files(out, "new"))
        seen.append(state(out))
        make_two_files(out, "newest")
        assert names(out.parent) == ["p"]
    assert [text for text, _ in groupby(seen)] == ["none", "new"]


def test_who_has_the_older_model_mapped_keeps_it(tmp_path):
    make(tmp_path / "p", "old")
    file = tmp_path / "p" / "model"
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
        before = held[:]
        make(tmp_path / "p", "new", overwrite=True)
        assert held[:] == before
    assert content(tmp_path / "p") == "new"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_run_that_lives_gives_the_older_package_its_name_back(tmp_path, monkeypatch, error):
    out = tmp_path / "p"
    make(out, "old")
    rename = Path.rename

    def rename_but_the_new_one(self, target):
        if self == partial_name(out):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_but_the_new_one)
    expected = ExportError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        make(out, "new", overwrite=True)
    assert content(out) == "old"
    assert names(tmp_path) == ["p"]


def left_by_a_kill(tmp_path):
    """Between its renames: the older package has no name but this one."""
    older = tmp_path / ".p.d2qconv-replaced"
    make(tmp_path / "p", "old")
    (tmp_path / "p").rename(older)
    return older


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_does_not_cost_the_older_package(tmp_path, overwrite):
    left_by_a_kill(tmp_path)
    (tmp_path / "p").mkdir()
    if overwrite:
        check_folder(tmp_path / "p", True)
    else:
        with pytest.raises(InputError, match="the output exists"):
            check_folder(tmp_path / "p", False)
    assert content(tmp_path / "p") == "old"
    assert names(tmp_path) == ["p"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "broken link"])
def test_what_took_the_name_of_the_older_package_costs_neither(tmp_path, kind):
    older, out = left_by_a_kill(tmp_path), tmp_path / "p"
    elsewhere = tmp_path / "elsewhere"
    make(elsewhere, "theirs")
    if kind == "file":
        out.write_text("x")
    elif kind == "folder":
        out.mkdir()
        (out / "letter").write_text("dear")
    else:
        out.symlink_to(tmp_path / "nowhere" if kind == "broken link" else elsewhere)
    before = names(tmp_path)
    with pytest.raises(InputError, match="a killed run left") as caught:
        make(out, "new", overwrite=True)
    assert older.name in caught.value.todo
    assert names(tmp_path) == before
    assert content(older) == "old"
    out.rename(tmp_path / "away")
    check_folder(out, True)
    assert content(out) == "old"


def test_folders_of_somebody_else_are_left_alone(tmp_path):
    theirs = [tmp_path / ".p.replaced", tmp_path / ".p.removed"]
    for folder in theirs:
        folder.mkdir()
        fill(folder, "theirs")
    make(tmp_path / "p", "old")
    make(tmp_path / "p", "new", overwrite=True)
    assert [content(folder) for folder in theirs] == ["theirs"] * 2


@pytest.mark.parametrize("name", [".p.d2qconv-replaced", ".p.d2qconv-removed"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_has_our_names_and_is_no_package_is_refused_and_kept(tmp_path, name, kind):
    make(tmp_path / "p", "old")
    make(tmp_path / "elsewhere", "theirs")
    left = tmp_path / name
    if kind == "file":
        left.write_text("x")
    elif kind == "folder":
        left.mkdir()
        (left / "letter").write_text("dear")
    else:
        left.symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path)
    with pytest.raises(InputError, match="no package of its own"):
        make(tmp_path / "p", "new", overwrite=True)
    assert names(tmp_path) == before
    assert [content(tmp_path / n) for n in ("p", "elsewhere")] == ["old", "theirs"]
    assert kind != "folder" or (left / "letter").read_text() == "dear"


@pytest.mark.parametrize("left", [("model", MANIFEST), (MANIFEST,), ()])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_half_removed_package_is_removed_and_never_given_a_name(tmp_path, left, is_there):
    out, going = tmp_path / "p", tmp_path / ".p.d2qconv-removed"
    make(going, "old")
    for name in {"model", MANIFEST} - set(left):
        (going / name).unlink()
    if is_there:
        make(tmp_path / "new", "new")
        (tmp_path / "new").rename(out)
    check_folder(out, True)
    assert names(tmp_path) == (["p"] if is_there else [])
    assert not is_there or content(out) == "new"


def test_an_older_package_goes_file_by_file_its_manifest_last(tmp_path, monkeypatch):
    make(tmp_path / "p", "old")
    gone, unlink = [], Path.unlink

    def watched(self, **options):
        gone.append((self.parent.name, self.name))
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    make(tmp_path / "p", "new", overwrite=True)
    assert gone == [(".p.d2qconv-removed", "model"), (".p.d2qconv-removed", MANIFEST)]


def test_another_process_that_was_faster_keeps_its_output(tmp_path):
    def be_slow():
        with atomic_folder(tmp_path / "p") as partial:
            fill(partial, "slow")
            (tmp_path / "p").mkdir()
            fill(tmp_path / "p", "fast")

    with pytest.raises(ExportError, match="another process"):
        be_slow()
    assert content(tmp_path / "p") == "fast"


def become_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


def become_a_link(path):
    """To a file of the same content."""
    path.rename(path.parent.with_name("elsewhere"))
    path.symlink_to(path.parent.with_name("elsewhere"))


@pytest.mark.timeout(10)
@pytest.mark.parametrize("become", [become_a_pipe, become_a_folder, become_a_link])
def test_what_is_no_regular_file_is_not_recorded(tmp_path, become):
    def write():
        with atomic_folder(tmp_path / "p") as partial:
            (partial / "good").write_text("x")
            (partial / "model").write_text("x")
            become(partial / "model")
            fill_manifest(partial)

    with pytest.raises(ExportError, match="no regular files: model"):
        write()
    assert "p" not in names(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "model").write_text("other"),
        lambda p: (p / "model").unlink(),
        lambda p: (p / "more").write_text("x"),
        lambda p: become_a_pipe(p / "model"),
        lambda p: become_a_folder(p / "model"),
        lambda p: become_a_link(p / "model"),
        lambda p: os.mkfifo(p / "more"),
        lambda p: (p / "more").symlink_to(p / "model"),
    ],
)
@pytest.mark.timeout(10)
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
    with pytest.raises(PluginError, match="no exporter is called 'toy'"):
        for_file(tmp_path / "p", [Found("other", "", None)])
