"""What this machine has: processor, memory, disks, GPUs. Everything is read from the system; nothing is measured.

On Linux from /proc and /sys (`root` in tests), elsewhere what Python itself says.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2qconv.budget import available_host_bytes, gibibytes, host_memory_limit
from d2qconv.errors import InputError
from d2qconv.threads import n_cores

ROOT = Path("/")
#: Instruction sets that llama.cpp's and ONNX Runtime's kernels are chosen by, as /proc/cpuinfo names them.
INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def machine_facts(gpu: Mapping[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """All of it. gpu: what `torch_facts` gave, empty if torch is not there."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "processor": processor(root),
        "memory": memory(root),
        "disk": disks(),
        "gpu": gpus(gpu),
    }


def processor(root: Path = ROOT) -> dict[str, str]:
    """Its name, the cores that this process may use, and the instructions that matter."""
    text = _read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    quota = _quota(root)
    cores = f"{n_cores()} of {os.cpu_count()}" + (f", limited to {quota:g} by the container" if quota else "")
    found = {"name": name[1] if name else platform.processor() or platform.machine(), "cores": cores}
    if flags:
        found["instructions"] = " ".join(i for i in INSTRUCTIONS if i in has) or "none of those that matter"
    return found


def memory(root: Path = ROOT) -> dict[str, str]:
    """Total, what can be had now, and a container's limit."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    limit = host_memory_limit(root)
    found = {"total": gibibytes(int(total[1]) * 1024)} if total else {}
    try:
        found["free"] = gibibytes(available_host_bytes(root))
    except InputError:
        found["free"] = "the system does not say"
    if limit is not None and total and limit < int(total[1]) * 1024:
        found["limit of the container"] = gibibytes(limit)
    return found


def disks() -> dict[str, str]:
    """Room where outputs and work directories go by default, and for temporary files."""
    places = {"current folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    found = {}
    for name, path in places.items():
        try:
            found[name] = f"{gibibytes(shutil.disk_usage(path).free)} free"
        except OSError as error:
            found[name] = f"cannot be looked at: {error.strerror}"
    return found


def gpus(facts: Mapping[str, Any]) -> dict[str, str]:
    """Every GPU that torch sees, CUDA's versions, whether Triton's kernels can be used."""
    if not facts:
        return {"devices": "unknown: torch is not here"}
    found = {}
    for number, device in enumerate(facts.get("devices", [])):
        found[f"cuda:{number}"] = (
            f"{device['name']}, {gibibytes(device['free'])} free of {gibibytes(device['total'])}, "
            f"compute capability {device['capability']}"
        )
    found = found or {"devices": "none that torch can use"}
    found["CUDA of torch"] = facts.get("cuda") or "none: a build of torch for the CPU"
    if facts.get("error"):
        found["torch says"] = facts["error"]
    driver = _driver()
    if driver:
        found["driver"] = driver
    found["triton"] = facts.get("triton") or "missing; GPUs work without, slower"
    return found


def torch_facts() -> dict[str, Any]:
    """What torch says of its GPUs; run by `probe` in a process of its own."""
    from importlib.util import find_spec

    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda or "", "devices": [], "triton": ""}
    if find_spec("triton") is not None:
        try:
            import triton

            found["triton"] = str(triton.__version__)
        except (ImportError, OSError, RuntimeError) as error:
            found["triton"] = f"broken: {error}"
    try:
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(number)
            about = torch.cuda.get_device_properties(number)
            found["devices"].append(
                {
                    "name": about.name,
                    "free": free,
                    "total": total,
                    "capability": f"{about.major}.{about.minor}",
                }
            )
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0]
    return found


def _driver() -> str:
    """The NVIDIA driver's version, '' where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None or sys.platform != "linux":
        return ""
    try:
        done = subprocess.run(  # noqa: S603 the driver's own program
            [program, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def _quota(root: Path) -> float | None:
    """Cores that a control group of version 2 allows (cpu.max: quota and period), None for all."""
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
