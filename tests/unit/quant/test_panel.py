"""The quick ways against their definition, bit for bit.

Without a GPU Triton interprets the kernel; on one, `tools/check_device`.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import take_block
from d2qconv.quant.dsq import ColumnScaled
from d2qconv.quant.panel import Panel, round_lattice, round_panel
from d2qconv_gguf.grids import GRIDS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


AFFINE = {f"affine_{zero}": AffineGrid(2, 32, zero) for zero in ("integer", "float", "none")}


def make(name, n, seed=0, *, is_scaled=False):
    """A panel in the middle of a block, its grid and parameters."""
    generator = torch.Generator().manual_seed(seed)
    plain = AFFINE[name] if name in AFFINE else GRIDS[name]
    grid = ColumnScaled(plain) if is_scaled else plain
    w = torch.randn(37, grid.block, generator=generator) * 0.05
    w[3] = 0
    params = grid.fit(w, torch.rand(grid.block, generator=generator) + 0.1)
    factor = torch.triu(torch.randn(n, n, generator=generator) * 0.2, 1) + torch.diag(
        torch.rand(n, generator=generator) + 0.5
    )
    group = (grid.block // grid.group) // 2
    first = group * grid.group
    return grid, take_block(params, 0), group, w[:, first : first + n].T.contiguous(), factor, first


def test_a_panel_is_columns_one_by_one():
    grid, params, _, rest, factor, first = make("q2_k", 16)
    codes = torch.empty(16, 37, dtype=torch.uint8)
    errors = torch.empty(16, 37)
    left = rest.clone()
    round_panel(Panel(rest.clone(), factor, first), grid, params, codes, errors)
    for j in range(16):
        place = first + j
        code = grid.encode(left[j : j + 1].T, params, place)
        error = (left[j] - grid.decode(code, params, place)[:, 0]) / factor[j, j]
        assert torch.equal(codes[j], code[:, 0])
        assert torch.equal(errors[j], error)
        for k in range(j + 1, 16):
            left[k] -= factor[j, k] * error


def test_drift_pulls_what_the_column_or_the_source_weighs():
    grid, params, _, rest, factor, first = make("q4_0", 32)
    drift = torch.triu(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), 1)
    pull = torch.randn_like(rest)
    seen = []
    for given in (None, pull):
        mine = rest.clone()
        codes, errors = torch.empty(32, 37, dtype=torch.uint8), torch.empty(32, 37)
        round_panel(Panel(mine, factor, first, drift, given), grid, params, codes, errors)
        expected = rest[1] - factor[0, 1] * errors[0] + drift[0, 1] * (rest[0] if given is None else pull[0])
        assert torch.equal(mine[1], expected)
        seen.append(codes)
    assert not torch.equal(*seen)


def compare(quick, name, n, is_scaled, with_drift, with_pull, with_old):
    """The definition and `quick` on one panel; raises AssertionError."""
    grid, params, group, rest, factor, first = make(name, n, is_scaled=is_scaled)
    drift = (
        torch.triu(torch.randn(n, n, generator=torch.Generator().manual_seed(1)), 1) if with_drift else None
    )
    pull = torch.randn(rest.shape, generator=torch.Generator().manual_seed(2)) if with_pull else None
    old = torch.randn(rest.shape, generator=torch.Generator().manual_seed(3)) * 0.05 if with_old else None
    lattice = grid.lattice(params, group)
    assert lattice is not None
    results = []
    for way in ("plain", "quick"):
        mine = rest.clone()
        panel = Panel(mine, factor, first, drift, pull, old)
        codes, errors = torch.empty(n, 37, dtype=torch.uint8), torch.empty(n, 37)
        if way == "plain":
            round_panel(panel, grid, params, codes, errors)
        else:
            scale = lattice.column_scale
            inside = torch.arange(n) + first - group * grid.group
            mine_only = replace(lattice, column_scale=None if scale is None else scale[inside])
            quick(panel, mine_only, codes, errors)
        results.append((mine, codes, errors))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other), (name, n, is_scaled, with_drift)


CASES = (
    ("q2_k", 16, False, False, False, False),
    ("q3_k", 16, True, True, False, False),
    ("q4_k", 32, False, True, True, False),
    ("q4_0", 32, True, False, False, True),
    ("q8_0", 24, False, False, False, False),
    ("q2_k", 16, False, False, False, True),
    ("iq4_xs", 32, False, True, False, False),
    ("iq4_nl", 32, True, False, False, True),
)


@pytest.mark.parametrize("case", [*CASES, *((name, 32, True, True, False, False) for name in AFFINE)])
def test_lattice_equals_definition(case):
    compare(round_lattice, *case)


@needs_triton
def test_kernel_equals_definition():
    """In a process of its own, since Triton decides at import whether it interprets."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    from d2qconv.quant import panel_triton

    for case in CASES:
        compare(panel_triton.round_panel, *case)
