"""Writes one part of the work directory as a safetensors file, a tensor at a time.

Layout (the format's README): 8 bytes little-endian length n, n bytes of JSON, then the data without holes. The JSON
maps a name to dtype, shape and [begin, end) offsets into the data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from d2qconv.ir.workdir import open_new

#: The format's names of the dtypes that codes, params and float tensors have.
_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


def write_part(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write and sync a file of these tensors, of any device; returns its SHA-256, hex.

    They come to the host one at a time, so that one copy of the largest is held at most. Wide dtypes lie first, so
    that every tensor begins at a multiple of its item. If that fails, the file does not stay and fill the disk;
    raises OSError.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    sha = hashlib.sha256()
    try:
        with open_new(path) as file:
            head = _header(ordered)
            file.write(head)
            sha.update(head)
            for _, tensor in ordered:
                # A matrix of no rows has no bytes to view.
                if tensor.numel():
                    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                    file.write(values)
                    sha.update(values)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return sha.hexdigest()


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    entries, at = {}, 0
    for name, tensor in ordered:
        end = at + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
