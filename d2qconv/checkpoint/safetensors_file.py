"""One safetensors file: a strict reader of its header, and its tensors read when asked for.

Layout (the format's own README): 8 bytes little-endian length n, n bytes of JSON, then the data. The JSON
maps a name to dtype, shape and [begin, end) offsets into the data; `__metadata__` maps strings to strings.
The data must be covered by the tensors exactly once: no overlap, no hole, no rest.

Files come from strangers, so the header is checked completely before a tensor is read. Nothing is
unpickled, and no size is believed before it was compared with the size of the file.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

#: The format's own bound on the header, in bytes.
MAX_HEADER_BYTES = 100_000_000
#: More dimensions than any weight has.
MAX_RANK = 8
#: Sizes above this overflow the runtimes' 64-bit integers.
MAX_ELEMENTS = 2**63 - 1

#: Bytes per element of the types that weights may have.
FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
#: The same of what quantized checkpoints hold besides.
INTEGER_BYTES = {"I8": 1, "U8": 1, "I32": 4, "U32": 4, "I64": 8}
_BYTES = FLOAT_BYTES | INTEGER_BYTES

_LENGTH_BYTES = 8
_METADATA = "__metadata__"

_Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor as the header describes it."""

    dtype: str
    shape: list[_Unsigned]
    data_offsets: tuple[_Unsigned, _Unsigned]


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies. dtype: one of `FLOAT_BYTES` or `INTEGER_BYTES`. begin, end: bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header was read and found sound.

    size, mtime_ns: of the file when it was read; a later change is refused.
    """

    path: Path
    size: int
    mtime_ns: int
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    def tensors(self) -> dict[str, Dense]:
        """Every tensor by name, not read yet. Loading raises InputError on NaN, Inf or a changed file."""
        import torch

        # Words are bits, so that their sign is nobody's business: torch computes with signed ones.
        dtypes = {
            "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
            "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "U32": torch.int32, "I64": torch.int64,
        }  # fmt: skip
        return {
            e.name: Dense(e.shape, dtypes[e.dtype], _Read(self, e, dtypes[e.dtype]))
            for e in self.entries.values()
        }


@dataclass(frozen=True)
class _Read:
    """Reads one tensor into memory of its own, for `Dense.load`. dtype: the entry's, as torch has it."""

    file: SafetensorsFile
    entry: TensorEntry
    dtype: Any

    def __call__(self) -> Tensor:
        """The tensor in the file's dtype, on the CPU. Raises InputError."""
        import torch

        if sys.byteorder != "little":
            raise InputError(
                "safetensors is little-endian and this machine is not", where=str(self.file.path)
            )
        entry = self.entry
        raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        self._fill(raw.numpy().data)
        tensor: Tensor = raw.view(self.dtype).reshape(entry.shape)
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise InputError(
                    f"tensor '{entry.name}' holds NaN or Inf",
                    where=str(self.file.path),
                    todo="get the checkpoint again, or repair the tensor",
                )
        return tensor

    def _fill(self, buffer: memoryview) -> None:
        path, entry = self.file.path, self.entry
        try:
            with path.open("rb", buffering=0) as stream:
                now = os.fstat(stream.fileno())
                if (now.st_size, now.st_mtime_ns) != (self.file.size, self.file.mtime_ns):
                    raise InputError(
                        "the file changed since it was opened", where=str(path), todo="start again"
                    )
                stream.seek(entry.begin)
                done = 0
                while done < len(buffer):
                    n = stream.readinto(buffer[done:])
                    if not n:
                        raise InputError(
                            f"tensor '{entry.name}': expected {len(buffer)} bytes, found {done}",
                            where=str(path),
                        )
                    done += n
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def read_file(path: Path) -> SafetensorsFile:
    """Read and check the header of one safetensors file.

    Raises InputError: not a regular file, truncated, header too long or not what the format says, a dtype
    that no checkpoint has that is read here, offsets that overlap, leave a hole or a rest, or do not fit the shape.
    """
    where = str(path)
    try:
        # Opening a FIFO would block, so the kind is looked at first.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError("not a regular file", where=where)
        with path.open("rb") as stream:
            facts = os.fstat(stream.fileno())
            header = _header_bytes(stream.read(_LENGTH_BYTES), facts.st_size, where)
            text = stream.read(header)
            if len(text) != header:
                raise InputError(f"expected a header of {header} bytes, found {len(text)}", where=where)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=where) from error
    metadata, raw = _decode(text, where)
    _check_dtypes(raw, where)
    start = _LENGTH_BYTES + header
    entries = [_entry(name, entry, start, where) for name, entry in raw.items()]
    _check_cover(entries, start, facts.st_size, where)
    by_name = {e.name: e for e in entries}
    return SafetensorsFile(path, facts.st_size, facts.st_mtime_ns, by_name, metadata)


def _header_bytes(length: bytes, size: int, where: str) -> int:
    """Length of the JSON, checked against the format's bound and the file's size."""
    if len(length) < _LENGTH_BYTES:
        raise InputError(f"expected at least {_LENGTH_BYTES} bytes, found {size}", where=where)
    n = int.from_bytes(length, "little")
    if n > MAX_HEADER_BYTES:
        raise InputError(
            f"not a safetensors file: its header would have {n} bytes, the format allows {MAX_HEADER_BYTES}",
            where=where,
        )
    if _LENGTH_BYTES + n > size:
        raise InputError(
            f"truncated inside the header: expected at least {_LENGTH_BYTES + n} bytes, found {size}",
            where=where,
            todo="download the file again",
        )
    return n


def _decode(text: bytes, where: str) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata and entries of the header."""
    if not text.startswith(b"{"):
        raise InputError("the header is not what the format says: it must begin with {", where=where)
    try:
        parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(parts.pop(_METADATA, msgspec.Raw(b"{}")), type=dict[str, str])
        entries = {name: msgspec.json.decode(part, type=_Entry) for name, part in parts.items()}
        # msgspec keeps the last of two equal keys; a reader that keeps the first would see another model.
        json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(f"the header is not what the format says: {error}", where=where) from error
    return metadata, entries


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return found


def _check_dtypes(entries: Mapping[str, _Entry], where: str) -> None:
    """Refuse types that no checkpoint has that is read here, all of them in one error."""
    wrong = [(name, e.dtype) for name, e in entries.items() if e.dtype not in _BYTES]
    if wrong:
        raise unreadable(wrong, where)


def unreadable(tensors: Sequence[tuple[str, str]], where: str) -> InputError:
    """That these tensors (name, dtype) are no weights."""
    name, dtype = tensors[0]
    more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
    if dtype == "F64":
        why, todo = "weights must be BF16, F16 or F32", "convert the checkpoint to F32"
    else:
        why = "weights must be BF16, F16 or F32; this checkpoint seems to be quantized already"
        todo = "use the original float checkpoint"
    return InputError(f"tensor {name!r} has dtype {dtype!r}{more}: {why}", where=where, todo=todo)


def _entry(name: str, raw: _Entry, start: int, where: str) -> TensorEntry:
    """An entry with offsets from the file's start; its byte count must be that of its shape."""
    if len(raw.shape) > MAX_RANK:
        raise InputError(f"tensor {name!r} has {len(raw.shape)} dimensions", where=where)
    count = _BYTES[raw.dtype]
    for length in raw.shape:
        # Python integers do not overflow, and this bound keeps them short.
        count *= length
        if max(count, length) > MAX_ELEMENTS:
            raise InputError(f"tensor {name!r}: shape {raw.shape} overflows", where=where)
    begin, end = raw.data_offsets
    if max(begin, end) > MAX_ELEMENTS:
        raise InputError(f"tensor {name!r}: offsets [{begin}, {end}] overflow", where=where)
    if end - begin != count:
        raise InputError(
            f"tensor {name!r}: {raw.dtype} {raw.shape} needs {count} bytes, "
            f"its offsets [{begin}, {end}] give {end - begin}",
            where=where,
        )
    return TensorEntry(name, raw.dtype, tuple(raw.shape), start + begin, start + end)


def _check_cover(entries: Sequence[TensorEntry], start: int, size: int, where: str) -> None:
    """The data must be covered exactly once."""
    needed = max((e.end for e in entries), default=start)
    at = start
    for e in sorted(entries, key=lambda e: (e.begin, e.end)):
        if e.begin < at:
            raise InputError(f"tensor {e.name!r} overlaps another one", where=where)
        if e.begin > at:
            raise InputError(
                f"{e.begin - at} bytes before tensor {e.name!r} belong to no tensor", where=where
            )
        at = e.end
    if needed > size:
        raise InputError(
            f"truncated, or its offsets are out of range: expected {needed} bytes, found {size}",
            where=where,
            todo="download the file again",
        )
    if needed < size:
        raise InputError(f"expected {needed} bytes, found {size}: the rest belongs to no tensor", where=where)
