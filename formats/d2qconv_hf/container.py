"""The arrays of a written package, read without the code that wrote them: headers, spans, values.

A stranger may have changed the files, so a header is checked against its file before anything is read: offsets inside
the data, no overlap, no hole, as many bytes as type and shape say. Nothing larger than an array is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2qconv.checkpoint.folder import is_plain_name, is_regular, read_json
from d2qconv.errors import InputError, VerifyError

_DTYPES: Mapping[str, tuple[str, int]] = {
    "F16": ("<f2", 2),
    "BF16": ("<u2", 2),
    "F32": ("<f4", 4),
    "I32": ("<u4", 4),
    "U32": ("<u4", 4),
    "I64": ("<i8", 8),
}
INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100_000_000
_MOST_RANK = 8
#: Values that are made of an array at a time.
_PIECE = 1 << 19


@dataclass(frozen=True)
class Span:
    """One array in a file. kind: safetensors' name of its type."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    begin: int

    @property
    def n_bytes(self) -> int:
        """Of the array."""
        dtype, _ = _DTYPES[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(dtype).itemsize

    def raw(self) -> np.ndarray:
        """The array as stored; bf16 as u16, all 32-bit integers as u32."""
        dtype, _ = _DTYPES[self.kind]
        count = int(np.prod(self.shape, dtype=np.int64))
        try:
            found = np.fromfile(self.path, dtype=dtype, count=count, offset=self.begin)
        except OSError as error:
            raise VerifyError(f"cannot be read: {error.strerror}", where=str(self.path)) from error
        if len(found) != count:
            raise VerifyError("ends too early", where=str(self.path))
        return found.reshape(self.shape)

    def floats(self) -> np.ndarray:
        """The array as f32; raises VerifyError if it is none of floats."""
        self._check_floats()
        return self._as_f32(self.raw())

    def pieces(self) -> Iterator[np.ndarray]:
        """The same, some rows at a time."""
        self._check_floats()
        step = max(1, _PIECE // max(1, math.prod(self.shape[1:])))
        mapped = self._mapped() if self.shape and self.shape[0] else self.raw()
        for at in range(0, len(mapped), step):
            yield self._as_f32(np.asarray(mapped[at : at + step]))

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows i64[n] as f32; raises VerifyError as `floats` does."""
        self._check_floats()
        return self._as_f32(np.asarray(self._mapped()[index]))

    def _check_floats(self) -> None:
        if self.kind not in ("F16", "BF16", "F32"):
            raise VerifyError(f"an array of {self.kind} where floats belong", where=str(self.path))

    def _mapped(self) -> np.ndarray:
        """The array as stored, mapped from the file; it is not empty."""
        dtype, _ = _DTYPES[self.kind]
        try:
            return np.memmap(self.path, dtype, "r", self.begin, self.shape)
        except (OSError, ValueError) as error:
            raise VerifyError(f"cannot be read: {error}", where=str(self.path)) from error

    def _as_f32(self, raw: np.ndarray) -> np.ndarray:
        if self.kind == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)


@dataclass(frozen=True)
class Folder:
    """A package's config.json and arrays."""

    path: Path
    config: Mapping[str, Any]
    spans: Mapping[str, Span]

    def error(self, what: str) -> VerifyError:
        """That this package is not sound."""
        return VerifyError(what, where=str(self.path))

    def span(self, name: str) -> Span:
        """An array; raises VerifyError if it is not there."""
        if name not in self.spans:
            raise self.error(f"has no array {name!r:.120}")
        return self.spans[name]


def open_folder(path: Path) -> Folder:
    """Config and headers of a package; raises VerifyError."""
    try:
        _require_regular(path / "config.json")
        config = read_json(path / "config.json")
        files = _files(path)
    except InputError as error:
        raise VerifyError(error.what, where=error.where) from error
    spans: dict[str, Span] = {}
    for file, named in files.items():
        found = _header(path / file)
        if named is not None and set(found) != named:
            raise VerifyError("holds other arrays than the index says", where=str(path / file))
        if twice := set(found) & set(spans):
            raise VerifyError(f"holds {min(twice)!r:.120}, as another file does", where=str(path / file))
        spans |= found
    return Folder(path, config, spans)


def _files(path: Path) -> dict[str, set[str] | None]:
    """Names of the files with weights, each with the arrays that the index puts there."""
    index = path / INDEX
    if not index.exists() and not index.is_symlink():
        return {"model.safetensors": None}
    _require_regular(index)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise VerifyError("names no arrays", where=str(index))
    found: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise VerifyError(f"names {file!r:.80}, which is no file of the folder's", where=str(index))
        there = found.setdefault(file, set())
        assert there is not None, "files of an index have their arrays named"
        there.add(name)
    return found


def _require_regular(path: Path) -> None:
    """Raise VerifyError unless a file lies there itself."""
    try:
        is_file = is_regular(path)
    except OSError as error:
        raise VerifyError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not is_file:
        raise VerifyError("is not there, or no regular file", where=str(path))


def _header(path: Path) -> dict[str, Span]:
    """The arrays of one file."""
    _require_regular(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MOST_HEADER, size - 8):
                raise VerifyError("is no safetensors file", where=str(path))
            entries = json.loads(file.read(length))
    except OSError as error:
        raise VerifyError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise VerifyError("has a header that is not JSON", where=str(path)) from error
    if not isinstance(entries, dict):
        raise VerifyError("has a header that is no object", where=str(path))
    entries.pop("__metadata__", None)
    spans, at = {}, 0
    try:
        ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
        for name, entry in ordered:
            kind, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            sizes = (*shape, begin, end)
            if any(type(n) is not int or n < 0 for n in sizes) or len(shape) > _MOST_RANK:
                raise VerifyError(f"{name!r:.120} has no sizes", where=str(path))
            n_bytes = _DTYPES[kind][1]
            for n in shape:
                n_bytes *= n
            if begin != at or end - begin != n_bytes:
                raise VerifyError(f"{name!r:.120} does not lie where its header says", where=str(path))
            spans[name] = Span(path, kind, shape, 8 + length + begin)
            at = end
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise VerifyError(f"has a header that is not understood: {error!r:.120}", where=str(path)) from error
    if 8 + length + at != size:
        raise VerifyError(f"has {size} bytes and its header says {8 + length + at}", where=str(path))
    return spans
