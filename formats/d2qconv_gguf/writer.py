"""Streams a GGUF: two passes over the tensors, one tensor in memory at a time.

The first pass decodes every tensor to f32 in the file's own row order and takes its SHA-256; the digests go into the
metadata, which stands before the data. The second pass writes. Container layout: ggml's `docs/gguf.md`, by `gguf-py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from d2qconv.errors import ExportError
from d2qconv.export.base import FloatType, Progress, TargetPlan, TensorPlan
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import QuantizedModel, Stored
from d2qconv_gguf.codecs import CODECS
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.names import Layout, row_order
from d2qconv_gguf.types import GGML_TYPES


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
    stored: Stored
    order: Tensor | None = None

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        """The storage type as ggml has it."""
        return GGML_TYPES[self.type_name]

    def data(self) -> np.ndarray:
        """The bytes as they stand in the file, u8[n_bytes]."""
        if isinstance(self.stored, Coded):
            packed = CODECS[self.type_name].pack(self._coded())
            return np.ascontiguousarray(packed).reshape(-1)
        return _raw(self._float())

    def digest(self) -> str:
        """SHA-256 of the decoded values, f32 little endian, row by row in the file's order."""
        values = self._coded().decode() if isinstance(self.stored, Coded) else self._float().to(torch.float32)
        return hashlib.sha256(_raw(values).data).hexdigest()

    def _coded(self) -> Coded:
        assert isinstance(self.stored, Coded)
        coded = self.stored.to("cpu")
        return coded if self.order is None else coded.take_rows(self.order)

    def _float(self) -> Tensor:
        """The tensor in its storage dtype; rounded to nearest even where that is narrower than the source."""
        assert not isinstance(self.stored, Coded)
        loaded = self.stored.load().cpu()
        if self.order is not None:
            loaded = loaded[self.order]
        stored = loaded.to(FloatType(self.type_name).dtype)
        if not bool(torch.isfinite(stored).all()):
            raise ExportError(
                f"holds values that are not finite in {self.type_name}",
                where=self.name,
                todo="choose bf16 or f32 for this tensor, or check the checkpoint",
            )
        return stored


def _raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, u8[n]."""
    flat = tensor.detach().contiguous().reshape(-1)
    as_bytes: np.ndarray = flat.view(torch.uint8).numpy()
    return as_bytes


def entries(model: QuantizedModel, plan: TargetPlan, layout: Layout) -> list[Entry]:
    """The file's tensors in the plan's order; raises ExportError where the model is not what was planned."""
    missing = [str(t.id) for t in plan.tensors if t.id not in model.tensors]
    extra = [str(i) for i in model.tensors if i not in plan.by_id]
    if missing or extra:
        raise ExportError(
            f"the quantized model is not what was planned: missing {missing or 'none'}, unplanned {extra or 'none'}"
        )
    made = []
    for planned in plan.tensors:
        stored = model.tensors[planned.id]
        _check(planned, stored)
        order = row_order(planned.id, layout, model.desc.dims)
        made.append(
            Entry(planned.stored_as, planned.shape, planned.type_name, planned.n_bytes, stored, order)
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
    """First pass: digest of every tensor's decoded values, by its name in the file."""
    found = {}
    for n, entry in enumerate(made):
        progress(n, 2 * len(made), f"hash {entry.name}")
        found[entry.name] = entry.digest()
    return found


def write_file(
    path: Path, architecture: str, keys: Sequence[KV], made: Sequence[Entry], progress: Progress
) -> int:
    """Second pass: header, metadata, tensors. Returns the bytes written; raises ExportError if the disk refuses."""
    writer = GGUFWriter(path, architecture)
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
            for n, entry in enumerate(made):
                progress(len(made) + n, 2 * len(made), f"write {entry.name}")
                data = entry.data()
                if data.nbytes != entry.n_bytes:
                    raise ExportError(
                        f"packs into {data.nbytes} bytes, planned were {entry.n_bytes}", where=entry.name
                    )
                writer.write_tensor_data(data)
        finally:
            writer.close()
        progress(2 * len(made), 2 * len(made), "written")
        return path.stat().st_size
    except OSError as error:
        raise ExportError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            todo="check space and permissions",
        ) from error
