"""DSQ as D²Quant's authors released it (arXiv 2602.02546, released code): a research grid to compare against.

Per block of 128 columns, all rows together: ŵ_ij = c_j · (±r0_i ± r1_i), or with a third ±r2_i; 4 or 8 levels per
row, symmetric and not uniform, no zero point, times a scale per input column. `fit` alternates, 15 times: the row
scales of all signs jointly by least squares; the column scales; the nearest of the levels for every weight. It
minimises the plain squared error: importance is not looked at. No file format stores these levels; formats take
`ColumnScaled(grid)` of their own grid instead.

What differs from the release, all of it guards: where the normal equations of a row are singular, the row keeps its
scales; c stays above 2^-12 of its largest, so that a column of zeros has no c of 0, which no fold could carry; and at
the end c gets geometric mean 1, the constant going into r.

Parameters, all f32: `r0`, `r1`[, `r2`] [n_out, n_blocks]; `column_scale` [1, n_blocks, block]. Bit k of a code says
that r_k counts positive. Order of operations: ((±r0 ± r1) ± r2) · c, so that every device gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2qconv.errors import InputError, Refusal
from d2qconv.grids.base import Exactness, Params, blocks_refusal
from d2qconv.grids.scaling import scaled_rows
from d2qconv.quant.dsq import SCALE

N_ITERATIONS = 15
#: Smallest c, as a fraction of the largest in its block.
_SMALLEST_COLUMN = 2.0**-12
#: A pivot of the normal equations below this fraction of Σ c² counts as 0.
_SINGULAR = 1e-6
#: Rows are brought to unit size by a power of two within these bounds.
_SMALLEST_SIZE, _LARGEST_SIZE = 2.0**-100, 2.0**120


@dataclass(frozen=True)
class DualScale:
    """`bits` row scales per block of `block` columns and, unless `has_columns` is false, a scale per column.

    bits: 2 (released two-scale form) or 3 (three-scale form). Raises InputError for others.
    """

    bits: int
    block: int = 128
    has_columns: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 3) or self.block < 1:
            raise InputError(
                f"no dual-scale grid has {self.bits} bits and blocks of {self.block} columns",
                where="dual-scale grid",
                todo="use 2 or 3 bits, and blocks of at least 1 column",
            )

    @property
    def id(self) -> str:
        """`dual_scale2_g128`, `sign_scale2_g128` without columns."""
        return f"{'dual' if self.has_columns else 'sign'}_scale{self.bits}_g{self.block}"

    @property
    def group(self) -> int:
        """As block."""
        return self.block

    @property
    def step(self) -> int:
        """One code per column."""
        return 1

    @property
    def levels(self) -> int:
        """2^bits."""
        return 1 << self.bits

    @property
    def bits_per_weight(self) -> float:
        """Codes and row scales in f32; the column scales end up in another matrix's rows."""
        return self.bits + 32 * self.bits / self.block

    @property
    def scales(self) -> tuple[str, ...]:
        """The row scales: `r0`, `r1`[, `r2`]."""
        return tuple(f"r{k}" for k in range(self.bits))

    @property
    def inner(self) -> DualScale:
        """The grid without column scales."""
        return replace(self, has_columns=False)

    def accepts(self, shape: Sequence[int]) -> Refusal | None:
        """Why a matrix `[n_out, n_in]` cannot be stored on this grid, or None."""
        return blocks_refusal(
            self.id, self.block, shape, "use a block length that divides it, or store this tensor as f16"
        )

    def fit(self, w: Tensor, importance: Tensor) -> Params:  # noqa: ARG002
        """Row and column scales of one block (w: f32[n_out, block]) by the released iteration; see the module."""
        # One layout, so that sums and results do not depend on the caller's.
        w = w.contiguous()
        largest = w.abs().amax().reshape(1)
        # The power of two below, exactly.
        size = largest.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        size = size.clamp(_SMALLEST_SIZE, _LARGEST_SIZE)
        r, c = _fit(w / size, self.bits, has_columns=self.has_columns)
        params = {name: (x * size)[:, None] for name, x in zip(self.scales, r, strict=True)}
        if self.has_columns:
            params[SCALE] = c[None, None, :]
        return params

    def refit(self, params: Params, group: int, w: Tensor, importance: Tensor) -> Params:  # noqa: ARG002
        """`params` itself: a block is one group."""
        return params

    def encode(self, w: Tensor, params: Params, col: int) -> Tensor:
        """Codes u8[n_out, n] of the nearest of all levels, by |w - decoded| in f32; the lowest code of equal ones."""
        c = params[SCALE].reshape(-1)[col : col + w.shape[1]] if self.has_columns else None
        r = torch.stack([params[name][:, 0] for name in self.scales])
        return _nearest(w, r, c)

    def decode(self, codes: Tensor, params: Params, col: int = 0) -> Tensor:
        """Values f32[n_out, n] of codes u8[n_out, n]; see `Grid.decode` and the module."""
        blocks = params[self.scales[0]].shape[1]
        grouped = codes.reshape(codes.shape[0], blocks, -1)
        values: Tensor | None = None
        for k, name in enumerate(self.scales):
            r = params[name][:, :, None]
            term = torch.where((grouped >> k) & 1 == 1, r, -r)
            values = term if values is None else values + term
        assert values is not None, "there are at least two scales"
        values = values.reshape(codes.shape)
        return values * params[SCALE].reshape(-1)[col : col + codes.shape[1]] if self.has_columns else values

    def lattice(self, params: Params, group: int) -> None:  # noqa: ARG002
        """None: the levels are not evenly spaced."""
        return

    def scale_rows(self, params: Params, scale: Tensor) -> tuple[Params, Exactness]:
        """The row scales times scale_i, rounded to storage; see `Grid.scale_rows` and `scaled_rows`."""
        return scaled_rows(params, self.scales, scale, self.id)


def _signs(codes: Tensor, bits: int) -> Tensor:
    """The sign of every scale in codes u8[...]: f32[bits, ...], -1 or 1."""
    return torch.stack([(codes >> k) & 1 for k in range(bits)]).to(torch.float32).mul_(2).sub_(1)


def _nearest(w: Tensor, r: Tensor, c: Tensor | None) -> Tensor:
    """Codes u8[n_out, n] of the levels (times c_j) nearest to w, decoded as `decode` does. r: f32[bits, n_out]."""
    levels: Tensor | None = None
    every = torch.arange(1 << len(r), dtype=torch.uint8, device=w.device)
    for sign, x in zip(_signs(every, len(r)), r, strict=True):
        term = sign[:, None] * x
        levels = term if levels is None else levels + term
    assert levels is not None, "there are at least two scales"
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    best = torch.full_like(w, torch.inf)
    for code, level in enumerate(levels):
        distance = level[:, None] - w if c is None else (level[:, None] * c).sub_(w)
        codes.masked_fill_(distance.abs_() < best, code)
        best = torch.minimum(best, distance)
    return codes


def _fit(w: Tensor, bits: int, *, has_columns: bool) -> tuple[Tensor, Tensor]:
    """(r f32[bits, n_out], c f32[block]) of w: f32[n_out, block], of about unit size. See the module."""
    c = _floored(w.abs().mean(0)) if has_columns else torch.ones_like(w[0])
    r, signs = _start(w, c, bits)
    for _ in range(N_ITERATIONS):
        r, signs = _row_scales(w, c, r, signs)
        if has_columns:
            c = _column_scales(w, r, signs, c)
        signs = _signs(_nearest(w, r, c), bits)
    if not has_columns:
        return r, c
    mean = c.log().mean().exp()
    return r * mean, c / mean


def _floored(c: Tensor) -> Tensor:
    """C, no smaller than 2^-12 of its largest; 1 if all are 0."""
    largest = c.amax()
    return torch.where(largest > 0, torch.maximum(c, largest * _SMALLEST_COLUMN), 1.0)


def _start(w: Tensor, c: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Greedy: B = sign(R), r = ⟨R, c·B⟩ / Σ c², and R less c·r·B, `bits` times from R = W. sign(0) is 1.

    Returns r f32[bits, n_out] and B f32[bits, n_out, block].
    """
    rest, total = w, c.square().sum()
    r, signs = [], []
    for _ in range(bits):
        sign = torch.where(rest >= 0, 1.0, -1.0)
        scale = (rest.abs() * c).sum(1) / total
        r.append(scale)
        signs.append(sign)
        rest = rest - scale[:, None] * (sign * c)
    return torch.stack(r), torch.stack(signs)


def _row_scales(w: Tensor, c: Tensor, old: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares r of fixed signs and c, every row by itself; a negative r turns its signs round.

    Solves Σ_l (Σ_j c² B_k B_l) r_l = Σ_j c B_k W by elimination. Shapes as in `_start`.
    """
    n, weighted = len(signs), signs * c
    total = c.square().sum()
    a = [[(weighted[k] * weighted[i]).sum(1) if k < i else total for i in range(n)] for k in range(n)]
    b = list((weighted * w).sum(2))
    is_regular = torch.ones_like(b[0], dtype=torch.bool)
    for k in range(n):
        is_regular = is_regular & (a[k][k] > _SINGULAR * total)
        for i in range(k + 1, n):
            # The rest of the matrix stays symmetric: its upper half is enough.
            factor = a[k][i] / a[k][k]
            a[i] = [x - factor * y if m >= i else x for m, (x, y) in enumerate(zip(a[i], a[k], strict=True))]
            b[i] = b[i] - factor * b[k]
    r = list(b)
    for k in reversed(range(n)):
        for i in range(k + 1, n):
            r[k] = r[k] - a[k][i] * r[i]
        r[k] = r[k] / a[k][k]
    found = torch.where(is_regular, torch.stack(r), old)
    return found.abs(), torch.where(found < 0, -1.0, 1.0)[:, :, None] * signs


def _column_scales(w: Tensor, r: Tensor, signs: Tensor, c: Tensor) -> Tensor:
    """|Σ_i W S / Σ_i S²| with S = Σ_k r_k B_k; the old c where all S are 0. Shapes as in `_start`."""
    s = (signs * r[:, :, None]).sum(0)
    norm = s.square().sum(0)
    return _floored(torch.where(norm > 0, (w * s).sum(0).abs() / norm, c))
