"""One digest over a whole checkpoint: reads every weight once, several tensors at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import msgspec
import torch

from d2qconv.checkpoint.dense import Dense
from d2qconv.names import TensorId
from d2qconv.threads import each

#: Bytes of tensors in memory at a time, or one tensor.
BUDGET = 2 << 30


def content_digest(
    config: Mapping[str, Any],
    tensors: Mapping[TensorId, Dense],
    on_step: Callable[[int, str], None],
    *,
    n_threads: int | None = None,
) -> str:
    """SHA-256, hex, over the config and every weight, whatever files they lie in and in which order.

    It is that of the config as JSON with sorted keys, followed for every tensor in the order of `str(id)` by its
    name, dtype, shape and the 32 bytes of the SHA-256 over its values, little endian, in the checkpoint's dtype.
    `Dense.load` refuses values that are not finite; what it raises is raised here. on_step: number of tensors done,
    and the name of the last one; called in the caller's thread, largest tensors first.
    """
    order = sorted(tensors, key=lambda t: (-tensors[t].n_elements, str(t)))
    found: dict[TensorId, bytes] = {}
    done = each(
        order,
        lambda tensor_id: _digest(tensors[tensor_id]),
        cost=lambda tensor_id: tensors[tensor_id].n_elements * tensors[tensor_id].dtype.itemsize,
        budget=BUDGET,
        in_order=False,
        n_threads=n_threads,
    )
    with closing(done):
        for number, digest in done:
            found[order[number]] = digest
            on_step(len(found), str(order[number]))
    sha = hashlib.sha256(msgspec.json.encode(config, order="sorted"))
    for tensor_id in sorted(tensors, key=str):
        dense = tensors[tensor_id]
        sha.update(f"\n{tensor_id} {dense.dtype} {tuple(dense.shape)}\n".encode())
        sha.update(found[tensor_id])
    return sha.hexdigest()


def _digest(dense: Dense) -> bytes:
    values = dense.load().contiguous().reshape(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().data).digest()
