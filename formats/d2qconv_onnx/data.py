"""The data file: tensors one behind the other, each at a multiple of 64 bytes, written as a stream.

Matrices are read, packed and digested by several threads, with a bound on their memory, and written in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from d2qconv.errors import ExportError
from d2qconv.exporters.base import FloatType, Progress, TensorPlan
from d2qconv.exporters.planned import check_stored, digest
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import QuantizedModel
from d2qconv.threads import each
from d2qconv_onnx import codec

#: File name beside model.onnx; ONNX calls it the location of external data.
DATA = "model.onnx.data"
ALIGNMENT = 64
#: Bytes of tensors in memory at a time, or one tensor.
BUDGET = 1 << 29


@dataclass(frozen=True)
class Place:
    """Where an array stands in the data file. dtype: f32 or u8."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class DataFile:
    """What was written: every array by the name of its initializer, and the digest of every tensor's values."""

    places: Mapping[str, Place]
    decoded_sha256: Mapping[str, str]


@dataclass
class _Appender:
    file: BinaryIO
    places: dict[str, Place] = field(default_factory=dict)

    def add(self, name: str, values: np.ndarray) -> None:
        """Append an array at the next multiple of ALIGNMENT."""
        self.file.write(bytes(-self.file.tell() % ALIGNMENT))
        little = values.astype(values.dtype.newbyteorder("<"), copy=False)
        self.places[name] = Place(self.file.tell(), tuple(values.shape), values.dtype)
        self.file.write(np.ascontiguousarray(little).data)


@dataclass(frozen=True)
class _Ready:
    arrays: Mapping[str, np.ndarray]
    sha256: str


def write_data(
    path: Path,
    model: QuantizedModel,
    tensors: Sequence[TensorPlan],
    extra: Mapping[str, np.ndarray],
    progress: Progress,
) -> DataFile:
    """Write every planned tensor and the `extra` arrays; raises ExportError where a tensor is not the planned one."""
    digests: dict[str, str] = {}
    with path.open("xb") as file:
        appender = _Appender(file)
        for name, values in extra.items():
            appender.add(name, values)
        done = each(
            tensors,
            lambda plan: _ready(plan, model),
            cost=lambda t: 2 * _size(t),
            budget=BUDGET,
            in_order=True,
        )
        with closing(done):
            for number, ready in done:
                plan = tensors[number]
                progress(number, len(tensors), f"write {plan.stored_as}")
                for name, values in ready.arrays.items():
                    appender.add(name, values)
                digests[plan.stored_as] = ready.sha256
    return DataFile(appender.places, digests)


def _size(plan: TensorPlan) -> int:
    """Bytes of the codes in memory, one a weight, or of the floats."""
    return int(np.prod(plan.shape)) * (4 if isinstance(plan.storage, FloatType) else 1)


def _ready(plan: TensorPlan, model: QuantizedModel) -> _Ready:
    """Read a tensor, check it against its plan, pack it, digest its values."""
    stored = model.tensors[plan.id]
    check_stored(plan, stored)
    name = plan.stored_as
    if isinstance(stored, Coded):
        coded = stored.to("cpu")
        packed = codec.pack(coded)
        arrays = {
            f"{name}.codes": packed.codes,
            f"{name}.scales": packed.scales,
            f"{name}.zeros": packed.zeros,
        }
        return _Ready(arrays, digest(rows.numpy() for rows in coded.decoded_rows()))
    values = stored.load().cpu().to(torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise ExportError("holds values that are not finite", where=name, todo="check the checkpoint")
    return _Ready({name: values}, digest([values]))
