"""How much memory a run may take, and how much it took.

Host memory here is what a process cannot give back: anonymous and shared pages. Pages of mapped files (a checkpoint,
activations on disk) are the system's cache, which it drops when others need the room.
"""

from __future__ import annotations

import math
import os
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from d2qconv.errors import InputError

if TYPE_CHECKING:
    import torch

#: Of the memory that is free at the start, what is taken without being asked for a number.
GPU_SHARE, HOST_SHARE = 0.9, 0.8
#: Bytes that CUDA takes of a GPU before the first tensor: its context and the libraries' kernels. Measured on an H200.
CUDA_CONTEXT = 800 << 20
#: By these variables the user sets up PyTorch's allocator.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: Seconds between two looks at the process's memory.
LOOK_EVERY = 0.02

#: Bytes that the process may hold by `host_limit`, None where nobody said.
_HOST_LIMIT: ContextVar[int | None] = ContextVar("host_limit", default=None)

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([kmgt])(i?)b?|b)?\s*", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take. gpu_bytes: None where no GPU is used."""

    gpu_bytes: int | None
    host_bytes: int


@dataclass(frozen=True)
class Peaks:
    """The most memory that a run held at one time, in bytes.

    gpu_allocated: by tensors; gpu_reserved: by PyTorch's allocator, which keeps freed blocks; neither has the CUDA
    context (about half a GiB). Both None without a GPU. host: anonymous and shared pages, looked at every
    LOOK_EVERY seconds; or, where `is_host_with_files`, the resident set, which counts pages of mapped files too.
    """

    gpu_allocated: int | None
    gpu_reserved: int | None
    host: int
    is_host_with_files: bool = False


def parse_size(text: str, where: str) -> int:
    """Bytes: `24GiB` and `1.5Gi` count in powers of 1024, `24GB` and `1.5G` of 1000, a bare number bytes.

    Case does not matter. Raises InputError for anything else, and for less than one byte.
    """
    found = _SIZE.fullmatch(text)
    n_bytes = 0
    if found is not None:
        number, unit, binary = found.groups()
        factor = (1024 if binary else 1000) ** _POWER[unit.lower()] if unit else 1
        n_bytes = math.floor(float(number) * factor)
    if n_bytes < 1:
        raise InputError(f"not a size of memory: {text!r}", where=where, todo="write 24GiB, 24GB or 500MiB")
    return n_bytes


def choose_budget(max_gpu: str | None, max_host: str | None, device: torch.device) -> Budget:
    """The budget as asked for, or GPU_SHARE and HOST_SHARE of what is free now.

    Raises InputError for a text that is no size, a GPU budget without a GPU or above what the GPU has, and where
    the system does not say how much host memory it has.
    """
    gpu = _gpu_bytes(max_gpu, device)
    if max_host is not None:
        return Budget(gpu, parse_size(max_host, "--max-host-mem"))
    return Budget(gpu, int(available_host_bytes() * HOST_SHARE))


def _gpu_bytes(asked: str | None, device: torch.device) -> int | None:
    if device.type != "cuda":
        if asked is not None:
            raise InputError("a GPU budget, and no GPU in use", where="--max-gpu-mem", todo="leave it out")
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if asked is None:
        return int(free * GPU_SHARE)
    n_bytes = parse_size(asked, "--max-gpu-mem")
    if n_bytes > total:
        raise InputError(
            f"{asked} is more than {device} has ({gibibytes(total)})",
            where="--max-gpu-mem",
            todo="ask for less, or leave it out",
        )
    return n_bytes


def limit_allocator(device: torch.device, budget: Budget) -> None:
    """Let PyTorch's allocator keep no more of a GPU than the budget: what it holds and does not use it gives back.

    Its segments may grow, so that gaps between tensors can be joined, unless the user's environment sets it up.
    """
    if device.type != "cuda" or budget.gpu_bytes is None:
        return
    import torch

    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # Its name until PyTorch 2.9 was another; no public function changes it once torch is loaded.
        old = torch.cuda.memory._set_allocator_settings
        getattr(torch._C, "_accelerator_setAllocatorSettings", old)("expandable_segments:True")
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(max(budget.gpu_bytes - CUDA_CONTEXT, 0) / total, 1.0)
    torch.cuda.set_per_process_memory_fraction(share, device.index or 0)


def available_host_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping; raises InputError if the system does not say.

    On Linux MemAvailable of /proc/meminfo, or less where a control group of the process (version 1 or 2) or one
    above it allows less. Elsewhere all of the physical memory (sysconf), whoever uses it.
    """
    limits = [*_cgroup_rooms(root)]
    available = _meminfo(root / "proc/meminfo")
    if available is None:
        available = _physical()
    if available is not None:
        limits.append(available)
    if not limits:
        raise InputError(
            "this system does not say how much memory it has", where="--max-host-mem", todo="give a number"
        )
    return max(min(limits), 0)


@contextmanager
def host_limit(n_bytes: int | None) -> Iterator[None]:
    """Within it `host_room` counts as if this process could hold no more. None sets no limit."""
    token = _HOST_LIMIT.set(n_bytes)
    try:
        yield
    finally:
        _HOST_LIMIT.reset(token)


def host_room() -> int:
    """Bytes that this process may still take: of what is free HOST_SHARE, and no more than `host_limit` leaves."""
    room = int(available_host_bytes() * HOST_SHARE)
    limit = _HOST_LIMIT.get()
    return room if limit is None else max(min(room, limit - (held_host_bytes() or 0)), 0)


def lacks_room(n_bytes: int) -> str:
    """Why work that takes about `n_bytes` more of host memory must not begin; empty if it may.

    Where the system does not say what is free, it may.
    """
    try:
        room = host_room()
    except InputError:
        return ""
    if n_bytes <= room:
        return ""
    return (
        f"it would take about {gibibytes(n_bytes)} of host memory, and {gibibytes(room)} may be taken"
        " (--max-host-mem, or what is free)"
    )


def _meminfo(path: Path) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def host_memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process allow all that is in them, None if they set no limit."""
    limits = []
    for folder, limit, _, _ in _cgroups(root):
        with suppress(OSError, ValueError):  # `max`, or a group without the controller
            limits.append(int((folder / limit).read_text()))
    return min(limits, default=None)


def _cgroup_rooms(root: Path) -> list[int]:
    """What the control groups of this process still allow, the caches that they would drop counted as free."""
    return [room for group in _cgroups(root) for room in _cgroup_room(*group)]


def _cgroups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's control groups and of those above; names of the files that say limit, use and cache."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = base / group.lstrip("/")
        # In a container the path of the group may be the host's; its files then lie at the base.
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base):
                yield (folder, *names)


def _cgroup_room(folder: Path, limit: str, used: str, cache: str) -> list[int]:
    try:
        allowed, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        found = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # `max`, or a group without the controller
        return []
    return [allowed - taken + (int(found[1]) if found else 0)]


def held_host_bytes() -> int | None:
    """Anonymous and shared pages of this process now; None where the system does not tell them from mapped files."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", text, re.MULTILINE)
    return sum(map(int, found)) * 1024 if found else None


class PeakMeter:
    """Measures Peaks from entering to leaving: the host's by a thread that looks, the GPU's by its allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMeter:
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        if held_host_bytes() is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def peaks(self) -> Peaks:
        """The peaks so far."""
        allocated = reserved = None
        if self._device.type == "cuda":
            import torch

            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
        now = held_host_bytes()
        if now is None:
            unit = 1 if sys.platform == "darwin" else 1024
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return Peaks(allocated, reserved, resident, is_host_with_files=True)
        return Peaks(allocated, reserved, max(self._held, now))

    def figures(self) -> dict[str, int]:
        """The peaks so far, as a watch is told them."""
        peaks = self.peaks()
        found = {"host_bytes": peaks.host}
        return found if peaks.gpu_reserved is None else found | {"gpu_bytes": peaks.gpu_reserved}

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_EVERY):
            self._held = max(self._held, held_host_bytes() or 0)


def gibibytes(n_bytes: int) -> str:
    """`18.2 GiB`, `512 MiB`: memory is told in powers of 1024."""
    if n_bytes < 1 << 30:
        return f"{math.ceil(n_bytes / (1 << 20))} MiB"
    return f"{n_bytes / (1 << 30):.1f} GiB"
