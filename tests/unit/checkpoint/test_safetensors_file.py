"""The reader of one safetensors file, against the library that defines the format and against hostile files."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from d2qconv.checkpoint.safetensors_file import MAX_HEADER_BYTES, read_file
from d2qconv.errors import InputError


def container(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as found:
        read_file(path)
    assert str(path) in str(found.value)
    return str(found.value)


def sample() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=g).to(torch.bfloat16),
        "b": torch.randn(5, generator=g).to(torch.float16),
        "c": torch.randn(2, 2, 3, generator=g),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
    }


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(sample(), path, {"format": "pt"})
    file = read_file(path)
    tensors = file.tensors()
    expected = load_file(path)
    assert file.metadata == {"format": "pt"}
    assert tensors.keys() == expected.keys()
    for name, dense in tensors.items():
        assert (dense.shape, dense.dtype) == (tuple(expected[name].shape), expected[name].dtype)
        loaded = dense.load()
        assert loaded.dtype == expected[name].dtype
        assert torch.equal(loaded, expected[name])


def test_loaded_tensors_are_independent(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, path)
    dense = read_file(path).tensors()["a"]
    dense.load().zero_()
    assert torch.equal(dense.load(), torch.ones(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_that_are_not_finite(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    values = torch.ones(3, 5, dtype=dtype)
    values[1, 2] = bad
    save_file({"model.w": values}, path)
    with pytest.raises(InputError, match=r"(?s)model\.safetensors.*'model\.w' holds NaN or Inf"):
        read_file(path).tensors()["model.w"].load()


def test_changed_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, path)
    dense = read_file(path).tensors()["a"]
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="changed since"):
        dense.load()
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        dense.load()


@pytest.mark.parametrize(
    ("dtype", "size", "why"),
    [
        ("F8_E4M3", 1, "quantized already"),
        ("F64", 8, "convert the checkpoint"),
        ("X", 1, "must be BF16, F16 or F32"),
    ],
)
def test_dtypes(tmp_path: Path, dtype: str, size: int, why: str) -> None:
    header = {"q.qweight": entry([2], 0, 2 * size, dtype), "w": entry([1], 2 * size, 2 * size + 4)}
    message = refused(tmp_path, container(header, bytes(2 * size + 4)))
    assert "'q.qweight'" in message
    assert repr(dtype) in message
    assert why in message


def test_truncated(tmp_path: Path) -> None:
    whole = container({"a": entry([4], 0, 16)}, bytes(16))
    for cut in (1, 16, 20, len(whole) - 4, len(whole)):
        message = refused(tmp_path, whole[: len(whole) - cut])
        assert f"found {len(whole) - cut}" in message
        assert "expected" in message
    assert f"expected {len(whole)} bytes, found {len(whole) - 1}" in refused(tmp_path, whole[:-1])


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES, 1000])
def test_header_length(tmp_path: Path, length: int) -> None:
    message = refused(tmp_path, container(b"{}", length=length))
    assert str(length) in message or str(length + 8) in message


@pytest.mark.parametrize(
    ("header", "n_data", "why"),
    [
        ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, 24, "overlaps"),
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, 16, "overlaps"),
        ({"a": entry([4], 0, 16), "b": entry([1], 4, 8)}, 16, "overlaps"),
        ({"a": entry([4], 4, 20)}, 20, "4 bytes before tensor 'a'"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "4 bytes before tensor 'b'"),
        ({"a": entry([1], 0, 4)}, 8, "belongs to no tensor"),
        ({}, 8, "belongs to no tensor"),
        ({"a": entry([4], 0, 16)}, 8, "out of range"),
        ({"a": entry([2**40], 0, 2**42)}, 8, "out of range"),
        ({"a": entry([4], 0, 12)}, 12, "needs 16 bytes"),
        ({"a": entry([4], 16, 0)}, 16, "needs 16 bytes"),
        ({"a": entry([2**32, 2**32], 0, 0)}, 0, "overflows"),
        ({"a": entry([2**64], 0, 0)}, 0, "overflows"),
        ({"a": entry([2**70, 0], 0, 0)}, 0, "overflows"),
        ({"a": entry([1], 2**70, 2**70 + 4)}, 4, "overflow"),
        ({"a": entry([1] * 9, 0, 4)}, 4, "9 dimensions"),
        ({"a": entry([-1], 0, 4)}, 4, "not what the format says"),
        ({"a": entry([1], -4, 0)}, 4, "not what the format says"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "data_offsets"),
        ({"a": {**entry([1], 0, 4), "more": 1}}, 4, "more"),
        ({"a": entry([1], 0, 4), "__metadata__": {"n": 1}}, 4, "not what the format says"),
        (b"[]", 0, "begin with"),
        (b' {"a":1}', 0, "begin with"),
        (b"{", 0, "not what the format says"),
        (b'{"a":', 0, "not what the format says"),
        (b'{"a":' + b"[" * 200_000, 0, "not what the format says"),
        (b'{"\xff": 1}', 0, "not what the format says"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: object, n_data: int, why: str) -> None:
    assert why in refused(tmp_path, container(header, bytes(n_data)))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
        b'"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_duplicate_keys(tmp_path: Path, text: bytes) -> None:
    assert "occurs twice" in refused(tmp_path, container(text, bytes(4)))


def test_not_a_regular_file(tmp_path: Path) -> None:
    fifo = tmp_path / "model.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match="not a regular file"):
        read_file(fifo)
    with pytest.raises(InputError, match="not a regular file"):
        read_file(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_file(tmp_path / "absent.safetensors")


VALID = container(
    {
        "__metadata__": {"format": "pt"},
        "m.a": entry([2, 3], 0, 12, "BF16"),
        "m.b": entry([4], 12, 20, "F16"),
        "m.c": entry([2], 20, 28, "F32"),
    },
    bytes(range(1, 29)),
)
HEADER_END = len(VALID) - 28


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.one_of(st.just(0), st.integers(0, len(VALID))),
)
def test_mutated_header(tmp_path: Path, edits: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(VALID)
    for at, byte in edits:
        content[at] = byte
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[: len(content) - cut])
    try:
        file = read_file(path)
        loaded = {name: (dense, dense.load()) for name, dense in file.tensors().items()}
    except InputError:
        return
    # What was accepted covers the data once, and the format's own library reads the same.
    assert sum(e.end - e.begin for e in file.entries.values()) == 28
    for name, theirs in load_file(path).items():
        dense, ours = loaded.pop(name)
        assert (dense.dtype, dense.shape) == (theirs.dtype, tuple(theirs.shape))
        assert torch.equal(ours, theirs)
    assert not loaded


def test_the_unmutated_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(VALID)
    assert [t.load().shape for t in read_file(path).tensors().values()] == [(2, 3), (4,), (2,)]
