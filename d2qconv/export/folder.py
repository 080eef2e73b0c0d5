"""Putting a package that is a folder in its place: whole, or not at all.

It is written and checked as `.NAME.HOST-PID.partial`, flushed to the disk, and renamed. No system call of every
platform exchanges two folders at once, so an older package is first renamed to `.NAME.replaced`, then the new one takes
the name, then the older one is removed. Whatever stops the run:

- before the first rename, the older package stays as it was;
- between the two renames there is no NAME; the next run for this output gives the older package its name back before it
  does anything else;
- after the second, the new package is there, and the next run removes what is left of the older one.

Only folders that hold a manifest of ours, and empty ones, are ever replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2qconv.errors import ExportError, InputError
from d2qconv.export.manifest import MANIFEST
from d2qconv.export.package import free_beside, partial_name, remove_stale, sync_folder, unwritable


def check_folder(path: Path, overwrite: bool, n_bytes: int = 0) -> None:
    """Refuse, before any work, a folder that could not be written at its end; raises InputError.

    n_bytes: size that the package will have, 0 if not known yet. Mends what a killed run left behind.
    """
    final = _final(path)
    free = free_beside(final, path)
    _mend(final)
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise InputError(
            "the output is a file, and this format writes a folder",
            where=str(path),
            todo="name another with -o",
        )
    if final.is_dir() and any(final.iterdir()):
        if not (final / MANIFEST).is_file():
            raise InputError(
                "the output is a folder that holds something else; nothing was touched",
                where=str(path),
                todo="name a new folder with -o",
            )
        if not overwrite:
            raise InputError(
                "the output exists", where=str(path), todo="name another folder, or add --overwrite"
            )
    if n_bytes > free:
        raise InputError(
            f"the package takes {n_bytes:,} bytes and the disk has {free:,} left",
            where=str(path),
            todo="make room, or name a folder on another disk with -o",
        )


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder; what the body writes there becomes the package `path`, if it succeeds.

    See the module for what is guaranteed. Raises InputError as `check_folder` does, and ExportError for an OSError of
    the body, a package without its manifest, or an output that another process made meanwhile.
    """
    check_folder(path, overwrite)
    final = _final(path)
    remove_stale(final)
    partial = partial_name(final)
    try:
        partial.mkdir()
        yield partial
        _publish(partial, final, overwrite)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _final(path: Path) -> Path:
    """Where the package will be; a link in the way to it is followed, the folder itself is none."""
    return path.parent.resolve() / path.name


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _publish(partial: Path, final: Path, overwrite: bool) -> None:
    if not (partial / MANIFEST).is_file():
        raise ExportError("the exporter wrote no manifest", where=str(final))
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(partial)
    if final.is_dir() and any(final.iterdir()):
        if not (overwrite and (final / MANIFEST).is_file()):
            raise ExportError(
                "another process wrote the output meanwhile",
                where=str(final),
                todo="name another folder with -o",
            )
        final.rename(_replaced(final))
        sync_folder(final.parent)
    # Onto an empty folder or none.
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(_replaced(final), ignore_errors=True)


def _mend(final: Path) -> None:
    """End what a run that was killed between two renames had begun."""
    older = _replaced(final)
    if not older.is_dir():
        return
    if final.exists():
        shutil.rmtree(older, ignore_errors=True)
    else:
        older.rename(final)
        sync_folder(final.parent)
