"""The bytes of MatMulNBits and GatherBlockQuantized: codes as a bit stream along the columns, lowest bits first.

::

    codes   u8[n_out, n_in / block, block · bits / 8]     byte = q0 | q1 << bits | …
    scales  f32[n_out, n_in / block]
    zeros   u8[n_out, ceil(n_in / block · bits / 8)]      packed alike; the rest of a row's last byte is zero

`bits` is what a code takes in the file (`types.container`). Layout: onnxruntime's docs/ContribOperators.md, and
matmul_nbits.cc, which pads the zero points of every row to a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from d2qconv.errors import ExportError
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv_onnx import types

Bytes: TypeAlias = np.ndarray


@dataclass(frozen=True)
class Packed:
    """A matrix as it stands in the file; see the module."""

    codes: Bytes
    scales: np.ndarray
    zeros: Bytes


def grid_of(coded: Coded) -> AffineGrid:
    """The matrix's grid; raises ExportError if the nodes cannot hold it."""
    grid = coded.grid
    if not isinstance(grid, AffineGrid) or grid.zero != "integer" or grid.scale != "f32":
        raise ExportError(
            f"MatMulNBits cannot hold codes of the grid {grid.id}",
            todo="quantize for this format: its codes are integers with f32 scales and integer zero points",
        )
    return grid


def pack(coded: Coded) -> Packed:
    """Bytes of a matrix on the CPU; raises ExportError for a grid that the nodes cannot hold."""
    grid = grid_of(coded)
    bits, (n_out, n_in) = types.container(grid), coded.shape
    n_blocks = n_in // grid.group
    codes = pack_rows(coded.codes.numpy(), bits).reshape(n_out, n_blocks, grid.group * bits // 8)
    scales = coded.params["step"].to(torch.float32).expand(n_out, n_blocks).contiguous().numpy()
    zeros = pack_rows(coded.params["zero"].expand(n_out, n_blocks).numpy(), bits)
    return Packed(codes, scales, zeros)


def unpack(packed: Packed, grid: AffineGrid, shape: tuple[int, int]) -> Coded:
    """The inverse of `pack`."""
    bits, (n_out, n_in) = types.container(grid), shape
    codes = unpack_rows(packed.codes.reshape(n_out, -1), bits, n_in)
    zeros = unpack_rows(packed.zeros, bits, n_in // grid.group)
    params = {"step": torch.from_numpy(packed.scales.copy()), "zero": torch.from_numpy(zeros)}
    return Coded(grid, shape, torch.from_numpy(codes), params)


def pack_rows(values: np.ndarray, bits: int) -> Bytes:
    """u8[n_rows, n] of values below 2^bits → u8[n_rows, ceil(n · bits / 8)]; bits: 2, 4 or 8."""
    n_rows, n = values.shape
    each = 8 // bits
    spare = -n % each
    full = np.pad(values, ((0, 0), (0, spare))) if spare else values
    parts = full.reshape(n_rows, -1, each)
    packed = parts[:, :, 0].copy()
    for place in range(1, each):
        packed |= parts[:, :, place] << (place * bits)
    return packed


def unpack_rows(packed: Bytes, bits: int, n: int) -> np.ndarray:
    """u8[n_rows, ceil(n · bits / 8)] → u8[n_rows, n]."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[:, :, None] >> places) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(values.reshape(len(packed), -1)[:, :n])
