"""Fits and refits of the types without an offset as CUDA kernels, by Triton; `symmetric_search` says what they do.

One launch does a step for all rows, groups and candidates for d: ten launches are a fit where there are inner integers,
two a fit of the others, two a refit. table: of `levels.lookup`, read only with HAS_TABLE.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2qconv.grids.base import Params
from d2qconv.grids.constants import constant
from d2qconv_gguf.grids.levels import lookup
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
from d2qconv_gguf.grids.symmetric_search import SymmetricShape

#: Rows of a program that holds one number of each.
_ROWS = 128


@triton.jit  # type: ignore[untyped-decorator]
def _iterated(  # type: ignore[no-untyped-def]
    at, stride, shrink, a, is_row, step, sum_ww, table,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_TABLE: tl.constexpr,
    N_ITERATIONS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Codes and least-squares steps in turn: error, step, qq, qw, of the shape of step."""
    qq = tl.zeros_like(step)
    qw = tl.zeros_like(step)
    for _ in range(N_ITERATIONS):
        _, qq, qw = code_sums(at, stride, shrink, a, is_row, step, 0.0, LOW, HIGH, SIZE, table, HAS_TABLE)
        step = tl.where(qq > 0, divide(qw, tl.maximum(qq, 1e-30)), step)
    return sum_ww + step * (step * qq - 2 * qw), step, qq, qw


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _free(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, starts, table, out, sum_out,
    N_STARTS: tl.constexpr, N_ITERATIONS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, HAS_TABLE: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`signed_fit` of one group and sign. out: f32[2, 4, G, n]: error, step, qq, qw. sum_out: f32[G, n]: sum_ww."""
    row, is_row, at, shrink, _ = rows_of(w, row_stride, scale, n, ROWS)
    group = tl.program_id(1)
    at += group.to(tl.int64) * SIZE * stride
    mine = a + group * SIZE
    low, high, _, sum_ww = moments(at, stride, shrink, mine, is_row, SIZE)
    largest = tl.maximum(-low, high)
    k = tl.arange(0, K)[:, None]
    start = tl.load(starts + k, mask=k < N_STARTS, other=1.0)
    sign = tl.where(tl.program_id(2) == 0, 1.0, -1.0)
    step = largest * divide(tl.zeros_like(start) + sign, start)
    error, step, qq, qw = _iterated(
        at, stride, shrink, mine, is_row, step, sum_ww, table, LOW, HIGH, HAS_TABLE, N_ITERATIONS, SIZE
    )
    found = best_of(error, k < N_STARTS)
    plane = GROUPS * n
    to = out + tl.program_id(2) * 4 * plane + group * n + row
    tl.store(to, pick(error, found), mask=is_row)
    tl.store(to + plane, pick(step, found), mask=is_row)
    tl.store(to + 2 * plane, pick(qq, found), mask=is_row)
    tl.store(to + 3 * plane, pick(qw, found), mask=is_row)
    tl.store(sum_out + group * n + row, sum_ww, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _super_scales(  # type: ignore[no-untyped-def]
    free, sum_ww, scale, share, numbers, d_out, n, N: tl.constexpr, KEEP: tl.constexpr,
    INNER: tl.constexpr, N_INNER: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `super_scales`. free, sum_ww: of `_free`. d_out: f32[KEEP, n]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    is_row = row < n
    plane = GROUPS * n
    extreme = tl.zeros([1, ROWS], tl.float32)
    for g in range(GROUPS):
        at = free + g * n + row
        plus = tl.load(at, mask=is_row, other=0.0)
        minus = tl.load(at + 4 * plane, mask=is_row, other=0.0)
        step = tl.load(at + plane, mask=is_row, other=0.0)
        step = tl.where(plus <= minus, step, tl.load(at + 5 * plane, mask=is_row, other=0.0))
        extreme = tl.where(tl.abs(step) > tl.abs(extreme), step, extreme)
    factor = tl.load(scale + row, mask=is_row, other=1.0)
    k = tl.arange(0, K)[:, None]
    d = storable(divide(extreme, tl.load(numbers + k, mask=k < N, other=1.0)), factor)
    inverse_d = inverse(d)
    total = tl.zeros_like(d)
    for g in range(GROUPS):
        fixed = tl.load(sum_ww + g * n + row, mask=is_row, other=0.0)
        least = tl.zeros_like(d) + float("inf")
        for sign in range(2):
            at = free + sign * 4 * plane + g * n + row
            step = tl.load(at + plane, mask=is_row, other=0.0)
            qq = tl.load(at + 2 * plane, mask=is_row, other=0.0)
            qw = tl.load(at + 3 * plane, mask=is_row, other=0.0)
            rounded = clip(rint(step * inverse_d), INNER, INNER + N_INNER - 1) * d
            least = tl.minimum(least, fixed + rounded * (rounded * qq - 2 * qw))
        total += least * tl.load(share + g)
    is_left = (k < N) & (total == total)
    for i in range(KEEP):
        found = best_of(total, is_left)
        tl.store(d_out + i * n + row, pick(d, found), mask=is_row)
        is_left = is_left & (found == 0)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, table, d, free, sc_out, sums, PAIRS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_TABLE: tl.constexpr, INNER: tl.constexpr, N_INNER: tl.constexpr,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`choose_inner` of one group and candidate for d, and the sums under its codes.

    d: f32[P, n]. free: of `_free`. sc_out: i8[P, G, n]. sums: f32[3, P, G, n]: qq, qw, error.
    """
    row, is_row, at, shrink, _ = rows_of(w, row_stride, scale, n, ROWS)
    group = tl.program_id(1)
    pair = tl.program_id(2)
    at += group.to(tl.int64) * SIZE * stride
    mine = a + group * SIZE
    d_here = tl.load(d + pair * n + row, mask=is_row, other=0.0)
    inverse_d = inverse(d_here)
    plane = GROUPS * n
    aim = free + plane + group * n + row
    plus = rint(tl.load(aim, mask=is_row, other=0.0) * inverse_d)
    minus = rint(tl.load(aim + 4 * plane, mask=is_row, other=0.0) * inverse_d)
    k = tl.arange(0, K)[:, None]
    sc = clip(tl.where(k < 3, plus, minus) + (k % 3 - 1).to(tl.float32), INNER, INNER + N_INNER - 1)
    error = residual(at, stride, shrink, mine, is_row, sc * d_here, 0.0, LOW, HIGH, SIZE, table, HAS_TABLE)
    found = best_of(error, k < 6)
    sc = pick(sc, found)
    _, qq, qw = code_sums(
        at, stride, shrink, mine, is_row, sc * d_here, 0.0, LOW, HIGH, SIZE, table, HAS_TABLE
    )
    to = (pair * GROUPS + group) * n + row
    tl.store(sc_out + to, sc.to(tl.int8), mask=is_row)
    tl.store(sums + to, qq, mask=is_row)
    tl.store(sums + PAIRS * plane + to, qw, mask=is_row)
    tl.store(sums + 2 * PAIRS * plane + to, pick(error, found), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _solve(  # type: ignore[no-untyped-def]
    sc, sums, share, scale, d, total_out, d_out, n,
    PAIRS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The block's error, and `_least_squares_d` of one candidate. total_out, d_out: f32[P, n]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n
    pair = tl.program_id(1)
    plane = PAIRS * GROUPS * n
    total = tl.zeros([ROWS], tl.float32)
    qq = total
    qw = total
    for g in range(GROUPS):
        at = (pair * GROUPS + g) * n + row
        weight = tl.load(share + g)
        x = tl.load(sc + at, mask=is_row, other=0).to(tl.float32)
        qq += weight * x * x * tl.load(sums + at, mask=is_row, other=0.0)
        qw += weight * x * tl.load(sums + plane + at, mask=is_row, other=0.0)
        total += tl.load(sums + 2 * plane + at, mask=is_row, other=0.0) * weight
    at = pair * n + row
    old = tl.load(d + at, mask=is_row, other=0.0)
    new = tl.where(qq > 0, divide(qw, tl.maximum(qq, 1e-30)), old)
    tl.store(total_out + at, total, mask=is_row)
    tl.store(d_out + at, storable(new, tl.load(scale + row, mask=is_row, other=1.0)), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _select(  # type: ignore[no-untyped-def]
    total, d, state_out, d_out, n, ROUNDS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr
):
    """Of the states (f32[ROUNDS, P, n] each; d has more behind) the best: i32[n], and its d: f32[n]."""
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
    tl.store(state_out + row, state, mask=is_row)
    tl.store(d_out + row, tl.load(d + state * n + row, mask=is_row, other=0.0), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _every_inner(  # type: ignore[no-untyped-def]
    at, stride, shrink, a, is_row, d, table, LOW: tl.constexpr, HIGH: tl.constexpr, HAS_TABLE: tl.constexpr,
    INNER: tl.constexpr, N_INNER: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """See `try_all_inner`: error, sc."""
    sc = tl.arange(0, K)[:, None].to(tl.float32) + INNER + tl.zeros_like(d)
    error = residual(at, stride, shrink, a, is_row, sc * d, 0.0, LOW, HIGH, SIZE, table, HAS_TABLE)
    found = best_of(error, sc < INNER + N_INNER)
    return pick(error, found), pick(sc, found)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _try_all(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, table, d, error_out, sc_out,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_TABLE: tl.constexpr, INNER: tl.constexpr, N_INNER: tl.constexpr,
    SIZE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`try_all_inner` of one group. d: f32[n]. error_out: f32[G, n]. sc_out: i8[G, n]."""
    row, is_row, at, shrink, _ = rows_of(w, row_stride, scale, n, ROWS)
    group = tl.program_id(1)
    at += group.to(tl.int64) * SIZE * stride
    d_here = tl.load(d + row, mask=is_row, other=0.0)
    error, sc = _every_inner(
        at, stride, shrink, a + group * SIZE, is_row, d_here, table, LOW, HIGH, HAS_TABLE,
        INNER, N_INNER, SIZE, K,
    )  # fmt: skip
    tl.store(error_out + group * n + row, error, mask=is_row)
    tl.store(sc_out + group * n + row, sc.to(tl.int8), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    total, sc, state, d, last_error, last_sc, share, scale, d_out, sc_out, n,
    INNER: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The better of the best state and all inner integers, as stored: f16[n], u8[n, G]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < n
    last = tl.zeros([ROWS], tl.float32)
    for g in range(GROUPS):
        last += tl.load(last_error + g * n + row, mask=is_row, other=0.0) * tl.load(share + g)
    here = tl.load(state + row, mask=is_row, other=0)
    is_better = last < tl.load(total + here * n + row, mask=is_row, other=0.0)
    factor = tl.load(scale + row, mask=is_row, other=1.0)
    tl.store(d_out + row, half(tl.load(d + row, mask=is_row, other=0.0), factor), mask=is_row)
    for g in range(GROUPS):
        old = tl.load(sc + (here * GROUPS + g) * n + row, mask=is_row, other=0).to(tl.float32)
        new = tl.load(last_sc + g * n + row, mask=is_row, other=0).to(tl.float32)
        stored = tl.where(is_better, new, old) - INNER
        tl.store(sc_out + row * GROUPS + g, stored.to(tl.uint8), mask=is_row)


@triton.jit(do_not_specialize=["group"], do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _refit(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, table, d, d_stride, sc, sc_stride, sc_out, out_stride, group,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_TABLE: tl.constexpr, INNER: tl.constexpr, N_INNER: tl.constexpr,
    SIZE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `SignedK.refit`."""
    row, is_row, at, shrink, factor = rows_of(w, row_stride, scale, n, ROWS)
    d_here = divide(tl.load(d + row * d_stride, mask=is_row, other=0.0).to(tl.float32), factor)
    error, new = _every_inner(
        at, stride, shrink, a, is_row, d_here, table, LOW, HIGH, HAS_TABLE, INNER, N_INNER, SIZE, K
    )
    old = tl.load(sc + row * sc_stride + group, mask=is_row, other=0).to(tl.float32) + INNER
    before = residual(at, stride, shrink, a, is_row, old * d_here, 0.0, LOW, HIGH, SIZE, table, HAS_TABLE)
    stored = tl.where(error < before, new, old) - INNER
    tl.store(sc_out + row * out_stride + group, stored.to(tl.uint8), mask=is_row)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _single(  # type: ignore[no-untyped-def]
    w, row_stride, stride, a, scale, n, starts, table, d_out, N_STARTS: tl.constexpr,
    N_ITERATIONS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, HAS_TABLE: tl.constexpr,
    SIZE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `fit_single`: f16[n]."""
    row, is_row, at, shrink, factor = rows_of(w, row_stride, scale, n, ROWS)
    low, high, _, sum_ww = moments(at, stride, shrink, a, is_row, SIZE)
    k = tl.arange(0, K)[:, None]
    start = tl.load(starts + k % N_STARTS)
    step = divide(tl.maximum(-low, high), tl.where(k < N_STARTS, start, -start))
    _, step, _, _ = _iterated(
        at, stride, shrink, a, is_row, step, sum_ww, table, LOW, HIGH, HAS_TABLE, N_ITERATIONS, SIZE
    )
    step = storable(step, factor)
    error = residual(at, stride, shrink, a, is_row, step, 0.0, LOW, HIGH, SIZE, table, HAS_TABLE)
    found = best_of(error, k < 2 * N_STARTS)
    step = pick(step, found)
    if HAS_TABLE:
        step = tl.where(pick(error, found) <= sum_ww, step, 0.0)
    tl.store(d_out + row, half(step, factor), mask=is_row)


def _levels(w: Tensor, shape: SymmetricShape) -> tuple[Tensor, dict[str, float | bool]]:
    """The table (any other where there is none), and the constants that say what the levels are."""
    table = lookup(shape.table, w.device) if shape.table else constant(shape.starts, w.dtype, w.device)
    return table, {
        "LOW": float(shape.lowest),
        "HIGH": float(shape.highest),
        "HAS_TABLE": bool(shape.table),
    }


def _inner(shape: SymmetricShape) -> dict[str, float]:
    return {"INNER": float(shape.inner[0]), "N_INNER": float(shape.n_inner)}


def fit(w: Tensor, importance: Tensor, shape: SymmetricShape, group: int) -> dict[str, Tensor]:
    """Parameters of one block with inner integers: d f16[n, 1], sc u8[n, 1, G].

    w: f32[n, columns]; importance: f32[columns].
    """
    parts = [_fit_rows(rows, importance, shape, group) for rows in torch.split(w, MOST_ROWS)]
    return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def _fit_rows(
    w: Tensor, importance: Tensor, shape: SymmetricShape, group: int, keep: int = 2, rounds: int = 2
) -> dict[str, Tensor]:
    """`fit` of at most MOST_ROWS rows, with so many candidates for d and rounds of `fit_block`."""
    p = Prepared(w, importance, group)
    n, groups, empty = p.n, p.groups, p.empty
    table, levels = _levels(w, shape)
    inner = _inner(shape)
    free, sum_ww = empty(2, 4, groups, n), empty(groups, n)
    wide = tile(len(shape.starts))
    _free[(triton.cdiv(n, wide["ROWS"]), groups, 2)](
        *p.arguments, constant(shape.starts, w.dtype, w.device), table, free, sum_ww,
        N_STARTS=len(shape.starts), N_ITERATIONS=shape.n_iterations, SIZE=group, GROUPS=groups,
        **levels, **wide, **OPTIONS,
    )  # fmt: skip
    d = empty(rounds + 1, keep, n)
    wide = tile(len(shape.extremes))
    _super_scales[(triton.cdiv(n, wide["ROWS"]),)](
        free, sum_ww, p.scale, p.share, constant(shape.extremes, w.dtype, w.device), d, n,
        N=len(shape.extremes), KEEP=keep, GROUPS=groups, **inner, **wide, **OPTIONS,
    )  # fmt: skip
    sc, sums = empty(rounds, keep, groups, n, dtype=torch.int8), empty(3, keep, groups, n)
    total = empty(rounds, keep, n)
    wide = tile(6)
    for i in range(rounds):
        _choose[(triton.cdiv(n, wide["ROWS"]), groups, keep)](
            *p.arguments, table, d[i], free, sc[i], sums, PAIRS=keep, SIZE=group, GROUPS=groups,
            **levels, **inner, **wide, **OPTIONS,
        )  # fmt: skip
        _solve[(triton.cdiv(n, _ROWS), keep)](
            sc[i], sums, p.share, p.scale, d[i], total[i], d[i + 1], n,
            PAIRS=keep, GROUPS=groups, ROWS=_ROWS, **OPTIONS,
        )  # fmt: skip
    return _with_all_inner(p, shape, d, sc, total)


def _with_all_inner(
    p: Prepared, shape: SymmetricShape, d: Tensor, sc: Tensor, total: Tensor
) -> dict[str, Tensor]:
    """The end of `fit_block`: the best state (sc: i8[rounds, P, G, n]), all inner integers tried, as stored."""
    rounds, keep, groups, n = sc.shape
    state, best_d = p.empty(n, dtype=torch.int32), p.empty(n)
    _select[(triton.cdiv(n, _ROWS),)](
        total, d, state, best_d, n, ROUNDS=rounds, PAIRS=keep, ROWS=_ROWS, **OPTIONS
    )
    error, last = p.empty(groups, n), p.empty(groups, n, dtype=torch.int8)
    wide, inner = tile(shape.n_inner), _inner(shape)
    table, levels = _levels(p.w, shape)
    _try_all[(triton.cdiv(n, wide["ROWS"]), groups)](
        *p.arguments, table, best_d, error, last, SIZE=p.size, **levels, **inner, **wide, **OPTIONS
    )
    stored = {"d": p.empty(n, 1, dtype=torch.float16), "sc": p.empty(n, 1, groups, dtype=torch.uint8)}
    _finish[(triton.cdiv(n, _ROWS),)](
        total, sc, state, best_d, error, last, p.share, p.scale, stored["d"], stored["sc"], n,
        INNER=inner["INNER"], GROUPS=groups, ROWS=_ROWS, **OPTIONS,
    )  # fmt: skip
    return stored


def refit(
    params: Params, group: int, w: Tensor, importance: Tensor, shape: SymmetricShape
) -> dict[str, Tensor]:
    """See `SignedK.refit`; w: f32[n, columns of the group]."""
    p = Prepared(w, importance, w.shape[1])
    d, sc = params["d"], params["sc"]
    new = whole_copy(sc)
    wide = tile(shape.n_inner)
    table, levels = _levels(w, shape)
    _refit[(triton.cdiv(p.n, wide["ROWS"]),)](
        *p.arguments, table, d, d.stride(0), sc, sc.stride(0), new, new.stride(0), group,
        SIZE=p.size, **levels, **_inner(shape), **wide, **OPTIONS,
    )  # fmt: skip
    return {**params, "sc": new}


def fit_single(w: Tensor, importance: Tensor, shape: SymmetricShape) -> dict[str, Tensor]:
    """Parameters of one block with one step: d f16[n, 1]. w: f32[n, columns]; importance: f32[columns]."""
    p = Prepared(w, importance, w.shape[1])
    stored = {"d": p.empty(p.n, 1, dtype=torch.float16)}
    wide = tile(2 * len(shape.starts))
    table, levels = _levels(w, shape)
    _single[(triton.cdiv(p.n, wide["ROWS"]),)](
        *p.arguments, constant(shape.starts, w.dtype, w.device), table, stored["d"],
        N_STARTS=len(shape.starts), N_ITERATIONS=shape.n_iterations, SIZE=p.size,
        **levels, **wide, **OPTIONS,
    )  # fmt: skip
    return stored
