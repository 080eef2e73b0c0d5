"""Putting a package of several files in its place: the whole set, or none of it.

::

    model.gguf  →  model-00001-of-00003.gguf, model-00002-of-00003.gguf, model-00003-of-00003.gguf

No file system renames several files at once. So the files are written, flushed to the disk and checked in a folder of
their own beside their place, `.NAME.HOST-PID.partial`. One rename, of that folder to `.NAME.complete`, decides:

- whatever stops the writer before it, every older file stays as it was, and nothing new has a final name;
- after it the new set exists as a whole, and its files are moved to their final names: the second and all that follow,
  then the older set is removed, then the first. Readers begin with the first file, so a set is either usable or has no
  first file.

A run that is killed after the rename leaves `.NAME.complete` with what was not moved yet, the first file among it; the
next run for this output ends the move before it does anything else. Between the end of an older set and the coming of
the new first file lie a few system calls, in which no set is usable. A file under a final name is whole at any time.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2qconv.errors import ExportError, InputError
from d2qconv.exporters.package import (
    check_output,
    partial_name,
    remove_stale,
    sync_files,
    sync_folder,
    taken,
    unwritable,
)


def member(path: Path, number: int, n_files: int) -> Path:
    """File `number`, from 1, of a set of `n_files`; `path` itself for a set of one.

    The names are those of llama.cpp's gguf-split (`llama_split_path`) and of sharded Hugging Face checkpoints.
    """
    if n_files == 1:
        return path
    return path.with_name(f"{path.stem}-{number:05d}-of-{n_files:05d}{path.suffix}")


def members(path: Path) -> list[Path]:
    """What is there of this output: `path` and the files of any set of its name; first files before the others."""
    pattern = re.compile(re.escape(path.stem) + r"-(\d{5})-of-\d{5}" + re.escape(path.suffix))
    found: list[tuple[int, Path]] = []
    for sibling in path.parent.iterdir():
        match = pattern.fullmatch(sibling.name)
        if match or sibling.name == path.name:
            found.append((int(match[1]) if match else 1, sibling))
    return [file for _, file in sorted(found)]


def check_set(path: Path, overwrite: bool, n_bytes: int = 0) -> None:
    """Refuse, before any work, a set that could not be written at its end; see `check_output`.

    Ends the move of a set that an earlier run could not end. Raises InputError.
    """
    check_output(path, True, n_bytes)
    final = _final(path)
    try:
        _end_move(final)
        is_left = _complete(final).exists()
    except OSError as error:
        raise InputError(
            f"a set that a killed run left cannot be moved to its place: {error.strerror or error}",
            where=str(_complete(final)),
            todo="make the folder writable, or move it away",
        ) from error
    if is_left:
        raise InputError(
            "holds files that are not of this package; they were left as they are",
            where=str(_complete(final)),
            todo="move them away",
        )
    found = members(final)
    if found and not overwrite:
        raise InputError(
            "the output exists", where=str(found[0]), todo="name another file, or add --overwrite"
        )


@contextmanager
def atomic_set(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path in an empty folder; what the body writes there becomes the package, if it succeeds.

    The body writes `path.name` there, or all `member`s of a set. See the module for what is guaranteed. Raises
    InputError as `check_set` does, and ExportError for an OSError of the body, an incomplete or strange set, or an
    output that another process made meanwhile.
    """
    check_set(path, overwrite)
    final = _final(path)
    remove_stale(final)
    folder = partial_name(final)
    try:
        folder.mkdir()
        yield folder / final.name
        _publish(folder, final, overwrite)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _final(path: Path) -> Path:
    """Where the set will be. A link to a folder is followed; the files of a set are never links."""
    return path.parent.resolve() / path.name


def _complete(final: Path) -> Path:
    return final.with_name(f".{final.name}.complete")


def _whole_set(final: Path, name: str) -> list[str]:
    """Names of the set that `name` belongs to, the first one first; empty if it is no name of this output."""
    match = re.fullmatch(re.escape(final.stem) + r"-\d{5}-of-(\d{5})" + re.escape(final.suffix), name)
    if match is None:
        return [final.name] if name == final.name else []
    return [member(final, number, int(match[1])).name for number in range(1, int(match[1]) + 1)]


def _publish(folder: Path, final: Path, overwrite: bool) -> None:
    """Make the set in `folder` the package."""
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        raise ExportError("the exporter wrote no file", where=str(final))
    if names != _whole_set(final, names[0]):
        raise ExportError(f"the exporter wrote no whole set: {', '.join(names)}", where=str(final))
    sync_files(folder / name for name in names)
    sync_folder(folder)
    if members(final) and not overwrite:
        raise taken(final, "file")
    folder.rename(_complete(final))
    sync_folder(final.parent)
    _end_move(final)


def _end_move(final: Path) -> None:
    """Move what is in `.NAME.complete` to its final names, in the order that the module tells; again, if need be."""
    complete = _complete(final)
    try:
        lock = os.open(complete, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        # Held until the process ends or the file is closed: two runs do not move at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        names = [file.name for file in complete.iterdir()] if complete.is_dir() else []
        left = sorted(name for name in names if _whole_set(final, name))
        if left:
            _move(complete, final, left)
        # Gone already, or not empty: somebody else's files stay, and the next run tells.
        with suppress(OSError):
            complete.rmdir()
        sync_folder(final.parent)
    finally:
        os.close(lock)


def _move(complete: Path, final: Path, left: list[str]) -> None:
    """left: names that are not moved yet, sorted; the first file of the set is among them until the end."""
    whole = _whole_set(final, left[0])
    first = whole[0]
    # An older set of as many files has the same names.
    (final.parent / first).unlink(missing_ok=True)
    for name in left:
        if name != first:
            (complete / name).replace(final.parent / name)
    for older in members(final):
        if older.name not in whole:
            older.unlink()
    sync_folder(final.parent)
    (complete / first).replace(final.parent / first)
