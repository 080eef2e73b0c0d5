"""`round_panel` as one CUDA kernel, by Triton, for grids whose groups are lattices.

A program holds the panel's columns of some rows as one tile in registers and walks over the columns. What
`round_panel` does with about forty launches a column is one launch a panel. Floating-point contraction is off and
division is IEEE, so that the result is the same to the bit.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from d2qconv.grids.base import Lattice
from d2qconv.quant.panel import Panel

#: Rows of one program for a panel of 16 columns; fewer for wider ones, so that the tile stays in registers.
_TILE = 2048
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _nearest_integer(x):  # type: ignore[no-untyped-def]
    """Ties to even; the compiled form has an instruction for it."""
    return libdevice.rint(x)


@triton.jit
def _nearest_integer_interpreted(x):  # type: ignore[no-untyped-def]
    """The same for |x| < 2²², where the codes are decided: adding 1.5 · 2²³ leaves no fraction."""
    big = 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, (x + big) - big, x)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    rest, factor, factor_stride, step, zero, offset, column_scale, codes, errors, drift, drift_stride,
    pull, old, table, n_out, top, n, step_stride, zero_stride, offset_stride,
    HAS_OFFSET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_DRIFT: tl.constexpr, HAS_PULL: tl.constexpr,
    HAS_OLD: tl.constexpr, TABLE: tl.constexpr, INTERPRETED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n_out
    at = column[:, None] * n_out + row[None, :]
    is_there = (column < n)[:, None] & is_row[None, :]
    w = tl.load(rest + at, mask=is_there, other=0.0)
    d = tl.load(step + row * step_stride, mask=is_row, other=1.0)
    z = tl.load(zero + row * zero_stride, mask=is_row, other=0.0)
    if HAS_OFFSET:
        b = tl.load(offset + row * offset_stride, mask=is_row, other=0.0)
    divisor = tl.where(d == 0, float("inf"), d)
    for j in range(n):
        mine = tl.sum(tl.where(column[:, None] == j, w, 0.0), axis=0)
        tl.store(rest + j * n_out + row, mine, mask=is_row)
        r = mine
        if HAS_SCALE:
            c = tl.load(column_scale + j)
            r = tl.math.div_rn(r, tl.zeros_like(r) + c)
        if HAS_OFFSET:
            r = r + b
        ratio = tl.math.div_rn(r, divisor)
        if TABLE > 0:
            code = tl.zeros_like(row)
            for k in range(TABLE - 1):
                boundary = (tl.load(table + k) + tl.load(table + k + 1)) * 0.5
                code += (ratio > boundary).to(tl.int32)
            q = tl.load(table + code)
            tl.store(codes + j * n_out + row, code.to(tl.uint8), mask=is_row)
        else:
            q = _nearest_integer_interpreted(ratio) if INTERPRETED else _nearest_integer(ratio)
            q = tl.minimum(tl.maximum(q, -z), top - z)
            tl.store(codes + j * n_out + row, (q + z).to(tl.uint8), mask=is_row)
        value = q * d
        if HAS_OFFSET:
            value = value - b
        if HAS_SCALE:
            value = value * c
        if HAS_OLD:
            e = value - tl.load(old + j * n_out + row, mask=is_row, other=0.0)
        else:
            pivot = tl.load(factor + j * factor_stride + j)
            e = tl.math.div_rn(mine - value, tl.zeros_like(mine) + pivot)
        tl.store(errors + j * n_out + row, e, mask=is_row)
        is_later = (column > j) & (column < n)
        u = tl.load(factor + j * factor_stride + column, mask=is_later, other=0.0)
        w = w - u[:, None] * e[None, :]
        if HAS_DRIFT:
            v = mine
            if HAS_PULL:
                v = tl.load(pull + j * n_out + row, mask=is_row, other=0.0)
            p = tl.load(drift + j * drift_stride + column, mask=is_later, other=0.0)
            w = w + p[:, None] * v[None, :]


def round_panel(panel: Panel, lattice: Lattice, codes: torch.Tensor, errors: torch.Tensor) -> None:
    """See `d2qconv.quant.panel.round_panel`. lattice: its column scale in the panel's order. All on one CUDA device."""
    n, n_out = panel.rest.shape
    columns = triton.next_power_of_2(n)
    rows = max(_TILE // columns, 16)
    none = panel.rest
    _kernel[(triton.cdiv(n_out, rows),)](
        panel.rest, panel.factor, panel.factor.stride(0), lattice.step, lattice.zero,
        none if lattice.offset is None else lattice.offset,
        none if lattice.column_scale is None else lattice.column_scale,
        codes, errors,
        none if panel.drift is None else panel.drift,
        0 if panel.drift is None else panel.drift.stride(0),
        none if panel.pull is None else panel.pull,
        none if panel.old is None else panel.old,
        none if lattice.table is None else lattice.table,
        n_out, float(lattice.levels - 1), n,
        int(lattice.step.numel() > 1), int(lattice.zero.numel() > 1),
        int(lattice.offset is not None and lattice.offset.numel() > 1),
        HAS_OFFSET=lattice.offset is not None, HAS_SCALE=lattice.column_scale is not None,
        HAS_DRIFT=panel.drift is not None, HAS_PULL=panel.pull is not None,
        HAS_OLD=panel.old is not None, TABLE=0 if lattice.table is None else lattice.levels,
        INTERPRETED=_IS_INTERPRETED, COLUMNS=columns, ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip
