"""The work directory: quantized tensors on disk, one file a part of the model, until the package is written.

::

    work/manifest.json        version, fingerprint, SHA-256 of every part in the order of writing
    work/<part>.safetensors
    work/tokens.safetensors   sampled calibration tokens, see `write_tokens`
    work/lock                 empty; flock'ed by the run that uses the directory

A part is written beside its name and synced, then entered into the manifest, then renamed. So a file that the
manifest does not name is not ours and is never removed, and a part counts only if its file is there and has the
manifest's SHA-256. A directory whose fingerprint differs is emptied of our files, never mixed with.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeAlias, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import RunError
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import Stored
from d2qconv.names import TensorId

try:
    import fcntl
except ImportError:  # Not a POSIX system: there is no lock.
    fcntl = None  # type: ignore[assignment]

VERSION = 1

_MANIFEST, _LOCK, _TOKENS = "manifest.json", "lock", "tokens.safetensors"
#: A part, while it is written.
_PENDING = "pending.safetensors.part"
_BESIDE = ".part"
#: Every file of ours but the parts, in an order in which they may be removed.
_OWN = (_PENDING, _MANIFEST + _BESIDE, _MANIFEST, _TOKENS + _BESIDE, _TOKENS, _LOCK)

#: Name of the entry in the tokens file's metadata.
_TOKENS_MARK = "d2qconv_tokens"

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


class _Header(msgspec.Struct, frozen=True):
    """manifest.json as far as other versions have it too."""

    version: int
    fingerprint: str
    parts: dict[str, msgspec.Raw]


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
            self._lock = _enter(folder)
            self._manifest = self._open(fingerprint)
        except OSError as error:
            self.close()
            raise _unusable(folder, error) from error
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
        assert self._file(part).name not in (_TOKENS, _PENDING), "this name is taken"
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
        pending = self._folder / _PENDING
        try:
            _write_synced(pending, data)
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
            raise _damaged(self._folder / _MANIFEST, f"notes of {part}: {error}") from error

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
            for name in _OWN:
                if _is_own(self._folder / name):
                    (self._folder / name).unlink(missing_ok=True)
        self.close()
        with suppress(OSError):
            self._folder.rmdir()

    def _file(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"

    def _open(self, fingerprint: str) -> _Manifest:
        """The manifest to go on from, with the directory brought to its state."""
        for leftover in (_PENDING, _MANIFEST + _BESIDE, _TOKENS + _BESIDE):
            (self._folder / leftover).unlink(missing_ok=True)
        fresh = _Manifest(VERSION, fingerprint, {})
        header = _read_header(self._folder)
        if header is None:
            self._write_manifest(fresh)
            return fresh
        if header.version != VERSION or header.fingerprint != fingerprint:
            self.n_discarded = sum(self._file(name).exists() for name in header.parts)
            self._remove_parts(header.parts)
            self._write_manifest(fresh)
            return fresh
        path = self._folder / _MANIFEST
        try:
            return self._drop_damaged(msgspec.json.decode(path.read_bytes(), type=_Manifest))
        except msgspec.MsgspecError as error:
            raise _damaged(path, str(error)) from error

    def _drop_damaged(self, manifest: _Manifest) -> _Manifest:
        """Keep the longest whole beginning of the parts, in the order of writing; the rest is made again.

        Whole: the file is there and has the manifest's SHA-256. Each block is quantized on the outputs of the parts
        before it, read back from the disk. A part that is made again may differ from the lost one (another
        device, library or thread count), and later parts would then compensate errors that are no longer there.
        """
        kept: dict[str, _Part] = {}
        for name, part in manifest.parts.items():
            if not self._file(name).is_file() or _sha256(self._file(name)) != part.sha256:
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
        _write_atomic(self._folder / _MANIFEST, msgspec.json.encode(manifest))


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


def read_tokens(folder: Path, key: str) -> dict[str, Tensor] | None:
    """What `write_tokens` wrote under `key`; None if there is no such file, or of another key, or damaged.

    `folder` need not exist. Raises RunError if a file that is there cannot be read.
    """
    path = folder / _TOKENS
    try:
        mark = _tokens_mark(path)
        if mark is None:
            return None
        tensors = load(path.read_bytes())
    except (SafetensorError, FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unusable(folder, error) from error
    return tensors if mark == _mark(key, tensors) else None


def write_tokens(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep sampled tokens in the work directory, in place of those that were there.

    Call it before the Store is opened: the directory is made if need be and locked while the file is written.
    The file's metadata hold one entry, `SHA-256 of the tensors:key`. Raises RunError as opening a Store does.
    """
    path = folder / _TOKENS
    lock = None
    try:
        lock = _enter(folder)
        if not _is_own(path):
            raise _foreign(path)
        # Clones: safetensors refuses tensors that share memory.
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        _write_atomic(path, save(own, {_TOKENS_MARK: _mark(key, own)}))
    except OSError as error:
        raise _unusable(folder, error) from error
    finally:
        if lock is not None:
            os.close(lock)


def _mark(key: str, tensors: dict[str, Tensor]) -> str:
    return f"{hashlib.sha256(save(tensors)).hexdigest()}:{key}"


def _tokens_mark(path: Path) -> str | None:
    """Our entry in a safetensors file's metadata; raises SafetensorError, OSError."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(_TOKENS_MARK)


def _is_own(path: Path) -> bool:
    """Is there nothing at `path` that a user may have put there? For names in _OWN; parts stand in the manifest.

    `lock` is ours if empty, `tokens.safetensors` if it has our mark or cannot be parsed.
    """
    if not path.exists():
        return path.name in _OWN
    if not path.is_file():
        return False
    if path.name == _LOCK:
        return path.stat().st_size == 0
    if path.name == _TOKENS:
        try:
            return _tokens_mark(path) is not None
        except SafetensorError:
            return True
    return path.name in _OWN


def _enter(folder: Path) -> int | None:
    """Make the folder, refuse it if it is not ours, lock it; raises RunError, OSError. A foreign folder stays as is."""
    folder.mkdir(parents=True, exist_ok=True)
    if _read_header(folder) is None:
        for path in folder.iterdir():
            if not _is_own(path):
                raise _foreign(path)
    return _take_lock(folder)


def _take_lock(folder: Path) -> int | None:
    """Descriptor of the locked lock file; the lock lasts until it is closed or the process ends.

    flock belongs to the open file, so a second Store of the same process is refused as well. One that was
    dropped may hang in a reference cycle, an exception's traceback for instance, hence the collection.
    """
    if fcntl is None:
        return None
    path = folder / _LOCK
    is_collected = False
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_at(path, lock):
                return lock
            os.close(lock)
        except BlockingIOError as error:
            os.close(lock)
            if is_collected:
                raise RunError(
                    "another run uses this work directory",
                    where=str(folder),
                    todo="wait until it ends or stop it, or name another folder with --work-dir",
                ) from error
            gc.collect()
            is_collected = True
        except BaseException:
            os.close(lock)
            raise


def _is_still_at(path: Path, descriptor: int) -> bool:
    """Is the open file still the one of that name? `delete` may have removed it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_header(folder: Path) -> _Header | None:
    """The manifest, of any version; None if there is none. Raises RunError if it does not parse, OSError."""
    path = folder / _MANIFEST
    try:
        header = msgspec.json.decode(path.read_bytes(), type=_Header)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    for part in header.parts:
        if Path(part).name != part:
            raise _damaged(path, f"{part!r} is not the name of a part")
    return header


def _damaged(manifest: Path, why: str) -> RunError:
    return RunError(
        f"the work directory's manifest is damaged: {why}",
        where=str(manifest),
        todo="delete the folder if a run of d2qconv made it, or name another with --work-dir",
    )


def _foreign(path: Path) -> RunError:
    return RunError(
        f"the work directory holds files that are not ours: {path.name}",
        where=str(path.parent),
        todo="name an empty folder with --work-dir",
    )


def _unusable(folder: Path, error: OSError) -> RunError:
    return RunError(
        f"the work directory cannot be used: {error}",
        where=str(folder),
        todo="name another with --work-dir, on a local disk with free space",
    )


def _tensor(value: object) -> Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomic(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + _BESIDE)
    _write_synced(beside, data)
    beside.replace(path)


def _write_synced(path: Path, data: bytes) -> None:
    """Write and sync a file; if that fails, it does not stay and fill the disk."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
