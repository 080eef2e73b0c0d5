"""A quantized model as another format stores it: the same values, by its own codes and parameters.

See `d2qconv.grids.exact` for what is possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from d2qconv.grids.base import Grid
from d2qconv.grids.exact import placed
from d2qconv.ir.coded import Coded
from d2qconv.ir.model import QuantizedModel, Stored
from d2qconv.names import TensorId


def recoded(model: QuantizedModel, grids: Mapping[TensorId, Grid]) -> QuantizedModel:
    """`model` with these matrices on these grids, which hold theirs; read and changed one at a time."""
    return replace(model, tensors=_Recoded(model.tensors, grids))


class _Recoded(Mapping[TensorId, Stored]):
    def __init__(self, tensors: Mapping[TensorId, Stored], grids: Mapping[TensorId, Grid]) -> None:
        self._tensors, self._grids = tensors, grids

    def __getitem__(self, tensor: TensorId) -> Stored:
        stored, wide = self._tensors[tensor], self._grids.get(tensor)
        if wide is None or not isinstance(stored, Coded) or stored.grid == wide:
            return stored
        codes, params = placed(stored.grid, stored.codes, stored.params, wide)
        return replace(stored, grid=wide, codes=codes, params=params)

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
