"""What one grid holds of another: the same codes, the same values, bit for bit."""

from __future__ import annotations

import pytest
import torch

from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.exact import as_affine, holds, widened
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
    found = wide.decode(coded.codes, widened(narrow, coded.params, wide))
    assert torch.equal(found.view(torch.int32), coded.decode().view(torch.int32))


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
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
