"""The manifest of a package that is a folder: `d2qconv.json`, a record of everything else in it.

It is written last, and names every file with size and SHA-256, the digest of every tensor's decoded values, where the
package comes from, and what it needs to be loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from d2qconv.checkpoint.folder import is_regular
from d2qconv.errors import ExportError, VerifyError
from d2qconv.exporters.base import Check

MANIFEST = "d2qconv.json"
#: A manifest lists a few thousand tensors; what is larger is none.
_MOST_BYTES = 64 << 20
_PIECE = 1 << 24
_SHOWN = 5


class FileRecord(msgspec.Struct, frozen=True):
    """One file: its size and SHA-256."""

    n_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a folder holds.

    format: the exporter's name. version: of d2qconv. files: by name, all but the manifest. decoded_sha256: per stored
    name, of the tensor's decoded values, f32 little endian, row by row. requires: the first version of each library
    that loads the package. facts: for a person.
    """

    format: str
    version: str
    files: dict[str, FileRecord]
    decoded_sha256: dict[str, str]
    provenance: dict[str, str]
    requires: dict[str, str]
    facts: dict[str, str | int | float]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a package; raises VerifyError if there is none, or not such a one."""
    path = folder / MANIFEST
    todo = "only folders that d2qconv wrote can be verified"
    try:
        if not is_regular(path):
            raise VerifyError("has no manifest", where=str(path), todo=todo)
        if path.stat().st_size > _MOST_BYTES:
            raise VerifyError("is too large for a manifest", where=str(path), todo=todo)
        found = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.MsgspecError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise VerifyError(f"is not a manifest: {error}", where=str(path), todo=todo) from error
    strange = [name for name in found.files if not _is_plain(name)]
    if strange:
        raise VerifyError(f"names files that are none of the folder's: {strange[:_SHOWN]}", where=str(path))
    return found


def inspected(folder: Path) -> dict[str, Any]:
    """What a package tells of itself; raises VerifyError as `read_manifest` does."""
    manifest = read_manifest(folder)
    return {
        **manifest.facts,
        "files": len(manifest.files),
        "file_bytes": sum(record.n_bytes for record in manifest.files.values()),
        "requires": manifest.requires,
        "provenance": manifest.provenance,
    }


def provenance_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Where a package says that it comes from, of what its exporter's `inspect` gives, without GGUF's prefix."""
    said = dict(facts.get("provenance", {}))
    return {name.removeprefix("d2qconv."): str(text) for name, text in said.items()}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it."""
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file of a folder but the manifest, by name.

    Raises OSError, and ExportError for what is no regular file, such as a link, a folder or a pipe.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    strange = [path.name for path in paths if not is_regular(path)]
    if strange:
        raise ExportError(f"the exporter wrote no regular files: {_listed(strange)}", where=str(folder))
    return {path.name: file_record(path) for path in paths}


def files_check(folder: Path, manifest: Manifest) -> Check:
    """Whether every file is there as it was written, and nothing else is. Opens regular files only: a pipe never ends.

    Raises VerifyError if the folder cannot be read.
    """
    try:
        there = {path.name for path in folder.iterdir()} - {MANIFEST}
        wrong = [
            name
            for name, record in manifest.files.items()
            if name not in there or not is_regular(folder / name) or file_record(folder / name) != record
        ]
    except OSError as error:
        raise VerifyError(f"cannot be read: {error.strerror}", where=str(folder)) from error
    wrong += sorted(there - set(manifest.files))
    if wrong:
        return Check("files", f"{_listed(wrong)} not as recorded in {MANIFEST}", False)
    n_bytes = sum(record.n_bytes for record in manifest.files.values())
    return Check("files", f"{len(manifest.files)} files, {n_bytes:,} bytes, by SHA-256 as recorded", True)


def require_known(folder: Path, manifest: Manifest, known: Collection[str]) -> None:
    """Raise VerifyError if a package has a file that its exporter never writes.

    Runtimes act on files by their names: an adapter_config.json sends transformers to another model, for one. A record
    says that a file is what its author put there, and a package's author may be anybody.
    """
    strange = sorted(set(manifest.files) - set(known))
    if strange:
        raise VerifyError(f"holds files that d2qconv does not write: {_listed(strange)}", where=str(folder))


def file_record(path: Path) -> FileRecord:
    """Size and digest of a file; raises OSError."""
    sha, n_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha.update(piece)
            n_bytes += len(piece)
    return FileRecord(n_bytes, sha.hexdigest())


def _is_plain(name: str) -> bool:
    return name == PurePosixPath(name).name and name not in ("", ".", "..", MANIFEST) and "\\" not in name


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
