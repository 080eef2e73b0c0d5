"""The sweep over several blocks at a time, with drift, pull and order, against its formula column by column.

Rounding is discontinuous, and f32 sums in another order fall to the other side of a boundary now and then. So
`Formula` does not round: it takes the sweep's own decisions one after the other, computes in f64 what the columns are
when each is made, and asks whether it was the nearest.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

import d2qconv.quant.chunk as chunk_module
from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import take_block
from d2qconv.quant.chunk import Chunk, Rounded, round_chunk
from d2qconv.quant.dsq import ColumnScaled
from d2qconv.quant.dual_scale import DualScale
from d2qconv.quant.hessian import drift, inverse_factor, toward_source
from d2qconv.quant.order import gar
from d2qconv.quant.sweep import Drift, gptq
from d2qconv_gguf.grids import GRIDS

CLOSE = 2e-5


def problem(n_out=12, n_in=512, seed=0, n_tokens=None):
    """S, and x and x̃: f32[n_tokens, n_in], x̃ being x moved by what depends on x."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = n_tokens or 4 * n_in
    mix, shift = torch.randn(2, n_in, n_in, generator=generator) / n_in**0.5
    size = torch.exp(0.3 * torch.randn(n_in, generator=generator))
    x = torch.randn(n_tokens, n_in, generator=generator) @ (torch.eye(n_in) + 2 * mix) * size
    moved = x + 0.3 * x @ shift + 0.2 * torch.randn(n_tokens, n_in, generator=generator)
    w = torch.randn(n_out, n_in, generator=generator) * 0.05
    return w, x, moved


def moments(x, moved):
    return moved.T @ moved / len(moved), x.T @ moved / len(moved)


@dataclass(frozen=True)
class Seen:
    """A grid that keeps what it was fitted to. groups: what `refit` was given, by number."""

    inner: object
    fits: list = field(default_factory=list)
    refits: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def fit(self, w, importance):
        self.fits.append((w.clone(), importance.clone()))
        return self.inner.fit(w, importance)

    def refit(self, params, group, w, importance):
        self.refits.append((group, w.clone(), importance.clone()))
        return self.inner.refit(params, group, w, importance)

    def refit_vectors(self, params, group, w, metric):
        self.refits.append((group, w.clone(), metric.clone()))
        return self.inner.refit_vectors(params, group, w, metric)


@dataclass
class Formula:
    """W[:, i:] −= e U[i, i:] − v_i P[i, i:] in the sweep's order; v_i is w_i, or the source's weight."""

    coded: object
    seen: Seen
    rest: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    p: torch.Tensor | None = None
    source: torch.Tensor | None = None

    @classmethod
    def of(cls, w, factor, coded, seen, order=None, drift=None):
        order = torch.arange(w.shape[1]) if order is None else order
        source = None if drift is None or drift.source is None else drift.source.double()[:, order]
        return cls(
            coded,
            seen,
            w.double()[:, order],
            factor.double(),
            order,
            None if drift is None else drift.p.double(),
            source,
        )

    def check(self, *, is_refit):
        grid, n_in = self.coded.grid, self.rest.shape[1]
        for start in range(0, n_in, grid.block):
            self.same(self.seen.fits[start // grid.block], start, grid.block)
            for first in range(start, start + grid.block, grid.group):
                if is_refit:
                    group, *given = self.seen.refits[first // grid.group]
                    assert group == first % grid.block // grid.group
                    self.same(given, first, grid.group)
                for j in range(first, first + grid.group, grid.step):
                    self.code(j)
        count = (n_in // grid.block, n_in // grid.group if is_refit else 0)
        assert (len(self.seen.fits), len(self.seen.refits)) == count

    def same(self, given, start, n):
        """The grid saw these columns as they are now, and their importance 1/U_jj²."""
        inside = slice(start, start + n)
        torch.testing.assert_close(given[0].double(), self.rest[:, inside], atol=CLOSE, rtol=0)
        if given[1].dim() == 1:
            wanted = self.factor.diagonal()[inside] ** -2
        else:
            wanted = torch.stack(
                [self.metric(run) for run in torch.arange(start, start + n).view(-1, self.coded.grid.step)]
            )
        torch.testing.assert_close(
            given[1].double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
        )

    def metric(self, positions):
        """What an error of these neighbouring positions costs once those behind them have made up for it."""
        now = slice(int(positions[0]), int(positions[-1]) + 1)
        local = self.factor[now, now]
        return torch.linalg.inv(local.T @ local)

    def code(self, j):
        """The code at position j is the nearest; its error goes to the columns behind it."""
        grid, step = self.coded.grid, self.coded.grid.step
        now, column = slice(j, j + step), int(self.order[j])
        params = take_block(self.coded.params, column // grid.block)
        place = column % grid.block
        got = grid.decode(self.coded.codes[:, column // step, None], params, place).double()
        w, metric = self.rest[:, now].clone(), self.metric(torch.arange(j, j + step))
        if step == 1:
            codes = grid.encode(w.float(), params, place)
        else:
            codes = grid.encode_vectors(w.float(), params, place, metric.float()[None])
        best = grid.decode(codes, params, place).double()
        root = torch.linalg.cholesky(metric / metric.diagonal().mean())
        misses = [((w - values) @ root).norm(dim=1) for values in (got, best)]
        assert bool((misses[0] <= misses[1] + CLOSE).all()), f"position {j}"
        error = torch.linalg.solve_triangular(self.factor[now, now].T, (w - got).T, upper=False).T
        self.rest[:, j + step :] -= error @ self.factor[now, j + step :]
        for i in range(j, j + step) if self.p is not None else ():
            pull = (w[:, i - j] if self.source is None else self.source[:, i])[:, None]
            self.rest[:, j + step :] += pull * self.p[i, j + step :]


@dataclass(frozen=True)
class Quads:
    """A code book: one code for four columns, 200 points, one scale per row and block of 64. It has no lattice."""

    id, block, group, step, levels, bits_per_weight = "quads", 64, 16, 4, 200, 2.0
    points = torch.randn(200, 4, generator=torch.Generator().manual_seed(4))

    def fit(self, w, importance):
        return {"s": w.abs().mean(1, keepdim=True).half()}

    def refit(self, params, group, w, importance):
        return params

    def encode(self, w, params, col):
        return self.encode_vectors(w, params, col, torch.eye(4).expand(w.shape[1] // 4, 4, 4))

    def encode_vectors(self, w, params, col, metric):
        fours = w.reshape(len(w), -1, 1, 4) / params["s"].float().reshape(len(w), 1, 1, 1)
        miss = fours - self.points
        return torch.einsum("nrpi,rij,nrpj->nrp", miss, metric, miss).argmin(-1).to(torch.uint8)

    def refit_vectors(self, params, group, w, metric):
        return params

    def decode(self, codes, params, col=0):
        n_blocks = params["s"].shape[1]
        values = self.points[codes.long()].reshape(len(codes), n_blocks, -1)
        return (values * params["s"].float().reshape(len(codes), n_blocks, 1)).reshape(len(codes), -1)

    def lattice(self, params, group):
        return None


GRID_LIST = [
    GRIDS["q2_k"],
    GRIDS["q4_0"],
    AffineGrid(2, 256, "float"),
    AffineGrid(3, 64, "integer"),
    ColumnScaled(AffineGrid(2, 128, "float")),
    DualScale(2),
    Quads(),
]
all_grids = pytest.mark.parametrize("grid", GRID_LIST, ids=lambda g: g.id)


def run_and_check(grid, *, order=None, strength=0.0, form="gptaq", is_refit=True, seed=0):
    """A sweep of 512 columns in two chunks, checked; returns the largest move by the drift."""
    w, x, moved = problem(seed=seed)
    gram, cross = moments(x, moved)
    taken = torch.arange(512) if order is None else order
    gram, cross = gram[taken][:, taken], cross[taken][:, taken]
    factor = inverse_factor(gram, 0.01, "test")
    with_drift = None
    if strength:
        # What a rescomp sweep pulls by need not be what it starts from.
        source = w + 0.01 if form == "rescomp" else None
        with_drift = Drift(drift(gram, cross, factor, strength), source)
    seen = Seen(grid)
    coded = gptq(w, factor, seen, is_refit=is_refit, order=order, drift=with_drift)
    coded = replace(coded, grid=grid)
    Formula.of(w, factor, coded, seen, order, with_drift).check(is_refit=is_refit)
    return coded


@all_grids
def test_a_sweep_over_several_blocks_a_chunk_is_the_formula(grid):
    run_and_check(grid)


def test_without_a_refit_nothing_is_refitted():
    run_and_check(GRIDS["q2_k"], is_refit=False)


few_grids = pytest.mark.parametrize("grid", [GRID_LIST[i] for i in (0, 2, 6)], ids=lambda g: g.id)


@few_grids
@pytest.mark.parametrize("form", ["gptaq", "rescomp"])
def test_drift_is_the_formula(grid, form):
    moved = run_and_check(grid, strength=0.5, form=form)
    plain = run_and_check(grid)
    assert not torch.equal(moved.codes, plain.codes)


def falling(grid):
    """GAR's order of the problem's columns."""
    order = gar(problem()[2].square().mean(0), grid)
    assert not torch.equal(order, torch.arange(512))
    return order


@all_grids
def test_order_and_drift_are_the_formula(grid):
    run_and_check(grid, order=falling(grid), strength=0.5)


@few_grids
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_order_with_and_without_a_pull_is_the_formula(grid, strength):
    run_and_check(grid, order=falling(grid), strength=strength, form="rescomp")


def test_rescomp_from_the_source_itself_differs_from_gptaq():
    w, x, moved = problem()
    gram, cross = moments(x, moved)
    factor = inverse_factor(gram, 0.01, "test")
    p = drift(gram, cross, factor, 0.5)
    own, given = (gptq(w, factor, GRIDS["q2_k"], is_refit=True, drift=Drift(p, s)) for s in (None, w))
    assert not torch.equal(own.codes, given.codes)


def test_no_drift_is_no_change():
    w, x, moved = problem()
    gram, _ = moments(x, moved)
    factor = inverse_factor(gram, 0.01, "test")
    p = drift(gram, gram, factor, 1.0)
    assert not p.any()
    plain = gptq(w, factor, GRIDS["q2_k"], is_refit=True)
    assert torch.equal(gptq(w, factor, GRIDS["q2_k"], is_refit=True, drift=Drift(p)).codes, plain.codes)


def test_drift_is_the_best_move_of_the_columns_that_are_left():
    """Row i: what least squares adds to the later columns for w_i (x_i − x̃_i), w_i = 1, times the strength."""
    _, x, moved = problem(n_in=24, n_tokens=500, seed=2)
    gram, cross = moments(x, moved)
    p = drift(gram, cross, inverse_factor(gram, 1e-7, "test"), 0.25)
    assert torch.equal(p, p.triu(1))
    for i in range(23):
        best = torch.linalg.lstsq(moved[:, i + 1 :], (x - moved)[:, i : i + 1]).solution[:, 0]
        torch.testing.assert_close(p[i, i + 1 :], 0.25 * best, atol=2e-4, rtol=0)


@pytest.mark.parametrize("grid", [GRIDS["q2_k"], GRIDS["q4_0"]], ids=lambda g: g.id)
def test_the_source_is_nearer_with_gptaq_and_nearest_in_closed_form(grid):
    """E‖S x − Ŵ x̃‖², where x̃ is not x."""
    w, x, moved = problem(n_out=32, seed=3)
    gram, cross = moments(x, moved)
    factor = inverse_factor(gram, 0.01, "test")
    p = drift(gram, cross, factor, 1.0)
    closed = toward_source(w, w @ cross - w @ gram, factor, 1.0)
    found = [
        gptq(w, factor, grid, is_refit=True),
        gptq(w, factor, grid, is_refit=True, drift=Drift(p)),
        gptq(closed, factor, grid, is_refit=True),
    ]
    wanted = x @ w.T
    errors = [float((wanted - moved @ coded.decode().T).square().mean()) for coded in found]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("is_ordered", [False, True])
def test_panels_of_a_long_group_are_cut_at_128_columns(monkeypatch, is_ordered):
    panels = []

    def spy(panel, *rest):
        panels.append((panel.place, len(panel.rest)))
        return round_lattice(panel, *rest)

    round_lattice = chunk_module.round_lattice
    monkeypatch.setattr(chunk_module, "round_lattice", spy)
    grid = AffineGrid(2, 256, "float")
    order = gar(torch.rand(512, generator=torch.Generator().manual_seed(1)), grid) if is_ordered else None
    run_and_check(grid, order=order)
    assert panels == [(0, 128), (128, 128)] * 2


@pytest.mark.parametrize("width", [64, 96, 192, 256])
def test_the_cut_changes_nothing_but_rounding(monkeypatch, width):
    w, x, moved = problem()
    factor = inverse_factor(moments(x, moved)[0], 0.01, "test")
    grid = AffineGrid(3, 256, "float")
    whole = gptq(w, factor, grid, is_refit=True).decode()
    monkeypatch.setattr(chunk_module, "PANEL_COLUMNS", width)
    cut = gptq(w, factor, grid, is_refit=True).decode()
    assert float((cut != whole).float().mean()) < 0.02


def test_a_chunk_leaves_its_errors_for_the_rest_of_the_matrix():
    """codes and errors of every position, and the columns as they were when they were reached."""
    w, x, moved = problem()
    grid = GRIDS["q4_0"]
    u = inverse_factor(moments(x, moved)[0], 0.01, "test")[:128, :128]
    rest = w.T[:128].contiguous()
    into = Rounded(torch.empty(128, 12, dtype=torch.uint8), torch.empty(128, 12))
    blocks = round_chunk(Chunk(rest, u, u.diagonal() ** -2), grid, into, is_refit=False)
    assert len(blocks) == 4
    decoded = torch.cat(
        [grid.decode(into.codes[32 * i : 32 * i + 32].T, params) for i, params in enumerate(blocks)], dim=1
    )
    # W − Ŵ = E U, for the errors E of all columns: what the sweep took out of each, and what was left of it.
    torch.testing.assert_close(w[:, :128] - decoded, into.errors.T @ u, atol=CLOSE, rtol=0)
    torch.testing.assert_close(into.errors, (rest - decoded.T) / u.diagonal()[:, None], atol=1e-6, rtol=1e-5)


def test_grids_without_a_lattice_say_so():
    w, *_ = problem()
    for grid in (DualScale(2), DualScale(3)):
        params = grid.fit(w[:, : grid.block], torch.ones(grid.block))
        assert grid.lattice(params, 0) is None
        assert ColumnScaled(grid.inner).lattice({**params, "column_scale": torch.ones(1, 1, 128)}, 0) is None
