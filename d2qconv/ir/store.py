"""The work directory: quantized tensors on disk, one file a part of the model, until the package is written.

::

    work/manifest.json     version, fingerprint, SHA-256 of every part
    work/<part>.safetensors

A part is written beside its name, synced and renamed, then entered into the manifest the same way; so a part that
the manifest names is whole. A directory whose fingerprint differs is emptied, never mixed with.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import RunError
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import Stored
from d2qconv.names import TensorId

VERSION = 1

Notes = TypeVar("Notes")

#: One tensor of a part, in memory.
Held: TypeAlias = Coded | Tensor


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


class _Manifest(msgspec.Struct):
    """manifest.json."""

    version: int
    fingerprint: str
    parts: dict[str, _Part]


class Store:
    """Quantized parts by name. Open it with the fingerprint of the run that fills it."""

    def __init__(self, folder: Path, fingerprint: str, grids: Mapping[str, Grid]) -> None:
        """Open or make `folder`; raises RunError if it cannot be written or belongs to something else."""
        self._folder = folder
        self._grids = grids
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._manifest = self._open(fingerprint)
        except OSError as error:
            raise RunError(f"the work directory cannot be used: {error}", where=str(folder)) from error

    def parts(self) -> tuple[str, ...]:
        """Names of the finished parts."""
        return tuple(self._manifest.parts)

    def write(self, part: str, tensors: Mapping[TensorId, Held], notes: object) -> None:
        """Add a finished part. notes: anything that msgspec can encode."""
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
        try:
            _write_atomic(self._file(part), data)
            self._manifest.parts[part] = _Part(
                hashlib.sha256(data).hexdigest(), layouts, msgspec.Raw(msgspec.json.encode(notes))
            )
            _write_atomic(self._folder / "manifest.json", msgspec.json.encode(self._manifest))
        except OSError as error:
            raise RunError(
                f"the work directory cannot be written: {error}",
                where=str(self._folder),
                todo="free some space or name another with --work-dir; the same command resumes",
            ) from error

    def notes(self, part: str, kind: type[Notes]) -> Notes:
        """The notes given with a part, as `kind`."""
        return msgspec.json.decode(self._manifest.parts[part].notes, type=kind)

    def read(self, part: str) -> dict[TensorId, Held]:
        """All tensors of a part."""
        return {t: self.read_tensor(part, t) for t in self.tensor_ids(part)}

    def tensor_ids(self, part: str) -> Iterator[TensorId]:
        """What a part holds."""
        return map(TensorId.parse, self._manifest.parts[part].tensors)

    def read_tensor(self, part: str, tensor_id: TensorId) -> Held:
        """One tensor of a part, on the CPU."""
        name = str(tensor_id)
        layout = self._manifest.parts[part].tensors[name]
        with safe_open(self._file(part), framework="pt") as file:
            if not layout.grid:
                return _tensor(file.get_tensor(f"{name}:values"))
            params = {p: _tensor(file.get_tensor(f"{name}:{p}")) for p in layout.params}
            codes = _tensor(file.get_tensor(f"{name}:codes"))
        n_out, n_in = layout.shape
        return Coded(self._grids[layout.grid], (n_out, n_in), codes, params)

    def tensors(self) -> Mapping[TensorId, Stored]:
        """Every tensor of every part, read each time it is asked for, so that one is in memory at a time."""
        return _StoredTensors(self)

    def delete(self) -> None:
        """Remove the directory and all in it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"

    def _open(self, fingerprint: str) -> _Manifest:
        path = self._folder / "manifest.json"
        fresh = _Manifest(VERSION, fingerprint, {})
        if not path.exists():
            if any(self._folder.iterdir()):
                raise RunError(
                    "the work directory holds files that are not ours",
                    where=str(self._folder),
                    todo="name an empty folder with --work-dir",
                )
            _write_atomic(path, msgspec.json.encode(fresh))
            return fresh
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Manifest)
        except msgspec.MsgspecError as error:
            raise RunError(
                f"the work directory's manifest is damaged: {error}",
                where=str(path),
                todo="delete the folder",
            ) from error
        if found.version != VERSION or found.fingerprint != fingerprint:
            for old in self._folder.glob("*.safetensors"):
                old.unlink()
            _write_atomic(path, msgspec.json.encode(fresh))
            return fresh
        return self._drop_damaged(found)

    def _drop_damaged(self, manifest: _Manifest) -> _Manifest:
        """Forget parts whose file is not what the manifest says; they are made again."""
        whole = {
            name: part
            for name, part in manifest.parts.items()
            if self._file(name).exists() and _sha256(self._file(name)) == part.sha256
        }
        return _Manifest(manifest.version, manifest.fingerprint, whole)


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomic(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
