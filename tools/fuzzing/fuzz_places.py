"""What stands in a folder instead of a file: nothing, a link that leads out, a pipe, a folder, a name that leads out.

Beside the folder of a case lies `outside`, which nothing may read or change: a copy of every file, a pipe, a letter.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

from fuzz_bytes import (
    Mutated,
    Mutator,
    bytes_mutators,
    change_protobuf,
    replace_digits,
    replace_npy_type,
    set_gguf_field,
    swap_gguf_key,
)
from fuzz_json import change_json, change_line, change_safetensors

#: By suffix, what knows the format; every file is also changed as plain bytes.
BY_SUFFIX: dict[str, Sequence[Mutator]] = {
    ".json": (change_json,) * 14,
    ".jsonl": (change_line,) * 14,
    ".safetensors": (change_safetensors,) * 14,
    ".gguf": (*(set_gguf_field,) * 12, swap_gguf_key, swap_gguf_key),
    ".onnx": (change_protobuf,) * 14,
    ".model": (change_protobuf,) * 14,
    ".npy": (*(replace_digits,) * 4, *(replace_npy_type,) * 3),
}
#: Share of cases that change what stands there, not what is in it.
PLACES = 0.08
_ABSENT = ("removed", "emptied", "folder", "pipe", "link to itself", "link to nothing")
_LINKS = (
    "link out",
    "link to a pipe outside",
    "link to a letter",
    "linked folder",
)


def change_folder(
    folder: Path, files: Sequence[str], outside: Path, random: Random, *, may_link: bool, is_text: bool
) -> tuple[str, set[Path]]:
    """Change one or two files of a folder; returns what was done, and the paths that are other than before."""
    said, touched = [], set()
    for _ in range(2 if random.random() < 0.15 else 1):
        name = random.choice(files)
        path = folder / name
        if random.random() < PLACES:
            what, place = _change_place(
                path, folder, files, outside, random, may_link=may_link, is_text=is_text
            )
        elif path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            # Of a link of the hub's cache, what it points to is changed; never what lies outside.
            place = path.resolve()
            what = _change_content(place, random, path.suffix)
        else:
            continue
        said.append(f"{name}: {what}")
        touched.add(place)
    return "; then ".join(said), touched


def _change_content(path: Path, random: Random, suffix: str = "") -> str:
    data = path.read_bytes()
    mutators = (*bytes_mutators(), *BY_SUFFIX.get(suffix or path.suffix, ()))
    try:
        made, what = random.choice(mutators)(data, random)
    except Exception:  # noqa: BLE001 a file that was changed before is no whole one any more
        made, what = bytes_mutators()[0](data, random)
    path.unlink()
    path.write_bytes(made)
    return what


def _change_place(
    path: Path,
    folder: Path,
    files: Sequence[str],
    outside: Path,
    random: Random,
    *,
    may_link: bool,
    is_text: bool,
) -> tuple[str, Path]:
    """What was done, and where."""
    found = [(folder / name).resolve() for name in files if name.endswith(".index.json")]
    index = [path for path in found if path.is_file() and path.is_relative_to(folder.resolve())]
    kinds = [*_ABSENT, *(() if may_link else _LINKS), "stranger", *(["index names"] * 3 if index else [])]
    if is_text:
        kinds.remove("pipe")
    kind = random.choice(kinds)
    if kind == "stranger":
        (folder / "stranger").write_text("a letter")
        return kind, folder / "stranger"
    if kind == "index names":
        return _change_index(index[0], outside, random), index[0]
    if kind == "linked folder":
        inner = path.parent
        if inner == folder or inner.parent.name == "snapshots":
            # The folder of the checkpoint itself: who names it may name a link.
            kind = "link out"
        else:
            shutil.rmtree(inner)
            inner.symlink_to(outside)
            return f"{inner.name} is a link to a folder outside", inner
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "emptied":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "removed":
        target = {
            "link to itself": Path(path.name),
            "link to nothing": Path("nowhere"),
            "link out": outside / path.name,
            "link to a pipe outside": outside / "pipe",
            "link to a letter": outside / "letter.jinja",
        }[kind]
        path.symlink_to(target)
    return kind, path


def _change_index(path: Path, outside: Path, random: Random) -> str:
    """The index of a checkpoint names files that are not in its folder."""
    text = path.read_bytes()
    try:
        index = json.loads(text)
        names = sorted(set(index["weight_map"].values()))
        old = random.choice(names)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return "left alone"
    new = random.choice(
        (
            f"../outside/{old}",
            str(outside / str(old)),
            f"./{old}",
            f"{old}\0",
            f"..\\{old}",
            "pipe",
            f"//{old}",
            "..",
        )
    )
    index["weight_map"] = {k: new if v == old else v for k, v in index["weight_map"].items()}
    path.unlink()
    path.write_text(json.dumps(index))
    return f"the index names {new!r:.60}"


def make_outside(pristine: Path, outside: Path) -> None:
    """Files that a link or a name leads to if nobody looks: valid ones, so that reading them would go unnoticed."""
    outside.mkdir()
    for path in pristine.rglob("*"):
        if path.is_file():
            shutil.copyfile(path, outside / path.name)
    os.mkfifo(outside / "pipe")
    (outside / "letter.jinja").write_text("{{ a letter }}")


__all__ = ["Mutated", "change_folder", "make_outside"]
