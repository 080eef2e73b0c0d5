"""The files of a checkpoint folder: which of them hold the weights, and that none leads out of the folder.

The names in an index are a stranger's text: they must be plain file names. A symbolic link that leaves the
folder is refused as well, since side files are copied into packages. One kind of folder consists of such
links: a snapshot in the Hugging Face cache (`models--org--name/snapshots/<commit>/`), whose files lead to
the same repository's `blobs/`, or to the cache-wide store `blobs/` beside all repositories. These two are
legal, in such a folder only. Paths are compared after every link was resolved, so a `blobs` that is itself
a link elsewhere opens nothing.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from d2qconv.checkpoint.safetensors_file import SafetensorsFile, read_file
from d2qconv.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Suffixes of files that would have to be unpickled.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: No JSON file of a checkpoint is longer (tokenizer.json of the largest vocabularies: some 35 MB; the index of 200,000
#: tensors: 25 MB). What is parsed takes up to thirty times as much memory.
MAX_JSON_BYTES = 100_000_000
#: How many names an error lists.
N_LISTED = 10


class _Index(msgspec.Struct):
    """model.safetensors.index.json; `metadata` and the like are not read."""

    weight_map: dict[str, str]


def listed(names: Sequence[str]) -> str:
    """`'a', 'b' and 7 more`."""
    text = ", ".join(repr(n) for n in names[:N_LISTED])
    return text if len(names) <= N_LISTED else f"{text} and {len(names) - N_LISTED} more"


def is_plain_name(name: str) -> bool:
    """Whether a name is one path component on every system: no separator, no drive, not `.` or `..`."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8. Python has other bytes of it as halves of surrogate pairs."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def is_regular(path: Path) -> bool:
    """Whether a file lies there itself: no link, which may lead anywhere, and no pipe, which may never end.

    Raises OSError, but not if nothing is there.
    """
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def is_snapshot(root: Path) -> bool:
    """Whether a resolved folder lies where the Hugging Face cache keeps its snapshots."""
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")


def find(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, or None. Raises InputError if it leads out of the folder."""
    path = _contained(folder, name)
    return None if path is None else _as_file(path, folder, name)


def find_all(folder: Path, inner: str, suffix: str) -> list[Path]:
    """The files of a folder in the folder whose names end so, by name; none if it is absent.

    Raises InputError if the inner folder or one of the files leads out of the folder.
    """
    inside = _contained(folder, inner)
    if inside is None:
        return []
    if not inside.is_dir():
        raise InputError(f"{inner!r} is not a folder", where=str(folder))
    try:
        names = sorted(p.name for p in inside.iterdir() if p.name.endswith(suffix))
    except OSError as error:
        raise InputError(
            f"{inner!r} cannot be listed: {error.strerror or error}", where=str(folder)
        ) from error
    found = [(_contained(folder, inner, name), name) for name in names]
    return [_as_file(path, folder, f"{inner}/{name}") for path, name in found if path is not None]


def _as_file(path: Path, folder: Path, name: str) -> Path:
    if not path.is_file():
        raise InputError(f"{name!r} is not a file", where=str(folder))
    return path


def _contained(folder: Path, *parts: str) -> Path | None:
    """What lies at that place in the folder, or None. Raises InputError if it leads out of the folder."""
    bad = next((part for part in parts if not is_plain_name(part)), None)
    if bad is not None:
        raise InputError(f"{bad!r} is not a plain file name", where=str(folder))
    path, name = folder.joinpath(*parts), "/".join(parts)
    try:
        if not path.is_symlink() and not path.exists():
            return None
        root, target = folder.resolve(strict=True), path.resolve(strict=True)
    except (FileNotFoundError, RuntimeError) as error:
        raise InputError(f"{name!r} is a link that leads nowhere", where=str(folder)) from error
    except OSError as error:
        raise InputError(f"{name!r} cannot be read: {error.strerror or error}", where=str(folder)) from error
    allowed = [root]
    if is_snapshot(root):
        repository = root.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    if not any(target.is_relative_to(a) for a in allowed):
        raise InputError(
            f"{name!r} is a link that leaves the folder", where=str(folder), todo="put the file itself there"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError if the file is too long, not JSON, or not an object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{size} bytes are too many for a JSON file", where=str(path))
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(f"not a JSON object: {error}", where=str(path)) from error
    return found


def read_shards(folder: Path) -> tuple[SafetensorsFile, ...]:
    """Headers of the files that hold the weights, each tensor in exactly one of them. Raises InputError."""
    single, index = find(folder, SINGLE), find(folder, INDEX)
    if index is None:
        if single is None:
            raise _no_weights(folder)
        return (read_file(single),)
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    if single is not None and names != [SINGLE]:
        raise InputError(
            f"both {SINGLE} and {INDEX} are there, and the index names other files",
            where=str(folder),
            todo="remove the one that is not the model",
        )
    found = {name: find(folder, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise InputError(
            f"missing: {listed(missing)}", where=str(folder), todo="download the checkpoint completely"
        )
    shards = {name: read_file(path) for name, path in found.items() if path is not None}
    _check_index(weight_map, shards, index)
    return tuple(shards.values())


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, every file name plain."""
    try:
        weight_map = msgspec.convert(read_json(index), _Index).weight_map
    except msgspec.ValidationError as error:
        raise InputError(f"not an index of safetensors files: {error}", where=str(index)) from error
    bad = sorted({n for n in weight_map.values() if not is_plain_name(n) or not n.endswith(".safetensors")})
    if bad:
        raise InputError(f"not plain names of safetensors files: {listed(bad)}", where=str(index))
    if not weight_map:
        raise InputError("the index names no tensor", where=str(index))
    return weight_map


def _check_index(weight_map: Mapping[str, str], shards: Mapping[str, SafetensorsFile], index: Path) -> None:
    """Index and headers must name the same tensors in the same files."""
    held = {(tensor, name) for name, shard in shards.items() for tensor in shard.entries}
    named = set(weight_map.items())
    absent = sorted(f"{t} in {f}" for t, f in named - held)
    extra = sorted(f"{t} in {f}" for t, f in held - named)
    problems = []
    if absent:
        problems.append(f"in the index but not in the file: {listed(absent)}")
    if extra:
        problems.append(f"in the file but not in the index: {listed(extra)}")
    if problems:
        raise InputError("index and files disagree; " + "; ".join(problems), where=str(index))


def _no_weights(folder: Path) -> InputError:
    """Why a folder without model.safetensors cannot be opened."""
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        return InputError(f"cannot be listed: {error.strerror or error}", where=str(folder))
    pickles = [n for n in names if n.endswith(PICKLES)]
    others = [n for n in names if n.endswith(".safetensors")]
    if others:
        return InputError(
            f"neither {SINGLE} nor {INDEX}, only {listed(others)}",
            where=str(folder),
            todo=f"rename the only file to {SINGLE}, or add the index of the shards",
        )
    if pickles:
        return InputError(
            f"only pickled weights ({listed(pickles)}), which are never opened: unpickling runs code",
            where=str(folder),
            todo="get or make a safetensors version of the checkpoint",
        )
    return InputError(f"no weights: neither {SINGLE} nor {INDEX}", where=str(folder))
