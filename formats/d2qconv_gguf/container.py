"""Reads a GGUF with gguf-py alone: container by `GGUFReader`, values by `gguf.quants.dequantize`.

Nothing of our grids or codecs is used, so what is read here is an independent opinion on what was written. Types that
gguf-py does not know yet are decoded in `ggml_types`, and the tensors of such a file are those that our own walk found.
Files may be hostile: before gguf-py sees one, its header is walked once with every count, length and offset bounded by
the file's size.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, Keys
from gguf.quants import dequantize

from d2qconv.errors import InputError, VerifyError
from d2qconv_gguf.ggml_types import DECODERS, SIZES, GgmlType, NewerType, type_of

_T = TypeVar("_T", int, float, str, bool)

#: Keys of a package of several files, see `shards`.
SPLIT_NO = Keys.Split.LLM_KV_SPLIT_NO
SPLIT_COUNT = Keys.Split.LLM_KV_SPLIT_COUNT
SPLIT_TENSORS = Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
#: bytes of a metadata value by its GGUFValueType
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_DIMS = 4
#: Keys with the items of their arrays, and tensors: the largest vocabularies have some 1.3 million tokens, scores,
#: types and merges. gguf-py makes several objects of some hundred bytes for each.
_MAX_ITEMS, _MAX_TENSORS = 1 << 21, 1 << 17
#: Values that are decoded at a time, so that what gguf-py makes of them on the way stays in the processor's cache.
_PIECE = 1 << 19
_BROKEN = (ValueError, KeyError, IndexError, TypeError, OverflowError, AttributeError, RecursionError)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the container has it: shape rows first, type by ggml, bytes u8[...] mapped from the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    n_bytes: int
    data: np.ndarray

    def values(self) -> np.ndarray:
        """Decoded values, f32[shape], rows in the file's order; an f32 tensor's are the file itself."""
        if self.type == GGMLQuantizationType.F32:
            return np.ascontiguousarray(self._decode(self.data), dtype=np.float32).reshape(self.shape)
        values = np.empty(math.prod(self.shape), dtype=np.float32)
        at = 0
        for piece in self.pieces():
            values[at : at + piece.size] = piece
            at += piece.size
        self._release()
        return values.reshape(self.shape)

    def pieces(self) -> Iterator[np.ndarray]:
        """The decoded values in their order, f32[n] at a time, whole rows each."""
        rows = np.asarray(self.data).reshape(-1, self.data.shape[-1])
        step = max(1, _PIECE // self.shape[-1])
        for at in range(0, len(rows), step):
            # As one row, since gguf-py cuts into 16 rows at a time. Blocks lie within rows: the values are the same.
            yield self._decode(rows[at : at + step].reshape(1, -1)).reshape(-1)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows i64[n] of a matrix, decoded: f32[n, n_in]."""
        rows = np.asarray(self.data).reshape(-1, self.data.shape[-1])
        step = max(1, _PIECE // self.shape[-1])
        values = np.empty((len(index), self.shape[-1]), dtype=np.float32)
        for at in range(0, len(index), step):
            picked = rows[index[at : at + step]]
            values[at : at + len(picked)] = self._decode(picked.reshape(1, -1)).reshape(len(picked), -1)
        self._release()
        return values

    def digest(self) -> str:
        """SHA-256 of `values`, little endian."""
        sha = hashlib.sha256()
        for piece in self.pieces():
            sha.update(np.ascontiguousarray(piece, dtype="<f4").data)
        self._release()
        return sha.hexdigest()

    def _release(self) -> None:
        """Give the file's pages in memory back, so that a large file does not fill it; they are read again on use."""
        owner: object = self.data
        while isinstance(owner, np.ndarray):
            mapped, owner = owner, owner.base
        if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not self.data.nbytes:
            return
        start = self.data.ctypes.data - mapped.ctypes.data
        # Whole pages of this tensor: those at its ends are its neighbours' too.
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + self.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            owner.madvise(mmap.MADV_DONTNEED, first, length)

    def _decode(self, data: np.ndarray) -> np.ndarray:
        if isinstance(self.type, NewerType):
            return DECODERS[self.type](data)
        try:
            return np.asarray(dequantize(data, self.type), dtype=np.float32)
        except (*_BROKEN, NotImplementedError) as error:
            raise VerifyError(f"cannot be decoded as {self.type.name}: {error}", where=self.name) from error


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of one file. keys: values as Python has them; types: `UINT32`, `ARRAY/STRING`, ….

    n_spare: bytes behind the last tensor. others: the further files of a split package, each with its own keys;
    their tensors are among `tensors`.
    """

    path: Path
    keys: Mapping[str, Any]
    types: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, StoredTensor]
    n_spare: int
    others: tuple[GgufFile, ...] = ()

    @property
    def files(self) -> tuple[GgufFile, ...]:
        """All files of the package, this one first."""
        return (self, *self.others)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.path.stat().st_size for file in self.files)

    @property
    def architecture(self) -> str:
        """`general.architecture`; raises VerifyError if there is none."""
        return self.need("general.architecture", str)

    def need(self, key: str, kind: type[_T]) -> _T:
        """A key that must be there, of that Python type; raises VerifyError."""
        value = self.get(key, kind)
        if value is None:
            raise VerifyError(f"has no key {key}", where=str(self.path))
        return value

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """A key's value or None; raises VerifyError if it has another type."""
        value = self.keys.get(key)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise VerifyError(f"{key} is {value!r:.80}, not {kind.__name__}", where=str(self.path))
        return value


def read(path: Path) -> GgufFile:
    """Open a GGUF, and with the first file of a split one all others.

    Raises InputError for a file that cannot be read or is none at all, VerifyError for one that is not whole,
    well-formed and little-endian, and for a set that is not whole or not named as llama.cpp looks for it.
    """
    first = _read_one(path)
    n_files = first.get(SPLIT_COUNT, int) or 1
    if n_files == 1:
        return first
    number = first.get(SPLIT_NO, int)
    match = re.fullmatch(r"(.+)-00001-of-(\d{5})(\.[^.]*)?", path.name)
    if number != 0:
        raise VerifyError(
            f"is file {(number or 0) + 1} of {n_files}",
            where=str(path),
            todo="name the first one, …-00001-of-….gguf",
        )
    if match is None or int(match[2]) != n_files:
        raise VerifyError(
            f"is the first of {n_files} files, and its name does not say so",
            where=str(path),
            todo=f"name it …-00001-of-{n_files:05d}.gguf: llama.cpp finds the others by the name",
        )
    others = []
    for n in range(1, n_files):
        other = _read_one(path.with_name(f"{match[1]}-{n + 1:05d}-of-{n_files:05d}{match[3] or ''}"))
        if (other.get(SPLIT_NO, int), other.get(SPLIT_COUNT, int)) != (n, n_files):
            raise VerifyError(f"does not say that it is file {n + 1} of {n_files}", where=str(other.path))
        others.append(other)
    tensors = {name: t for file in (first, *others) for name, t in file.tensors.items()}
    n_tensors = sum(len(file.tensors) for file in (first, *others))
    if not len(tensors) == n_tensors == first.get(SPLIT_TENSORS, int):
        raise VerifyError(
            f"the {n_files} files hold {n_tensors} tensors, {len(tensors)} names; the first one announces "
            f"{first.get(SPLIT_TENSORS, int)}",
            where=str(path),
        )
    return replace(first, tensors=tensors, others=tuple(others))


def _read_one(path: Path) -> GgufFile:
    """One file, whatever it is a part of."""
    try:
        # Opening a pipe would wait for its other end. A link is as good as the file: the user named it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError("not a regular file", where=str(path), todo="name a .gguf")
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise InputError("not a GGUF file", where=str(path), todo="name a .gguf")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            spans = _Walk(path, data).run()
        is_newer = any(isinstance(span.type, NewerType) for span in spans)
        reader = _KeyReader(path) if is_newer else GGUFReader(path)
        fields = {n: f for n, f in reader.fields.items() if not n.startswith("GGUF.")}
        keys = {name: field.contents() for name, field in fields.items()}
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (InputError, VerifyError):
        raise
    except _BROKEN as error:
        raise VerifyError(f"is not a whole GGUF: {error or type(error).__name__}", where=str(path)) from error
    types = {name: tuple(int(t) for t in field.types) for name, field in fields.items()}
    if is_newer:
        tensors = {span.name: span.stored(reader.data) for span in spans}
    else:
        tensors = {
            t.name: StoredTensor(
                t.name,
                tuple(int(n) for n in reversed(t.shape.tolist())),
                t.tensor_type,
                int(t.n_bytes),
                t.data,
            )
            for t in reader.tensors
        }
    end = max((span.start + span.n_bytes for span in spans), default=0)
    return GgufFile(path, keys, types, tensors, path.stat().st_size - end)


class _KeyReader(GGUFReader):  # type: ignore[misc]
    """gguf-py's reader for the keys alone, since it stops at a tensor of a type that it does not know."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        pass


@dataclass(frozen=True)
class _Span:
    """A tensor's info, checked. shape: rows first. start: of its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    start: int
    n_bytes: int

    def stored(self, data: np.ndarray) -> StoredTensor:
        """The tensor in the mapped file, as bytes u8[..., bytes of a row]."""
        block, size = SIZES[self.type]
        rows = (*self.shape[:-1], self.shape[-1] // block * size)
        return StoredTensor(
            self.name, self.shape, self.type, self.n_bytes, data[self.start :][: self.n_bytes].reshape(rows)
        )


def to_torch(tensor: StoredTensor, order: torch.Tensor | None) -> torch.Tensor:
    """Decoded values, f32, rows picked by `order` if given."""
    found = tensor.values()
    # an f32 tensor is still the file itself, which nobody may write to
    values = torch.from_numpy(found if found.flags.writeable else found.copy())
    return values if order is None else values[order]


def rows_to_torch(tensor: StoredTensor, order: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
    """The same of some rows i64[n], counted in the order asked for."""
    picked = index if order is None else order[index]
    return torch.from_numpy(tensor.rows(picked.numpy()))


class _Walk:
    """One pass over a GGUF header that reads nothing beyond the file and builds nothing."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0
        self.alignment = 32
        self.n_items = 0

    def run(self) -> list[_Span]:
        """Walk keys and tensor infos behind the magic, and check that every tensor's bytes lie in the file."""
        self.at = len(_MAGIC)
        version, n_tensors, n_keys = self._take("<IQQ")
        if version not in (2, 3):
            raise self._bad(f"version {version} is not 2 or 3 (or the file is big-endian)")
        if n_tensors > _MAX_TENSORS:
            raise self._bad(f"announces {n_tensors} tensors")
        for _ in range(self._count(n_keys, 12)):
            self._add_items(1)
            key = self._string()
            (kind,) = self._take("<I")
            start = self.at
            self._value(kind, 0)
            if key == b"general.alignment" and kind == 4:
                (self.alignment,) = struct.unpack_from("<I", self.data, start)
        if self.alignment == 0 or self.alignment & (self.alignment - 1):
            raise self._bad(f"alignment {self.alignment} is not a power of two")
        found = [self._tensor() for _ in range(self._count(n_tensors, 24))]
        base = -(-self.at // self.alignment) * self.alignment
        spans = [replace(span, start=base + span.start) for span in found]
        if len({span.name for span in spans}) < len(spans):
            raise self._bad("two tensors have the same name")
        taken = sorted(spans, key=lambda span: (span.start, span.n_bytes))
        for span, follower in zip(taken, [*taken[1:], None], strict=True):
            start, end = span.start, span.start + span.n_bytes
            if start % self.alignment or end > len(self.data):
                raise self._bad(
                    f"{span.name}: bytes {start}…{end} are not in the file of {len(self.data)} bytes"
                )
            if follower is not None and end > follower.start:
                raise self._bad(f"{span.name} and {follower.name} overlap")
        return spans

    def _bad(self, what: str) -> VerifyError:
        return VerifyError(f"is not a whole GGUF: {what}", where=str(self.path), todo="write the file again")

    def _skip(self, n: int) -> int:
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise self._bad(f"ends at byte {len(self.data)}, inside its header")
        return start

    def _take(self, layout: str) -> tuple[int, ...]:
        return struct.unpack_from(layout, self.data, self._skip(struct.calcsize(layout)))

    def _count(self, n: int, least: int) -> int:
        """Give n back if the rest of the file can hold n items of at least `least` bytes each."""
        if n * least > len(self.data) - self.at:
            raise self._bad(f"announces {n} items at byte {self.at}, more than it holds")
        return n

    def _add_items(self, n: int) -> None:
        self.n_items += n
        if self.n_items > _MAX_ITEMS:
            raise self._bad(
                f"its metadata announce {self.n_items} items, more than it holds or than any model has"
            )

    def _string(self) -> bytes:
        (length,) = self._take("<Q")
        start = self._skip(length)
        return self.data[start : start + length]

    def _value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth == 0:
            item, length = self._take("<IQ")
            self._add_items(length)
            if item in _SIZES:
                self._skip(length * _SIZES[item])
                return
            for _ in range(self._count(length, 8)):
                self._value(item, 1)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise self._bad(f"metadata of unknown type {kind} at byte {self.at}")

    def _tensor(self) -> _Span:
        """The next tensor's info; its start is still counted from the first tensor's."""
        name = self._string().decode("utf-8", "replace")
        (n_dims,) = self._take("<I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._bad(f"{name} has {n_dims} dimensions")
        shape: Sequence[int] = self._take(f"<{n_dims}Q")
        kind, offset = self._take("<IQ")
        if kind not in {int(t) for t in SIZES}:
            raise self._bad(f"{name} has ggml type {kind}, which gguf-py does not know")
        stored_as = type_of(kind)
        block, size = SIZES[stored_as]
        if shape[0] % block or 0 in shape:
            raise self._bad(f"{name}: shape {tuple(shape)} does not fit {stored_as.name}")
        n_bytes = math.prod(shape) // block * size
        return _Span(name, tuple(reversed(shape)), stored_as, offset, n_bytes)


def bits_per_weight(tensors: Sequence[StoredTensor]) -> float:
    """Stored bits per element over some tensors."""
    n = sum(math.prod(t.shape) for t in tensors)
    return 8 * sum(t.n_bytes for t in tensors) / n if n else 0.0
