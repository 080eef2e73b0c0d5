"""A quantized model as another format stores it: the same codes, the same values, other parameters.

See `d2qconv.grids.exact` for what is possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.exact import widened
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import QuantizedModel, Stored
from d2qconv.names import TensorId


def recoded(model: QuantizedModel, grids: Mapping[TensorId, AffineGrid]) -> QuantizedModel:
    """`model` with these matrices on these grids, which hold theirs; read and changed one at a time."""
    return replace(model, tensors=_Recoded(model.tensors, grids))


class _Recoded(Mapping[TensorId, Stored]):
    def __init__(self, tensors: Mapping[TensorId, Stored], grids: Mapping[TensorId, AffineGrid]) -> None:
        self._tensors, self._grids = tensors, grids

    def __getitem__(self, tensor: TensorId) -> Stored:
        stored, wide = self._tensors[tensor], self._grids.get(tensor)
        if wide is None or not isinstance(stored, Coded) or stored.grid == wide:
            return stored
        return replace(stored, grid=wide, params=widened(stored.grid, stored.params, wide))

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
