"""Rows times a number, for grids whose values are linear in some float parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2qconv.errors import RunError
from d2qconv.grids.base import Exactness, Params


def scaled_rows(
    params: Params, names: Sequence[str], scale: Tensor, where: str
) -> tuple[dict[str, Tensor], Exactness]:
    """Parameters `names`, `[n_out, n_blocks]`, times scale_i (f32[n_out]), rounded once to their own dtypes.

    The reported error is max |stored / wanted − 1| over all that are not zero: at most 2^-11 in f16, 2^-8 in bf16 and
    2^-24 in f32, but up to 1 where a number is so small that the dtype has few bits left for it.
    Raises RunError if a product is larger than its dtype can hold.
    """
    factor = scale.to(torch.float64)[:, None]
    scaled = dict(params)
    worst = 0.0
    for name in names:
        dtype = params[name].dtype
        wanted = params[name].to(torch.float64) * factor
        stored = wanted.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            kind = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(dtype, "f32")
            raise RunError(
                f"a row scale makes {name} {wanted.abs().max().item():.3g}, but {kind} ends at "
                f"{torch.finfo(dtype).max:.5g}",
                where=where,
                todo="the matrix or the scale has an outlier; leave the scale out or store the matrix as f16",
            )
        relative = torch.where(wanted == 0, 0.0, (stored.to(torch.float64) - wanted) / wanted)
        worst = max(worst, relative.abs().max().item() if relative.numel() else 0.0)
        scaled[name] = stored
    return scaled, Exactness(worst)
