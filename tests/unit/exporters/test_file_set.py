"""A set of files appears whole under its final names, or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2qconv.errors import ExportError, InputError
from d2qconv.exporters import file_set
from d2qconv.exporters.file_set import atomic_set, check_set, member, members


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def whole(text: str, n: int) -> dict[str, str]:
    return {member(Path("m.gguf"), i, n).name: f"{text} {i}" for i in range(1, n + 1)}


def write(
    out: Path, text: str, n: int, error: BaseException | None = None, *, overwrite: bool = True
) -> None:
    with atomic_set(out, overwrite=overwrite) as path:
        assert path.name == out.name
        for i in range(1, n + 1):
            member(path, i, n).write_text(f"{text} {i}")
        if error:
            raise error


def test_names():
    assert member(Path("a/m.x.gguf"), 2, 13) == Path("a/m.x-00002-of-00013.gguf")
    assert member(Path("a/m.gguf"), 1, 1) == Path("a/m.gguf")


def test_success(tmp_path):
    write(tmp_path / "m.gguf", "new", 3, overwrite=False)
    assert contents(tmp_path) == whole("new", 3)
    assert names(tmp_path) == sorted(whole("new", 3))


@pytest.mark.parametrize("n_old", [1, 2, 3, 5])
@pytest.mark.parametrize("n_new", [1, 3])
def test_an_older_set_is_replaced_and_nothing_else_is_touched(tmp_path, n_old, n_new):
    others = {"m-extra.gguf": "", "n-00001-of-00002.gguf": "", "m-00001-of-00002.txt": ""}
    for name in others:
        (tmp_path / name).touch()
    write(tmp_path / "m.gguf", "old", n_old)
    write(tmp_path / "m.gguf", "new", n_new)
    assert contents(tmp_path) == whole("new", n_new) | others


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    write(tmp_path / "m.gguf", "old", 2)
    with pytest.raises(type(error)):
        write(tmp_path / "m.gguf", "new", 3, error)
    assert contents(tmp_path) == whole("old", 2)
    assert names(tmp_path) == sorted(whole("old", 2))


def test_a_full_disk_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="No space left"):
        write(tmp_path / "m.gguf", "new", 2, OSError(28, "No space left on device"))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("written", "what"),
    [
        ([], "wrote no file"),
        (["m-00001-of-00002.gguf"], "no whole set"),
        (["m-00001-of-00001.gguf", "m.gguf"], "no whole set"),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "x"], "no whole set"),
        (["other.gguf"], "no whole set"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path, written, what):
    def run():
        with atomic_set(tmp_path / "m.gguf") as path:
            for name in written:
                (path.parent / name).touch()

    with pytest.raises(ExportError, match=what):
        run()
    assert names(tmp_path) == []


def test_what_exists_is_refused_without_overwrite(tmp_path):
    for n in (1, 2):
        write(tmp_path / "m.gguf", "old", n)
        with pytest.raises(InputError, match="the output exists"):
            check_set(tmp_path / "m.gguf", overwrite=False)
        check_set(tmp_path / "m.gguf", overwrite=True)
    with pytest.raises(InputError, match="folder does not exist"):
        check_set(tmp_path / "no" / "m.gguf", overwrite=False)


def test_a_set_that_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "m.gguf"

    def run():
        with atomic_set(out) as path:
            for i in (1, 2):
                member(path, i, 2).write_text("new")
            for name, text in whole("of somebody else", 3).items():
                (tmp_path / name).write_text(text)

    with pytest.raises(ExportError, match="meanwhile"):
        run()
    assert contents(tmp_path) == whole("of somebody else", 3)


KILLED = """
import os, signal, sys
from pathlib import Path
from d2qconv.exporters.file_set import atomic_set, member
out, text, n, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
left = steps
def dying(function):
    def call(*given, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return call
for name in ("rename", "replace", "unlink", "rmdir"):
    setattr(Path, name, dying(getattr(Path, name)))
os.fsync = dying(os.fsync)
with atomic_set(out, overwrite=True) as path:
    for i in range(1, n + 1):
        member(path, i, n).write_text(f"{text} {i}")
"""


@pytest.mark.parametrize("n_old", [3, 4])
def test_killed_at_every_step_no_half_set_is_ever_usable(tmp_path, n_old):
    """Before its SIGKILL a run may take 0, 1, 2, … steps that change the disk."""
    states, steps = [], 0
    while True:
        folder = tmp_path / str(steps)
        folder.mkdir()
        out = folder / "m.gguf"
        write(out, "old", n_old)
        done = subprocess.run([sys.executable, "-c", KILLED, out, "new", "3", str(steps)], check=False)
        found = contents(folder)
        first = {text for name, text in found.items() if "-00001-" in name}
        whole_new, whole_old = whole("new", 3), whole("old", n_old)
        is_decided = (folder / ".m.gguf.complete").is_dir()
        if first == {"old 1"}:
            assert whole_old.items() <= found.items() or n_old == 4
            usable = found if n_old == 3 else {k: v for k, v in found.items() if k in whole_old}
            assert usable == whole_old
        elif first == {"new 1"}:
            assert found == whole_new
        else:
            assert first == set()
            assert is_decided
        states.append(next(iter(first), ""))
        check_set(out, overwrite=True)
        assert contents(folder) == (whole_new if is_decided or first == {"new 1"} else whole_old)
        assert not (folder / ".m.gguf.complete").exists()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        steps += 1
    assert {"old 1", "", "new 1"} == set(states)
    write(tmp_path / "0" / "m.gguf", "newer", 2)
    assert names(tmp_path / "0") == sorted(whole("newer", 2))


def test_folders_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    host = file_set.partial_name(tmp_path / "m.gguf").name.removesuffix(f"-{os.getpid()}.partial")
    stale = tmp_path / f"{host}-{int(dead.stdout)}.partial"
    stale.mkdir()
    (stale / "m.gguf").touch()
    write(tmp_path / "m.gguf", "new", 2)
    assert not stale.exists()
    assert len(members(tmp_path / "m.gguf")) == 2


def test_a_folder_of_an_earlier_run_with_the_number_of_this_process_is_no_obstacle(tmp_path):
    left = file_set.partial_name(tmp_path / "m.gguf")
    left.mkdir()
    (left / "m.gguf").touch()
    write(tmp_path / "m.gguf", "new", 2)
    assert contents(tmp_path) == whole("new", 2)


def test_a_strange_file_beside_what_is_to_be_moved_stays_and_is_told(tmp_path):
    complete = tmp_path / ".m.gguf.complete"
    complete.mkdir()
    (complete / ".DS_Store").touch()
    for name, text in whole("new", 2).items():
        (complete / name).write_text(text)
    with pytest.raises(InputError, match="not of this package"):
        check_set(tmp_path / "m.gguf", overwrite=True)
    assert contents(tmp_path) == whole("new", 2)
    assert names(complete) == [".DS_Store"]
    (complete / ".DS_Store").unlink()
    check_set(tmp_path / "m.gguf", overwrite=True)
    assert not complete.exists()


@pytest.mark.parametrize("is_link", [True, False])
def test_what_has_the_name_of_the_folder_between_is_no_traceback(tmp_path, is_link):
    complete = tmp_path / ".m.gguf.complete"
    if is_link:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "m.gguf").write_text("theirs")
        complete.symlink_to(tmp_path / "elsewhere")
    else:
        complete.touch()
    with pytest.raises(InputError, match="cannot be moved"):
        check_set(tmp_path / "m.gguf", overwrite=True)
    assert not (tmp_path / "m.gguf").exists()
