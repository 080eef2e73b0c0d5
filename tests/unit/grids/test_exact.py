"""What one grid holds of another: the same codes, the same values, bit for bit."""

from __future__ import annotations

import pytest
import torch

from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.exact import FoundGrid, as_affine, holds, placed
from d2qconv.testing.laws import fit_and_encode
from d2qconv_gguf.grids import GRIDS
from d2qconv_onnx import types

W = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)) * 0.02
ONES = torch.ones(512)


@pytest.mark.parametrize(
    ("narrow", "kind", "block"),
    [
        (GRIDS["q4_0"], "int4", 32),
        (GRIDS["q8_0"], "int8", 32),
        (GRIDS["q2_0"], "int2", 64),
        (GRIDS["q2_0"], "int2", 32),
        (GRIDS["tq2_0"], "int2", 128),
        (AffineGrid(3, 128, "integer"), "int3", 128),
        (AffineGrid(3, 128, "none", "bf16"), "int3", 64),
        (AffineGrid(4, 512, "integer", is_per_channel=True), "int4", 128),
        (AffineGrid(2, 128, "integer", significand=8), "int2", 128),
    ],
)
def test_values_stay_bit_for_bit(narrow, kind, block):
    coded = fit_and_encode(narrow, W, ONES)
    wide = types.grid(kind, block)
    assert holds(wide, narrow)
    found = wide.decode(*placed(narrow, coded.codes, coded.params, wide))
    assert torch.equal(found.view(torch.int32), coded.decode().view(torch.int32))


@pytest.mark.parametrize(
    ("narrow", "kind"),
    [
        (AffineGrid(4, 32, "none"), "q4_0"),
        (AffineGrid(4, 128, "none", significand=8), "q4_0"),
        (AffineGrid(4, 32, "integer"), "q5_0"),
        (AffineGrid(3, 64, "integer"), "q4_0"),
        (AffineGrid(2, 64, "integer"), "q4_0"),
        (AffineGrid(2, 64, "none"), "q2_0"),
        (AffineGrid(2, 256, "none"), "tq2_0"),
        (AffineGrid(8, 512, "none", is_per_channel=True), "q8_0"),
        (FoundGrid(2, 128, "integer", least_zero=1, most_zero=1), "q2_0"),
        (FoundGrid(4, 32, "integer", significand=7, has_f16_offsets=True), "q4_1"),
    ],
)
def test_ggml_types_hold_affine_values_by_codes_of_their_own(narrow, kind):
    coded = fit_and_encode(narrow, W, ONES)
    if kind == "q2_0" and narrow.zero == "integer":
        coded.params["zero"].fill_(1)
    wide = GRIDS[kind]
    assert holds(wide, narrow)
    assert all(
        not holds(grid, narrow) for grid in GRIDS.values() if grid.bits_per_weight < wide.bits_per_weight
    )
    codes, params = placed(narrow, coded.codes, coded.params, wide)
    assert torch.equal(wide.decode(codes, params), coded.decode())
    assert int(codes.max()) < wide.levels


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (AffineGrid(4, 32, "integer"), GRIDS["q4_1"]),
        (AffineGrid(8, 32, "integer"), GRIDS["q8_0"]),
        (AffineGrid(4, 32, "none", "bf16"), GRIDS["q4_0"]),
        (AffineGrid(4, 16, "none"), GRIDS["q4_0"]),
        (AffineGrid(4, 32, "float"), GRIDS["q4_1"]),
        (AffineGrid(4, 32, "none"), GRIDS["iq4_nl"]),
        (GRIDS["q2_k"], types.grid("int2", 32)),
        (GRIDS["iq4_nl"], types.grid("int4", 32)),
        (GRIDS["iq2_xxs"], types.grid("int2", 32)),
        (GRIDS["q4_0"], types.grid("int4", 64)),
        (GRIDS["q4_0"], types.grid("int8", 32)),
        (AffineGrid(4, 32, "float"), types.grid("int4", 32)),
        (AffineGrid(4, 32, "none", "f32"), AffineGrid(4, 32, "none", "f16")),
        (AffineGrid(4, 32, "integer"), AffineGrid(4, 32, "none")),
        (AffineGrid(4, 32, "integer"), AffineGrid(4, 32, "integer", significand=7)),
    ],
)
def test_what_is_not_held_whatever_the_parameters_is_said(narrow, wide):
    assert not holds(wide, narrow)


def test_only_equal_levels_are_affine():
    affine = {name for name, grid in GRIDS.items() if as_affine(grid) is not None}
    assert affine == {"q4_0", "q8_0", "q2_0", "tq2_0"}
