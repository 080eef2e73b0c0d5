"""Storage types by the names that the options use: affine grids that MatMulNBits can hold, and their bytes.

MatMulNBits (com.microsoft; onnxruntime's contrib_ops/cpu/quantization/matmul_nbits.cc) takes 2, 4 and 8 bits and blocks
of 16 to 256 columns. Kernels for int8 activations exist for blocks of 32, 64 and 128. Scales have the type of the
activations, f32 here; zero points are codes, packed, each row padded to a byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from d2qconv.grids.affine import AffineGrid

#: Bits of a code by the name of the type.
BITS: Mapping[str, int] = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
#: Bits that a code takes in the file.
CONTAINERS: Mapping[int, int] = {2: 2, 3: 4, 4: 4, 8: 8}
#: Columns of a block for which there are fast kernels, as the option takes them.
BLOCKS = ("32", "64", "128")
#: First onnxruntime whose CPU kernels are right and fast, by bits of the container.
RUNTIME: Mapping[int, str] = {2: "1.28", 4: "1.23", 8: "1.23"}
#: First onnxruntime-genai that was seen to run such graphs.
GENAI = "0.13"


def grid(name: str, block_size: int) -> AffineGrid:
    """The grid of a type; raises KeyError for a name that is none."""
    return AffineGrid(BITS[name], block_size, "integer", "f32")


def container(grid: AffineGrid) -> int:
    """Bits that a code of this grid takes in the file."""
    return CONTAINERS[grid.bits]


def zero_bytes(grid: AffineGrid, n_in: int) -> int:
    """Bytes of a row's zero points."""
    return -(-(n_in // grid.group) * container(grid) // 8)


def n_bytes(grid: AffineGrid, shape: Sequence[int]) -> int:
    """Bytes of codes, scales and zero points of a matrix [n_out, n_in]."""
    n_out, n_in = shape
    return n_out * (n_in * container(grid) // 8 + 4 * (n_in // grid.group) + zero_bytes(grid, n_in))
