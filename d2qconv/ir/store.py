"""The work directory: quantized tensors on disk, one file a part of the model, until the package is written.

::

    work/manifest.json        version, fingerprint, what the run began with, SHA-256 of every part in the order of
                              writing, and one of all that
    work/<part>.safetensors   codes as bits (see `packing`), params and float tensors as they are
    work/measured.json        sensitivities, see `workdir.write_measured`
    work/tokens.safetensors   sampled calibration tokens, see `workdir.write_tokens`
    work/lock                 empty; flock'ed by the run that uses the directory

A part is written beside its name and synced, then entered into the manifest, then renamed. So a file that the
manifest does not name is not ours and is never removed, and a part counts only if its file is there and has the
manifest's SHA-256. A directory whose fingerprint differs is emptied of our files, never mixed with.

A part may hold changes: other params, or other values of float tensors, for tensors of parts before it. Their codes
stay where they are. Changes count, all of them, as soon as their part does.
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
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.folder import is_regular
from d2qconv.errors import RunError
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded, Held
from d2qconv.ir.model import Stored
from d2qconv.ir.packing import code_bits, pack_codes, unpack_codes
from d2qconv.ir.part_file import write_part
from d2qconv.ir.workdir import (
    BESIDE,
    MANIFEST,
    MEASURED,
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
)
from d2qconv.names import TensorId

VERSION = 3

Notes = TypeVar("Notes")


class _Layout(msgspec.Struct, frozen=True):
    """How one tensor lies in its part. grid: "" for a float tensor.

    changes: the part whose tensor of this name this one replaces, "" if it replaces none. Codes stay in that part.
    """

    grid: str
    shape: tuple[int, ...]
    params: tuple[str, ...] = ()
    changes: str = ""


class _Part(msgspec.Struct, frozen=True):
    """One file: its digest, its tensors, and notes that the run wants back when it resumes."""

    sha256: str
    tensors: dict[str, _Layout]
    notes: msgspec.Raw


class _Manifest(msgspec.Struct, frozen=True):
    """manifest.json. parts: in the order in which they were written. begun: see `Store`. sha256: of all the rest."""

    version: int
    fingerprint: str
    parts: dict[str, _Part]
    begun: str = ""
    sha256: str = ""

    def sealed(self) -> _Manifest:
        """With its digest."""
        rest = msgspec.json.encode(replace(self, sha256=""))
        return replace(self, sha256=hashlib.sha256(rest).hexdigest())


class Store:
    """Quantized parts by name. Open it with the fingerprint of the run that fills it, close it when done.

    begun: words that the first opening leaves for `read_begun`, before a later run has a fingerprint. n_discarded:
    finished parts of another fingerprint or version that were removed at opening.
    """

    _lock: int | None = None
    _is_open = False

    def __init__(self, folder: Path, fingerprint: str, grids: Mapping[str, Grid], begun: str = "") -> None:
        """Open or make `folder`; raises RunError if it cannot be written, is in use, or belongs to something else."""
        self._folder = folder
        self._grids = grids
        self.n_discarded = 0
        try:
            self._lock = enter(folder)
            self._manifest = self._open(_Manifest(VERSION, fingerprint, {}, begun))
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
        """Add a finished part, or put another in its place; not one that changes refer to.

        tensors: on any device; codes are packed there. notes: anything that msgspec can encode. Raises RunError if
        the disk refuses.
        """
        self._write(part, tensors, dict.fromkeys(tensors, ""), notes)

    def write_changed(self, part: str, changed: Mapping[TensorId, Held], notes: object) -> None:
        """Add a finished part with new params or float values of tensors that other parts hold.

        Codes, grids and shapes must be those of the stored tensors; raises RunError if they are not (the codes are
        read back and compared, on the device of those given) or if the disk refuses.
        """
        origin = {t: p for p in self.parts() for t in self.tensor_ids(p) if not self._layout(p, t).changes}
        for tensor_id, held in changed.items():
            self._require_same_codes(origin[tensor_id], tensor_id, held)
        self._write(part, changed, {tensor_id: origin[tensor_id] for tensor_id in changed}, notes)

    def _write(
        self, part: str, tensors: Mapping[TensorId, Held], changes: Mapping[TensorId, str], notes: object
    ) -> None:
        """changes: per tensor, the part whose tensor it replaces; see `_Layout`."""
        assert self._is_open, "the store is closed"
        assert self._file(part).name not in (TOKENS, PENDING), "this name is taken"
        assert part not in {*self._changed_parts(), *changes.values()}, "a part holds changes of this one"
        flat: dict[str, Tensor] = {}
        layouts: dict[str, _Layout] = {}
        for tensor_id, held in tensors.items():
            name, of = str(tensor_id), changes[tensor_id]
            if isinstance(held, Coded):
                if not of:
                    flat[f"{name}:codes"] = pack_codes(held.codes, code_bits(held.grid.levels))
                flat |= {f"{name}:{param}": value for param, value in held.params.items()}
                layouts[name] = _Layout(held.grid.id, held.shape, tuple(held.params), of)
            else:
                flat[f"{name}:values"] = held
                layouts[name] = _Layout("", tuple(held.shape), (), of)
        pending, encoded = self._folder / PENDING, msgspec.Raw(msgspec.json.encode(notes))
        try:
            entry = _Part(write_part(pending, flat), layouts, encoded)
            parts = {name: old for name, old in self._manifest.parts.items() if name != part}
            manifest = replace(self._manifest, parts={**parts, part: entry})
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

    def _require_same_codes(self, part: str, tensor_id: TensorId, held: Held) -> None:
        """Raise RunError if `held` is not the stored tensor up to params and float values."""
        layout = self._layout(part, tensor_id)
        is_same = (held.grid.id if isinstance(held, Coded) else "", tuple(held.shape)) == (
            layout.grid,
            layout.shape,
        )
        if is_same and isinstance(held, Coded):
            stored = self._read(part, tensor_id, held.codes.device)
            is_same = isinstance(stored, Coded) and torch.equal(stored.codes, held.codes)
        if not is_same:
            raise RunError(
                f"{tensor_id} has other codes, grid or shape than {part}",
                where=str(self._folder),
                todo="this is a fault of d2qconv; please report it",
            )

    def notes(self, part: str, kind: type[Notes]) -> Notes:
        """The notes given with a part, as `kind`; raises RunError if they are something else."""
        try:
            return msgspec.json.decode(self._manifest.parts[part].notes, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise damaged(self._folder / MANIFEST, f"notes of {part}: {error}") from error

    def tensor_ids(self, part: str) -> Iterator[TensorId]:
        """What a part holds."""
        return map(TensorId.parse, self._manifest.parts[part].tensors)

    def read_tensor(
        self, part: str, tensor_id: TensorId, device: torch.device | str = "cpu", *, as_written: bool = False
    ) -> Held:
        """One tensor of a part, with its latest change, or `as_written` in that part.

        Codes are unpacked on the device. Raises RunError if the part cannot be read back any more.
        """
        if not as_written:
            for later, entry in reversed(self._manifest.parts.items()):
                layout = entry.tensors.get(str(tensor_id))
                if layout is not None and layout.changes == part:
                    return self._read(later, tensor_id, torch.device(device))
        return self._read(part, tensor_id, torch.device(device))

    def _read(self, part: str, tensor_id: TensorId, device: torch.device) -> Held:
        """One tensor as this part has it."""
        layout = self._layout(part, tensor_id)
        found = self._read_flat(part, tensor_id, layout.params if layout.grid else ("values",))
        if not layout.grid:
            return found["values"].to(device)
        holder = layout.changes or part
        packed = self._read_flat(holder, tensor_id, ("codes",))["codes"].to(device)
        grid = self._grids[layout.grid]
        n_out, n_in = layout.shape
        codes = unpack_codes(packed, code_bits(grid.levels), (n_out, n_in // grid.step))
        return Coded(grid, (n_out, n_in), codes, {p: value.to(device) for p, value in found.items()})

    def _read_flat(self, part: str, tensor_id: TensorId, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the arrays of one tensor, on the CPU; raises RunError."""
        path = self._file(part)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: _tensor(file.get_tensor(f"{tensor_id}:{name}")) for name in names}
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{tensor_id} cannot be read back: {error}",
                where=str(path),
                todo="the same command makes this part and those after it again",
            ) from error

    def _layout(self, part: str, tensor_id: TensorId) -> _Layout:
        return self._manifest.parts[part].tensors[str(tensor_id)]

    def _changed_parts(self) -> set[str]:
        """Parts that hold tensors which later parts change."""
        return {t.changes for entry in self._manifest.parts.values() for t in entry.tensors.values()} - {""}

    def tensors(self) -> Mapping[TensorId, Stored]:
        """Every tensor of every part, changes applied, read each time it is asked for; one is in memory at a time."""
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

    def _open(self, fresh: _Manifest) -> _Manifest:
        """The manifest to go on from, with the directory brought to its state. fresh: of a run without parts."""
        for leftover in (PENDING, MANIFEST + BESIDE, TOKENS + BESIDE, MEASURED + BESIDE):
            (self._folder / leftover).unlink(missing_ok=True)
        header = read_header(self._folder)
        if header is None:
            self._write_manifest(fresh)
            return fresh
        manifest = self._sealed() if header.version == VERSION else None
        if manifest is None or manifest.fingerprint != fresh.fingerprint:
            self.n_discarded = sum(self._file(name).exists() for name in header.parts)
            self._remove_parts(header.parts)
            self._write_manifest(fresh)
            return fresh
        try:
            for part in manifest.parts.values():
                self._check_tensors(part)
            return self._drop_damaged(manifest)
        except ValueError as error:
            raise damaged(self._folder / MANIFEST, str(error)) from error

    def _sealed(self) -> _Manifest:
        """The manifest that is there, to the last byte as it was written; raises RunError if it is not, OSError."""
        path = self._folder / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=_Manifest)
        # Text is looked at only where it is read: a header that parsed may hold names that do not.
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise damaged(path, str(error)) from error
        if manifest != manifest.sealed():
            raise damaged(path, "it is not as it was written")
        return manifest

    def _check_tensors(self, part: _Part) -> None:
        """Raise ValueError for names that are no tensors', and grids that the run has not."""
        for name, layout in part.tensors.items():
            TensorId.parse(name)
            if layout.grid and layout.grid not in self._grids:
                raise ValueError(f"{name} is on a grid {layout.grid!r:.80} that this run has not")

    def _drop_damaged(self, manifest: _Manifest) -> _Manifest:
        """Keep the longest whole beginning of the parts, in the order of writing; the rest is made again.

        Whole: the file is there and has the manifest's SHA-256. Each block is quantized on the outputs of the parts
        before it, read back from the disk. A part that is made again may differ from the lost one (another
        device, library or thread count), and later parts would then compensate errors that are no longer there.
        """
        kept: dict[str, _Part] = {}
        for name, part in manifest.parts.items():
            if not is_regular(self._file(name)) or sha256_of(self._file(name)) != part.sha256:
                break
            kept[name] = part
        if len(kept) == len(manifest.parts):
            return manifest
        self._remove_parts(manifest.parts.keys() - kept.keys())
        shorter = replace(manifest, parts=kept)
        self._write_manifest(shorter)
        return shorter

    def _remove_parts(self, parts: Iterable[str]) -> None:
        """Remove files of parts, always before the manifest forgets that they are ours."""
        for part in parts:
            self._file(part).unlink(missing_ok=True)

    def _write_manifest(self, manifest: _Manifest) -> None:
        write_atomic(self._folder / MANIFEST, msgspec.json.encode(manifest.sealed()))


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
