"""Laws that every Grid and its Codec obey, as tests to inherit.

Make a subclass whose name starts with `Test`, say what is asked for below, and pytest collects the laws::

    class TestQ2K(GridLaws):
        grid = GRIDS["q2_k"]
        codec = CODECS["q2_k"]

        def random_packed(self, rng, n_out, n_in): ...
        def reference_decode(self, packed, shape): ...

Nothing here needs pytest fixtures. Examples are derandomised: the same on every run. Needs hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from d2qconv.grids.base import (
    Grid,
    Params,
    code_dtype,
    encode_weighed,
    is_vector,
    stack_blocks,
    take_block,
    take_rows,
)
from d2qconv.ir.coded import Coded

Array: TypeAlias = NDArray[np.generic]

#: Hypothesis profile of the laws: few examples, the same every time, nothing left on disk.
few = settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)


class ArrayCodec(Protocol):
    """A codec that packs a matrix into one array. For several arrays, wrap it in one that joins them."""

    def pack(self, coded: Coded) -> Array:
        """The bytes of the matrix, rows first."""

    def unpack(self, data: Array, shape: tuple[int, int]) -> Coded:
        """Inverse of `pack`."""


def fit_and_encode(grid: Grid, w: Tensor, importance: Tensor) -> Coded:
    """Round w (f32[n_out, n_in]) to nearest, block by block, under importance (f32[n_in])."""
    params, codes = [], []
    for start in range(0, w.shape[1], grid.block):
        columns = slice(start, start + grid.block)
        params.append(grid.fit(w[:, columns], importance[columns]))
        codes.append(encode_weighed(grid, w[:, columns], params[-1], importance[columns]))
    return Coded(grid, (w.shape[0], w.shape[1]), torch.cat(codes, 1), stack_blocks(params))


def weighted_error(grid: Grid, w: Tensor, importance: Tensor, params: Params, col: int = 0) -> Tensor:
    """Σ_j importance_j (w_ij - decode_ij)² per row, in f64, of columns col.. of one block: f64[n_out]."""
    values = grid.decode(encode_weighed(grid, w, params, importance, col), params, col)
    return ((w.double() - values.double()).square() * importance.double()).sum(1)


def adversarial(block: int) -> dict[str, Tensor]:
    """Blocks that break careless fits, by name; each f32[n_out, block]."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(6, block, generator=generator)
    outlier = normal * 0.01
    outlier[:, block // 3] = 50.0
    alternating = torch.ones(2, block)
    alternating[:, ::2] = -1.0
    return {
        "zeros": torch.zeros(2, block),
        "negative zeros": -torch.zeros(2, block),
        "constants": torch.tensor([[1.0], [-1.0], [0.37], [-2e-3]]).expand(-1, block).contiguous(),
        "tiny": normal * 1e-8,
        "below every type": normal * 1e-38,
        "subnormal": torch.full((2, block), 1e-42),
        "near f16 subnormals": normal * 1e-6,
        "huge": normal.clamp(-1, 1) * 6e4,
        "beyond f16": normal * 1e9,
        "largest": normal.sign() * torch.finfo(torch.float32).max,
        "one outlier": outlier,
        "only positive": normal.abs() + 1.0,
        "only negative": -normal.abs() - 1.0,
        "alternating": alternating,
        "some zero rows": normal * torch.tensor([0.0, 1, 0, 1, 0, 1])[:, None],
    }


class GridLaws:
    """The laws. n_blocks: blocks a row in the random matrices; n_rows: rows, where they are rounded.

    max_fit_error: relative squared error that a fit of Gaussian weights must stay below.
    """

    grid: ClassVar[Grid]
    codec: ClassVar[ArrayCodec]
    max_fit_error: ClassVar[float]
    n_blocks: ClassVar[int] = 3
    n_rows: ClassVar[int] = 24

    def random_packed(self, rng: np.random.Generator, n_out: int, n_in: int) -> Array:
        """Random legal bytes of a matrix; floats among them are finite."""
        raise NotImplementedError

    def reference_decode(self, packed: Array, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Values by a decoder that shares no code with grid and codec: f32[n_out, n_in]."""
        raise NotImplementedError

    def _random(self, seed: int, n_out: int = 5) -> tuple[Array, Coded]:
        n_in = self.n_blocks * self.grid.block
        packed = self.random_packed(np.random.default_rng(seed), n_out, n_in)
        return packed, self.codec.unpack(packed, (n_out, n_in))

    def _weights(self, n_out: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        n_in = self.n_blocks * self.grid.block
        w = torch.randn(n_out or self.n_rows, n_in, generator=generator) * 0.02
        return w, torch.exp(torch.randn(n_in, generator=generator))

    def test_numbers_fit_together(self) -> None:
        """Group divides block, step divides group, codes fit their dtype, and the object is a Grid."""
        grid = self.grid
        assert isinstance(grid, Grid)
        assert grid.block % grid.group == 0
        assert grid.group % grid.step == 0
        assert 2 <= grid.levels <= (256 if grid.step == 1 else 2**31)

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_pack_inverts_unpack(self, seed: int) -> None:
        """Packing what was unpacked gives the same bytes."""
        packed, coded = self._random(seed)
        again = self.codec.pack(coded)
        assert again.dtype == packed.dtype
        assert again.shape == packed.shape
        assert again.tobytes() == packed.tobytes()

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_unpack_inverts_pack(self, seed: int) -> None:
        """Codes and params survive packing, in shape, dtype and bits; a fit's params are in storage precision."""
        w, importance = self._weights(seed=seed)
        for coded in (self._random(seed)[1], fit_and_encode(self.grid, w, importance)):
            again = self.codec.unpack(self.codec.pack(coded), coded.shape)
            assert again.grid is self.grid
            assert_same(again.codes, coded.codes)
            assert set(again.params) == set(coded.params)
            for name, p in coded.params.items():
                assert_same(again.params[name], p)

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_decodes_as_the_reference(self, seed: int) -> None:
        """Values equal those of the independent decoder bit for bit, on random bytes and on fitted weights."""
        w, importance = self._weights(seed=seed)
        packed, coded = self._random(seed)
        fitted = fit_and_encode(self.grid, w, importance)
        for data, matrix in ((packed, coded), (self.codec.pack(fitted), fitted)):
            wanted = np.ascontiguousarray(self.reference_decode(data, matrix.shape), dtype=np.float32)
            got = matrix.decode().numpy()
            assert got.shape == wanted.shape
            assert np.isfinite(wanted).all()
            assert (got.view(np.int32) == wanted.view(np.int32)).all()

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_parts_decode_as_the_whole(self, seed: int) -> None:
        """Any run of columns inside one block decodes as in the whole matrix."""
        _, coded = self._random(seed)
        whole, grid = coded.decode(), self.grid
        rng = np.random.default_rng(seed)
        for block in range(self.n_blocks):
            first, last = sorted(rng.choice(grid.block // grid.step + 1, 2, replace=False) * grid.step)
            start = block * grid.block // grid.step
            codes = coded.codes[:, start + first // grid.step : start + last // grid.step]
            part = grid.decode(codes, take_block(coded.params, block), int(first))
            assert_same(part, whole[:, block * grid.block + first : block * grid.block + last])

    @given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.1, 1.0, 3.0]))
    @few
    def test_encodes_to_the_nearest(self, seed: int, spread: float) -> None:
        """No other code of a scalar grid decodes nearer, ties within rounding of the largest value aside."""
        _, coded = self._random(seed)
        grid = self.grid
        if is_vector(grid):
            return
        params = take_block(coded.params, 0)
        levels = _levels(grid, params, coded.shape[0])
        largest = levels.abs().amax(0)
        generator = torch.Generator().manual_seed(seed % 2**31)
        w = torch.randn(largest.shape, generator=generator) * spread * largest.amax(1, keepdim=True)
        w[:, ::3] = levels[grid.levels // 2][:, ::3]
        codes = grid.encode(w, params, 0)
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < grid.levels
        distance = (levels.double() - w.double()).abs()
        got = distance.gather(0, codes[None].long())[0]
        slack = 4 * torch.finfo(torch.float32).eps * (largest + w.abs()).double()
        assert bool((got <= distance.amin(0) + slack).all())
        # Column by column, as GPTQ asks, the codes are the same.
        for col in range(0, grid.block, max(1, grid.block // 7)):
            assert_same(grid.encode(w[:, col : col + 1], params, col), codes[:, col : col + 1])

    def _metric(self, seed: int, n_runs: int) -> Tensor:
        """Random metrics whose columns are correlated by 0.1 on average and 0.3 at most: f32[n_runs, step, step]."""
        generator = torch.Generator().manual_seed(seed % 2**31)
        root = torch.eye(self.grid.step) + 0.1 * torch.randn(
            n_runs, self.grid.step, self.grid.step, generator=generator
        )
        return root @ root.mT

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_vectors_are_nearly_the_cheapest(self, seed: int) -> None:
        """Under a metric, of 65,536 codes (or all) none is much cheaper than the one chosen, on average by 1 %."""
        grid = self.grid
        if not is_vector(grid):
            return
        w, importance = self._weights(n_out=12, seed=seed)
        w, n = w[:, : grid.block], grid.step
        params, metric = grid.fit(w, importance[: grid.block]), self._metric(seed, 1)
        codes = grid.encode_vectors(w[:, :n], params, 0, metric)
        assert codes.dtype is code_dtype(grid.levels)
        assert int(codes.min()) >= 0
        assert int(codes.max()) < grid.levels
        draw = torch.Generator().manual_seed(seed % 2**31)
        tried = (
            torch.arange(grid.levels)
            if grid.levels <= 2**16
            else torch.randint(grid.levels, (2**16,), generator=draw)
        )
        cost = _cost(w[:, :n] - grid.decode(codes, params), metric[0])
        least = torch.stack(
            [
                _cost(
                    w[i, :n] - grid.decode(tried.int()[:, None], _repeated(params, i, len(tried))), metric[0]
                ).min()
                for i in range(len(w))
            ]
        )
        assert float(cost.sum()) <= 1.01 * float(least.sum())
        # Run by run, as GPTQ asks, the codes are the same as all at once.
        many = self._metric(seed, grid.group // n)
        at_once = grid.encode_vectors(w[:, : grid.group], params, 0, many)
        for i in range(grid.group // n):
            run = slice(i * n, (i + 1) * n)
            assert_same(
                grid.encode_vectors(w[:, run], params, run.start, many[i : i + 1]), at_once[:, i : i + 1]
            )

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_refit_of_vectors_never_worsens(self, seed: int) -> None:
        """As `test_refit_never_worsens`, under a metric."""
        grid = self.grid
        if not is_vector(grid):
            return
        w, importance = self._weights(seed=seed)
        w = w[:, : grid.block]
        params, metric = grid.fit(w, importance[: grid.block]), self._metric(seed, grid.group // grid.step)
        moved = w * (1 + 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed % 2**31)))
        for group in range(grid.block // grid.group):
            start = group * grid.group
            part = moved[:, start : start + grid.group]
            costs = []
            for p in (params, grid.refit_vectors(params, group, part, metric)):
                values = grid.decode(grid.encode_vectors(part, p, start, metric), p, start)
                runs = (part - values).view(len(w), -1, grid.step)
                costs.append(torch.einsum("nri,rij,nrj->n", runs, metric, runs))
            assert bool((costs[1] <= costs[0] * (1 + 1e-4)).all())

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_take_rows_commutes_with_pack(self, seed: int) -> None:
        """Rows picked before packing are the rows picked after it."""
        packed, coded = self._random(seed, n_out=6)
        index = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, 8))
        assert self.codec.pack(coded.take_rows(index)).tobytes() == packed[index.numpy()].tobytes()

    def test_bytes_are_the_bits_promised(self) -> None:
        """The packed matrix has bits_per_weight · n / 8 bytes."""
        packed, coded = self._random(0)
        assert packed.nbytes * 8 == self.grid.bits_per_weight * coded.shape[0] * coded.shape[1]

    def test_refusals_have_a_reason(self) -> None:
        """Whole blocks are accepted; anything else is refused with what, why and what to do."""
        grid = self.grid
        assert grid.accepts((3, 2 * grid.block)) is None
        for shape in ((3, grid.block + 1), (3, 0), (0, grid.block), (grid.block,), (2, 2, grid.block)):
            refusal = grid.accepts(shape)
            assert refusal is not None, shape
            assert refusal.where
            assert refusal.why
            assert refusal.todo

    def test_fits_stay_finite(self) -> None:
        """Zeros, constants, tiny, huge and lopsided weights: finite params, and no worse than all zeros."""
        importance = torch.exp(torch.linspace(-9, 9, self.grid.block))
        for name, w in adversarial(self.grid.block).items():
            for weights in (torch.ones(self.grid.block), importance, importance.flip(0)):
                self._check_fit(name, w, weights)

    @given(data=st.data())
    @few
    def test_fits_stay_finite_on_anything(self, data: st.DataObject) -> None:
        """As above, on weights that hypothesis invents."""
        values = st.lists(st.floats(-6e4, 6e4, width=32), min_size=3, max_size=self.grid.block)
        found = torch.tensor(data.draw(values), dtype=torch.float32)
        w = found.repeat(self.grid.block)[: 2 * self.grid.block].reshape(2, -1)
        weights = torch.tensor(data.draw(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1)))
        self._check_fit("invented", w, weights.repeat(self.grid.block)[: self.grid.block])

    def _check_fit(self, name: str, w: Tensor, importance: Tensor) -> None:
        params = self.grid.fit(w, importance)
        for p in params.values():
            assert p.shape[:2] == (w.shape[0], 1), name
            assert bool(torch.isfinite(p.float()).all()), name
        values = self.grid.decode(self.grid.encode(w, params, 0), params)
        assert bool(torch.isfinite(values).all()), name
        zeros = (w.double().square() * importance.double()).sum(1)
        assert bool((weighted_error(self.grid, w, importance, params) <= zeros * (1 + 1e-6)).all()), name

    def test_fit_is_good(self) -> None:
        """Gaussian weights are fitted better than max_fit_error; importance lowers the error that it weighs."""
        w, importance = self._weights(n_out=64)
        flat = torch.ones_like(importance)
        even, weighted = fit_and_encode(self.grid, w, flat), fit_and_encode(self.grid, w, importance)
        relative = (even.decode() - w).square().sum() / w.square().sum()
        assert relative < self.max_fit_error

        def error(coded: Coded) -> Tensor:
            return ((coded.decode() - w).square() * importance).sum()

        assert error(weighted) < error(even)

    def test_fit_scales_with_the_weights(self) -> None:
        """Weights times a power of two: the same codes, values times that power."""
        w, importance = self._weights(n_out=8)
        # So large that the steps of no type lie among the subnormals of f16, where rounding is absolute.
        one, four = (fit_and_encode(self.grid, w * s, importance) for s in (16.0, 64.0))
        assert_same(one.codes, four.codes)
        assert_same(one.decode() * 4.0, four.decode())

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_refit_never_worsens(self, seed: int) -> None:
        """After a refit the group's weighted error is no larger, and nothing else has changed."""
        grid = self.grid
        w, importance = self._weights(seed=seed)
        w, importance = w[:, : grid.block], importance[: grid.block]
        moved = w + torch.randn(w.shape, generator=torch.Generator().manual_seed(seed % 2**31)) * 0.01
        fitted = grid.fit(w, importance)
        foreign = take_block(self._random(seed, n_out=len(w))[1].params, 0)
        for params in (fitted, foreign):
            before = {name: p.clone() for name, p in params.items()}
            for group in range(grid.block // grid.group):
                columns = slice(group * grid.group, (group + 1) * grid.group)
                new = grid.refit(params, group, moved[:, columns], importance[columns])
                errors = [
                    weighted_error(grid, moved[:, columns], importance[columns], p, columns.start)
                    for p in (params, new)
                ]
                assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
                shape = len(w), grid.block // grid.step
                codes = torch.full(shape, grid.levels - 1, dtype=code_dtype(grid.levels))
                old_values, new_values = grid.decode(codes, params), grid.decode(codes, new)
                old_values[:, columns] = new_values[:, columns]
                assert_same(old_values, new_values)
            for name, p in params.items():
                assert_same(p, before[name])

    @given(seed=st.integers(0, 2**32 - 1))
    @few
    def test_scaled_rows_decode_scaled(self, seed: int) -> None:
        """decode(scale_rows(p, s)) = s · decode(p) within the reported exactness; a power of two is exact."""
        w, importance = self._weights(seed=seed)
        coded = fit_and_encode(self.grid, w, importance)
        generator = torch.Generator().manual_seed(seed % 2**31)
        rows = (
            torch.randn(len(w), generator=generator).exp() * torch.randn(len(w), generator=generator).sign()
        )
        scaled, exactness = coded.scale_rows(rows)
        assert_same(scaled.codes, coded.codes)
        values = coded.decode().double()
        terms = values.abs()
        if not is_vector(self.grid):
            # A value is a difference of two terms, and no term is larger than twice the largest level.
            blocks = [take_block(coded.params, b) for b in range(self.n_blocks)]
            terms = 3 * torch.cat([_levels(self.grid, b, len(w)).abs().amax(0) for b in blocks], dim=1)
        bound = (exactness.max_relative_error + 1e-6) * (terms * rows.abs()[:, None])
        assert bool(((scaled.decode() - values * rows[:, None]).abs() <= bound).all())
        assert exactness.max_relative_error < 0.05
        doubled, exact = coded.scale_rows(torch.full((len(w),), -2.0))
        assert exact.is_exact
        assert_same(doubled.decode(), coded.decode() * -2.0)

    def test_rows_are_independent(self) -> None:
        """A row's encoding does not depend on the other rows' parameters."""
        w, importance = self._weights(n_out=7)
        w, importance = w[:, : self.grid.block], importance[: self.grid.block]
        params = self.grid.fit(w, importance)
        index = torch.tensor([6, 0, 3])
        assert_same(
            self.grid.encode(w[index], take_rows(params, index), 0), self.grid.encode(w, params, 0)[index]
        )


def _levels(grid: Grid, params: Params, n_out: int) -> Tensor:
    """Every level's value in every column of one block: f32[levels, n_out, block]. Scalar grids only."""
    decode: Callable[[int], Tensor] = lambda code: grid.decode(  # noqa: E731
        torch.full((n_out, grid.block), code, dtype=torch.uint8), params
    )
    return torch.stack([decode(code) for code in range(grid.levels)])


def _cost(miss: Tensor, metric: Tensor) -> Tensor:
    """eᵀ M e of every row of f32[n, step]."""
    return ((miss @ metric) * miss).sum(1)


def _repeated(params: Params, row: int, n: int) -> Params:
    """Params of one row, n times."""
    return take_rows(params, torch.full((n,), row))


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal in dtype, shape and every bit, but zeros of either sign are equal."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a, b)
