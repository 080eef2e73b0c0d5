from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_models import FAST, make_desc, nearest, quantized, write

from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import ExportError
from d2qconv.exporters.base import Carrier, silent
from d2qconv.ir.coded import Coded
from d2qconv.names import Part, Role, TensorId
from d2qconv_gguf import container, writer
from d2qconv_gguf.codecs import base
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.names import LLAMA, row_order
from d2qconv_gguf.types import n_bytes, storage
from d2qconv_gguf.writer import Entry, Told, digest_all, write_file


def entry(name, stored, kind, order=None):
    shape = tuple(stored.shape)
    return Entry(name, shape, kind, n_bytes(storage(kind), shape), stored, order)


@pytest.mark.parametrize(
    "kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl", "tq2_0", "q4_0", "q8_0"]
)
def test_decoded_by_gguf_py_bit_for_bit_with_rows_permuted(tmp_path, kind):
    coded = nearest(torch.randn(24, 512, generator=torch.Generator().manual_seed(3)), GRIDS[kind])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    made = [entry("a", coded, kind, order)]
    digests = digest_all(made, silent)
    write_file(tmp_path / "x.gguf", "llama", [], made, silent)
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    seen = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(seen.view(np.uint32), coded.decode()[order].numpy().view(np.uint32))
    assert digests["a"] == hashlib.sha256(seen.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_floats_are_rounded_to_nearest_and_recorded_as_stored(tmp_path, kind, source):
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(3)).to(source)
    made = [entry("a", Dense.of(values), kind), entry("b", Dense.of(values[0]), "f32")]
    digests = digest_all(made, silent)
    write_file(tmp_path / "x.gguf", "llama", [], made, silent)
    tensor = gguf.GGUFReader(tmp_path / "x.gguf").tensors[0]
    seen = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(7, 33)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    assert np.array_equal(seen, values.to(dtype).float().numpy())
    assert digests["a"] == hashlib.sha256(seen.tobytes()).hexdigest()


def test_values_that_f16_cannot_hold_are_refused(tmp_path):
    made = [entry("a", Dense.of(torch.tensor([[1.0, 1e6]])), "f16")]
    with pytest.raises(ExportError, match="not finite in f16"):
        write_file(tmp_path / "x.gguf", "llama", [], made, silent)


def test_a_full_disk_is_an_export_error():
    made = [entry("a", Dense.of(torch.zeros(64, 4096)), "f32")]
    with pytest.raises(ExportError, match="cannot be written"):
        write_file(_full(), "llama", [], made, silent)


def _full():
    from pathlib import Path

    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("no /dev/full here")
    return path


def test_a_missing_folder_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="cannot be written"):
        write_file(tmp_path / "no" / "x.gguf", "llama", [], [], silent)


def test_tensors_are_written_in_order_and_few_are_in_memory(tmp_path, monkeypatch):
    """With a budget for two, a third is read only when one was hashed or written."""
    lock, n_held, most, events = threading.Lock(), 0, [], []

    def read(n):
        nonlocal n_held
        with lock:
            n_held += 1
            most.append(n_held)
        time.sleep(0.002)
        return torch.full((4, 32), float(n))

    def done(what):
        nonlocal n_held
        with lock:
            n_held -= 1
        events.append(what)

    made = [entry(f"t{n}", Dense((4, 32), torch.float32, lambda n=n: read(n)), "f32") for n in range(9)]
    monkeypatch.setattr(writer, "BUDGET", 2 * 512)
    digests = digest_all(made, lambda *step: done(step[2]))
    assert list(digests) == [e.name for e in made]
    assert sorted(events) == [f"hash t{n}" for n in range(9)]
    assert max(most) == 2
    events.clear()
    monkeypatch.setattr(writer, "BUDGET", 2 * 3 * 512)
    write_file(tmp_path / "x.gguf", "llama", [], made, lambda *step: done(step[2]))
    assert events == [*(f"write t{n}" for n in range(9)), "written"]
    assert max(most) == 2
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert [float(t.data.min()) for t in tensors] == [float(t.data.max()) for t in tensors] == list(range(9))


@pytest.mark.parametrize("kind", ["q3_k", "q8_0", "f16", "bf16", "f32"])
def test_large_tensors_are_cut_into_pieces_of_the_same_digest_and_bytes(tmp_path, monkeypatch, kind):
    """Pieces of three rows of seven here; the digest is that of all values at once."""
    weight = torch.randn(7, 256, generator=torch.Generator().manual_seed(3))
    stored = nearest(weight, GRIDS[kind]) if kind in GRIDS else Dense.of(weight)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    made = [entry("a", stored, kind, order)]
    whole, digests = made[0].data(), digest_all(made, silent)
    for module in (writer, container, base):
        monkeypatch.setattr(module, "_PIECE", 3 * 256)
    assert np.array_equal(made[0].data(), whole)
    assert digest_all(made, silent) == digests
    write_file(tmp_path / "x.gguf", "llama", [], made, silent)
    (tensor,) = container.read(tmp_path / "x.gguf").tensors.values()
    seen = gguf.dequantize(tensor.data, tensor.type).astype(np.float32)
    assert [p.size for p in tensor.pieces()] == [768, 768, 256]
    assert np.array_equal(tensor.values(), seen)
    assert tensor.digest() == digests["a"] == hashlib.sha256(seen.tobytes()).hexdigest()


def test_tensors_of_a_model_are_read_when_they_are_needed():
    desc = make_desc("llama")
    plan = GgufExporter(FAST).plan(desc, Carrier.NONE)
    model = quantized(desc, plan)
    reads = Counting(model.tensors)
    made = writer.entries(replace(model, tensors=reads), plan, LLAMA)
    assert reads.n == 0
    digest_all(made, silent)
    assert reads.n == len(plan.tensors)


class Counting(Mapping):
    """A mapping that counts how often a tensor is asked for."""

    def __init__(self, tensors):
        self.tensors, self.n = tensors, 0

    def __getitem__(self, key):
        self.n += 1
        return self.tensors[key]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __contains__(self, key):
        return key in self.tensors


def test_q_and_its_bias_are_permuted_in_a_llama_file(tmp_path):
    desc = make_desc("qwen2")
    package, _, model = write(tmp_path / "x.gguf", desc, FAST, Carrier.BIAS)
    tensors = {t.name: t for t in gguf.GGUFReader(package.path).tensors}
    for role, name in ((Role.Q, "blk.1.attn_q"), (Role.K, "blk.1.attn_k")):
        order = row_order(TensorId(role, 1), LLAMA, desc.dims)
        coded = model.tensors[TensorId(role, 1)]
        assert isinstance(coded, Coded)
        weight = tensors[f"{name}.weight"]
        seen = gguf.dequantize(weight.data, weight.tensor_type)
        assert np.array_equal(seen, coded.decode()[order].numpy())
        bias = desc.tensors[TensorId(role, 1, Part.BIAS)].load().float()
        assert np.array_equal(tensors[f"{name}.bias"].data, bias[order].numpy())
        assert not np.array_equal(tensors[f"{name}.bias"].data, bias.numpy())
    package, _, model = write(tmp_path / "y.gguf", desc, FAST, Carrier.NONE)
    tensors = {t.name: t for t in gguf.GGUFReader(package.path).tensors}
    bias = desc.tensors[TensorId(Role.Q, 1, Part.BIAS)].load().float()
    assert np.array_equal(tensors["blk.1.attn_q.bias"].data, bias.numpy())


def test_equal_inputs_give_equal_bytes(tmp_path):
    desc = make_desc("qwen3")
    one, _, _ = write(tmp_path / "x.gguf", desc, FAST)
    two, _, _ = write(tmp_path / "y.gguf", desc, FAST)
    assert one.path.read_bytes() == two.path.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_what_does_not_get_to_the_disk_is_told(tmp_path):
    """numpy's tofile says nothing about the last 4096 bytes."""
    values = np.arange(100, dtype=np.float32)
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        values.view(Told).tofile(full)
    with (tmp_path / "x").open("wb") as file:
        values.view(Told).tofile(file)
    assert (tmp_path / "x").read_bytes() == values.tobytes()
