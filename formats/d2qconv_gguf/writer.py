"""Streams a GGUF: two passes over the tensors, several of them at a time in threads, with a bound on their memory.

The first pass decodes every tensor to f32 in the file's own row order and takes its SHA-256; the digests go into the
metadata, which stands before the data. The second pass packs, and writes in the order of the file. Container layout:
ggml's `docs/gguf.md`, by `gguf-py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor

from d2qconv.errors import ExportError
from d2qconv.exporters.base import FloatType, Progress, TargetPlan, TensorPlan
from d2qconv.exporters.planned import check_complete
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import QuantizedModel, Stored
from d2qconv.threads import each
from d2qconv_gguf.codecs import CODECS
from d2qconv_gguf.ggml_types import GgmlType
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.names import Layout, row_order
from d2qconv_gguf.types import GGML_TYPES

#: Bytes of tensors in memory at a time, or one tensor.
BUDGET = 3 << 29
#: Values that are decoded at a time: in f32 they fit into the processor's cache.
_PIECE = 1 << 19


@dataclass(frozen=True)
class Planned:
    """A tensor of the model, read when it is needed and then checked against its plan."""

    model: QuantizedModel
    plan: TensorPlan

    def read(self) -> Stored:
        """The tensor; raises ExportError if it is not what was planned."""
        stored = self.model.tensors[self.plan.id]
        _check(self.plan, stored)
        return stored


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    shape: rows first, as in torch; the file stores it reversed. order: rows of `stored` in the order of the file,
    i64[n_out], None for as they are.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    n_bytes: int
    stored: Stored | Planned
    order: Tensor | None = None

    @property
    def ggml_type(self) -> GgmlType:
        """The storage type as ggml has it."""
        return GGML_TYPES[self.type_name]

    @property
    def n_values(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it is stored as floats, and not as codes."""
        return self.type_name in tuple(FloatType)

    def data(self) -> np.ndarray:
        """The bytes as they stand in the file, u8[n_bytes]."""
        stored = self._read()
        if isinstance(stored, Coded):
            return CODECS[self.type_name].pack(stored).reshape(-1)
        return np.concatenate([_raw(piece) for piece in self._float_pieces(stored)])

    def digest(self) -> str:
        """SHA-256 of the decoded values, f32 little endian, row by row in the file's order."""
        stored = self._read()
        pieces = stored.decoded_rows() if isinstance(stored, Coded) else self._float_pieces(stored)
        sha = hashlib.sha256()
        for piece in pieces:
            sha.update(_raw(piece.to(torch.float32)).data)
        return sha.hexdigest()

    def _read(self) -> Coded | Tensor:
        """The tensor on the CPU, rows in the order of the file, floats in the model's dtype."""
        stored = self.stored.read() if isinstance(self.stored, Planned) else self.stored
        if isinstance(stored, Coded):
            coded = stored.to("cpu")
            return coded if self.order is None else coded.take_rows(self.order)
        loaded = stored.load().cpu()
        return loaded if self.order is None else loaded[self.order]

    def _float_pieces(self, loaded: Tensor) -> Iterator[Tensor]:
        """Values in their order, in the storage dtype; rounded to nearest even where that is narrower."""
        for piece in torch.split(loaded.reshape(-1), _PIECE):
            stored = piece.to(FloatType(self.type_name).dtype)
            if not bool(torch.isfinite(stored).all()):
                raise ExportError(
                    f"holds values that are not finite in {self.type_name}",
                    where=self.name,
                    todo="choose bf16 or f32 for this tensor, or check the checkpoint",
                )
            yield stored


def _raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, u8[n]."""
    flat = tensor.detach().contiguous().reshape(-1)
    as_bytes: np.ndarray = flat.view(torch.uint8).numpy()
    return as_bytes


def entries(model: QuantizedModel, plan: TargetPlan, layout: Layout) -> list[Entry]:
    """The file's tensors in the plan's order, not read yet; raises ExportError where they are not those planned."""
    check_complete(model, plan)
    made = []
    for planned in plan.tensors:
        order = row_order(planned.id, layout, model.desc.dims)
        made.append(
            Entry(
                planned.stored_as,
                planned.shape,
                planned.type_name,
                planned.n_bytes,
                Planned(model, planned),
                order,
            )
        )
    return made


def _check(planned: TensorPlan, stored: Stored) -> None:
    given = stored.grid.id if isinstance(stored, Coded) else "float"
    wanted = "float" if isinstance(planned.storage, FloatType) else planned.type_name
    if given != wanted or tuple(stored.shape) != planned.shape:
        raise ExportError(
            f"is {given} {tuple(stored.shape)}, planned was {planned.type_name} {planned.shape}",
            where=str(planned.id),
        )


def digest_all(made: Sequence[Entry], progress: Progress) -> Mapping[str, str]:
    """First pass: digest of every tensor's decoded values, by its name in the file. Largest tensors first."""
    jobs = sorted(made, key=lambda entry: -entry.n_values)
    found: dict[str, str] = {}
    done = each(jobs, Entry.digest, cost=_digest_cost, budget=BUDGET, in_order=False)
    with closing(done):
        for number, digest in done:
            progress(len(found), 2 * len(made), f"hash {jobs[number].name}")
            found[jobs[number].name] = digest
    return {entry.name: found[entry.name] for entry in made}


def _digest_cost(entry: Entry) -> int:
    """Bytes held while a tensor is hashed: its codes, or its values in at most f32; twice where rows are permuted."""
    once = entry.n_values * (4 if entry.is_float else 1)
    return once if entry.order is None else 2 * once


def _write_cost(entry: Entry) -> int:
    """Bytes held while a tensor is packed and waits to be written."""
    pieces = entry.n_bytes if entry.is_float else 0
    return _digest_cost(entry) + entry.n_bytes + pieces


class Told(np.ndarray):
    """An array whose `tofile`, which gguf-py calls, tells what the system says to every byte.

    numpy's own writes through a second, buffered stream, and takes no notice if its last bytes do not get to the disk.
    """

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:  # noqa: ARG002 numpy's names
        """Write all bytes to an open file; raises OSError."""
        if self.size:
            fid.write(np.ascontiguousarray(self).data.cast("B"))


def write_file(
    path: Path,
    architecture: str,
    keys: Sequence[KV],
    made: Sequence[Entry],
    progress: Progress,
    place: tuple[int, int] | None = None,
) -> int:
    """Second pass: header, metadata, tensors. Returns the bytes written; raises ExportError if the disk refuses.

    architecture: empty for a file that is not the first of its package. place: where these tensors stand among all
    of the package, (first, n), None if they are all.
    """
    writer = GGUFWriter(path, architecture)
    if not architecture:
        writer.kv_data[0].clear()
    for kv in keys:
        if kv.key != "general.architecture":
            writer.add_key_value(kv.key, kv.value, kv.type, kv.sub_type)
    for entry in made:
        # raw_dtype with a float dtype: the shape is taken as it is, in elements
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.n_bytes, entry.ggml_type)
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _write_data(writer, made, progress, *(place or (0, len(made))))
        finally:
            writer.close()
        return path.stat().st_size
    except OSError as error:
        raise ExportError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            todo="check space and permissions",
        ) from error


def _write_data(
    writer: GGUFWriter, made: Sequence[Entry], progress: Progress, first: int, n_all: int
) -> None:
    """The tensors' bytes; they are tensors first, first + 1, … of n_all that the package has."""
    packed = each(made, Entry.data, cost=_write_cost, budget=BUDGET, in_order=True)
    with closing(packed):
        for n, data in packed:
            entry = made[n]
            progress(n_all + first + n, 2 * n_all, f"write {entry.name}")
            if data.nbytes != entry.n_bytes:
                raise ExportError(
                    f"packs into {data.nbytes} bytes, planned were {entry.n_bytes}", where=entry.name
                )
            writer.write_tensor_data(data.view(Told))
    if first + len(made) == n_all:
        progress(2 * n_all, 2 * n_all, "written")
