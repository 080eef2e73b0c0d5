"""The processes of one run, one for each GPU, started by torchrun.

Every process walks through the same model in the same order. Calibration sequences are shared out and what is summed
over them is summed over the processes; rows of matrices are shared out and gathered. Process 0, the leader, alone
reads and writes files of the run. A run of one process is a `Team` too, whose methods do nothing.

Every method but `share` is collective: all processes call the same ones in the same order. What they return, and what
`sum_` leaves, is the same on all of them, bit by bit. Tensors on a GPU travel by NCCL, everything else by gloo.

When one process fails, it leaves the group without waiting and exits; torchrun then ends the others. A process whose
others went silent stops by itself after `WAIT`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d2qconv.errors import D2qError, InputError, RunError

#: How long a process waits for another; the longest wait is for the leader to sample calibration tokens.
WAIT = timedelta(minutes=30)
#: What torchrun sets in every process.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HOW = "start it with torchrun --nproc-per-node GPUS -m d2qconv …, or without torchrun for one GPU"

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`, which computes on `device`. Leave it by its `with` block."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Team:
        """One process, no communication."""
        return cls(0, 1, torch.device(device))

    @classmethod
    def join(cls, device: torch.device, *, wait: timedelta = WAIT) -> Team:
        """Meet the processes that torchrun started with this one; alone if it did not start this one.

        device: `cuda` stands for the GPU of this process's LOCAL_RANK. wait: for each answer of the others.
        Raises InputError if the variables or the GPUs are not there, RunError if the others do not come.
        """
        place = _place(os.environ)
        if place is None:
            return cls.alone(device)
        rank, size, local = place
        if size == 1:
            return cls.alone(device)
        if not dist.is_available() or not dist.is_gloo_available():
            raise InputError("this torch cannot talk to other processes", where="torchrun", todo=HOW)
        backend = "gloo"
        if device.type == "cuda":
            device = _gpu(device, local)
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=wait)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"process {rank} of {size} did not meet the others: {_first_line(error)}",
                where="torchrun",
                todo="look for the first message of another process; on several machines check --rdzv-endpoint",
            ) from error
        return cls(rank, size, device)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.leave()
        else:
            self.abandon()

    @property
    def is_leader(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """A contiguous part of n items for this process. Parts differ by one at most; the last may be empty."""
        return self._share(self.rank, n)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace every tensor by its sum over the processes, in the tensor's own precision."""
        if self.size == 1:
            return
        with self._talk("adding up"):
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.all_reduce(whole)
                if whole is not tensor:
                    tensor.copy_(whole)

    def total(self, value: float) -> float:
        """The sum of a number over the processes, in f64."""
        if self.size == 1:
            return value
        whole = torch.tensor(value, dtype=torch.float64)
        self.sum_(whole)
        return whole.item()

    def gather_rows(self, part: Tensor, n: int) -> Tensor:
        """`[n, ...]` from every process's `[len(share(n)), ...]`; of any dtype, since bytes travel."""
        if self.size == 1:
            return part
        counts = [_length(self._share(rank, n)) for rank in range(self.size)]
        if len(part) != counts[self.rank]:
            raise ValueError(f"process {self.rank} holds {len(part)} of {n} rows, not {counts[self.rank]}")
        row = part.shape[1:].numel() * part.element_size()
        if n * row == 0:
            return part.new_empty(n, *part.shape[1:])
        padded = torch.zeros(counts[0], row, dtype=torch.uint8, device=part.device)
        padded[: len(part)] = _as_bytes(part).view(len(part), row)
        pieces = [torch.empty_like(padded) for _ in counts]
        with self._talk("gathering rows"):
            dist.all_gather(pieces, padded)
        rows = torch.cat([piece[:m] for piece, m in zip(pieces, counts, strict=True)])
        return rows.view(-1).view(part.dtype).view(n, *part.shape[1:])

    def gather(self, value: T) -> list[T]:
        """A small picklable value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        with self._talk("comparing notes"):
            dist.all_gather_object(values, value)
        return values

    def same(self, what: str, value: str) -> None:
        """Raise RunError on all processes if `value` differs between them."""
        values = self.gather(value)
        if len(set(values)) > 1:
            listed = ", ".join(f"{rank}: {text}" for rank, text in enumerate(values))
            raise RunError(
                f"{what} differs between the processes ({listed})",
                where="torchrun",
                todo="give all of them the same command, model, versions and kind of device",
            )

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` returns on the leader, where alone it is called; a small picklable value.

        If it raises there, the others raise RunError.
        """
        if self.size == 1:
            return make()
        sent: list[tuple[T | None, str]] = [(None, "")]
        failure: BaseException | None = None
        if self.is_leader:
            try:
                sent = [(make(), "")]
            except Exception as error:  # noqa: BLE001 raised again below, once the others know
                failure = error
                sent = [(None, error.what if isinstance(error, D2qError) else repr(error))]
        with self._talk("listening to the first process"):
            dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        value, trouble = sent[0]
        if trouble:
            raise RunError(f"the first process stopped: {_first_line(trouble)}", where=f"process {self.rank}")
        return value  # type: ignore[return-value] # None only where T has it

    def tensors_from_leader(
        self, make: Callable[[], Mapping[str, Tensor]], device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """As `from_leader`, for tensors by name; they arrive on `device`, or on this process's own."""
        target = self.device if device is None else torch.device(device)
        made: dict[str, Tensor] = {}

        def describe() -> list[tuple[str, tuple[int, ...], torch.dtype]]:
            made.update({name: tensor.to(target) for name, tensor in make().items()})
            return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()]

        layout = self.from_leader(describe)
        if self.size == 1:
            return made
        got: dict[str, Tensor] = {}
        with self._talk("listening to the first process"):
            for name, shape, dtype in layout:
                tensor = made[name] if self.is_leader else torch.empty(shape, dtype=dtype, device=target)
                tensor = tensor.contiguous()
                if tensor.numel():
                    dist.broadcast(_as_bytes(tensor), src=0)
                got[name] = tensor
        return got

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum_(torch.zeros(1))

    def leave(self) -> None:
        """Wait for the others, then end the group."""
        if self.size > 1 and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

    def abandon(self) -> None:
        """End this process's part in the group at once, whatever the others do; they fail at their next call."""
        if self.size == 1 or not dist.is_initialized():
            return
        with suppress(RuntimeError):
            world = dist.group.WORLD
            if world is not None:
                world.abort()
        with suppress(RuntimeError):
            dist.destroy_process_group()

    def _share(self, rank: int, n: int) -> slice:
        each, more = divmod(n, self.size)
        start = rank * each + min(rank, more)
        return slice(start, start + each + (rank < more))

    @contextmanager
    def _talk(self, doing: str) -> Iterator[None]:
        """Turn a failure of the connection into RunError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RunError(
                f"process {self.rank} of {self.size} lost the others while {doing}: {_first_line(error)}",
                where="torchrun",
                todo="another process stopped or hangs; the first message among theirs says why",
            ) from error


def started() -> tuple[int, int, int]:
    """(rank, processes of the run, those on this machine) as torchrun says, before any has joined; else (0, 1, 1).

    For what must be known while planning: who prints, and by how many the machine's memory is shared. Raises
    InputError.
    """
    place = _place(os.environ)
    if place is None:
        return 0, 1, 1
    rank, size, _ = place
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not here.isdigit() or not 1 <= int(here) <= size:
        raise InputError(
            f"there are not {here!r} of {size} processes here", where="LOCAL_WORLD_SIZE", todo=HOW
        )
    return rank, size, int(here)


def _place(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(rank, size, local rank) as torchrun set them, or None without it; raises InputError."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise InputError(
            f"some variables of torchrun are set, and {', '.join(missing)} not",
            where="the environment",
            todo=HOW,
        )
    try:
        rank, size, local = (int(environment[name]) for name in VARIABLES[:3])
    except ValueError as error:
        raise InputError(f"a variable of torchrun is no number: {error}", todo=HOW) from error
    if not 0 <= rank < size or local < 0:
        raise InputError(f"there is no process {rank} (local {local}) of {size}", where="RANK", todo=HOW)
    return rank, size, local


def _gpu(device: torch.device, local: int) -> torch.device:
    """The GPU of this process; raises InputError."""
    if device.index is not None:
        raise InputError(
            "under torchrun every process takes the GPU of its own number",
            where=f"--device {device}",
            todo="use --device cuda, and CUDA_VISIBLE_DEVICES to choose among the GPUs",
        )
    n_gpus = torch.cuda.device_count()
    if local >= n_gpus:
        raise InputError(
            f"process {local} of this machine needs a GPU of its own, and it has {n_gpus}",
            where="torchrun",
            todo=f"use --nproc-per-node {n_gpus}" if n_gpus else "use --device cpu",
        )
    if not dist.is_nccl_available():
        raise InputError("this torch has no NCCL", where="torchrun", todo="use one GPU, without torchrun")
    return torch.device("cuda", local)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as u8[n_bytes], if contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
