"""The work directory: quantized tensors on disk, one file a part of the model, until the package is written.

::

    work/manifest.json        version, fingerprint, SHA-256 of every part in the order of writing
    work/<part>.safetensors
    work/tokens.safetensors   sampled calibration tokens, see `workdir.write_tokens`
    work/lock                 empty; flock'ed by the run that uses the directory

A part is written beside its name and synced, then entered into the manifest, then renamed. So a file that the
manifest does not name is not ours and is never removed, and a part counts only if its file is there and has the
manifest's SHA-256. A directory whose fingerprint differs is emptied of our files, never mixed with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import RunError
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded, Held
from d2qconv.ir.model import Stored
from d2qconv.ir.workdir import (
    BESIDE,
    MANIFEST,
    OWN,
    PENDING,
    TOKENS,
    damaged,
    enter,
    is_own,
    read_header,
    sha256_of,
    unusable,
    write_atomic,
    write_synced,
)
from d2qconv.names import TensorId

VERSION = 1

Notes = TypeVar("Notes")


class _Layout(msgspec.Struct, frozen=True):
    """How one tensor lies in its part. grid is "" for a float tensor."""

    grid: str
    shape: tuple[int, ...]
    params: tuple[str, ...] = ()


class _Part(msgspec.Struct, frozen=True):
    """One file: its digest, its tensors, and notes that the run wants back when it resumes."""

    sha256: str
    tensors: dict[str, _Layout]
    notes: msgspec.Raw


class _Manifest(msgspec.Struct, frozen=True):
    """manifest.json. parts: in the order in which they were written."""

    version: int
    fingerprint: str
    parts: dict[str, _Part]


class Store:
    """Quantized parts by name. Open it with the fingerprint of the run that fills it, close it when done.

    n_discarded: finished parts of another fingerprint or version that were removed at opening.
    """

    _lock: int | None = None
    _is_open = False

    def __init__(self, folder: Path, fingerprint: str, grids: Mapping[str, Grid]) -> None:
        """Open or make `folder`; raises RunError if it cannot be written, is in use, or belongs to something else."""
        self._folder = folder
        self._grids = grids
        self.n_discarded = 0
        try:
            self._lock = enter(folder)
            self._manifest = self._open(fingerprint)
        except OSError as error:
            self.close()
            raise unusable(folder, error) from error
        except BaseException:
            self.close()
            raise
        self._is_open = True

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs use the directory. What was written can still be read; nothing can be written."""
        self._is_open = False
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def parts(self) -> tuple[str, ...]:
        """Names of the finished parts."""
        return tuple(self._manifest.parts)

    def write(self, part: str, tensors: Mapping[TensorId, Held], notes: object) -> None:
        """Add a finished part. notes: anything that msgspec can encode. Raises RunError if the disk refuses."""
        assert self._is_open, "the store is closed"
        assert self._file(part).name not in (TOKENS, PENDING), "this name is taken"
        flat: dict[str, Tensor] = {}
        layouts: dict[str, _Layout] = {}
        for tensor_id, held in tensors.items():
            name = str(tensor_id)
            if isinstance(held, Coded):
                flat[f"{name}:codes"] = held.codes.contiguous().cpu()
                for param, value in held.params.items():
                    flat[f"{name}:{param}"] = value.contiguous().cpu()
                layouts[name] = _Layout(held.grid.id, held.shape, tuple(held.params))
            else:
                flat[f"{name}:values"] = held.contiguous().cpu()
                layouts[name] = _Layout("", tuple(held.shape))
        data = save(flat)
        entry = _Part(hashlib.sha256(data).hexdigest(), layouts, msgspec.Raw(msgspec.json.encode(notes)))
        parts = {name: old for name, old in self._manifest.parts.items() if name != part}
        manifest = _Manifest(VERSION, self._manifest.fingerprint, {**parts, part: entry})
        pending = self._folder / PENDING
        try:
            write_synced(pending, data)
            self._write_manifest(manifest)
            pending.replace(self._file(part))
        except OSError as error:
            with suppress(OSError):
                pending.unlink()
            raise RunError(
                f"the work directory cannot be written: {error}",
                where=str(self._folder),
                todo="free some space or name another with --work-dir; the same command resumes",
            ) from error
        self._manifest = manifest

    def notes(self, part: str, kind: type[Notes]) -> Notes:
        """The notes given with a part, as `kind`; raises RunError if they are something else."""
        try:
            return msgspec.json.decode(self._manifest.parts[part].notes, type=kind)
        except msgspec.MsgspecError as error:
            raise damaged(self._folder / MANIFEST, f"notes of {part}: {error}") from error

    def tensor_ids(self, part: str) -> Iterator[TensorId]:
        """What a part holds."""
        return map(TensorId.parse, self._manifest.parts[part].tensors)

    def read_tensor(self, part: str, tensor_id: TensorId) -> Held:
        """One tensor of a part, on the CPU. Raises RunError if the part cannot be read back any more."""
        name = str(tensor_id)
        layout = self._manifest.parts[part].tensors[name]
        path = self._file(part)
        try:
            with safe_open(path, framework="pt") as file:
                if not layout.grid:
                    return _tensor(file.get_tensor(f"{name}:values"))
                params = {p: _tensor(file.get_tensor(f"{name}:{p}")) for p in layout.params}
                codes = _tensor(file.get_tensor(f"{name}:codes"))
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{name} cannot be read back: {error}",
                where=str(path),
                todo="the same command makes this part and those after it again",
            ) from error
        n_out, n_in = layout.shape
        return Coded(self._grids[layout.grid], (n_out, n_in), codes, params)

    def tensors(self) -> Mapping[TensorId, Stored]:
        """Every tensor of every part, read each time it is asked for, so that one is in memory at a time."""
        return _StoredTensors(self)

    def delete(self) -> None:
        """Remove our files, and the folder if nothing else is in it. Closes the store.

        What the system refuses to remove stays: by now the package is written.
        """
        assert self._is_open, "the store is closed"
        with suppress(OSError):
            self._remove_parts(self._manifest.parts)
            for name in OWN:
                if is_own(self._folder / name):
                    (self._folder / name).unlink(missing_ok=True)
        self.close()
        with suppress(OSError):
            self._folder.rmdir()

    def _file(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"

    def _open(self, fingerprint: str) -> _Manifest:
        """The manifest to go on from, with the directory brought to its state."""
        for leftover in (PENDING, MANIFEST + BESIDE, TOKENS + BESIDE):
            (self._folder / leftover).unlink(missing_ok=True)
        fresh = _Manifest(VERSION, fingerprint, {})
        header = read_header(self._folder)
        if header is None:
            self._write_manifest(fresh)
            return fresh
        if header.version != VERSION or header.fingerprint != fingerprint:
            self.n_discarded = sum(self._file(name).exists() for name in header.parts)
            self._remove_parts(header.parts)
            self._write_manifest(fresh)
            return fresh
        path = self._folder / MANIFEST
        try:
            return self._drop_damaged(msgspec.json.decode(path.read_bytes(), type=_Manifest))
        except msgspec.MsgspecError as error:
            raise damaged(path, str(error)) from error

    def _drop_damaged(self, manifest: _Manifest) -> _Manifest:
        """Keep the longest whole beginning of the parts, in the order of writing; the rest is made again.

        Whole: the file is there and has the manifest's SHA-256. Each block is quantized on the outputs of the parts
        before it, read back from the disk. A part that is made again may differ from the lost one (another
        device, library or thread count), and later parts would then compensate errors that are no longer there.
        """
        kept: dict[str, _Part] = {}
        for name, part in manifest.parts.items():
            if not self._file(name).is_file() or sha256_of(self._file(name)) != part.sha256:
                break
            kept[name] = part
        if len(kept) == len(manifest.parts):
            return manifest
        self._remove_parts(manifest.parts.keys() - kept.keys())
        shorter = _Manifest(manifest.version, manifest.fingerprint, kept)
        self._write_manifest(shorter)
        return shorter

    def _remove_parts(self, parts: Iterable[str]) -> None:
        """Remove files of parts, always before the manifest forgets that they are ours."""
        for part in parts:
            self._file(part).unlink(missing_ok=True)

    def _write_manifest(self, manifest: _Manifest) -> None:
        write_atomic(self._folder / MANIFEST, msgspec.json.encode(manifest))


class _StoredTensors(Mapping[TensorId, Stored]):
    """See `Store.tensors`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._part_of = {t: part for part in store.parts() for t in store.tensor_ids(part)}

    def __getitem__(self, key: TensorId) -> Stored:
        held = self._store.read_tensor(self._part_of[key], key)
        return held if isinstance(held, Coded) else Dense.of(held)

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, torch.Tensor)
    return value
