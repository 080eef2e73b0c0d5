"""Codes as bits: what the work directory stores of a matrix of codes. Nothing here knows a file format's blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Bits that a stored code may have.
WIDTHS = (1, 2, 4, 8)


def code_bits(levels: int) -> int:
    """Bits of one stored code: ceil(log2(levels)), brought up to a width that divides a byte."""
    return next(width for width in WIDTHS if levels <= 1 << width)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """u8[ceil(n · bits / 8)] from n codes below 2^bits (u8, any shape), on their device.

    With k = 8 / bits the codes, row by row, are cut into k runs of m = ceil(n / k), the last ones shorter or empty;
    byte j holds code j of run i at bit i · bits, 0 where the run has ended.
    Raises ValueError if a code needs more bits.
    """
    flat = codes.reshape(-1)
    if bits == 8 or not flat.numel():
        return flat.contiguous()
    if int(flat.max()) >> bits:
        raise ValueError(f"a code {int(flat.max())} does not fit into {bits} bits")
    m = math.ceil(flat.numel() * bits / 8)
    packed = flat[:m].clone()
    for i in range(1, 8 // bits):
        run = flat[i * m : (i + 1) * m]
        packed[: len(run)] |= run << (i * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes u8[shape] that `pack_codes` made `packed` of, on its device; raises ValueError for another length."""
    n = math.prod(shape)
    m = math.ceil(n * bits / 8)
    if packed.shape != (m,):
        raise ValueError(f"{tuple(packed.shape)} bytes are not {n} codes of {bits} bits")
    if bits == 8:
        return packed.reshape(tuple(shape))
    if packed.device.type == "cpu":
        # numpy asks the system for large pages, torch does not: touching fresh small ones takes longer than the rest.
        codes = torch.from_numpy(np.empty(n, dtype=np.uint8))
    else:
        codes = torch.empty(n, dtype=torch.uint8, device=packed.device)
    for i in range(8 // bits):
        run = codes[i * m : (i + 1) * m]
        torch.bitwise_right_shift(packed[: len(run)], i * bits, out=run)
        run &= (1 << bits) - 1
    return codes.reshape(tuple(shape))
