"""Safetensors files written as a stream: sizes are known before the first tensor is made, so headers go first.

Layout: 8 bytes little-endian length of the header, the header in JSON, the data without holes. Names of shards and the
index are those of transformers' save_pretrained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from d2qconv.errors import ExportError
from d2qconv_hf.dialects.base import Array
from d2qconv_hf.types import SAFETENSORS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ALIGNMENT = 8


def split(arrays: Mapping[str, Array], most: int) -> list[dict[str, Array]]:
    """The arrays, in their order, in shards of at most `most` bytes, or of one array."""
    shards: list[dict[str, Array]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.n_bytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.n_bytes
    return shards


class ShardWriter:
    """Takes tensors in the planned order and puts them into the shards' files."""

    def __init__(self, folder: Path, shards: list[dict[str, Array]], stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._left = iter(_places(shards))
        self._name = ""
        self._file: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor; raises ExportError if it is not the planned one."""
        file_name, expected, array, header = next(self._left)
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, array.dtype, array.shape):
            raise ExportError(
                f"{name} of {tensor.dtype} {list(tensor.shape)} came, and {expected} of {array.dtype} "
                f"{list(array.shape)} was planned",
                where=file_name,
            )
        if file_name != self._name:
            self._file = self._stack.enter_context((self._folder / file_name).open("xb"))
            self._name = file_name
            self._file.write(header)
        _write(self._file, tensor)


def _places(shards: list[dict[str, Array]]) -> Iterator[tuple[str, str, Array, bytes]]:
    """File, name, array of every tensor, and the file's header."""
    for file_name, shard in zip(file_names(len(shards)), shards, strict=True):
        header = _header(shard)
        for name, array in shard.items():
            yield file_name, name, array, header


def file_names(n: int) -> list[str]:
    """Names of n shards."""
    return [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def write_index(folder: Path, shards: list[dict[str, Array]]) -> None:
    """The index, if there are several shards."""
    if len(shards) == 1:
        return
    files = zip(file_names(len(shards)), shards, strict=True)
    weight_map = {name: file for file, shard in files for name in shard}
    total = sum(array.n_bytes for shard in shards for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _header(shard: Mapping[str, Array]) -> bytes:
    """Length and JSON, padded with spaces so that the data begin at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in shard.items():
        entries[name] = {
            "dtype": SAFETENSORS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.n_bytes],
        }
        at += array.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO | None, tensor: Tensor) -> None:
    assert file is not None, "the first tensor of a shard opens it"
    plain = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)
    file.write(plain.numpy().data)
