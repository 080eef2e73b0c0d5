"""How the float parameters of a grid are rounded, and rows times a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from d2qconv.errors import RunError
from d2qconv.grids.base import Exactness, Params


def stored(x: Tensor, dtype: torch.dtype, significand: int = 0) -> Tensor:
    """`x` rounded to `dtype`, before that to `significand` significant bits (0: all that the dtype has), ties to even.

    f16 has room for 11 significant bits. A step of fewer makes products with small integers exact in f16 itself, so
    that a runtime that multiplies there gets the value that one gets that multiplies in f32.
    """
    if significand:
        mantissa, exponent = torch.frexp(x)
        x = torch.ldexp(torch.round(mantissa * 2.0**significand) * 2.0**-significand, exponent)
    return x.to(dtype)


def top(dtype: torch.dtype, significand: int = 0) -> float:
    """The largest number that `stored` does not make infinite."""
    largest = torch.finfo(dtype).max
    return math.ldexp(1.0 - 2.0**-significand, math.frexp(largest)[1]) if significand else largest


def scaled_rows(
    params: Params, names: Sequence[str], scale: Tensor, where: str, significand: int = 0
) -> tuple[dict[str, Tensor], Exactness]:
    """Parameters `names`, `[n_out, n_blocks]`, times scale_i (f32[n_out]), rounded as `stored` does.

    The reported error is max |stored / wanted − 1| over all that are not zero: at most 2^-11 in f16, 2^-8 in bf16 and
    2^-24 in f32 (2^-significand if that is given), but up to 1 where a number is so small that the dtype has few bits
    left for it.
    Raises RunError if a product is larger than its dtype can hold.
    """
    factor = scale.to(torch.float64)[:, None]
    scaled = dict(params)
    worst = 0.0
    for name in names:
        dtype = params[name].dtype
        wanted = params[name].to(torch.float64) * factor
        found = stored(wanted, dtype, significand)
        if not bool(torch.isfinite(found).all()):
            kind = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(dtype, "f32")
            raise RunError(
                f"a row scale makes {name} {wanted.abs().max().item():.3g}, but {kind} ends at "
                f"{torch.finfo(dtype).max:.5g}",
                where=where,
                todo="the matrix or the scale has an outlier; leave the scale out or store the matrix as f16",
            )
        relative = torch.where(wanted == 0, 0.0, (found.to(torch.float64) - wanted) / wanted)
        worst = max(worst, relative.abs().max().item() if relative.numel() else 0.0)
        scaled[name] = found
    return scaled, Exactness(worst)
