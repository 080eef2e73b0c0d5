"""Codes as bits: what the work directory stores of a matrix of codes. Nothing here knows a file format's blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Bits that a stored code may have: parts of a byte, or whole bytes.
WIDTHS = (1, 2, 4, 8, 16, 24, 32)


def code_bits(levels: int) -> int:
    """Bits of one stored code: ceil(log2(levels)), brought up to one of WIDTHS."""
    return next(width for width in WIDTHS if levels <= 1 << width)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """u8[ceil(n · bits / 8)] from n codes below 2^bits (u8, or i32 above 8 bits; any shape), on their device.

    Above 8 bits: all lowest bytes, then all second ones, and so on. Else, with k = 8 / bits, the codes, row by row, are
    cut into k runs of m = ceil(n / k), the last ones shorter or empty;
    byte j holds code j of run i at bit i · bits, 0 where the run has ended.
    Raises ValueError if a code needs more bits.
    """
    flat = codes.reshape(-1)
    if bits == 8 or not flat.numel():
        return flat.to(torch.uint8).contiguous()
    if int(flat.max()) >> bits:
        raise ValueError(f"a code {int(flat.max())} does not fit into {bits} bits")
    if bits > 8:
        return torch.cat([(flat >> shift & 255).to(torch.uint8) for shift in range(0, bits, 8)])
    m = math.ceil(flat.numel() * bits / 8)
    packed = flat[:m].clone()
    for i in range(1, 8 // bits):
        run = flat[i * m : (i + 1) * m]
        packed[: len(run)] |= run << (i * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes [shape] that `pack_codes` made `packed` of, on its device; raises ValueError for another length."""
    n = math.prod(shape)
    m = math.ceil(n * bits / 8)
    if packed.shape != (m,):
        raise ValueError(f"{tuple(packed.shape)} bytes are not {n} codes of {bits} bits")
    if bits == 8:
        return packed.reshape(tuple(shape))
    if bits > 8:
        wide = torch.zeros(n, dtype=torch.int32, device=packed.device)
        for place, part in enumerate(packed.view(bits // 8, n)):
            wide |= part.to(torch.int32) << 8 * place
        return wide.reshape(tuple(shape))
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
