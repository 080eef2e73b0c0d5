"""Putting a package in its place: whole, or not at all.

A package is written beside its final name as `.NAME.HOST-PID.partial`, flushed to the disk, and renamed. Whatever
stops the writer, the file that was there before stays as it was. A partial file that a killed run left behind is
removed by the next run on the same host. Packages of several files: `file_set`; folders: `folder`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2qconv.errors import ExportError, InputError


def check_output(path: Path, overwrite: bool, n_bytes: int = 0) -> None:
    """Refuse, before any work, an output that could not be written at its end.

    n_bytes: size that the package will have, 0 if not known yet. A probe file is created and removed, since
    permission bits do not tell (root, read-only mounts). Raises InputError.
    """
    try:
        free = _probe(path, overwrite)
    # RuntimeError: links that lead to each other (Python 3.12 and older).
    except (OSError, RuntimeError) as error:
        raise _unwritable_place(path, error) from error
    require_room(path, n_bytes, free, "file")


def require_room(path: Path, n_bytes: int, free: int, what: str) -> None:
    """Raise InputError for a package that the disk does not hold. what: a file or a folder, for the user."""
    if n_bytes > free:
        raise InputError(
            f"the package takes {n_bytes:,} bytes and the disk has {free:,} left",
            where=str(path),
            todo=f"make room, or name a {what} on another disk with -o",
        )


def _probe(path: Path, overwrite: bool) -> int:
    """Bytes free where `path` will be, once a file could be made beside it."""
    final = path.resolve()
    if final.is_dir():
        raise InputError("the output is a folder", where=str(path), todo="name a file with -o")
    if final.exists() and not final.is_file():
        raise InputError(
            "the output is not a regular file", where=str(path), todo="name another file with -o"
        )
    if final.exists() and not overwrite:
        raise InputError("the output exists", where=str(path), todo="name another file, or add --overwrite")
    return _free(final)


def free_beside(final: Path, path: Path) -> int:
    """Bytes free where `final` will be, once a file could be made beside it. path: as the user named it.

    Raises InputError if none can be made.
    """
    try:
        return _free(final)
    except OSError as error:
        raise _unwritable_place(path, error) from error


def _free(final: Path) -> int:
    folder = final.parent
    if not folder.is_dir():
        raise InputError(
            "the output's folder does not exist", where=str(folder), todo="make the folder first"
        )
    with tempfile.NamedTemporaryFile(dir=folder, prefix=partial_name(final).name + "."):
        return shutil.disk_usage(folder).free


def _unwritable_place(path: Path, error: OSError | RuntimeError) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(
        f"the output cannot be written: {reason}",
        where=str(path),
        todo="name a file in a folder that you may write to",
    )


@contextmanager
def atomic_output(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a name to write the package to; rename it to `path` if the body succeeds, remove it if not.

    The name is in `path`'s own folder (a rename is atomic only within one file system). `path` may be a symbolic
    link: what it points to is replaced. Raises InputError as `check_output` does, and ExportError for an OSError
    of the body, a missing file, or a `path` that another process made meanwhile.
    """
    check_output(path, overwrite)
    final = path.resolve()
    remove_stale(final)
    partial = partial_name(final)
    try:
        yield partial
        _publish(partial, final, overwrite)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> ExportError:
    """What to say if writing the package `path` failed."""
    return ExportError(
        f"the package could not be written: {error.strerror or error}",
        where=str(path),
        todo="the same command goes on from the work directory, once the cause is removed",
    )


def taken(final: Path, what: str) -> ExportError:
    """What to say if the output is there all of a sudden. what: a file or a folder."""
    return ExportError(
        "another process wrote the output meanwhile", where=str(final), todo=f"name another {what} with -o"
    )


def _publish(partial: Path, final: Path, overwrite: bool) -> None:
    if not partial.is_file():
        raise ExportError("the exporter wrote no file", where=str(final))
    sync_files([partial])
    if overwrite:
        partial.replace(final)
    else:
        try:
            # Unlike a rename, a link fails if the name is taken.
            final.hardlink_to(partial)
        except FileExistsError as error:
            raise taken(final, "file") from error
        except OSError:
            # No hard links on this file system (FAT, some network mounts).
            partial.replace(final)
    sync_folder(final.parent)


def sync_files(files: Iterable[Path]) -> None:
    """Make what was written durable; raises OSError, also where the disk turns out to be full only now."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:32]


def partial_name(final: Path) -> Path:
    """What is written until it takes the name `final`: a file, or the folder of a set."""
    return final.with_name(f".{final.name}.{_host()}-{os.getpid()}.partial")


def remove_stale(final: Path) -> None:
    """Remove partial and probe files of this output whose process, on this host, is gone.

    One of this process's own number is of an earlier one: in a container every run may have the same.
    """
    pattern = re.compile(re.escape(f".{final.name}.{_host()}-") + r"(\d+)\.partial(?:\.\w+)?")
    for sibling in final.parent.iterdir():
        match = pattern.fullmatch(sibling.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            if sibling.is_dir():
                shutil.rmtree(sibling, ignore_errors=True)
            else:
                sibling.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
