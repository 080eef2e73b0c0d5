"""Some rows of a matrix at a time.

Rows are independent in everything but the column scales of DSQ, and what rounding needs beside the weights is several
times their size: for a head of 128256 × 4096 more than for a whole block. So a large matrix goes through in slabs.
Their size is fixed, since products of other shapes may differ in the last bit: no budget may change the result.
"""

from __future__ import annotations

#: Weights of a slab, at most. The matrices of an 8B model's blocks are one slab each.
SLAB_ELEMENTS = 1 << 27


def slabs(n_out: int, n_in: int) -> list[slice]:
    """Rows of each slab of a matrix `[n_out, n_in]`, in order: as few as can be, equally high but for the last."""
    n = max(-(-n_out * n_in // SLAB_ELEMENTS), 1)
    height = max(-(-n_out // n), 1)
    return [slice(start, min(start + height, n_out)) for start in range(0, n_out, height)]
