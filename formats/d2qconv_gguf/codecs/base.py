"""Bytes of ggml's blocks: what every codec shares.

A block is a few bytes of parameters and its columns' codes in bit planes. A subclass says the layout of ONE block, on
arrays of N blocks; rows, shapes, devices and checks are dealt with here. Packing moves bits and never rounds.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2qconv.errors import ExportError, VerifyError
from d2qconv.grids.base import Grid, code_dtype
from d2qconv.ir.coded import Coded
from d2qconv_gguf.ggml_types import GgmlType

Bytes = NDArray[np.uint8]
#: u8, or i32 where there are more than 256 codes
Codes: TypeAlias = NDArray[Any]
#: Codes that are packed at a time, so that what is made of them on the way stays in the processor's cache.
_PIECE = 1 << 19


class Codec:
    """One ggml type.

    grid: whose codes and params it holds. ggml_type: as written into the tensor's header. block_bytes: per block.
    """

    ggml_type: GgmlType
    block_bytes: int

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __repr__(self) -> str:
        """`<codec Q2_K>`."""
        return f"<codec {self.ggml_type.name}>"

    def row_bytes(self, n_in: int) -> int:
        """Bytes of one row; n_in is a multiple of the grid's block."""
        return n_in // self.grid.block * self.block_bytes

    def pack(self, coded: Coded) -> Bytes:
        """u8[n_out, row_bytes], the tensor's data as it stands in the file.

        Raises ExportError if `coded` is on another grid, or its arrays do not have the shapes that it claims.
        """
        self._check(coded)
        n_out, n_in = coded.shape
        codes = _array(coded.codes).reshape(-1, self.grid.block // self.grid.step)
        params = {name: _blocks(_array(p)) for name, p in coded.params.items()}
        packed = np.empty((len(codes), self.block_bytes), dtype=np.uint8)
        step = _PIECE // self.grid.block
        for at in range(0, len(codes), step):
            piece = slice(at, at + step)
            packed[piece] = self._pack(codes[piece], {name: p[piece] for name, p in params.items()})
        return packed.reshape(n_out, self.row_bytes(n_in))

    def unpack(self, data: Bytes, shape: tuple[int, int]) -> Coded:
        """The matrix `shape` in `data` (u8, n_out · row_bytes of them); inverse of `pack`, on the CPU.

        Raises VerifyError if the data has another length.
        """
        n_out, n_in = shape
        wanted = n_out * self.row_bytes(n_in)
        if n_in % self.grid.block or data.size != wanted:
            raise VerifyError(
                f"{data.size} bytes for a matrix {n_out}x{n_in}, not {wanted}",
                where=self.ggml_type.name,
                todo="the file is cut off, or its header has another shape; write it again",
            )
        blocks = np.ascontiguousarray(data).reshape(-1, self.block_bytes)
        codes, params = self._unpack(blocks)
        n_blocks = n_in // self.grid.block
        return Coded(
            self.grid,
            (n_out, n_in),
            torch.from_numpy(codes.reshape(n_out, n_in // self.grid.step)),
            {
                name: torch.from_numpy(np.ascontiguousarray(p).reshape(n_out, n_blocks, *p.shape[1:]))
                for name, p in params.items()
            },
        )

    def _pack(self, codes: Codes, params: dict[str, NDArray[np.generic]]) -> Bytes:
        """u8[N, block_bytes] from codes [N, block / step] and params [N, ...]."""
        raise NotImplementedError

    def _unpack(self, blocks: Bytes) -> tuple[Codes, dict[str, NDArray[np.generic]]]:
        """Codes [N, block / step] and params [N, ...] from u8[N, block_bytes]."""
        raise NotImplementedError

    def _check(self, coded: Coded) -> None:
        n_out, n_in = coded.shape
        n_blocks = n_in // self.grid.block
        problem = ""
        if coded.grid is not self.grid:
            problem = f"got codes on grid {coded.grid.id}"
        elif self.grid.accepts(coded.shape) is not None:
            problem = f"a matrix {n_out}x{n_in} has no whole blocks of {self.grid.block}"
        elif tuple(coded.codes.shape) != (n_out, n_in // self.grid.step):
            problem = f"codes are {tuple(coded.codes.shape)}, not {(n_out, n_in // self.grid.step)}"
        elif coded.codes.dtype is not code_dtype(self.grid.levels):
            problem = f"codes are {coded.codes.dtype}, not {code_dtype(self.grid.levels)}"
        else:
            for name, p in coded.params.items():
                if tuple(p.shape[:2]) != (n_out, n_blocks):
                    problem = f"{name} is {tuple(p.shape)}, not ({n_out}, {n_blocks}, ...)"
        if problem:
            raise ExportError(
                problem, where=self.ggml_type.name, todo="this is a fault of d2qconv; please report it"
            )


def _array(t: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = t.detach().cpu().contiguous().numpy()
    return array


def _blocks(p: NDArray[np.generic]) -> NDArray[np.generic]:
    """[n_out, n_blocks, ...] to [N, ...]."""
    return p.reshape(-1, *p.shape[2:])


def f16_bytes(x: NDArray[np.generic]) -> Bytes:
    """f16[N] to its two bytes, little endian: u8[N, 2]."""
    return np.ascontiguousarray(x).astype("<f2", copy=False).view(np.uint8).reshape(-1, 2)


def f16_values(data: Bytes) -> NDArray[np.generic]:
    """u8[N, 2] to f16[N], a copy; every bit pattern survives."""
    return np.array(data).view("<f2").astype(np.float16, copy=False).reshape(-1)


def join_planes(codes: Bytes, bits: int, width: int) -> Bytes:
    """Codes below 2^bits into bytes, the way of all ggml blocks.

    The block is cut into runs of `width` columns; 8 / bits consecutive runs lie on top of one another in `width` bytes,
    the first one in the lowest bits. codes: u8[N, columns] -> u8[N, columns · bits / 8].
    """
    planes = codes.reshape(len(codes), -1, 8 // bits, width)
    joined = planes[:, :, 0].copy()
    for number in range(1, planes.shape[2]):
        joined |= planes[:, :, number] << np.uint8(bits * number)
    return joined.reshape(len(codes), -1)


def split_planes(data: Bytes, bits: int, width: int) -> Bytes:
    """Inverse of `join_planes`: u8[N, bytes] -> u8[N, bytes · 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    planes = (data.reshape(len(data), -1, 1, width) >> shifts) & np.uint8(2**bits - 1)
    return planes.reshape(len(data), -1)
