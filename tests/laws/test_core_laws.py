"""The laws for the core's affine grids. Bytes and independent decoder are this file's own, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv.testing.laws import GridLaws

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
#: Largest relative error of a Gaussian fit in groups of 128 or fewer: asymmetric grids, symmetric ones.
MOST = {2: (0.135, 0.135), 3: (0.036, 0.036), 4: (0.0095, 0.0098), 8: (5e-5, 6e-5)}


@dataclass(frozen=True)
class PlainCodec:
    """Bytes of a row: codes, lowest bit first; steps; zeros as codes are, or offsets."""

    grid: AffineGrid

    def pack(self, coded):
        g = self.grid
        parts = [bits_of(coded.codes.numpy(), g.bits), floats_of(coded.params["step"])]
        if g.zero == "integer":
            parts.append(bits_of(coded.params["zero"].numpy(), g.bits))
        if g.zero == "float":
            parts.append(floats_of(coded.params["offset"]))
        return np.concatenate(parts, axis=1)

    def unpack(self, data, shape):
        g, (n_out, n_in) = self.grid, shape
        n_blocks = n_in // g.group
        sizes = np.cumsum([n_in * g.bits // 8, n_blocks * TORCH[g.scale].itemsize])
        codes, steps, rest = np.split(data, sizes, axis=1)
        params = {"step": floats(steps, g.scale)}
        if g.zero == "integer":
            params["zero"] = torch.from_numpy(numbers(rest, g.bits))
        if g.zero == "float":
            params["offset"] = floats(rest, g.scale)
        return Coded(g, (n_out, n_in), torch.from_numpy(numbers(codes, g.bits)), params)


def bits_of(x, bits):
    """u8[n, k] to bytes u8[n, k·bits / 8]."""
    return np.packbits((x[:, :, None] >> np.arange(bits) & 1).reshape(len(x), -1), axis=1, bitorder="little")


def numbers(data, bits):
    """Inverse of `bits_of`."""
    single = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, bits)
    return (single.astype(int) << np.arange(bits)).sum(2).astype(np.uint8)


def floats_of(x):
    return x.contiguous().view(torch.uint8).numpy()


def floats(data, scale):
    return torch.from_numpy(data.copy()).view(TORCH[scale])


class AffineLaws(GridLaws):
    grid: AffineGrid

    def random_packed(self, rng, n_out, n_in):
        """Any codes; steps and offsets of either sign and very different sizes, some 0."""
        g, n_blocks = self.grid, n_in // self.grid.group
        codes = rng.integers(0, 256, (n_out, n_in * g.bits // 8), dtype=np.uint8)

        def some_floats():
            x = rng.standard_normal((n_out, n_blocks)) * np.exp2(rng.integers(-12, 12, (n_out, n_blocks)))
            x[rng.random(x.shape) < 0.1] = 0
            return floats_of(torch.from_numpy(x).to(TORCH[g.scale]))

        parts = [codes, some_floats()]
        if g.zero == "integer":
            parts.append(rng.integers(0, 256, (n_out, n_blocks * g.bits // 8), dtype=np.uint8))
        if g.zero == "float":
            parts.append(some_floats())
        return np.concatenate(parts, axis=1)

    def reference_decode(self, packed, shape):
        g, n_in = self.grid, shape[1]
        n_blocks, size = n_in // g.group, {"f16": 2, "bf16": 2, "f32": 4}[g.scale]

        def numpy_floats(data):
            data = np.ascontiguousarray(data)
            if g.scale == "bf16":
                return (data.view("<u2").astype("<u4") << 16).view("<f4")
            return data.view("<f2" if g.scale == "f16" else "<f4").astype(np.float32)

        end = n_in * g.bits // 8
        codes = numbers(packed[:, :end], g.bits).astype(np.float32).reshape(len(packed), n_blocks, g.group)
        step = numpy_floats(packed[:, end : end + size * n_blocks])[:, :, None]
        rest = packed[:, end + size * n_blocks :]
        if g.zero == "float":
            values = step * codes - numpy_floats(rest)[:, :, None]
        elif g.zero == "integer":
            values = step * (codes - numbers(rest, g.bits)[:, :, None].astype(np.float32))
        else:
            values = step * (codes - np.float32(2 ** (g.bits - 1)))
        return values.reshape(shape)


def laws(grid, max_fit_error=None):
    """A class of laws for one grid. Eight blocks, so that 3-bit zeros fill whole bytes."""
    most = max_fit_error or MOST[grid.bits][grid.zero == "none"]
    return type(
        f"Test_{grid.id}",
        (AffineLaws,),
        {
            "grid": grid,
            "codec": PlainCodec(grid),
            "max_fit_error": most,
            "n_blocks": 8 if grid.bits == 3 else 4,
        },
    )


GRIDS = [
    AffineGrid(bits, group, zero)
    for bits, groups in ((2, (16, 128)), (3, (32,)), (4, (128,)), (8, (64,)))
    for group in groups
    for zero in ("integer", "float", "none")
]
for _grid in GRIDS:
    globals()[f"Test_{_grid.id}"] = laws(_grid)


class TestPerChannel(AffineLaws):
    grid = AffineGrid(4, 96, "float", is_per_channel=True)
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.0095, 1

    def test_refusals_have_a_reason(self):
        """A row is one block: two are refused."""
        assert self.grid.accepts((3, 96)) is None
        for shape in ((3, 192), (3, 48), (3, 0), (0, 96), (96,)):
            refusal = self.grid.accepts(shape)
            assert refusal is not None, shape
            assert refusal.where
            assert refusal.why
            assert refusal.todo


class TestLongGroups(AffineLaws):
    grid = AffineGrid(2, 256, "float")
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.12, 4


class TestBf16Integer(AffineLaws):
    grid = AffineGrid(4, 64, "integer", scale="bf16")
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.0095, 4


class TestBf16Float(AffineLaws):
    grid = AffineGrid(8, 64, "float", scale="bf16")
    codec, max_fit_error, n_blocks = PlainCodec(grid), 6e-5, 4


class TestF32Integer(AffineLaws):
    grid = AffineGrid(2, 64, "integer", scale="f32")
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.135, 4


class TestF32Float(AffineLaws):
    grid = AffineGrid(3, 16, "float", scale="f32")
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.036, 8


class TestF32None(AffineLaws):
    grid = AffineGrid(4, 32, "none", scale="f32")
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.0098, 4


class TestFewBitsInteger(AffineLaws):
    grid = AffineGrid(4, 64, "integer", significand=7)
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.0097, 4


class TestFewBitsNone(AffineLaws):
    grid = AffineGrid(3, 32, "none", significand=8)
    codec, max_fit_error, n_blocks = PlainCodec(grid), 0.05, 8
