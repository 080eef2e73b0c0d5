"""Putting a package that is a folder in its place: whole, or not at all.

It is written and checked as `.NAME.HOST-PID.partial`, flushed to the disk, and renamed. No system call of every
platform exchanges two folders at once, so an older package is first renamed to `.NAME.d2qconv-replaced`, then the new
one takes the name, then the older one is renamed again, to `.NAME.d2qconv-removed`, and removed. Whatever stops the
run:

- before the first rename, the older package stays as it was;
- between the first two there is no NAME; a run that lives gives the older package its name back at once, and after one
  that was killed the next run for this output does so before it does anything else;
- after the second, the new package is there, and the next run removes what is left of the older one.

So `.NAME.d2qconv-replaced` is always a whole package, and `.NAME.d2qconv-removed` one that may lack files, its manifest
last. Nobody else makes such names; even so, they are touched only if they hold a manifest or nothing. The first is
removed only if NAME holds a manifest, and renamed back only onto an empty NAME or none: if NAME is anything else, the
run is refused and both stay as they are.

Only folders that hold a manifest of ours, and empty ones, are ever replaced.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2qconv.errors import ExportError, InputError
from d2qconv.exporters.manifest import MANIFEST
from d2qconv.exporters.package import (
    free_beside,
    partial_name,
    remove_stale,
    require_room,
    sync_files,
    sync_folder,
    taken,
    unwritable,
)


def check_folder(path: Path, overwrite: bool, n_bytes: int = 0) -> None:
    """Refuse, before any work, a folder that could not be written at its end; raises InputError.

    n_bytes: size that the package will have, 0 if not known yet. Mends what a killed run left behind.
    """
    final = _final(path)
    free = free_beside(final, path)
    _mend(final, path)
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
    require_room(path, n_bytes, free, "folder")


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
    """The older package until the new one has its name: whole."""
    return final.with_name(f".{final.name}.d2qconv-replaced")


def _removed(final: Path) -> Path:
    """The older package while it is removed."""
    return final.with_name(f".{final.name}.d2qconv-removed")


def _is_package(folder: Path) -> bool:
    """Whether it is a folder, no link to one, with a manifest."""
    return not folder.is_symlink() and (folder / MANIFEST).is_file()


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing of this name, or an empty folder."""
    if folder.is_symlink():
        return False
    return not any(folder.iterdir()) if folder.is_dir() else not folder.exists()


def _publish(partial: Path, final: Path, overwrite: bool) -> None:
    if not (partial / MANIFEST).is_file():
        raise ExportError("the exporter wrote no manifest", where=str(final))
    sync_files(partial.iterdir())
    sync_folder(partial)
    if final.is_dir() and any(final.iterdir()):
        if not (overwrite and (final / MANIFEST).is_file()):
            raise taken(final, "folder")
        final.rename(_replaced(final))
        try:
            sync_folder(final.parent)
            partial.rename(final)
        except BaseException:
            # Fails only if somebody took the name meanwhile; then the next run tells.
            with suppress(OSError):
                _replaced(final).rename(final)
                sync_folder(final.parent)
            raise
    else:
        # Onto an empty folder or none.
        partial.rename(final)
    sync_folder(final.parent)
    # The new package is in its place whatever becomes of this; what is left, the next run removes.
    with suppress(OSError):
        _put_away(final)


def _put_away(final: Path) -> None:
    """Remove the older package. Raises OSError."""
    if _is_package(_replaced(final)):
        _replaced(final).rename(_removed(final))
        # No file of it goes before it has lost the name of a whole package.
        sync_folder(final.parent)
        _delete(_removed(final))


def _delete(folder: Path) -> None:
    """Remove a folder, its manifest last. Another run may be doing the same. Raises OSError."""
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MANIFEST:
                path.unlink(missing_ok=True)
        sync_folder(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()


def _mend(final: Path, path: Path) -> None:
    """End what a killed run had begun, as the module tells. path: as the user named it. Raises InputError."""
    older, going = _replaced(final), _removed(final)
    try:
        for left in (older, going):
            if not (_is_package(left) or _is_empty(left)):
                raise InputError(
                    "has a name that d2qconv needs, and is no package of its own; nothing was touched",
                    where=str(left),
                    todo="move it away, or name another output with -o",
                )
        has_older = _is_package(older)
        if has_older and not (_is_package(final) or _is_empty(final)):
            raise InputError(
                f"something else has the name of a package that a killed run left as {older.name}; "
                "nothing was touched",
                where=str(path),
                todo=f"move it away, and the package gets its name back; or move {older.name} away",
            )
        if going.exists():
            _delete(going)
        if has_older and _is_package(final):
            _put_away(final)
        elif has_older:
            older.rename(final)
            sync_folder(final.parent)
    except OSError as error:
        raise InputError(
            f"what a killed run left beside the output cannot be mended: {error.strerror}",
            where=str(path),
            todo=f"make the folder writable, or move {older.name} and {going.name} away",
        ) from error
