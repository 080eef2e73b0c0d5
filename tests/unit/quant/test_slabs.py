"""Rounding some rows at a time gives what rounding all of them gives."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded, cat_rows
from d2qconv.quant import slabs as slabs_module
from d2qconv.quant.dsq import ColumnScaled
from d2qconv.quant.slabs import SLAB_ELEMENTS, slabs
from d2qconv.run import Recipe
from d2qconv.walk.rounding import Rounder, error_of
from d2qconv_gguf.grids import GRIDS


@given(n_out=st.integers(1, 1 << 18), n_in=st.integers(1, 1 << 15))
def test_slabs_cover_every_row_once_and_are_not_too_large(n_out, n_in):
    found = slabs(n_out, n_in)
    assert found[0].start == 0
    assert found[-1].stop == n_out
    assert all(a.stop == b.start for a, b in pairwise(found))
    heights = [s.stop - s.start for s in found]
    assert len(set(heights[:-1])) <= 1
    assert heights[-1] >= 1
    # Rows are whole: a slab may be larger by less than one row.
    assert heights[0] * n_in < SLAB_ELEMENTS + n_in


def test_matrices_of_8b_blocks_are_whole_and_heads_are_not():
    assert [len(slabs(*m)) for m in ((28672, 4096), (4096, 14336), (128256, 4096))] == [1, 1, 4]


def problem(n_out=48, n_in=256):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, n_in, generator=generator) * torch.rand(n_in, generator=generator)
    source = x + 0.2 * torch.randn(x.shape, generator=generator)
    w = torch.randn(n_out, n_in, generator=generator) * 0.05
    gram, cross = x.T @ x / len(x), source.T @ x / len(x)
    return w, InputStatistics(gram, x.mean(0), cross, source.mean(0))


FORMS = [
    Recipe(),
    Recipe(polish=0, order="natural"),
    Recipe(asymmetry_form="rescomp", polish=0),
    Recipe(asymmetry_form="gptaq"),
]


@pytest.mark.parametrize("recipe", FORMS, ids=["default", "plain", "rescomp", "gptaq"])
@pytest.mark.parametrize("grid", [GRIDS["q2_k"], AffineGrid(2, 128, "integer")], ids=lambda g: g.id)
def test_slabs_round_as_the_whole_does(monkeypatch, recipe, grid):
    w, statistics = problem()
    whole = Rounder(recipe)(w, grid, statistics, "test")
    monkeypatch.setattr(slabs_module, "SLAB_ELEMENTS", 20 * 256)
    assert len(slabs(*w.shape)) == 3
    parts = Rounder(recipe)(w, grid, statistics, "test")
    assert parts.shape == whole.shape
    # Sums over other shapes may round otherwise, so a code may fall to the other side of a boundary.
    assert float((parts.codes == whole.codes).float().mean()) > 0.98
    errors = [error_of("t", w, found, statistics).output for found in (whole, parts)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_column_scales_are_those_of_all_rows(monkeypatch):
    w, statistics = problem()
    grid = ColumnScaled(GRIDS["q2_k"])
    whole = Rounder(Recipe())(w, grid, statistics, "test")
    monkeypatch.setattr(slabs_module, "SLAB_ELEMENTS", 20 * 256)
    parts = Rounder(Recipe())(w, grid, statistics, "test")
    assert torch.equal(whole.codes, parts.codes)


def test_errors_are_those_of_the_definition(monkeypatch):
    w, statistics = problem()
    held = Rounder(Recipe())(w, GRIDS["q2_k"], statistics, "test")
    difference, gram = (w - held.decode()).double(), statistics.gram.double()
    wanted = float(((difference @ gram) * difference).sum() / ((w.double() @ gram) * w.double()).sum())
    for size in (SLAB_ELEMENTS, 7 * 256):
        monkeypatch.setattr(slabs_module, "SLAB_ELEMENTS", size)
        for given_as in (held, held.decode()):
            found = error_of("t", w, given_as, statistics)
            assert found.output == pytest.approx(wanted, rel=1e-4)
            assert found.weight == pytest.approx(
                float(difference.square().sum() / w.double().square().sum()), rel=1e-4
            )


def test_rows_put_together_are_the_matrix():
    w, statistics = problem()
    held = Rounder(Recipe())(w, GRIDS["q2_k"], statistics, "test")
    back = cat_rows([held.rows(slice(0, 5)), held.rows(slice(5, 48))])
    assert isinstance(back, Coded)
    assert back.shape == held.shape
    assert torch.equal(back.decode(), held.decode())
    assert torch.equal(held.rows(slice(5, 9)).decode(), held.decode()[5:9])
