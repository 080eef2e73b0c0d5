"""Sizes as text, memory that is free, peaks that are measured."""

import gc
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import d2qconv.budget as budget_module
from d2qconv.budget import (
    Budget,
    PeakMeter,
    available_host_bytes,
    choose_budget,
    gibibytes,
    held_host_bytes,
    parse_size,
)
from d2qconv.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("24GiB", 24 << 30),
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("500MiB", 500 << 20),
        ("1.5G", 1_500_000_000),
        ("1.5Gi", 3 << 29),
        (".5k", 500),
        ("2TiB", 2 << 40),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_sizes(text, n_bytes):
    assert parse_size(text, "--x") == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1G", "1e9", "24GiBs", "0", "0.2", "1,5G", "inf", "1iB", "24 Gi b"]
)
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="not a size of memory") as caught:
        parse_size(text, "--max-gpu-mem")
    assert caught.value.where == "--max-gpu-mem"


@given(st.integers(1, 1 << 50))
def test_bytes_are_read_back(n_bytes):
    assert parse_size(str(n_bytes), "") == n_bytes


def test_told_in_powers_of_1024():
    assert gibibytes(int(18.2 * 2**30)) == "18.2 GiB"
    assert gibibytes(512 << 20) == "512 MiB"
    assert gibibytes(1) == "1 MiB"


def test_a_gpu_budget_without_a_gpu():
    with pytest.raises(InputError, match="no GPU in use"):
        choose_budget("24GiB", None, CPU)


def test_the_budget_asked_for_or_a_share(monkeypatch):
    monkeypatch.setattr(budget_module, "available_host_bytes", lambda: 1000)
    assert choose_budget(None, None, CPU) == Budget(None, 800)
    assert choose_budget(None, "3k", CPU) == Budget(None, 3000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 20_000))
    gpu = torch.device("cuda")
    assert choose_budget(None, None, gpu) == Budget(9000, 800)
    assert choose_budget("15k", None, gpu) == Budget(15_000, 800)
    with pytest.raises(InputError, match="more than cuda has"):
        choose_budget("21k", None, gpu)


def machine(root, cgroup, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(folder, limit, used, cache=0):
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon 7\ninactive_file {cache}\nactive_file 9\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "n_bytes"),
    [
        ("", {}, 5_120_000),
        ("0::/a/b\n", v2("a/b/", "max", 0), 5_120_000),
        ("0::/a/b\n", v2("a/b/", 9_000_000, 8_000_000), 1_000_000),
        ("0::/a/b\n", v2("a/b/", 9_000_000, 8_000_000, 500_000), 1_500_000),
        ("0::/a/b\n", v2("a/b/", "max", 0) | v2("a/", 3_000_000, 1_000_000), 2_000_000),
        ("0::/not/here\n", v2("", 3_000_000, 1_000_000), 2_000_000),
        ("0::/\n", v2("", 3_000_000, 4_000_000), 0),
        ("0::/\n", v2("", 99_000_000, 4_000_000), 5_120_000),
        (
            "7:cpu:/x\n4:memory:/x\n",
            {
                "memory/x/memory.limit_in_bytes": "4000000",
                "memory/x/memory.usage_in_bytes": "1500000",
                "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            2_500_100,
        ),
    ],
)
def test_free_host_memory(tmp_path, cgroup, files, n_bytes):
    assert available_host_bytes(machine(tmp_path, cgroup, files)) == n_bytes


def test_elsewhere_the_physical_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_module, "_physical", lambda: 123)
    assert available_host_bytes(tmp_path) == 123
    monkeypatch.setattr(budget_module, "_physical", lambda: None)
    with pytest.raises(InputError, match="does not say"):
        available_host_bytes(tmp_path)


def test_a_peak_that_has_passed_is_reported():
    gc.collect()
    before = held_host_bytes()
    with PeakMeter(CPU) as meter:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        time.sleep(0.2)
        del block
        gc.collect()
        peaks = meter.peaks()
    assert peaks.host - before > 60 << 20
    assert peaks.host - before < 200 << 20
    assert (peaks.gpu_allocated, peaks.gpu_reserved, peaks.is_host_with_files) == (None, None, False)


def test_mapped_files_do_not_count(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(64 << 20))
    before = held_host_bytes()
    with PeakMeter(CPU) as meter:
        mapped = torch.from_file(str(path), shared=True, size=64 << 20, dtype=torch.uint8)
        assert int(mapped.max()) == 0
        time.sleep(0.1)
    assert meter.peaks().host - before < 30 << 20


def test_without_proc_the_resident_set_is_reported(monkeypatch):
    monkeypatch.setattr(budget_module, "held_host_bytes", lambda: None)
    with PeakMeter(CPU) as meter:
        pass
    peaks = meter.peaks()
    assert peaks.is_host_with_files
    assert peaks.host > 50 << 20
