"""The importance matrix: what was measured, in a file that stock llama.cpp quantizes with."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from cyllama.llama import llama_cpp
from gguf_models import FAST, PLAIN, PROVENANCE, make_desc, quantized, small_source, write

from d2qconv.calibrate.tokens import load_tokens
from d2qconv.decoder.block import load_block, load_ends
from d2qconv.errors import ExportError, RunError
from d2qconv.exporters.base import Carrier, silent
from d2qconv.fold.rotation import Rotation, rotated
from d2qconv.ir.importance import Importance
from d2qconv.ir.model import QuantizedModel
from d2qconv.names import Role, TensorId
from d2qconv.pipeline import Job, convert, plan
from d2qconv.progress import Unwatched
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.testing.models import make_checkpoint
from d2qconv.walk import model as walk_model
from d2qconv_gguf import INFO, GgufOptions, imatrix
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.names import gguf_name

LLAMA = Path(__file__).parents[2] / "data" / "tiny-llama-5m"
TEXT = "The old man and the little girl walked down to the river, where a dog was waiting for a ball. "


def values(path):
    """Tensors of the file by name, and its keys."""
    file = gguf.GGUFReader(path)
    keys = {k: f.contents() for k, f in file.fields.items() if not k.startswith("GGUF.")}
    return {t.name: np.array(t.data) for t in file.tensors}, keys


def importance(desc, *, seed=3):
    """Random mean squares for every linear of the blocks."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for tensor, dense in desc.tensors.items():
        if tensor.block is not None and len(dense.shape) == 2:
            squares = torch.rand(dense.shape[1], generator=random).square() + 1e-3
            found[tensor] = Importance((tensor.role,), squares.numpy().tobytes(), 640, 64, True)
    return found


def test_layout(tmp_path):
    desc = make_desc("llama")
    found = importance(desc)
    imatrix.write(tmp_path / "i.gguf", QuantizedModel(desc, {}, PROVENANCE, found))
    tensors, keys = values(tmp_path / "i.gguf")
    assert len(tensors) == 2 * 7 * desc.dims.n_layers
    for tensor, some in found.items():
        sums, counts = (tensors[f"{gguf_name(tensor)}.{part}"] for part in ("in_sum2", "counts"))
        assert sums.shape == (1, desc.tensors[tensor].shape[1])
        assert counts.reshape(-1).tolist() == [640]
        assert np.allclose(sums / counts, some.mean_squares(), rtol=1e-6)
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.chunk_count"] * keys["imatrix.chunk_size"] == 640
    assert keys["imatrix.datasets"] == [PROVENANCE.calibration]
    assert keys[imatrix.INPUTS] == "source"


class Entry(ctypes.Structure):
    """struct llama_model_imatrix_data of llama.h; one without a name ends a list."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


def hand_over(params, path):
    """Give llama.cpp the matrix in the file, as llama-quantize does: sums over counts, by the weight's name.

    The wheel cannot set this field of its C struct, so that is written where it lies: in the object, 24 bytes behind
    the two numbers that the struct begins with. Returns what must live as long as the parameters.
    """
    tensors, _ = values(path)
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    means = {
        n: (tensors[f"{n}.in_sum2"] / tensors[f"{n}.counts"]).astype(np.float32).reshape(-1) for n in names
    }
    entries = (Entry * (len(means) + 1))()
    for entry, (name, mean) in zip(entries, means.items(), strict=False):
        entry.name, entry.size = name.encode(), mean.size
        entry.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    numbers = struct.pack("<2i", params.nthread, params.ftype)
    place = ctypes.string_at(id(params), type(params).__basicsize__).index(numbers) + 24
    ctypes.c_void_p.from_address(id(params) + place).value = ctypes.addressof(entries)
    return entries, means


def test_stock_llama_cpp_quantizes_with_it(tmp_path):
    """llama.cpp refuses IQ2_XXS without an importance matrix, takes ours, and weighs the columns by it."""
    desc = make_desc("llama")
    write(tmp_path / "f16.gguf", desc, PLAIN, Carrier.NONE)
    made = {}
    for seed in (3, 4):
        found = importance(desc, seed=seed)
        imatrix.write(tmp_path / "i.gguf", QuantizedModel(desc, {}, PROVENANCE, found))
        params = llama_cpp.LlamaModelQuantizeParams()
        params.ftype, params.nthread = int(gguf.LlamaFileType.MOSTLY_IQ2_XXS), 1
        source, target = str(tmp_path / "f16.gguf"), str(tmp_path / "q.gguf")
        with pytest.raises(RuntimeError):
            llama_cpp.model_quantize(source, target, params)
        kept = hand_over(params, tmp_path / "i.gguf")
        llama_cpp.model_quantize(source, target, params)
        del kept
        gate = next(t for t in gguf.GGUFReader(target).tensors if t.name == "blk.1.ffn_gate.weight")
        assert gate.tensor_type.name == "IQ2_XXS"
        made[seed] = np.array(gate.data)
        w = desc.tensors[TensorId(Role.GATE, 1)].load().float().numpy()
        error = ((gguf.dequantize(gate.data, gate.tensor_type) - w) ** 2).mean(0)
        most = np.argsort(found[TensorId(Role.GATE, 1)].mean_squares())
        assert error[most[-64:]].mean() < 0.8 * error[most[:64]].mean()
    assert not np.array_equal(made[3], made[4])


def job(model, out, text, **options):
    made = GgufOptions(type="q4_0", imatrix=out.with_name("i.gguf"), **options)
    calibration = CalibrationSpec(str(text), 6, 24)
    return Job(
        str(model),
        INFO,
        made,
        out,
        device="cpu",
        recipe=Recipe(refine=0),
        calibration=calibration,
        overwrite=True,
    )


def test_it_is_the_source_models_inputs_and_a_resumed_run_has_it(tmp_path, monkeypatch):
    """By the source's own decoder on the same tokens; cut off after the first block and started again."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Story {i}: {TEXT}" for i in range(80)))
    sizes = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32}
    model = make_checkpoint(tmp_path / "m", "llama", vocab=8192, tokenizer=LLAMA, tied=False, **sizes)
    monkeypatch.setattr("d2qconv_gguf.exporter.verify_file", lambda *_: [])
    planned = plan(job(model, tmp_path / "m.gguf", text))
    block = walk_model.Walk._block

    def stop(self, index, *rest):
        if index == 1:
            raise RunError("stopped")
        return block(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(walk_model.Walk, "_block", stop)
        with pytest.raises(RunError, match="stopped"):
            convert(planned, Unwatched())
    assert not (tmp_path / "i.gguf").exists()
    assert convert(planned, Unwatched()) is not None
    tensors, keys = values(tmp_path / "i.gguf")
    assert keys[imatrix.INPUTS] == "source"
    desc = planned.source
    tokens = load_tokens(
        planned.job.calibration, planned.checkpoint, desc, device="cpu", on_step=lambda _: None
    ).calibration
    n = tokens.numel()
    ends = load_ends(desc, "cpu")
    x = ends.embed(tokens)
    for index in range(desc.dims.n_layers):
        one = load_block(desc, index, "cpu")
        h, r = one.attention_input(x), one.attend(x)
        inputs = {"attn_q": h, "attn_k": h, "attn_v": h, "attn_output": one.mix(h)}
        inputs |= {
            "ffn_gate": one.ffn_input(r),
            "ffn_up": one.ffn_input(r),
            "ffn_down": one.gated(one.ffn_input(r)),
        }
        for name, y in inputs.items():
            sums = tensors.pop(f"blk.{index}.{name}.weight.in_sum2")
            wanted = y.double().square().sum((0, 1)).numpy()
            assert np.allclose(sums[0], wanted, rtol=1e-3, atol=1e-6 * wanted.max())
            assert tensors.pop(f"blk.{index}.{name}.weight.counts").item() == n
        x = one(x)
    assert sorted(tensors) == ["output.weight.counts", "output.weight.in_sum2"]
    # A second run replaces it.
    assert plan(job(model, tmp_path / "n.gguf", text)).target.refusals == ()


def test_where_it_cannot_be_written(tmp_path):
    desc, path = make_desc("llama"), tmp_path / "i.gguf"
    exporter = GgufExporter(replace(FAST, imatrix=path))
    (refusal,) = exporter.plan(rotated(desc, Rotation("walsh")), None).refusals
    assert "rotation" in refusal.where
    write(path, desc, FAST)
    (refusal,) = exporter.plan(desc, None).refusals
    assert "no importance matrix that d2qconv wrote" in refusal.why
    path.unlink()
    made = exporter.plan(desc, None)
    assert made.refusals == ()
    with pytest.raises(ExportError, match="no statistics"):
        exporter.write(quantized(desc, made), small_source(), made, tmp_path / "m.gguf", silent)
