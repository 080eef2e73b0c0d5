"""A folder that one run works in: whose files are in it, who may use it, and writing that a kill cannot halve.

`store` keeps the quantized parts there; the sampled calibration tokens and measurements are kept here.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from d2qconv.checkpoint.folder import is_plain_name, is_regular
from d2qconv.errors import RunError

try:
    import fcntl
except ImportError:  # Not a POSIX system: there is no lock.
    fcntl = None  # type: ignore[assignment]

MANIFEST, LOCK, TOKENS = "manifest.json", "lock", "tokens.safetensors"
#: What was measured before the types were chosen.
MEASURED = "measured.json"
#: A part, while it is written.
PENDING = "pending.safetensors.part"
BESIDE = ".part"
#: Activations on disk, for the moment before the file loses its name; only a kill just then leaves it.
ACTIVATIONS = "activations.part"
#: Every file of ours but the parts, in an order in which they may be removed.
OWN = (
    PENDING,
    ACTIVATIONS,
    MANIFEST + BESIDE,
    MANIFEST,
    TOKENS + BESIDE,
    TOKENS,
    MEASURED + BESIDE,
    MEASURED,
    LOCK,
)

#: Name of the entry in the tokens file's metadata.
TOKENS_MARK = "d2qconv.tokens"
MEASURED_MARK = "d2qconv.measured"


class _Measured(msgspec.Struct, frozen=True):
    """measured.json. values: JSON; sha256: of its bytes as they stand."""

    mark: str
    key: str
    sha256: str
    values: msgspec.Raw


class Header(msgspec.Struct, frozen=True):
    """manifest.json as far as other versions have it too."""

    version: int
    fingerprint: str
    parts: dict[str, msgspec.Raw]
    begun: str = ""


def read_tokens(folder: Path, key: str) -> dict[str, Tensor] | None:
    """What `write_tokens` wrote under `key`; None if there is no such file, or of another key, or damaged.

    `folder` need not exist. Raises RunError if a file that is there cannot be read.
    """
    path = folder / TOKENS
    try:
        mark = _tokens_mark(path) if is_regular(path) else None
        if mark is None:
            return None
        tensors = load(path.read_bytes())
    except (SafetensorError, FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unusable(folder, error) from error
    return tensors if mark == _mark(key, tensors) else None


def write_tokens(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep sampled tokens in the work directory, in place of those that were there.

    Call it before the Store is opened: the directory is made if need be and locked while the file is written.
    The file's metadata hold one entry, `SHA-256 of the tensors:key`. Raises RunError as opening a Store does.
    """
    path = folder / TOKENS
    lock = None
    try:
        lock = enter(folder)
        if not is_own(path):
            raise foreign(path)
        # Clones: safetensors refuses tensors that share memory.
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_atomic(path, save(own, {TOKENS_MARK: _mark(key, own)}))
    except OSError as error:
        raise unusable(folder, error) from error
    finally:
        if lock is not None:
            os.close(lock)


def read_measured(folder: Path, key: str) -> bytes | None:
    """The JSON that `write_measured` wrote under `key`; None if there is none, or of another key, or damaged.

    `folder` need not exist. Raises RunError if a file that is there cannot be read.
    """
    try:
        found = _measured(folder / MEASURED)
    except OSError as error:
        raise unusable(folder, error) from error
    if found is None or found.key != key or found.sha256 != hashlib.sha256(found.values).hexdigest():
        return None
    return bytes(found.values)


def prepare(folder: Path) -> None:
    """Make the folder for files without a name; raises RunError if it is not ours, or in use."""
    try:
        lock = enter(folder)
    except OSError as error:
        raise unusable(folder, error) from error
    if lock is not None:
        os.close(lock)


def write_measured(folder: Path, key: str, values: bytes) -> None:
    """Keep JSON in the work directory, in place of what was there; as `write_tokens`."""
    path = folder / MEASURED
    lock = None
    try:
        lock = enter(folder)
        if not is_own(path):
            raise foreign(path)
        digest = hashlib.sha256(values).hexdigest()
        write_atomic(path, msgspec.json.encode(_Measured(MEASURED_MARK, key, digest, msgspec.Raw(values))))
    except OSError as error:
        raise unusable(folder, error) from error
    finally:
        if lock is not None:
            os.close(lock)


def _measured(path: Path) -> _Measured | None:
    """None if there is no such file, or if it is not ours; raises OSError."""
    try:
        if not is_regular(path):
            return None
        found = msgspec.json.decode(path.read_bytes(), type=_Measured)
    except (NotADirectoryError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found if found.mark == MEASURED_MARK else None


def _mark(key: str, tensors: dict[str, Tensor]) -> str:
    return f"{hashlib.sha256(save(tensors)).hexdigest()}:{key}"


def _tokens_mark(path: Path) -> str | None:
    """Our entry in a safetensors file's metadata; raises SafetensorError, OSError."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(TOKENS_MARK)


def is_own(path: Path) -> bool:
    """Is there nothing at `path` that a user may have put there? For names in OWN; parts stand in the manifest.

    `lock` is ours if empty, `measured.json` if it has our mark, `tokens.safetensors` if it has it or cannot be parsed.
    """
    if not os.path.lexists(path):
        return path.name in OWN
    if not is_regular(path):
        return False
    kinds = {
        LOCK: lambda: path.stat().st_size == 0,
        MEASURED: lambda: _measured(path) is not None,
        TOKENS: lambda: _is_own_tokens(path),
    }
    if path.name in kinds:
        return kinds[path.name]()
    return path.name in OWN or path.name.startswith(ACTIVATIONS)


def _is_own_tokens(path: Path) -> bool:
    try:
        return _tokens_mark(path) is not None
    except SafetensorError:
        return True


def enter(folder: Path) -> int | None:
    """Make the folder, refuse it if it is not ours, lock it; raises RunError, OSError. A foreign folder stays as is."""
    folder.mkdir(parents=True, exist_ok=True)
    if read_header(folder) is None:
        for path in folder.iterdir():
            if not is_own(path):
                raise foreign(path)
    return _take_lock(folder)


def _take_lock(folder: Path) -> int | None:
    """Descriptor of the locked lock file; the lock lasts until it is closed or the process ends.

    flock belongs to the open file, so a second Store of the same process is refused as well. One that was
    dropped may hang in a reference cycle, an exception's traceback for instance, hence the collection.
    """
    if fcntl is None:
        return None
    path = folder / LOCK
    is_collected = False
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
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


def read_header(folder: Path) -> Header | None:
    """The manifest, of any version; None if there is none. Raises RunError if it does not parse, OSError."""
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        return None
    if not is_regular(path):
        raise damaged(path, "it is no regular file")
    try:
        header = msgspec.json.decode(path.read_bytes(), type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    for part in header.parts:
        if not is_plain_name(part) or f"{part}.safetensors" == TOKENS:
            raise damaged(path, f"{part!r} is not the name of a part")
    return header


def read_begun(folder: Path) -> str:
    """What the run that this folder is of has said of itself when it began; '' if there is none.

    `folder` need not exist. Raises RunError as `read_header` does, or if the manifest cannot be read.
    """
    try:
        header = read_header(folder)
    except NotADirectoryError:
        return ""
    except OSError as error:
        raise unusable(folder, error) from error
    return "" if header is None else header.begun


def damaged(manifest: Path, why: str) -> RunError:
    """The error for a manifest that cannot be used."""
    return RunError(
        f"the work directory's manifest is damaged: {why}",
        where=str(manifest),
        todo="delete the folder if a run of d2qconv made it, or name another with --work-dir",
    )


def foreign(path: Path) -> RunError:
    """The error for a folder with somebody else's file `path`."""
    return RunError(
        f"the work directory holds files that are not ours: {path.name}",
        where=str(path.parent),
        todo="name an empty folder with --work-dir",
    )


def unusable(folder: Path, error: OSError) -> RunError:
    """The error for a folder that the system refuses."""
    return RunError(
        f"the work directory cannot be used: {error}",
        where=str(folder),
        todo="name another with --work-dir, on a local disk with free space",
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds all of it or what it held before."""
    beside = path.with_name(path.name + BESIDE)
    write_synced(beside, data)
    beside.replace(path)


def write_synced(path: Path, data: bytes) -> None:
    """Write and sync a file; if that fails, it does not stay and fill the disk."""
    try:
        with open_new(path) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def open_new(path: Path) -> BinaryIO:
    """A new file of this name to write into; what was there, such as a link that leads elsewhere, is removed unread."""
    path.unlink(missing_ok=True)
    return path.open("xb")
