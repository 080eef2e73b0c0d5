from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from d2qconv.grids.affine import AffineGrid
from d2qconv.testing.laws import GridLaws
from d2qconv_onnx import codec, types


@dataclass(frozen=True)
class JoinedCodec:
    """MatMulNBits' three arrays side by side, as one array of bytes a row."""

    grid: AffineGrid

    def pack(self, coded):
        packed = codec.pack(coded)
        n_out = coded.shape[0]
        parts = [packed.codes.reshape(n_out, -1), packed.scales.view(np.uint8), packed.zeros]
        return np.concatenate(parts, axis=1)

    def unpack(self, data, shape):
        codes, scales, zeros = self.split(data, shape[1])
        return codec.unpack(codec.Packed(codes, scales, zeros), self.grid, shape)

    def split(self, data, n_in):
        bits, blocks = types.container(self.grid), n_in // self.grid.group
        ends = np.cumsum([n_in * bits // 8, 4 * blocks])
        codes, scales, zeros = np.split(data, ends, axis=1)
        return codes, np.ascontiguousarray(scales).view(np.float32), np.ascontiguousarray(zeros)


class OnnxLaws(GridLaws):
    # Whole bytes of zero points: rows are padded to them.
    n_blocks = 4

    def test_bytes_are_the_bits_promised(self):
        if types.container(self.grid) == self.grid.bits:
            super().test_bytes_are_the_bits_promised()
            return
        n_in = self.n_blocks * self.grid.block
        wider = types.container(self.grid) - self.grid.bits
        bits = self.grid.bits_per_weight * 5 * n_in + wider * 5 * (n_in + self.n_blocks)
        assert self.random_packed(np.random.default_rng(0), 5, n_in).nbytes * 8 == bits

    def random_packed(self, rng, n_out, n_in):
        grid, blocks = self.grid, n_in // self.grid.group
        codes = rng.integers(0, grid.levels, (n_out, n_in), dtype=np.uint8)
        zeros = rng.integers(0, grid.levels, (n_out, blocks), dtype=np.uint8)
        scales = (rng.standard_normal((n_out, blocks)) * 0.02).astype(np.float32)
        bits = types.container(grid)
        parts = [self.bytes_of(codes, bits), scales.view(np.uint8), self.bytes_of(zeros, bits)]
        return np.concatenate(parts, axis=1)

    def reference_decode(self, packed, shape):
        bits = types.container(self.grid)
        codes, scales, zeros = self.codec.split(packed, shape[1])
        q = self.values_of(codes, bits, shape[1])
        z = self.values_of(zeros, bits, shape[1] // self.grid.group)
        group = self.grid.group
        return (q - np.repeat(z, group, 1)).astype(np.float32) * np.repeat(scales, group, 1)

    # Through numpy's bit order, which shares nothing with the codec's shifts.
    @staticmethod
    def bytes_of(values, bits):
        stream = np.unpackbits(values[:, :, None], axis=2, bitorder="little", count=bits)
        return np.packbits(stream.reshape(len(values), -1), axis=1, bitorder="little")

    @staticmethod
    def values_of(packed, bits, n):
        stream = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")[:, : n * bits]
        places = 1 << np.arange(bits)
        return (stream.reshape(len(packed), n, bits) * places).sum(2).astype(np.int32)


def laws(name, block, worst):
    grid = types.grid(name, block)
    body = {"grid": grid, "codec": JoinedCodec(grid), "max_fit_error": worst}
    return type(f"Test{name.capitalize()}G{block}", (OnnxLaws,), body)


TestInt2G32 = laws("int2", 32, 0.13)
TestInt2G64 = laws("int2", 64, 0.16)
TestInt2G128 = laws("int2", 128, 0.18)
TestInt3G64 = laws("int3", 64, 0.05)
TestInt4G32 = laws("int4", 32, 0.01)
TestInt4G128 = laws("int4", 128, 0.02)
TestInt8G64 = laws("int8", 64, 1e-4)


@pytest.mark.parametrize("name", types.BITS)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_predicted_bytes_are_those_of_the_arrays(name, block):
    law = laws(name, block, 1.0)()
    for n_blocks in (1, 3, 5):
        n_in = n_blocks * block
        packed = law.random_packed(np.random.default_rng(n_blocks), 7, n_in)
        assert law.codec.pack(law.codec.unpack(packed, (7, n_in))).nbytes == packed.nbytes
        assert types.n_bytes(law.grid, (7, n_in)) == packed.nbytes
