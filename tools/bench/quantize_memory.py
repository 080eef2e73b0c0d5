"""Peak memory of the running process, sampled in a thread: host from /proc, GPU from NVML."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

#: Seconds between samples. Shorter peaks are missed, but by VmHWM and by torch's own counters.
PERIOD = 0.02


@dataclass
class Peaks:
    """Bytes. host: RssAnon + RssShmem, what only the process can give back; files that are mapped do not count.

    host_with_files: VmHWM, the kernel's own peak of all resident pages, mapped files included. torch_allocated and
    torch_reserved: of PyTorch's allocator. gpu_used: of the whole device by NVML, over what was used at the start;
    it holds the CUDA context and libraries' workspaces too. 0 without a GPU.
    """

    host: int = 0
    host_with_files: int = 0
    torch_allocated: int = 0
    torch_reserved: int = 0
    gpu_used: int = 0


class Sampler:
    """Samples from `with` to its end; `peaks` holds the result."""

    def __init__(self) -> None:
        self.peaks = Peaks()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._device = _nvml_device()
        self._before = self._gpu_used()

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.peaks.host_with_files = _status("VmHWM")
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.peaks.torch_allocated = torch.cuda.max_memory_allocated()
            self.peaks.torch_reserved = torch.cuda.max_memory_reserved()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self._sample()

    def _sample(self) -> None:
        peaks = self.peaks
        peaks.host = max(peaks.host, _status("RssAnon", "RssShmem"))
        peaks.gpu_used = max(peaks.gpu_used, self._gpu_used() - self._before)

    def _gpu_used(self) -> int:
        if self._device is None:
            return 0
        import pynvml  # noqa: PLC0415

        return int(pynvml.nvmlDeviceGetMemoryInfo(self._device).used)


def _nvml_device() -> object | None:
    """NVML's handle of the first visible GPU, None without NVML. Makes no CUDA context."""
    try:
        import pynvml  # noqa: PLC0415

        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        handle: object = pynvml.nvmlDeviceGetHandleByIndex(int(first))
    except Exception:  # noqa: BLE001  no library, no driver, no device: all the same here
        return None
    return handle


def _status(*names: str) -> int:
    """Sum of fields of /proc/self/status, bytes."""
    total = 0
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            total += int(value.split()[0]) * 1024
    return total


def as_dict(peaks: Peaks) -> dict[str, int]:
    """For JSON."""
    return asdict(peaks)
