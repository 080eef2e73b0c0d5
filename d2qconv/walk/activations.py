"""Activations of some sequences, on the device, in host memory, or on disk. The place never changes a bit of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from d2qconv.errors import RunError
from d2qconv.ir.workdir import ACTIVATIONS, unusable


class Place(StrEnum):
    """Where activations lie between their visits to a block."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass
class Activations:
    """f32[n_seq, length, hidden] that is read and replaced some sequences at a time.

    device: where `rows` gives them. Where that is the values' own, `rows` is a view: read it, replace it with `set`.
    Copies from and to a GPU run on the current stream in the order in which they are asked for; those from and to
    pinned memory do not make the caller wait. So the values may be read by the CPU only through this class.
    """

    values: Tensor
    device: torch.device
    _is_pinned: bool = field(default=False, init=False)

    @classmethod
    def of(cls, values: Tensor) -> Activations:
        """A tensor where it is."""
        return cls(values, values.device)

    @property
    def shape(self) -> torch.Size:
        """(n_seq, length, hidden)."""
        return self.values.shape

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.values)

    def __iter__(self) -> Iterator[Tensor]:
        """Every sequence, f32[length, hidden] on the device."""
        for i in range(len(self.values)):
            yield self.rows(slice(i, i + 1))[0]

    def rows(self, rows: slice) -> Tensor:
        """Some sequences, on the device."""
        return self.values[rows].to(self.device, non_blocking=self._is_pinned)

    def set(self, rows: slice, new: Tensor) -> None:
        """Replace some sequences. On one stream, a later `rows` sees them."""
        self.values[rows].copy_(new, non_blocking=self._is_pinned)

    def copy_from(self, other: Activations) -> None:
        """Take the values of activations of the same shape in the same place."""
        self.values.copy_(other.values)

    def is_finite(self) -> bool:
        """Neither NaN nor infinite anywhere; computed on the device, a sequence at a time."""
        is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        for sequence in self:
            is_finite &= torch.isfinite(sequence).all()
        return bool(is_finite)

    def close(self) -> None:
        """Give the memory back. Nothing may be asked of it any more."""
        if self._is_pinned:
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self.values.data_ptr())  # type: ignore[no-untyped-call]
            self._is_pinned = False
        self.values = torch.empty(0, *self.values.shape[1:])

    def __del__(self) -> None:
        if self._is_pinned:
            self.close()

    def pin(self) -> None:
        """Lock the pages, so that copies from and to the GPU run by themselves; raises RunError if refused.

        torch's own pinned memory comes in powers of two, up to twice what is asked for; this is exact.
        """
        n_bytes = self.values.numel() * self.values.element_size()
        status = torch.cuda.cudart().cudaHostRegister(self.values.data_ptr(), n_bytes, 0)  # type: ignore[no-untyped-call]
        if int(status) != 0:
            raise RunError(
                f"{n_bytes:,} bytes of host memory cannot be pinned for the GPU (CUDA error {int(status)})",
                where="activations",
                todo="give a smaller --max-host-mem, so that they are kept on disk",
            )
        self._is_pinned = True


@dataclass(frozen=True)
class Placement:
    """Where a run keeps its activations. folder: the work directory, for those on disk; rank: whose they are there."""

    place: Place
    device: torch.device
    folder: Path | None = None
    rank: int = 0

    def empty(self, n_seq: int, length: int, hidden: int) -> Activations:
        """Room for activations, not set yet; raises RunError."""
        shape = (n_seq, length, hidden)
        # Nothing can neither be pinned nor mapped.
        match self.place if n_seq else Place.DEVICE:
            case Place.DEVICE:
                return Activations(torch.empty(shape, device=self.device), self.device)
            case Place.HOST:
                made = Activations(torch.empty(shape), self.device)
                if self.device.type == "cuda":
                    made.pin()
                return made
            case Place.DISK:
                assert self.folder is not None, "activations on disk need a folder"
                return Activations(_mapped(self.folder / _name(self.rank), shape), self.device)


def _name(rank: int) -> str:
    """Every process of a team has a file of its own."""
    return ACTIVATIONS if rank == 0 else f"{ACTIVATIONS}.{rank}"


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """f32 in a new file, which has no name any more when this returns: it goes with the tensor, or with the process.

    All of its blocks are taken at once: a full disk is an error here, and not a signal (SIGBUS) at some later
    write. A kill between making and unlinking leaves the file; the next one replaces it.
    """
    n_bytes = math.prod(shape) * torch.float32.itemsize
    try:
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        try:
            values = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32)
        finally:
            path.unlink()
    except OSError as error:
        path.unlink(missing_ok=True)
        raise unusable(path.parent, error) from error
    except RuntimeError as error:
        raise RunError(
            f"{n_bytes:,} bytes of activations cannot be mapped: {str(error).splitlines()[0]}",
            where=str(path),
            todo="name a folder on a local disk with --work-dir",
        ) from error
    return values.view(shape)
