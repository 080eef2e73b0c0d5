"""The weights of a package: every planned tensor in its dialect's arrays, written as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import ExportError
from d2qconv.exporters.base import FloatType, Progress, TensorPlan
from d2qconv.exporters.planned import check_stored, digest
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import QuantizedModel, Stored
from d2qconv.names import TensorId
from d2qconv.threads import each
from d2qconv_hf.dialects.base import Array, Dialect
from d2qconv_hf.shards import ShardWriter, split, write_index

#: Bytes of tensors in memory at a time, or one tensor.
BUDGET = 1 << 29
#: Bytes in memory, decoded values among them, for one byte of the package.
_IN_MEMORY = 8


@dataclass(frozen=True)
class Weights:
    """What is written. zeros: biases that the label has and the model has not, with their lengths, of type dtype."""

    dialect: Dialect
    tensors: Sequence[TensorPlan]
    zeros: Mapping[TensorId, int]
    dtype: torch.dtype

    def write(self, model: QuantizedModel, folder: Path, most: int, progress: Progress) -> dict[str, str]:
        """Write shards of at most `most` bytes; returns the digests of the decoded values by name.

        Raises ExportError for a tensor that is not the planned one, or that its float type does not hold.
        """
        shards = split(self._layout(model.desc), most)
        digests: dict[str, str] = {}
        with ExitStack() as stack:
            writer = ShardWriter(folder, shards, stack)
            done = each(
                self.tensors,
                lambda planned: self._ready(model, planned),
                cost=lambda planned: _IN_MEMORY * planned.n_bytes,
                budget=BUDGET,
                in_order=True,
            )
            with closing(done):
                for number, (tensors, sha256) in done:
                    planned = self.tensors[number]
                    progress(number, len(self.tensors), f"write {planned.stored_as}")
                    for name, tensor in tensors.items():
                        writer.add(name, tensor)
                    digests[planned.stored_as] = sha256
            for tensor_id, n in self.zeros.items():
                writer.add(stored_name(model.desc, tensor_id), torch.zeros(n, dtype=self.dtype))
        write_index(folder, shards)
        return digests

    def _layout(self, desc: ModelDesc) -> dict[str, Array]:
        """Every array of the package in its order."""
        found: dict[str, Array] = {}
        for planned in self.tensors:
            if isinstance(planned.storage, AffineGrid):
                shape = planned.shape[0], planned.shape[1]
                found |= self.dialect.layout(module_name(desc, planned.id), planned.storage, shape)
            else:
                assert isinstance(planned.storage, FloatType), "what is no grid is a float type"
                found[planned.stored_as] = Array(planned.storage.dtype, planned.shape)
        return found | {stored_name(desc, t): Array(self.dtype, (n,)) for t, n in self.zeros.items()}

    def _ready(self, model: QuantizedModel, planned: TensorPlan) -> tuple[dict[str, Tensor], str]:
        """A tensor's arrays and the digest of its values."""
        stored = model.tensors[planned.id]
        if isinstance(planned.storage, FloatType):
            if isinstance(stored, Coded) and planned.storage is FloatType.F32:
                stored = Dense.of(stored.decode())
            check_stored(planned, stored)
            return _floats(planned, stored, planned.storage)
        check_stored(planned, stored)
        assert isinstance(stored, Coded), "what is planned on a grid has codes"
        coded = stored.to("cpu")
        arrays = self.dialect.arrays(module_name(model.desc, planned.id), coded)
        return arrays, digest(rows.numpy() for rows in coded.decoded_rows())


def module_name(model: ModelDesc, tensor: TensorId) -> str:
    """The checkpoint's name of a tensor's module: `model.layers.0.mlp.up_proj`."""
    site = model.arch.site(tensor.role)
    assert site is not None, f"{model.arch.id} has no {tensor.role}"
    return site.module.format(i=tensor.block)


def stored_name(model: ModelDesc, tensor: TensorId) -> str:
    """The name of a tensor that is stored as floats."""
    return f"{module_name(model, tensor)}.{tensor.part}"


def _floats(planned: TensorPlan, stored: Stored, storage: FloatType) -> tuple[dict[str, Tensor], str]:
    assert isinstance(stored, Dense), "floats have no codes"
    values = stored.load().cpu().to(storage.dtype)
    if not bool(torch.isfinite(values).all()):
        raise ExportError(
            f"holds values that {storage} does not",
            where=planned.stored_as,
            todo="add --dtype bfloat16, or check the checkpoint",
        )
    return {planned.stored_as: values}, digest([values.float().numpy()])
