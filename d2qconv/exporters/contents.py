"""The files of a package, and one digest over all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d2qconv.errors import InputError
from d2qconv.exporters.file_set import member
from d2qconv.exporters.manifest import FileRecord, file_record


@dataclass(frozen=True)
class Contents:
    """files: by name, sizes and SHA-256."""

    files: Mapping[str, FileRecord]

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(record.n_bytes for record in self.files.values())

    @property
    def sha256(self) -> str:
        """Of the only file; of several, of the lines which sha256sum prints of them in the order of their names."""
        if len(self.files) == 1:
            return next(iter(self.files.values())).sha256
        lines = "".join(f"{self.files[name].sha256}  {name}\n" for name in sorted(self.files))
        return hashlib.sha256(lines.encode()).hexdigest()


def package_files(path: Path) -> list[Path]:
    """All files of a package: a folder's, those of a set that is named by its first file, or the one file."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    match = re.fullmatch(r"(.+)-00001-of-(\d{5})", path.stem)
    if match is None:
        return [path]
    n_files = int(match[2])
    whole = path.with_name(match[1] + path.suffix)
    return [member(whole, number, n_files) for number in range(1, n_files + 1)]


def contents(path: Path) -> Contents:
    """Read every file of a package; raises InputError if one cannot be read."""
    try:
        return Contents({file.name: file_record(file) for file in package_files(path)})
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
