"""Affine grids: values worked out by hand, the three ways to clip, and their order on known distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2qconv.errors import InputError, RunError
from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Grid

CLIPS = ("none", "released", "search")
ZEROS = ("integer", "float", "none")
few = settings(max_examples=25, derandomize=True, database=None, deadline=None)


def gaussian(n_out=512, group=128, seed=0):
    return torch.randn(n_out, group, generator=torch.Generator().manual_seed(seed))


def uneven_importance(group=128, seed=5):
    return torch.exp(torch.randn(group, generator=torch.Generator().manual_seed(seed)))


def error(grid, w, importance):
    """Weighted squared error relative to the weights' own, f64."""
    params = grid.fit(w, importance)
    difference = w.double() - grid.decode(grid.encode(w, params, 0), params).double()
    return float((difference.square() * importance).sum() / (w.double().square() * importance).sum())


def row_errors(grid, w, importance):
    params = grid.fit(w, importance)
    difference = w.double() - grid.decode(grid.encode(w, params, 0), params).double()
    return (difference.square() * importance.double()).sum(1)


def test_integer_zero_by_hand():
    grid = AffineGrid(2, 16, "integer")
    params = {"step": torch.tensor([[0.5]]).half(), "zero": torch.tensor([[1]], dtype=torch.uint8)}
    w = torch.tensor([[-9.0, -0.5, -0.26, -0.2, 0.0, 0.25, 0.26, 0.75, 0.8, 9.0]])
    # 0.25 / 0.5 and 0.75 / 0.5 are ties: they go to 0 and 2 steps.
    assert grid.encode(w, params, 0).tolist() == [[0, 0, 0, 1, 1, 1, 2, 3, 3, 3]]
    assert grid.decode(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), params).tolist() == [
        [-0.5, 0.0, 0.5, 1.0]
    ]


def test_float_zero_by_hand():
    grid = AffineGrid(3, 16, "float", scale="f32")
    params = {"step": torch.tensor([[0.25]]), "offset": torch.tensor([[0.1]])}
    codes = torch.arange(8, dtype=torch.uint8)[None]
    wanted = torch.arange(8, dtype=torch.float32)[None] * 0.25 - torch.tensor(0.1)
    assert torch.equal(grid.decode(codes, params), wanted)
    assert torch.equal(grid.encode(wanted, params, 3), codes)


def test_no_zero_by_hand():
    grid = AffineGrid(4, 32, "none", scale="bf16")
    params = {"step": torch.tensor([[-2.0]]).bfloat16()}
    codes = torch.tensor([[0, 7, 8, 9, 15]], dtype=torch.uint8)
    assert grid.decode(codes, params).tolist() == [[16.0, 2.0, 0.0, -2.0, -14.0]]
    assert grid.encode(torch.tensor([[99.0, 2.0, 0.9, -2.0, -99.0]]), params, 0).tolist() == [
        [0, 7, 8, 9, 15]
    ]


def test_whole_range_fit_by_hand():
    """-1 .. 2 on four codes: step 1, zero 1; 1 .. 3 is stretched to 0 .. 3."""
    w = torch.zeros(2, 16)
    w[0, :2] = torch.tensor([-1.0, 2.0])
    w[1] = torch.linspace(1, 3, 16)
    params = AffineGrid(2, 16, "integer", clip="none").fit(w, torch.ones(16))
    assert params["step"].tolist() == [[1.0], [1.0]]
    assert params["zero"].tolist() == [[1], [0]]
    params = AffineGrid(2, 16, "float", clip="none").fit(w, torch.ones(16))
    assert params["step"].tolist() == [[1.0], [1.0]]
    assert params["offset"].tolist() == [[1.0], [0.0]]
    params = AffineGrid(2, 16, "none", clip="none").fit(w * 1.5, torch.ones(16))
    assert params["step"].tolist() == [[2.0], [3.0]]


@pytest.mark.parametrize("zero", ZEROS)
def test_released_search_is_the_plain_double_loop(zero):
    """Against D²Quant's released rule, written out row by row in f64; only the step's rounding is ours."""
    w, grid = gaussian(24, 32, seed=3), AffineGrid(2, 32, zero, scale="f32", clip="released")
    params = grid.fit(w, uneven_importance(32))
    for row, found in zip(w.double(), params["step"][:, 0].tolist(), strict=True):
        low, high = float(row.min().clamp(max=0)), float(row.max().clamp(min=0))
        if zero == "none":
            high = max(-low, high)
            low = -high
        tried = []
        for i in range(80):
            p = 1 - i / 100
            step = p * (high - low) / 3
            shift = -p * low / step
            middle = {"integer": round(shift), "float": shift, "none": 2}[zero]
            codes = torch.round(row / step + middle).clamp(0, 3)
            tried.append((float((step * (codes - middle) - row).abs().pow(2.4).sum()), step))
        assert found == pytest.approx(min(tried)[1], rel=1e-5)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_beats_released_beats_none(bits, zero):
    w, importance = gaussian(), uneven_importance()
    none, released, search = (error(AffineGrid(bits, 128, zero, clip=clip), w, importance) for clip in CLIPS)
    assert search < 0.995 * released
    assert released < (none if bits < 8 else 1.001 * none)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 256])
def test_search_is_never_worse_than_none_in_any_row(bits, zero, group):
    w, importance = gaussian(400, group, seed=bits), uneven_importance(group)
    w[:100] = w[:100].abs() + 3
    w[100:200, 0] *= 100
    w[200:300] = w[200:300] ** 3
    w[300] = 0
    plain = row_errors(AffineGrid(bits, group, zero, clip="none"), w, importance)
    assert bool((row_errors(AffineGrid(bits, group, zero), w, importance) <= plain * (1 + 1e-5)).all())


def test_search_is_near_the_best_there_is():
    """Against every zero point and 2000 steps per row."""
    w, importance = gaussian(16, 32, seed=9), uneven_importance(32)
    found = row_errors(AffineGrid(2, 32, "integer"), w, importance)
    best = torch.full((16,), torch.inf, dtype=torch.float64)
    for step in torch.linspace(0.05, 3, 2000).double():
        for zero in range(4):
            v = ((w.double() / step).round().clamp(-zero, 3 - zero)) * step
            best = torch.minimum(best, ((w - v).square() * importance).sum(1))
    assert float((found / best).mean()) < 1.005
    assert float((found / best).max()) < 1.05


def test_an_exactly_storable_row_is_found():
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    w = 0.25 * (codes - 5)
    for zero in ("integer", "float"):
        assert float(row_errors(AffineGrid(4, 64, zero), w, torch.ones(64)).max()) == 0.0


@pytest.mark.parametrize("value", [0.37, -2.0, 1e-5, 3e4])
def test_constant_rows_with_a_float_zero_cost_only_rounding(value):
    w = torch.full((2, 32), value)
    most = 2.0**-21 if abs(value) > 1e-4 else 1e-5
    assert error(AffineGrid(2, 32, "float"), w, torch.ones(32)) < most


def test_importance_decides_who_is_clipped():
    """An outlier nobody asks for is clipped, one that matters is kept."""
    w = gaussian(32, 64, seed=2)
    w[:, 7] = 30.0
    ignored = torch.ones(64)
    ignored[7] = 1e-6
    wanted = torch.ones(64)
    wanted[7] = 1e6
    grid = AffineGrid(3, 64, "integer")
    for importance, is_kept in ((ignored, False), (wanted, True)):
        params = grid.fit(w, importance)
        value = grid.decode(grid.encode(w, params, 0), params)[:, 7]
        assert bool(((value - 30).abs() < 1).all()) == is_kept
    # Nothing of the rest is lost to it.
    rest = ignored.clone()
    rest[7] = 0
    assert error(grid, w, rest) < 0.05


def test_rows_do_not_depend_on_each_other_or_on_chunks(monkeypatch):
    from d2qconv.grids import affine_fit

    w, importance = gaussian(300, 64), uneven_importance(64)
    grid = AffineGrid(2, 64, "integer")
    whole = grid.fit(w, importance)
    monkeypatch.setattr(affine_fit, "_CPU_ELEMENTS", 1)
    assert len(list(affine_fit._row_chunks(w, grid.storage, "search"))) == 19
    chunked = grid.fit(w, importance)
    for name, p in whole.items():
        assert torch.equal(p, chunked[name])


@pytest.mark.parametrize("scale", ["f16", "bf16", "f32"])
def test_params_have_the_promised_types(scale):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[scale]
    for zero in ZEROS:
        grid = AffineGrid(4, 32, zero, scale=scale)
        params = grid.fit(gaussian(3, 32), torch.ones(32))
        wanted = {"step": dtype} | {"integer": {"zero": torch.uint8}, "float": {"offset": dtype}, "none": {}}[
            zero
        ]
        assert {name: p.dtype for name, p in params.items()} == wanted
        assert all(p.shape == (3, 1) for p in params.values())
        assert set(grid.scales) == {name for name in wanted if name != "zero"}
        assert isinstance(grid, Grid)


@pytest.mark.parametrize("zero", ZEROS)
def test_lattice_is_the_formula_of_encode_and_decode(zero):
    grid, w = AffineGrid(3, 32, zero, scale="f32"), gaussian(20, 32)
    params = grid.fit(w, torch.ones(32))
    found = grid.lattice(params, 0)
    step, lowest = found.step[:, None], found.zero[:, None]
    offset = torch.zeros(()) if found.offset is None else found.offset[:, None]
    steps = ((w + offset) / step).round().clamp(-lowest, found.levels - 1 - lowest)
    codes = grid.encode(w, params, 0)
    assert torch.equal((steps + lowest).to(torch.uint8), codes)
    assert torch.equal(step * (codes - lowest) - offset, grid.decode(codes, params))
    assert found.column_scale is None


def test_a_step_of_zero_gives_the_zero_code():
    grid = AffineGrid(2, 16, "integer")
    params = {"step": torch.zeros(1, 1).half(), "zero": torch.tensor([[2]], dtype=torch.uint8)}
    assert grid.encode(gaussian(1, 16), params, 0).unique().tolist() == [2]


def test_names_and_sizes():
    assert AffineGrid(2, 128, "integer").id == "affine2_g128_int"
    assert AffineGrid(4, 4096, "none", scale="bf16", is_per_channel=True).id == "affine4_channel4096_sym_bf16"
    assert AffineGrid(3, 64, "float", clip="released").id == "affine3_g64_float_released"
    assert AffineGrid(2, 128, "integer").bits_per_weight == 2 + 18 / 128
    assert AffineGrid(4, 32, "float", scale="bf16").bits_per_weight == 5.0
    assert AffineGrid(8, 64, "none", scale="f32").bits_per_weight == 8.5
    assert AffineGrid(2, 128, "integer") == AffineGrid(2, 128, "integer")
    assert len({AffineGrid(2, 128, "integer"), AffineGrid(2, 128, "integer")}) == 1


def test_impossible_grids_are_refused():
    with pytest.raises(InputError, match="5 bits"):
        AffineGrid(5, 128, "integer")
    with pytest.raises(InputError, match="groups of 100"):
        AffineGrid(4, 100, "integer")
    with pytest.raises(InputError, match="groups of 0"):
        AffineGrid(4, 0, "integer", is_per_channel=True)


def test_a_refusal_names_the_groups_that_fit():
    refusal = AffineGrid(4, 128, "integer").accepts((5, 96))
    assert refusal is not None
    assert "16 or 32" in refusal.todo
    refusal = AffineGrid(4, 128, "integer").accepts((5, 7))
    assert refusal is not None
    assert "one group per row" in refusal.todo
    refusal = AffineGrid(4, 7, "integer", is_per_channel=True).accepts((5, 14))
    assert refusal is not None
    assert "14 columns" in refusal.todo


def test_a_scale_too_large_for_f16_is_an_error():
    grid = AffineGrid(4, 32, "float")
    params = grid.fit(gaussian(2, 32), torch.ones(32))
    with pytest.raises(RunError, match="but f16 ends"):
        grid.scale_rows(params, torch.tensor([1.0, 1e7]))
    scaled, exactness = AffineGrid(4, 32, "float", scale="f32").scale_rows(
        {name: p.float() for name, p in params.items()}, torch.tensor([0.3, 1e7])
    )
    assert 0 < exactness.max_relative_error <= 2.0**-24
    assert torch.equal(scaled["step"][1], params["step"][1].float() * 1e7)


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=16),
    weights=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=16),
    bits=st.sampled_from([2, 3, 4, 8]),
    zero=st.sampled_from(ZEROS),
    clip=st.sampled_from(CLIPS),
    scale=st.sampled_from(["f16", "bf16", "f32"]),
)
@few
def test_any_finite_weights_give_finite_values(values, weights, bits, zero, clip, scale):
    w = torch.tensor(values, dtype=torch.float32).repeat(32)[:32].reshape(2, 16)
    importance = torch.tensor(weights, dtype=torch.float32).repeat(16)[:16]
    grid = AffineGrid(bits, 16, zero, scale=scale, clip=clip)
    params = grid.fit(w, importance)
    assert all(bool(torch.isfinite(p.float()).all()) for p in params.values())
    assert bool(torch.isfinite(grid.decode(grid.encode(w, params, 0), params)).all())
