"""What is read of a machine, from a tree that stands for /."""

import pytest

from d2qconv.budget import gibibytes, host_limit, host_memory_limit, host_room, lacks_room
from d2qconv.doctor.machine import disks, gpus, machine_facts, memory, processor

GIB = 1 << 30


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(
        "processor : 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu sse2 avx2 fma avx512f amx_int8 avx512_vnni\n"
    )
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {32 << 20} kB\nMemAvailable: {20 << 20} kB\n")
    return tmp_path


def in_container(root, limit, used):
    (root / "proc/self/cgroup").write_text("0::/\n")
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text("inactive_file 0\n")
    (group / "cpu.max").write_text("150000 100000\n")


def test_processor(root):
    found = processor(root)
    assert found["name"] == "Some CPU @ 3 GHz"
    assert found["instructions"] == "avx2 fma avx512f avx512_vnni amx_int8"
    assert "limited" not in found["cores"]


def test_memory(root):
    assert memory(root) == {"total": "32.0 GiB", "free": "20.0 GiB"}


def test_container(root):
    in_container(root, 8 * GIB, 3 * GIB)
    assert host_memory_limit(root) == 8 * GIB
    assert memory(root) == {"total": "32.0 GiB", "free": "5.0 GiB", "limit of the container": "8.0 GiB"}
    assert processor(root)["cores"].endswith("limited to 1.5 by the container")


def test_a_container_without_limits(root):
    in_container(root, "max", 0)
    (root / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert host_memory_limit(root) is None
    assert "limit of the container" not in memory(root)
    assert "limited" not in processor(root)["cores"]


def test_gpus():
    device = {"name": "H100", "free": 70 * GIB, "total": 79 * GIB, "capability": "9.0"}
    found = gpus({"cuda": "13.0", "devices": [device], "triton": "3.9.0"})
    assert found["cuda:0"] == "H100, 70.0 GiB free of 79.0 GiB, compute capability 9.0"
    assert found["CUDA of torch"] == "13.0"
    assert gpus({"devices": []})["devices"] == "none that torch can use"
    assert "torch is not here" in gpus({})["devices"]


def test_this_machine():
    facts = machine_facts({})
    assert facts["python"].split()[1].startswith("3.")
    assert set(disks()) == {"current folder", "temporary files"}
    assert all("free" in text for text in facts["disk"].values())


def test_a_limit_bounds_the_room():
    free = host_room()
    with host_limit(1):
        assert host_room() == 0
        assert f"take about {gibibytes(5 * GIB)}" in lacks_room(5 * GIB)
    with host_limit(None):
        assert lacks_room(1) == ""
    assert abs(host_room() - free) < 8 * GIB
