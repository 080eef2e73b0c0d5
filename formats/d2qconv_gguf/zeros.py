"""A padded model in a file: which widths were filled up, and whether a reader decodes what was added as 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from d2qconv.arch.spec import Dim, Dims, ModelDesc
from d2qconv.exporters.base import Check
from d2qconv.names import Part
from d2qconv_gguf.container import GgufFile, StoredTensor
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.names import gguf_name

HIDDEN, FFN = "d2qconv.padding.hidden", "d2qconv.padding.ffn"


def padding_keys(desc: ModelDesc) -> list[KV]:
    """The source's own widths, where the file's are larger."""
    if desc.unpadded is None:
        return []
    return [KV.count(HIDDEN, desc.unpadded.hidden), KV.count(FFN, desc.unpadded.ffn)]


def padding_check(file: GgufFile, model: ModelDesc) -> Check | None:
    """Whether the padding is exact zeros, decoded by gguf-py; None for a model without.

    Looked at are the embedding's columns, the rows and biases of what writes to the residual stream and of gate and up,
    and the gains: what they hold makes everything else that was added meaningless.
    """
    hidden, ffn = file.get(HIDDEN, int), file.get(FFN, int)
    if hidden is None or ffn is None:
        return None
    real = replace(model.dims, hidden=hidden, ffn=ffn)
    wrong, n = [], 0
    for name, values in _added(file, model, real):
        n += values.size
        wrong += [name] if values.any() else []
    shown = f"hidden {hidden} of {model.dims.hidden}, ffn {ffn} of {model.dims.ffn}"
    if wrong:
        return Check("padding", f"{shown}: not 0 in {', '.join(wrong[:5])}", False)
    return Check("padding", f"{shown}, {n:,} values are exactly 0", n > 0)


def _added(file: GgufFile, model: ModelDesc, real: Dims) -> Iterator[tuple[str, np.ndarray]]:
    """What was added to each tensor that must be 0 there, by its name."""
    residual = model.arch.residual
    assert residual is not None, "only such models are padded"
    for tensor in model.tensors:
        stored, site = file.tensors[gguf_name(tensor)], model.arch.site(tensor.role)
        assert site is not None, "a tensor has a site"
        n_rows = real.size(site.n_out)
        if site.n_out in (Dim.HIDDEN, Dim.FFN) and n_rows < stored.shape[0]:
            yield stored.name, _rows(stored, n_rows)
        if tensor.role is residual.source and tensor.part is Part.WEIGHT and real.hidden < stored.shape[1]:
            for piece in stored.pieces():
                yield stored.name, piece.reshape(-1, stored.shape[1])[:, real.hidden :]


def _rows(stored: StoredTensor, first: int) -> np.ndarray:
    """Decoded values of the rows first, first + 1, …; of a vector the elements."""
    if len(stored.shape) == 1:
        return stored.values()[first:]
    shape = (stored.shape[0] - first, stored.shape[1])
    return replace(stored, shape=shape, data=stored.data[first:]).values()
