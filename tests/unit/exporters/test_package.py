"""The output appears whole, or not at all."""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from d2qconv.errors import ExportError, InputError
from d2qconv.exporters import package
from d2qconv.exporters.package import atomic_output, check_output


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_success(tmp_path):
    out = tmp_path / "m.gguf"
    with atomic_output(out) as partial:
        assert partial.parent == tmp_path
        partial.write_bytes(b"new")
        assert not out.exists()
    assert out.read_bytes() == b"new"
    assert names(tmp_path) == ["m.gguf"]


def test_permissions_are_those_of_a_plain_file(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_output(tmp_path / "m.gguf") as partial:
        partial.touch()
    assert stat.S_IMODE((tmp_path / "m.gguf").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_overwrite(tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")
    with atomic_output(out, overwrite=True) as partial:
        partial.write_bytes(b"new")
        assert out.read_bytes() == b"old"
    assert out.read_bytes() == b"new"
    assert names(tmp_path) == ["m.gguf"]


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.gguf", tmp_path / "m.gguf"
    real.write_bytes(b"old")
    link.symlink_to(real)
    with atomic_output(link, overwrite=True) as partial:
        partial.write_bytes(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def write(out: Path, data: bytes, error: BaseException | None = None, *, overwrite: bool = False) -> None:
    with atomic_output(out, overwrite=overwrite) as partial:
        partial.write_bytes(data)
        if error:
            raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), ExportError("no")])
@pytest.mark.parametrize("had_file", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error, had_file):
    out = tmp_path / "m.gguf"
    if had_file:
        out.write_bytes(b"old")
    with pytest.raises(type(error)) as caught:
        write(out, b"half", error, overwrite=had_file)
    assert caught.value is error
    assert names(tmp_path) == (["m.gguf"] if had_file else [])
    assert not had_file or out.read_bytes() == b"old"


def test_a_full_disk_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="No space left") as caught:
        write(tmp_path / "m.gguf", b"half", OSError(28, "No space left on device"))
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_an_exporter_that_writes_nothing(tmp_path):
    with pytest.raises(ExportError, match="wrote no file"), atomic_output(tmp_path / "m.gguf"):
        pass


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (out.write_bytes(b"of somebody else"), fsync(fd)))
    with pytest.raises(ExportError, match="meanwhile"):
        write(out, b"new")
    assert out.read_bytes() == b"of somebody else"
    assert names(tmp_path) == ["m.gguf"]


def test_without_hard_links_it_is_renamed(tmp_path, monkeypatch):
    def refuse_link(self, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse_link)
    with atomic_output(tmp_path / "m.gguf") as partial:
        partial.write_bytes(b"new")
    assert (tmp_path / "m.gguf").read_bytes() == b"new"
    assert names(tmp_path) == ["m.gguf"]


def test_partial_files_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    host = package._host()
    stale = [tmp_path / f".m.gguf.{host}-{int(dead.stdout)}.partial{probe}" for probe in ("", ".a7_xk29z")]
    # In a container every run may have the same number.
    stale.append(tmp_path / f".m.gguf.{host}-{os.getpid()}.partial.b7_xk29z")
    others = [
        tmp_path / f".m.gguf.{host}-{os.getppid()}.partial",
        tmp_path / f".m.gguf.{host}-{os.getppid()}.partial.a7_xk29z",
        tmp_path / f".m.gguf.elsewhere{host}-{int(dead.stdout)}.partial",
        tmp_path / f".n.gguf.{host}-{int(dead.stdout)}.partial",
    ]
    for file in (*stale, *others):
        file.touch()
    with atomic_output(tmp_path / "m.gguf") as partial:
        partial.touch()
    assert not any(file.exists() for file in stale)
    assert all(file.exists() for file in others)


@pytest.mark.parametrize(
    "name", ["folder", "missing/m.gguf", "there.gguf", "n" * 250, "n" * 300, "/proc/m.gguf", "/dev/null"]
)
def test_refused_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.gguf").write_bytes(b"old")
    before = names(tmp_path)
    with pytest.raises(InputError) as caught:
        check_output(tmp_path / name, overwrite=False)
    assert caught.value.todo
    with pytest.raises(InputError), atomic_output(tmp_path / name):
        pytest.fail("the body ran")
    assert names(tmp_path) == before
    assert (tmp_path / "there.gguf").read_bytes() == b"old"


def test_who_has_the_older_file_mapped_keeps_it(tmp_path):
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old" * 4096)
    with out.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        with atomic_output(out, overwrite=True) as partial:
            partial.write_bytes(b"new")
        assert held[:] == b"old" * 4096
    assert out.read_bytes() == b"new"


def test_links_in_a_circle_are_no_place(tmp_path):
    for a, b in (("a", "b"), ("b", "a")):
        (tmp_path / a).symlink_to(tmp_path / b)
    with pytest.raises(InputError, match="cannot be written"):
        check_output(tmp_path / "a", True)


def test_a_check_leaves_nothing_behind(tmp_path):
    check_output(tmp_path / "m.gguf", overwrite=False, n_bytes=10)
    assert names(tmp_path) == []


def test_too_little_room(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match="the disk has"):
        check_output(tmp_path / "m.gguf", overwrite=False, n_bytes=2 * free + 1)
