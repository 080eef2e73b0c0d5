"""How precisely CUDA multiplies f32 matrices.

`tensor_cores` takes TF32 for the forward passes and the Gram matrices: inputs rounded to 11 significant bits, products
summed in f32. tools/LOG.md has what that changes. Everything that decides a code (factors, targets, sweeps) stays in
f32.
On a CPU there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_cores(is_wanted: bool = True) -> Iterator[None]:
    """Matrix products of f32 tensors on CUDA in TF32 (or, with False, in full f32) while inside."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = is_wanted
    try:
        yield
    finally:
        matmul.allow_tf32 = before
