"""What a dialect is: names, shapes and bytes of a quantized matrix, and what config.json says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from d2qconv.errors import Refusal
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded


@dataclass(frozen=True)
class Array:
    """One array of a package before it is made: its type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its length in the file."""
        return self.dtype.itemsize * int(np.prod(self.shape))


@dataclass(frozen=True)
class Scheme:
    """How a linear is stored, as configs say it.

    group: columns, 0 for a whole row. has_zero: zero points are stored.
    """

    bits: int
    group: int
    has_zero: bool

    @classmethod
    def of(cls, grid: AffineGrid) -> Scheme:
        """The scheme of a grid."""
        return cls(grid.bits, 0 if grid.is_per_channel else grid.group, grid.zero == "integer")


@dataclass(frozen=True)
class Content:
    """What config.json must tell of a package.

    linears: per module name (`model.layers.0.mlp.up_proj`) its scheme, None where it stays float. head: the module of
    an untied head, '' if there is none.
    """

    linears: Mapping[str, Scheme | None]
    head: str

    @property
    def schemes(self) -> list[Scheme]:
        """The schemes that occur, the most frequent first."""
        counts = Counter(scheme for scheme in self.linears.values() if scheme is not None)
        return [scheme for scheme, _ in counts.most_common()]

    @property
    def floats(self) -> list[str]:
        """Linears that stay float, the head among them."""
        return [name for name, scheme in self.linears.items() if scheme is None] + [self.head] * bool(
            self.head
        )


@dataclass(frozen=True)
class Facts:
    """What plan and verify need to know of a dialect besides its bytes.

    name: of the exporter. runtime: the Python package that loads a folder, and `version` the first one that does.
    biases: model_types whose loader is known to honour biases of gate and up, as the package's config has them. bound:
    largest accepted difference of a logit, over the largest one, of a model that is loaded as f32. mixes_zeros: linears
    of several types may have zero points. has_offsets: -zero · step is stored, in the step's type.
    """

    name: str
    runtime: str
    version: str
    bound: float
    biases: frozenset[str] = field(default_factory=frozenset)
    mixes_zeros: bool = True
    has_offsets: bool = False


class Dialect(Protocol):
    """One way to write a quantized linear; stateless."""

    @property
    def facts(self) -> Facts:
        """Name and runtime."""

    def refuse(self, grid: AffineGrid, shape: Sequence[int]) -> Refusal | None:
        """Why a matrix [n_out, n_in] on this grid cannot be written, or None."""

    def refuse_all(self, content: Content) -> list[Refusal]:
        """Why these grids together cannot be written."""

    def layout(self, module: str, grid: AffineGrid, shape: tuple[int, int]) -> dict[str, Array]:
        """The arrays of a matrix, by name in the package."""

    def arrays(self, module: str, coded: Coded) -> dict[str, Tensor]:
        """The same, filled. coded: on the CPU, on a grid that `refuse` accepted."""

    def config(self, content: Content) -> dict[str, Any]:
        """Keys that config.json gets."""


def zeros_of(coded: Coded) -> np.ndarray:
    """Zero points u8[n_out, n_groups]; those of a grid without are the middle code."""
    grid, n_groups = affine(coded), coded.params["step"].shape[1]
    if grid.zero == "none":
        return np.full((coded.shape[0], n_groups), grid.levels // 2, dtype=np.uint8)
    return coded.params["zero"].expand(coded.shape[0], n_groups).numpy()


def steps_of(coded: Coded) -> Tensor:
    """Steps f16 or bf16 [n_out, n_groups]."""
    step = coded.params["step"]
    return step.expand(coded.shape[0], step.shape[1]).contiguous()


def affine(coded: Coded) -> AffineGrid:
    """The matrix's grid, of which the plan made sure that it is such a one."""
    assert isinstance(coded.grid, AffineGrid), f"{coded.grid.id} is not affine"
    return coded.grid


def words(values: np.ndarray) -> Tensor:
    """u32 words as torch's i32, which is what these files say of them."""
    return torch.from_numpy(values.view(np.int32))


def step_dtype(grid: AffineGrid) -> torch.dtype:
    """The type of the steps."""
    return torch.float16 if grid.scale == "f16" else torch.bfloat16


def whole_words(grid: AffineGrid, n: int, side: str, n_out: int, n_in: int) -> Refusal | None:
    """A refusal unless n codes fill whole words."""
    if n * grid.bits % 32 == 0:
        return None
    where = f"{grid.bits} bits, shape {n_out}x{n_in}"
    return Refusal(
        where,
        f"{n} {side} of {grid.bits} bits are no whole number of 32-bit words",
        "use another type, or leave the matrix float with --tensor-type ROLE=float",
    )
