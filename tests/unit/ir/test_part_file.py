"""Parts are safetensors files."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from d2qconv.ir.part_file import write_part


def test_another_reader_finds_every_tensor(tmp_path):
    random = torch.Generator().manual_seed(0)
    tensors = {
        "codes": torch.randint(0, 256, (3, 5), dtype=torch.uint8, generator=random),
        "d": torch.randn(7, 1, generator=random).half(),
        "b": torch.randn(3, generator=random).bfloat16(),
        "columns": torch.randn(4, 6, generator=random).t(),
        "none": torch.zeros(0, 4),
        "order": torch.arange(5),
        "one": torch.tensor(2.0),
    }
    sha256 = write_part(tmp_path / "x", tensors)
    data = (tmp_path / "x").read_bytes()
    assert hashlib.sha256(data).hexdigest() == sha256
    back = load_file(tmp_path / "x")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert all(head[n]["data_offsets"][0] % t.dtype.itemsize == 0 for n, t in tensors.items())
    assert write_part(tmp_path / "y", tensors) == sha256


def test_nothing_stays_of_a_file_that_could_not_be_written(tmp_path):
    with pytest.raises(KeyError):
        write_part(tmp_path / "x", {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
