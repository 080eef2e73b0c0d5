"""Fits and refits of Q2_K, Q4_K and Q5_K as CUDA kernels, by Triton; `affine_search` and `affine_k` say what they do.

One launch does a step for all rows, groups and pairs (d, dmin): twelve launches are a fit, two a refit. Every round
of `polish` keeps its state, and the best of all rounds and pairs is taken at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2qconv.grids.base import Params
from d2qconv.grids.constants import constant
from d2qconv_gguf.grids.affine_search import SUPER_RELATIVE, AffineShape
from d2qconv_gguf.grids.problem_triton import (
    MOST_ROWS,
    OPTIONS,
    UNALIGNED,
    Prepared,
    best_of,
    clip,
    code_sums,
    divide,
    half,
    inverse,
    moments,
    pick,
    residual,
    rint,
    rows_of,
    storable,
    tile,
    whole_copy,
)

#: Rows of a program that holds one number of each.
_ROWS = 128
#: As `AffineK.refit` has it.
_REFIT_REACH = 4


@triton.jit  # type: ignore[untyped-decorator]
def _free_fit(  # type: ignore[no-untyped-def]
    at, stride, shrink, a, is_row, starts, N_STARTS: tl.constexpr, N_ITERATIONS: tl.constexpr,
    TOP: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """See `free_fit`: step, offset, q, qq, qw, and the group's sum_w, sum_ww."""
    low, high, sum_w, sum_ww = moments(at, stride, shrink, a, is_row, SIZE)
    low = tl.minimum(low, 0.0)
    width = high - low
    k = tl.arange(0, K)[:, None]
    below = tl.load(starts + 2 * k, mask=k < N_STARTS, other=0.0)
    above = tl.load(starts + 2 * k + 1, mask=k < N_STARTS, other=0.0)
    offset = tl.maximum(-(low + below * width), 0.0)
    step = width * (1 - below - above)
    step = tl.maximum(divide(step, tl.zeros_like(step) + TOP), 0.0)
    error = tl.zeros_like(step)
    q = error
    qq = error
    qw = error
    for _ in range(N_ITERATIONS):
        q, qq, qw = code_sums(at, stride, shrink, a, is_row, step, offset, 0.0, TOP, SIZE)
        variance = qq - q * q
        fitted = divide(qw - q * sum_w, tl.maximum(variance, 1e-30))
        step = tl.where(variance > 1e-6 * qq, fitted, step)
        offset = step * q - sum_w
        through_zero = tl.where(qq > 0, divide(qw, tl.maximum(qq, 1e-30)), step)
        step = tl.maximum(tl.where(offset < 0, through_zero, step), 0.0)
        offset = tl.maximum(offset, 0.0)
        error = sum_ww + step * step * qq - 2 * step * qw + offset * (offset + 2 * sum_w - 2 * step * q)
    found = best_of(error, k < N_STARTS)
    q, qq, qw = pick(q, found), pick(qq, found), pick(qw, found)
    return pick(step, found), pick(offset, found), q, qq, qw, sum_w, sum_ww


@triton.jit  # type: ignore[untyped-decorator]
def _choose_inner(  # type: ignore[no-untyped-def]
    at, stride, shrink, a, is_row, d, dmin, aim_step, aim_q, sum_w, sum_ww,
    REACH: tl.constexpr, TOP: tl.constexpr, TOP_SCALE: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """See `choose_inner`: error, sc, m."""
    k = tl.arange(0, K)[:, None]
    sc = clip(rint(aim_step * inverse(d)) + (k // 3 - REACH).to(tl.float32), 0.0, TOP_SCALE)
    step = sc * d
    m = rint((step * aim_q - sum_w) * inverse(dmin)) + (k % 3 - 1).to(tl.float32)
    m = clip(m, 0.0, TOP_SCALE)
    error = residual(at, stride, shrink, a, is_row, step, m * dmin, 0.0, TOP, SIZE)
    found = best_of(error, k < 3 * (2 * REACH + 1))
    error, sc, m = pick(error, found), pick(sc, found), pick(m, found)
    is_nothing = sum_ww < error
    return tl.where(is_nothing, sum_ww, error), tl.where(is_nothing, 0.0, sc), tl.where(is_nothing, 0.0, m)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _free(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, starts, out, N_STARTS: tl.constexpr, N_ITERATIONS: tl.constexpr,
    TOP: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`free_fit` of one group. out: f32[7, G, n]."""
    row, is_row, at, shrink, _ = rows_of(w, row_stride, scale, n, ROWS)
    group = tl.program_id(1)
    step, offset, q, qq, qw, sum_w, sum_ww = _free_fit(
        at + group.to(tl.int64) * SIZE * stride, stride, shrink, a + group * SIZE, is_row, starts,
        N_STARTS, N_ITERATIONS, TOP, SIZE, K,
    )  # fmt: skip
    to = out + group * n + row
    plane = GROUPS * n
    tl.store(to, step, mask=is_row)
    tl.store(to + plane, offset, mask=is_row)
    tl.store(to + 2 * plane, q, mask=is_row)
    tl.store(to + 3 * plane, qq, mask=is_row)
    tl.store(to + 4 * plane, qw, mask=is_row)
    tl.store(to + 5 * plane, sum_w, mask=is_row)
    tl.store(to + 6 * plane, sum_ww, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _super_scales(  # type: ignore[no-untyped-def]
    free, scale, share, relative, d_out, dmin_out, n, N: tl.constexpr, KEEP: tl.constexpr,
    TOP_SCALE: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `super_scales`. free: f32[7, G, n] of `_free`. d_out, dmin_out: f32[KEEP, n]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    is_row = row < n
    plane = GROUPS * n
    most = tl.load(free + row, mask=is_row, other=0.0)
    most_offset = tl.load(free + plane + row, mask=is_row, other=0.0)
    for g in range(1, GROUPS):
        most = tl.maximum(most, tl.load(free + g * n + row, mask=is_row, other=0.0))
        most_offset = tl.maximum(most_offset, tl.load(free + plane + g * n + row, mask=is_row, other=0.0))
    factor = tl.load(scale + row, mask=is_row, other=1.0)
    k = tl.arange(0, K)[:, None]
    d = storable(divide(most, tl.load(relative + k // N, mask=k < N * N, other=1.0) * TOP_SCALE), factor)
    dmin = storable(divide(most_offset, tl.load(relative + k % N) * TOP_SCALE), factor)
    inverse_d = inverse(d)
    inverse_dmin = inverse(dmin)
    error = tl.zeros_like(d)
    for g in range(GROUPS):
        at = free + g * n + row
        free_step = tl.load(at, mask=is_row, other=0.0)
        q = tl.load(at + 2 * plane, mask=is_row, other=0.0)
        qq = tl.load(at + 3 * plane, mask=is_row, other=0.0)
        qw = tl.load(at + 4 * plane, mask=is_row, other=0.0)
        sum_w = tl.load(at + 5 * plane, mask=is_row, other=0.0)
        sum_ww = tl.load(at + 6 * plane, mask=is_row, other=0.0)
        step = clip(rint(free_step * inverse_d), 0.0, TOP_SCALE) * d
        wanted = step * q - sum_w
        fixed = sum_ww + step * step * qq - 2 * step * qw
        offset = clip(rint(wanted * inverse_dmin), 0.0, TOP_SCALE) * dmin
        error += (fixed + offset * (offset - 2 * wanted)) * tl.load(share + g)
    is_left = (k < N * N) & (error == error)
    for i in range(KEEP):
        found = best_of(error, is_left)
        tl.store(d_out + i * n + row, pick(d, found), mask=is_row)
        tl.store(dmin_out + i * n + row, pick(dmin, found), mask=is_row)
        is_left = is_left & (found == 0)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, d, dmin, aim_step, aim_q, aim_stride, sum_w, sum_ww, sc_out, m_out, sums,
    step_out, PAIRS: tl.constexpr, TOP: tl.constexpr, TOP_SCALE: tl.constexpr, SIZE: tl.constexpr,
    GROUPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`choose_inner` of one group and pair, and the sums under its codes.

    d, dmin: f32[P, n]. aim_step, aim_q: f32[P, G, n], or f32[G, n] with aim_stride 0. sc_out, m_out: u8[P, G, n].
    sums: f32[4, P, G, n]: q, qq, qw, error. step_out: f32[P, G, n].
    """
    row, is_row, at, shrink, _ = rows_of(w, row_stride, scale, n, ROWS)
    group = tl.program_id(1)
    pair = tl.program_id(2)
    d_here = tl.load(d + pair * n + row, mask=is_row, other=0.0)
    dmin_here = tl.load(dmin + pair * n + row, mask=is_row, other=0.0)
    aim = pair * aim_stride + group * n + row
    aimed_step = tl.load(aim_step + aim, mask=is_row, other=0.0)
    aimed_q = tl.load(aim_q + aim, mask=is_row, other=0.0)
    sum_w_here = tl.load(sum_w + group * n + row, mask=is_row, other=0.0)
    sum_ww_here = tl.load(sum_ww + group * n + row, mask=is_row, other=0.0)
    at += group.to(tl.int64) * SIZE * stride
    mine = a + group * SIZE
    error, sc, m = _choose_inner(
        at, stride, shrink, mine, is_row, d_here, dmin_here, aimed_step, aimed_q, sum_w_here, sum_ww_here,
        1, TOP, TOP_SCALE, SIZE, K,
    )  # fmt: skip
    step = sc * d_here
    q, qq, qw = code_sums(at, stride, shrink, mine, is_row, step, m * dmin_here, 0.0, TOP, SIZE)
    to = (pair * GROUPS + group) * n + row
    plane = PAIRS * GROUPS * n
    tl.store(sc_out + to, sc.to(tl.uint8), mask=is_row)
    tl.store(m_out + to, m.to(tl.uint8), mask=is_row)
    tl.store(step_out + to, step, mask=is_row)
    tl.store(sums + to, q, mask=is_row)
    tl.store(sums + plane + to, qq, mask=is_row)
    tl.store(sums + 2 * plane + to, qw, mask=is_row)
    tl.store(sums + 3 * plane + to, error, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _solve(  # type: ignore[no-untyped-def]
    sc, m, sums, sum_w, share, scale, d, dmin, total_out, d_out, dmin_out, n,
    PAIRS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The block's error, and `_least_squares_super` of one pair. total_out, d_out, dmin_out: f32[P, n]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n
    pair = tl.program_id(1)
    plane = PAIRS * GROUPS * n
    total = tl.zeros([ROWS], tl.float32)
    dd = total
    dm = total
    mm = total
    dw = total
    mw = total
    for g in range(GROUPS):
        at = (pair * GROUPS + g) * n + row
        x = tl.load(sc + at, mask=is_row, other=0).to(tl.float32)
        y = tl.load(m + at, mask=is_row, other=0).to(tl.float32)
        weight = tl.load(share + g)
        dd += weight * x * x * tl.load(sums + plane + at, mask=is_row, other=0.0)
        dm += weight * x * y * tl.load(sums + at, mask=is_row, other=0.0)
        mm += weight * y * y
        dw += weight * x * tl.load(sums + 2 * plane + at, mask=is_row, other=0.0)
        mw += weight * y * tl.load(sum_w + g * n + row, mask=is_row, other=0.0)
        total += tl.load(sums + 3 * plane + at, mask=is_row, other=0.0) * weight
    at = pair * n + row
    old_d = tl.load(d + at, mask=is_row, other=0.0)
    old_dmin = tl.load(dmin + at, mask=is_row, other=0.0)
    det = dd * mm - dm * dm
    is_regular = det > 1e-6 * dd * mm
    safe = tl.where(is_regular, det, 1.0)
    new_d = tl.where(is_regular, divide(dw * mm - dm * mw, safe), old_d)
    new_dmin = tl.where(is_regular, divide(dm * dw - dd * mw, safe), old_dmin)
    only_d = (mm == 0) & (dd > 0)
    new_d = tl.where(only_d, divide(dw, tl.where(only_d, dd, 1.0)), new_d)
    is_usable = (new_d > 0) & (new_dmin >= 0)
    factor = tl.load(scale + row, mask=is_row, other=1.0)
    tl.store(total_out + at, total, mask=is_row)
    tl.store(d_out + at, storable(tl.where(is_usable, new_d, old_d), factor), mask=is_row)
    tl.store(dmin_out + at, storable(tl.where(is_usable, new_dmin, old_dmin), factor), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    total, d, dmin, sc, m, scale, d_out, dmin_out, sc_out, m_out, n,
    ROUNDS: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The best of all states, as stored: f16[n], f16[n], u8[n, G], u8[n, G].

    total, d, dmin: f32[ROUNDS, P, n] (d and dmin have more behind). sc, m: u8[ROUNDS, P, G, n].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n
    best = tl.load(total + row, mask=is_row, other=0.0)
    state = tl.zeros([ROWS], tl.int32)
    for pair in range(PAIRS):
        for number in range(ROUNDS):
            i = number * PAIRS + pair
            found = tl.load(total + i * n + row, mask=is_row, other=0.0)
            state = tl.where(found < best, i, state)
            best = tl.minimum(best, found)
    factor = tl.load(scale + row, mask=is_row, other=1.0)
    d_here = tl.load(d + state * n + row, mask=is_row, other=0.0)
    dmin_here = tl.load(dmin + state * n + row, mask=is_row, other=0.0)
    tl.store(d_out + row, half(d_here, factor), mask=is_row)
    tl.store(dmin_out + row, half(dmin_here, factor), mask=is_row)
    for g in range(GROUPS):
        at = (state * GROUPS + g) * n + row
        tl.store(sc_out + row * GROUPS + g, tl.load(sc + at, mask=is_row, other=0), mask=is_row)
        tl.store(m_out + row * GROUPS + g, tl.load(m + at, mask=is_row, other=0), mask=is_row)


@triton.jit(do_not_specialize=["group"], do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _refit(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, starts, d, d_stride, dmin, dmin_stride, sc, sc_stride, m, m_stride,
    sc_out, m_out, out_stride, group, N_STARTS: tl.constexpr, N_ITERATIONS: tl.constexpr, REACH: tl.constexpr,
    TOP: tl.constexpr, TOP_SCALE: tl.constexpr, SIZE: tl.constexpr,
    K_FREE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `AffineK.refit`. out_stride: from a row of sc_out and m_out to the next."""
    row, is_row, at, shrink, factor = rows_of(w, row_stride, scale, n, ROWS)
    d_here = divide(tl.load(d + row * d_stride, mask=is_row, other=0.0).to(tl.float32), factor)
    dmin_here = divide(tl.load(dmin + row * dmin_stride, mask=is_row, other=0.0).to(tl.float32), factor)
    step, _, q, _, _, sum_w, sum_ww = _free_fit(
        at, stride, shrink, a, is_row, starts, N_STARTS, N_ITERATIONS, TOP, SIZE, K_FREE
    )
    error, new_sc, new_m = _choose_inner(
        at,
        stride,
        shrink,
        a,
        is_row,
        d_here,
        dmin_here,
        step,
        q,
        sum_w,
        sum_ww,
        REACH,
        TOP,
        TOP_SCALE,
        SIZE,
        K,
    )
    old_sc = tl.load(sc + row * sc_stride + group, mask=is_row, other=0).to(tl.float32)
    old_m = tl.load(m + row * m_stride + group, mask=is_row, other=0).to(tl.float32)
    old = residual(at, stride, shrink, a, is_row, old_sc * d_here, old_m * dmin_here, 0.0, TOP, SIZE)
    is_better = error < old
    new_sc = tl.where(is_better, new_sc, old_sc).to(tl.uint8)
    new_m = tl.where(is_better, new_m, old_m).to(tl.uint8)
    tl.store(sc_out + row * out_stride + group, new_sc, mask=is_row)
    tl.store(m_out + row * out_stride + group, new_m, mask=is_row)


def fit(w: Tensor, importance: Tensor, shape: AffineShape, group: int) -> dict[str, Tensor]:
    """Parameters of one block: d, dmin f16[n, 1], sc, m u8[n, 1, G]. w: f32[n, columns]; importance: f32[columns]."""
    parts = [_fit_rows(rows, importance, shape, group) for rows in torch.split(w, MOST_ROWS)]
    return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def _fit_rows(
    w: Tensor, importance: Tensor, shape: AffineShape, group: int, pairs: int = 4, rounds: int = 4
) -> dict[str, Tensor]:
    """`fit` of at most MOST_ROWS rows, with so many pairs and rounds of `fit_block`."""
    p = Prepared(w, importance, group)
    n, groups, empty = p.n, p.groups, p.empty
    sizes = {"SIZE": group, "GROUPS": groups, "TOP": float(shape.top_code)}
    top_scale = float(shape.top_scale)
    free = empty(7, groups, n)
    free_tile = tile(len(shape.starts))
    _free[(triton.cdiv(n, free_tile["ROWS"]), groups)](
        *p.arguments, constant(shape.starts, w.dtype, w.device), free, N_STARTS=len(shape.starts),
        N_ITERATIONS=shape.n_iterations, **sizes, **free_tile, **OPTIONS,
    )  # fmt: skip
    d, dmin = empty(rounds + 1, pairs, n), empty(rounds + 1, pairs, n)
    n_relative = len(SUPER_RELATIVE)
    super_tile = tile(n_relative * n_relative)
    _super_scales[(triton.cdiv(n, super_tile["ROWS"]),)](
        free, p.scale, p.share, constant(SUPER_RELATIVE, w.dtype, w.device), d, dmin, n, N=n_relative,
        KEEP=pairs, TOP_SCALE=top_scale, GROUPS=groups, **super_tile, **OPTIONS,
    )  # fmt: skip
    sc, m = (empty(rounds, pairs, groups, n, dtype=torch.uint8) for _ in range(2))
    sums, steps = empty(2, 4, pairs, groups, n), empty(2, pairs, groups, n)
    total = empty(rounds, pairs, n)
    choose_tile = tile(9)
    sum_w, sum_ww, aim, aim_stride = free[5], free[6], (free[0], free[2]), 0
    for i in range(rounds):
        # Two buffers in turn: a round reads what the one before it wrote.
        here = i % 2
        _choose[(triton.cdiv(n, choose_tile["ROWS"]), groups, pairs)](
            *p.arguments, d[i], dmin[i], *aim, aim_stride, sum_w, sum_ww, sc[i], m[i], sums[here], steps[here],
            PAIRS=pairs, TOP_SCALE=top_scale, **sizes, **choose_tile, **OPTIONS,
        )  # fmt: skip
        _solve[(triton.cdiv(n, _ROWS), pairs)](
            sc[i], m[i], sums[here], sum_w, p.share, p.scale, d[i], dmin[i], total[i], d[i + 1], dmin[i + 1],
            n, PAIRS=pairs, GROUPS=groups, ROWS=_ROWS, **OPTIONS,
        )  # fmt: skip
        aim, aim_stride = (steps[here], sums[here][0]), groups * n
    stored = {"d": empty(n, 1, dtype=torch.float16), "dmin": empty(n, 1, dtype=torch.float16)}
    stored |= {name: empty(n, 1, groups, dtype=torch.uint8) for name in ("sc", "m")}
    _finish[(triton.cdiv(n, _ROWS),)](
        total, d, dmin, sc, m, p.scale, *stored.values(), n,
        ROUNDS=rounds, PAIRS=pairs, GROUPS=groups, ROWS=_ROWS, **OPTIONS,
    )  # fmt: skip
    return stored


def refit(params: Params, group: int, w: Tensor, importance: Tensor, shape: AffineShape) -> dict[str, Tensor]:
    """See `AffineK.refit`; w: f32[n, columns of the group]."""
    p = Prepared(w, importance, w.shape[1])
    d, dmin, sc, m = (params[name] for name in ("d", "dmin", "sc", "m"))
    new = {"sc": whole_copy(sc), "m": whole_copy(m)}
    n_inner = 3 * (2 * _REFIT_REACH + 1)
    rows = tile(max(len(shape.starts), n_inner))["ROWS"]
    _refit[(triton.cdiv(p.n, rows),)](
        *p.arguments, constant(shape.starts, w.dtype, w.device), d, d.stride(0), dmin, dmin.stride(0),
        sc, sc.stride(0), m, m.stride(0), new["sc"], new["m"], new["sc"].stride(0), group,
        N_STARTS=len(shape.starts), N_ITERATIONS=shape.n_iterations, REACH=_REFIT_REACH,
        TOP=float(shape.top_code), TOP_SCALE=float(shape.top_scale), SIZE=p.size,
        K_FREE=tile(len(shape.starts))["K"], K=tile(n_inner)["K"], ROWS=rows, **OPTIONS,
    )  # fmt: skip
    return {**params, **new}
