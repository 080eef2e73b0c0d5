"""The kernels of the fits against the PyTorch code. Without a GPU Triton interprets them, slowly: few rows and groups.

Sums may differ in their last bits, so that of two equally good candidates another may win somewhere in a search: most
rows must have the same error, and all of them together nearly so. Where nothing follows a choice, all rows must.
"""

import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from d2qconv_gguf.grids import GRIDS, affine_search, symmetric_search
from d2qconv_gguf.grids.affine_k import AffineK
from d2qconv_gguf.grids.problem import Problem, has_kernels
from d2qconv_gguf.grids.symmetric import SignedK, SingleStep

N = 37
SCALAR = [name for name, grid in GRIDS.items() if isinstance(grid, AffineK | SignedK | SingleStep)]


def test_the_cpu_has_no_kernels():
    assert not has_kernels(torch.zeros(1, 1))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", SCALAR)
def test_kernels_fit_as_well_as_the_definition(name, said):
    assert said[name] == "equal", said[name]


@pytest.fixture(scope="module")
def said():
    """By type, `equal` or where it is not; from one process of their own, since Triton decides at import whether it
    interprets.
    """
    done = subprocess.run(
        [sys.executable, __file__, *SCALAR],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make(columns, group, seed=0):
    """Rows of many kinds, and importance with one group nobody asks for."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, columns, generator=generator) * 0.02
    w[3] = 0
    w[4] *= 1e-6
    w[5] *= 1e6
    w[6] = w[6].abs()
    w[7, 1:] = 0
    importance = torch.randn(columns, generator=generator).exp()
    if columns > group:
        importance[-group:] = 0
    return w, importance


def compare(p, mine, plain, grid, *, is_strict=False):
    """True errors of two results, params of one block each; raises AssertionError."""
    errors = []
    for params in (mine, plain):
        d = params["d"][:, 0].float() / p.scale
        step = d.expand(p.n_groups, -1)
        if "sc" in params:
            lowest = 0 if "m" in params else grid.search.inner[0]
            step = (params["sc"][:, 0].float() + lowest).t() * d
        offset = None
        if "m" in params:
            offset = params["m"][:, 0].float().t() * (params["dmin"][:, 0].float() / p.scale)
            offset = offset[None]
        highest = grid.levels - 1 - grid.zero
        error = p.residual(step[None], offset, -grid.zero, highest, grid.table)[0]
        errors.append((error * p.share).sum(0).double())
    mine_error, plain_error = errors
    is_close = (mine_error - plain_error).abs() <= 1e-5 * plain_error
    assert is_close.all() or not is_strict
    assert is_close.double().mean() >= 0.85, is_close
    assert abs(mine_error.sum() / plain_error.sum() - 1) < 1e-2
    assert {k: (v.dtype, v.shape) for k, v in mine.items()} == {
        k: (v.dtype, v.shape) for k, v in plain.items()
    }


def compare_affine(name):
    """Two pairs, two rounds, a part of the starting ranges, three groups' worth of columns at most."""
    from d2qconv_gguf.grids import affine_triton

    grid = GRIDS[name]
    shape = replace(grid.search, starts=grid.search.starts[::3])
    size, groups = grid.group, 64 // grid.group
    w, importance = make(64, size)
    p = Problem.make(w, importance, size)
    found = affine_search.fit_block(p, shape, pairs=2, rounds=3)
    plain = {
        "d": p.f16(found.d)[:, None],
        "dmin": p.f16(found.dmin)[:, None],
        "sc": found.sc.t()[:, None].to(torch.uint8),
        "m": found.m.t()[:, None].to(torch.uint8),
    }
    mine = affine_triton._fit_rows(w, importance, shape, size, pairs=2, rounds=3)
    compare(p, mine, plain, grid)

    group = groups - 1
    moved = w[:, -size:] + torch.randn(N, size, generator=torch.Generator().manual_seed(1)) * 0.005
    weights = importance[:size]
    p = Problem.make(moved, weights, size)
    results = [
        affine_triton.refit(plain, group, moved, weights, grid.search),
        grid.refit(plain, group, moved, weights),
    ]
    for result in results:
        assert torch.equal(result["sc"][:, :, :group], plain["sc"][:, :, :group])
        assert torch.equal(result["d"], plain["d"])
    only = [{k: v[:, :, group:] if k in ("sc", "m") else v for k, v in r.items()} for r in results]
    compare(p, *only, grid)


def compare_signed(name):
    """64 columns: two or four groups' worth."""
    from d2qconv_gguf.grids import symmetric_triton

    grid = GRIDS[name]
    size, lowest = grid.group, grid.search.inner[0]
    w, importance = make(64, size)
    p = Problem.make(w, importance, size)
    found = symmetric_search.fit_block(p, grid.search)
    plain = {"d": p.f16(found.d)[:, None], "sc": (found.sc.t()[:, None] - lowest).to(torch.uint8)}
    mine = symmetric_triton._fit_rows(w, importance, grid.search, size)
    compare(p, mine, plain, grid)

    moved, weights = w[:, size : 2 * size] * 1.1, importance[:size]
    p = Problem.make(moved, weights, size)
    results = [
        symmetric_triton.refit(plain, 1, moved, weights, grid.search),
        grid.refit(plain, 1, moved, weights),
    ]
    assert torch.equal(results[0]["sc"][:, :, 2:], plain["sc"][:, :, 2:])
    only = [{"d": r["d"], "sc": r["sc"][:, :, 1:2]} for r in results]
    compare(p, *only, grid, is_strict=True)


def compare_single(name):
    """Whole blocks; short ones, which take less to interpret, with columns side by side, too."""
    from d2qconv_gguf.grids import symmetric_triton

    grid = GRIDS[name]
    w, importance = make(grid.block, grid.block)
    plain = grid.fit(w, importance)
    p = Problem.make(w, importance, grid.block)
    beside = w.t().contiguous().t()
    for layout in (w, beside) if grid.block <= 64 else (w,):
        mine = symmetric_triton.fit_single(layout, importance, grid.search)
        compare(p, mine, plain, grid, is_strict=True)


def main(names):
    """Print by type what came of it."""
    said = {}
    for name in names:
        kinds = {AffineK: compare_affine, SignedK: compare_signed}
        compared = next((way for kind, way in kinds.items() if isinstance(GRIDS[name], kind)), compare_single)
        try:
            compared(name)
            said[name] = "equal"
        except Exception:  # noqa: BLE001 every type is heard
            said[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:])
