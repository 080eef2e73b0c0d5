"""Open a model: a local folder, or a hub name `org/name`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.folder import find, find_all, is_snapshot, read_json, read_shards
from d2qconv.checkpoint.hub import download
from d2qconv.checkpoint.safetensors_file import INTEGER_BYTES, unreadable
from d2qconv.errors import InputError

#: Keys of config.json under which tools say how they quantized the weights.
QUANTIZED_KEYS = ("quantization_config", "compression_config")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: A README is read this far for its front matter, and a license is a name, not a text.
_README_BYTES = 1 << 20
_LICENSE_CHARS = 200


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, opened: config parsed, headers checked, no weight read.

    source: as the user named it. revision: the hub's commit, '' for a plain folder. tensors: by checkpoint
    name. license: from README.md's front matter or config.json, '' if neither says.
    """

    path: Path
    source: str
    revision: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Dense]
    license: str

    def file(self, name: str) -> Path | None:
        """A side file such as `tokenizer.json`, or None. Raises InputError if it leads out of the folder."""
        return find(self.path, name)

    def files(self, folder: str, suffix: str) -> list[Path]:
        """The files of a folder in the folder whose names end so, by name. Raises InputError as `file` does."""
        return find_all(self.path, folder, suffix)

    def json(self, name: str) -> Mapping[str, Any] | None:
        """A side file that is a JSON object, parsed, or None if it is absent. Raises InputError."""
        path = self.file(name)
        return None if path is None else read_json(path)

    def copy_files(self, names: Iterable[str], folder: Path) -> None:
        """Copy those side files that are there, byte for byte. Raises InputError as `file` does, and OSError."""
        for name in names:
            source = self.file(name)
            if source is not None:
                (folder / name).write_bytes(source.read_bytes())

    @property
    def name(self) -> str:
        """What the model is called in public: the hub's name, or the folder's; never where it lies on a disk."""
        is_local = Path(self.source).expanduser().resolve() == self.path.resolve()
        return self.path.resolve().name if is_local else self.source


def is_hub_name(model: str) -> bool:
    """Whether it is of the form org/name."""
    return _HUB_NAME.fullmatch(model) is not None


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open a local folder if one has that name, else the hub's `org/name`.

    Raises InputError for whatever is wrong with the name, the folder or its files; PluginError if a hub name
    is given and huggingface_hub is missing. Only headers are read; nothing is unpickled.
    """
    try:
        local = Path(model).expanduser()
        is_local = local.exists()
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot be opened: {error}", where=model) from error
    if is_local:
        if not local.is_dir():
            raise InputError("not a folder", where=model, todo="name the folder that holds config.json")
        if revision is not None:
            raise InputError(
                f"revision {revision!r} belongs to a hub name, and this is a folder", where=model
            )
        folder = local
    elif is_hub_name(model):
        folder = download(model, revision)
    else:
        raise InputError("no such folder, and not a hub name like org/name", where=model)
    root = folder.resolve()
    config_path = find(folder, "config.json")
    if config_path is None:
        raise InputError("config.json is missing", where=model, todo="name a Hugging Face model folder")
    config = read_json(config_path)
    return Checkpoint(
        path=folder,
        source=model,
        revision=root.name if is_snapshot(root) else "",
        config=config,
        tensors=_tensors(folder, config, model),
        license=_license(folder, config),
    )


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the weights are no floats any more."""
    return any(config.get(key) is not None for key in QUANTIZED_KEYS)


def _tensors(folder: Path, config: Mapping[str, Any], model: str) -> dict[str, Dense]:
    """Every tensor by name; integers only where config.json says what they mean."""
    shards = read_shards(folder)
    integers = [
        (name, entry.dtype)
        for shard in shards
        for name, entry in shard.entries.items()
        if entry.dtype in INTEGER_BYTES
    ]
    if integers and not is_quantized(config):
        raise unreadable(integers, model)
    return {name: dense for shard in shards for name, dense in shard.tensors().items()}


def _license(folder: Path, config: Mapping[str, Any]) -> str:
    """The model's license as its card names it."""
    card = find(folder, "README.md")
    stated = "" if card is None else _front_matter_license(card)
    if not stated and isinstance(config.get("license"), str):
        stated = config["license"].strip()
    return stated[:_LICENSE_CHARS]


def _front_matter_license(card: Path) -> str:
    """`license:` of a model card; `other (name)` where the card names its own; several joined by commas.

    The front matter is YAML, of which only `key: value` and a list of plain items are read here.
    """
    try:
        with card.open("rb") as stream:
            lines = stream.read(_README_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(card)) from error
    if not lines or lines[0].strip() != "---":
        return ""
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if (top := re.match(r"([A-Za-z_]+):(.*)", line)) is not None:
            key = top[1]
            found.setdefault(key, []).extend(v for v in [_scalar(top[2]).strip("[]")] if v)
        elif key in found and (item := re.match(r"\s*-\s+(.+)", line)) is not None:
            found[key].append(_scalar(item[1]))
    text = ", ".join(found.get("license", []))
    named = ", ".join(found.get("license_name", []))
    return f"{text} ({named})" if text and named else text


def _scalar(text: str) -> str:
    """A plain YAML value without comment and quotes."""
    return re.sub(r"\s+#.*", "", text).strip().strip("'\"")
