"""What the fits as CUDA kernels share, by Triton: `Problem`, sums under codes, and the true error, of many candidates.

A program holds K candidates of R rows as tiles f32[K, R] in registers and walks over a group's columns, so that nothing
of size K · columns · rows exists. A number of each row is a tile f32[1, R]. Weights stay where they are and are
divided by the row's power of two when loaded, which is exact. Columns are summed from first to last: the same bits
every time. Division is IEEE and floating-point contraction is off: other than in the PyTorch code, the definition,
only the order of sums may differ. Where two candidates are equal up to these last bits, another may be chosen.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from d2qconv_gguf.grids.levels import REACH
from d2qconv_gguf.grids.problem import F16_MAX, F16_TINY, LARGEST_SCALE, SMALLEST_SCALE

#: Candidates times rows of one program.
_TILE = 1024
#: Rows fitted at once: what a fit keeps is below 1 GiB.
MOST_ROWS = 2**17
#: For every launch. No a·b + c in one rounding.
OPTIONS = {"enable_fp_fusion": False}
#: Arguments that are views of larger tensors: one compiled kernel for all, since none may be made while a CUDA graph
#: is recorded.
UNALIGNED = ("w", "importance", "d", "dmin", "sc", "m")

_LARGEST_F16 = tl.constexpr(F16_MAX)
_SMALLEST_F16 = tl.constexpr(F16_TINY)
_LOW_SCALE = tl.constexpr(SMALLEST_SCALE)
_HIGH_SCALE = tl.constexpr(LARGEST_SCALE)
_REACH = tl.constexpr(REACH)


@triton.jit
def _compiled_rint(x):  # type: ignore[no-untyped-def]
    """Ties to even."""
    return libdevice.rint(x)


@triton.jit
def _interpreted_rint(x):  # type: ignore[no-untyped-def]
    """The same for |x| < 2²², where codes are decided: adding 1.5 · 2²³ leaves no fraction."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


rint = _interpreted_rint if os.environ.get("TRITON_INTERPRET") == "1" else _compiled_rint


@triton.jit
def divide(x, y):  # type: ignore[no-untyped-def]
    """IEEE x / y of tiles that broadcast."""
    return tl.math.div_rn(x + tl.zeros_like(y), y + tl.zeros_like(x))


@triton.jit
def inverse(x):  # type: ignore[no-untyped-def]
    """1 / x; 0 where x is 0."""
    return tl.where(x == 0, 0.0, tl.math.div_rn(tl.zeros_like(x) + 1.0, tl.where(x == 0, 1.0, x)))


@triton.jit
def clip(x, low, high):  # type: ignore[no-untyped-def]
    """Bring x into low .. high."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def half(x, scale):  # type: ignore[no-untyped-def]
    """See `Problem.f16`."""
    return clip(x * scale, -_LARGEST_F16, _LARGEST_F16).to(tl.float16)


@triton.jit
def storable(x, scale):  # type: ignore[no-untyped-def]
    """See `Problem.storable`."""
    y = half(x, scale).to(tl.float32)
    tiny = tl.where(x < 0, -_SMALLEST_F16, _SMALLEST_F16)
    return divide(tl.where((y == 0) & (x != 0), tiny, y), scale)


@triton.jit
def best_of(error, is_candidate):  # type: ignore[no-untyped-def]
    """Which of the candidates f32[K, R] has the smallest error, the first of equals: bool[K, R], one per row."""
    k = tl.arange(0, error.shape[0])[:, None]
    error = tl.where(is_candidate & (error == error), error, float("inf"))
    return k == tl.argmin(error, axis=0, keep_dims=True)


@triton.jit
def pick(x, is_chosen):  # type: ignore[no-untyped-def]
    """f32[1, R]: of candidates x (f32[K, R]) the chosen ones."""
    return tl.sum(tl.where(is_chosen, x, 0.0), axis=0, keep_dims=True)


@triton.jit  # type: ignore[untyped-decorator]
def moments(at, stride, shrink, a, is_row, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Smallest and largest w, Σ a w and Σ a w² of a group, f32[1, R] each.

    Here and below: `at` points to the group's first column, `stride` leads to the next one, `shrink` is 1 / scale,
    `a` points to the group's importance, and there are SIZE columns.
    """
    low = tl.load(at, mask=is_row, other=0.0) * shrink
    high = low
    sum_w = tl.zeros_like(low)
    sum_ww = tl.zeros_like(low)
    for j in range(SIZE):
        w = tl.load(at + j * stride, mask=is_row, other=0.0) * shrink
        aw = w * tl.load(a + j)
        low = tl.minimum(low, w)
        high = tl.maximum(high, w)
        sum_w += aw
        sum_ww += aw * w
    return low, high, sum_w, sum_ww


@triton.jit  # type: ignore[untyped-decorator]
def nearest(x, LOW: tl.constexpr, HIGH: tl.constexpr, table, HAS_TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The integer of LOW..HIGH, or the level in `table` (see `levels.lookup`), nearest to x."""
    if HAS_TABLE:
        halves = clip(tl.ceil(x * 2), -_REACH, _REACH).to(tl.int32) + _REACH
        return tl.load(table + halves)
    return clip(rint(x), LOW, HIGH)


@triton.jit  # type: ignore[untyped-decorator]
def code_sums(  # type: ignore[no-untyped-def]
    at, stride, shrink, a, is_row, step, offset, LOW: tl.constexpr, HIGH: tl.constexpr, SIZE: tl.constexpr,
    table=None, HAS_TABLE: tl.constexpr = False,
):  # fmt: skip
    """Σ a q, Σ a q², Σ a q w under the levels `nearest` to (step, offset); each of step's shape."""
    near = clip(inverse(step), -1e30, 1e30)
    q = tl.zeros_like(step)
    qq = tl.zeros_like(step)
    qw = tl.zeros_like(step)
    for j in range(SIZE):
        w = tl.load(at + j * stride, mask=is_row, other=0.0) * shrink
        weight = tl.load(a + j)
        code = nearest((w + offset) * near, LOW, HIGH, table, HAS_TABLE)
        weighted = code * weight
        q += weighted
        qq += weighted * code
        qw += code * (w * weight)
    return q, qq, qw


@triton.jit  # type: ignore[untyped-decorator]
def residual(  # type: ignore[no-untyped-def]
    at, stride, shrink, a, is_row, step, offset, LOW: tl.constexpr, HIGH: tl.constexpr, SIZE: tl.constexpr,
    table=None, HAS_TABLE: tl.constexpr = False,
):  # fmt: skip
    """See `Problem.residual`; of step's shape."""
    near = clip(inverse(step), -1e30, 1e30)
    error = tl.zeros_like(step)
    for j in range(SIZE):
        w = tl.load(at + j * stride, mask=is_row, other=0.0) * shrink
        r = w + offset
        code = nearest(r * near, LOW, HIGH, table, HAS_TABLE)
        difference = r - code * step
        error += (difference * difference) * tl.load(a + j)
    return error


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)  # type: ignore[untyped-decorator]
def _prepare(  # type: ignore[no-untyped-def]
    w, row_stride, stride, importance, n, scale, a, share,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    is_row = row < n
    column = tl.arange(0, GROUPS * SIZE)[:, None]
    x = tl.load(w + row.to(tl.int64) * row_stride + column * stride, mask=is_row, other=0.0)
    largest = tl.max(tl.abs(x), axis=0, keep_dims=True)
    # Clear the significand: the power of two below.
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(scale + row, clip(power, _LOW_SCALE, _HIGH_SCALE), mask=is_row)
    if tl.program_id(0) == 0:
        group = tl.arange(0, GROUPS)[:, None]
        place = group * SIZE + tl.arange(0, SIZE)[None, :]
        given = tl.load(importance + place)
        top = tl.max(tl.max(given, axis=1, keep_dims=True), axis=0, keep_dims=True)
        given = divide(given, tl.maximum(top, 1.1754943508222875e-38))
        total = tl.sum(given, axis=1, keep_dims=True)
        even = tl.zeros_like(given) + 1.0 / SIZE
        tl.store(a + place, tl.where(total > 1e-30, divide(given, tl.maximum(total, 1e-30)), even))
        top = tl.max(total, axis=0, keep_dims=True)
        tl.store(share + group, divide(total, tl.maximum(top, 1e-30)))


class Prepared:
    """One block of rows before a search; made by one launch. Attributes as of `Problem`, but w as it is.

    w: f32[n, columns] of any strides. scale: f32[n]. a: f32[columns], sums to 1 in every group. share: f32[G].
    Raises ValueError if w is not f32.
    """

    def __init__(self, w: Tensor, importance: Tensor, group: int) -> None:
        if w.dtype != torch.float32:
            raise ValueError(f"weights are {w.dtype}, not float32")
        self.n, columns = w.shape
        self.size, self.groups = group, columns // group
        # Rows side by side, or every load would be on its own.
        self.w = w if w.stride(0) == 1 or self.groups == 1 else w.t().contiguous().t()
        self.scale = self.empty(self.n)
        self.a = self.empty(columns)
        self.share = self.empty(self.groups)
        rows = max(_TILE * 4 // columns, 16)
        _prepare[(triton.cdiv(self.n, rows),)](
            self.w, self.w.stride(0), self.w.stride(1), importance.to(torch.float32).contiguous(), self.n,
            self.scale, self.a, self.share, GROUPS=self.groups, SIZE=group, ROWS=rows, **OPTIONS,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor beside w."""
        return torch.empty(shape, dtype=dtype, device=self.w.device)

    @property
    def arguments(self) -> tuple[Tensor, int, int, Tensor, Tensor, int]:
        """(w, row_stride, stride, a, scale, n), as every kernel takes them first."""
        return self.w, self.w.stride(0), self.w.stride(1), self.a, self.scale, self.n


@triton.jit  # type: ignore[untyped-decorator]
def rows_of(w, row_stride, scale, n, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a program: (row, is_row, pointers to their first column, 1 / scale, scale), tiles [1, ROWS]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    is_row = row < n
    factor = tl.load(scale + row, mask=is_row, other=1.0)
    return row, is_row, w + row.to(tl.int64) * row_stride, inverse(factor), factor


def tile(candidates: int) -> dict[str, int]:
    """K and ROWS for a kernel that holds so many candidates of every row."""
    k = triton.next_power_of_2(candidates)
    return {"K": k, "ROWS": max(_TILE // k, 16)}


def whole_copy(inner: Tensor) -> Tensor:
    """A copy of u8[n, 1, G] whose numbers of a row lie side by side."""
    return inner.clone(memory_format=torch.contiguous_format)
