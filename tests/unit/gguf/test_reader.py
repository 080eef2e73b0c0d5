from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf_models import DIMS, OWN_BIASES, PLAIN, ROPES, as_stored, make_desc, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2qconv.arch.spec import Dims, Rope
from d2qconv.checkpoint.dense import Dense
from d2qconv.decoder.rope import attention_factor, inverse_frequencies
from d2qconv.errors import InputError, VerifyError
from d2qconv.exporters.base import Carrier, silent
from d2qconv.ir.coded import Coded
from d2qconv.names import Role, TensorId
from d2qconv_gguf import GgufOptions
from d2qconv_gguf.container import StoredTensor, read
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.metadata import KV, rope_freqs
from d2qconv_gguf.reader import llama3_rope, read_model
from d2qconv_gguf.writer import Entry, write_file

TINY = Dims(vocab=512, hidden=64, ffn=64, n_layers=1, n_heads=2, n_kv_heads=1, head=32)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_read_back_is_what_was_quantized(tmp_path, arch):
    desc = make_desc(arch, is_tied=arch != "qwen2")
    options = GgufOptions(type="q4_0", embedding="bf16", head="f16")
    package, made, model = write(tmp_path / "x.gguf", desc, options)
    seen, wanted = read_model(package.path), as_stored(model)
    assert seen.arch.id == made.layout
    assert (seen.dims, seen.is_tied, seen.max_positions) == (desc.dims, desc.is_tied, desc.max_positions)
    assert np.float32(seen.norm_eps) == np.float32(desc.norm_eps)
    assert seen.tensors.keys() == wanted.tensors.keys()
    for tensor, dense in wanted.tensors.items():
        ours = dense.load().to(torch.float16 if tensor.role is Role.HEAD else torch.float32).float()
        assert torch.equal(seen.tensors[tensor].load(), ours), tensor


@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_read_back_as_the_same_function(tmp_path, rope):
    package, _, _ = write(tmp_path / "x.gguf", make_desc("llama", rope=rope), PLAIN)
    seen, wanted = read_model(package.path).rope, ROPES[rope]
    torch.testing.assert_close(
        inverse_frequencies(seen, 64), inverse_frequencies(wanted, 64), rtol=2e-6, atol=0
    )
    assert attention_factor(seen) == pytest.approx(attention_factor(wanted), rel=1e-6)


@pytest.mark.parametrize("base", [-2.0, 1.0, float("nan"), float("inf")])
def test_a_rotary_base_that_is_none_is_refused(tmp_path, base):
    package, _, _ = write(tmp_path / "x.gguf", make_desc("llama", rope="yarn"), PLAIN)
    data = bytearray(package.path.read_bytes())
    # Behind the key: its type, then an f32.
    at = data.index(b"llama.rope.freq_base") + len(b"llama.rope.freq_base") + 4
    data[at : at + 4] = struct.pack("<f", base)
    package.path.write_bytes(data)
    with pytest.raises(VerifyError, match="RoPE has the base"):
        read_model(package.path)


@given(
    st.floats(1e3, 1e6),
    st.floats(1.5, 64),
    st.floats(0.5, 4),
    st.floats(1.1, 8),
    st.sampled_from([64, 512, 8192]),
    st.sampled_from([16, 64, 128]),
)
def test_llama3_parameters_are_found_from_the_factors(theta, factor, low, ratio, original, head):
    rope = Rope(theta, "llama3", factor, low, low * ratio, original)
    desc = make_desc_with(rope, head)
    factors = rope_freqs(desc)
    stored = StoredTensor("rope_freqs.weight", factors.shape, gguf.GGMLQuantizationType.F32, 0, factors)
    found = llama3_rope(theta, stored, head)
    top = float(factors.max())
    if top == pytest.approx(1):
        assert found.kind == "default"
    wanted = inverse_frequencies(Rope(theta), head) / torch.from_numpy(factors)
    torch.testing.assert_close(inverse_frequencies(found, head), wanted, rtol=2e-4, atol=0)


def make_desc_with(rope, head):
    dims = replace(DIMS, vocab=8, hidden=8, ffn=8, n_layers=0, head=head)
    return replace(make_desc("llama", dims=dims), rope=rope)


def test_other_factors_are_refused():
    values = np.array([1.0, 3.0, 1.0, 8.0] * 8, dtype=np.float32)
    with pytest.raises(VerifyError, match="not Llama 3's"):
        llama3_rope(1e4, StoredTensor("r", (32,), gguf.GGMLQuantizationType.F32, 128, values), 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file with every sort of metadata and two tensors; small, so that every byte can be spoiled."""
    path = tmp_path_factory.mktemp("small") / "x.gguf"
    keys = [
        KV.text("general.name", "x"),
        KV.count("llama.block_count", 1),
        KV.texts("tokenizer.ggml.tokens", ["a", "b"]),
        KV.ints("tokenizer.ggml.token_type", [1, 2, 3]),
        KV.flag("tokenizer.ggml.add_bos_token", False),
    ]
    tensors = [
        Entry("token_embd.weight", (2, 32), "f32", 256, Dense.of(torch.ones(2, 32))),
        Entry("output_norm.weight", (32,), "f32", 128, Dense.of(torch.ones(32))),
    ]
    write_file(path, "llama", keys, tensors, silent)
    return path.read_bytes()


def spoiled(folder, data):
    path = folder / "bad.gguf"
    path.write_bytes(data)
    return path


def use(path):
    """Everything that is done with a file that somebody gave us."""
    file = read(path)
    for tensor in file.tensors.values():
        assert tensor.values().shape == tensor.shape
    GgufExporter(GgufOptions()).inspect(path)
    read_model(path)


def test_every_truncation_is_refused(tmp_path, small):
    read(spoiled(tmp_path, small))
    for n in range(1, len(small)):
        with pytest.raises(InputError if n < 4 else VerifyError):
            read(spoiled(tmp_path, small[:n]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_spoiled_bytes_never_end_in_a_traceback(tmp_path, small, data):
    at = data.draw(st.integers(0, len(small) - 1))
    new = data.draw(st.binary(min_size=1, max_size=12))
    with np.errstate(all="ignore"), contextlib.suppress(InputError, VerifyError):
        use(spoiled(tmp_path, small[:at] + new + small[at + len(new) :]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (struct.pack("<IQ", 8, 2), struct.pack("<IQ", 8, 2**60)),
        (struct.pack("<IQ", 5, 3), struct.pack("<IQ", 5, 2**60)),
        (struct.pack("<IQ", 5, 3), struct.pack("<IQ", 9, 3)),
        (struct.pack("<IIQQ", 0x46554747, 3, 2, 6), struct.pack("<IIQQ", 0x46554747, 3, 2**62, 6)),
        (struct.pack("<IIQQ", 0x46554747, 3, 2, 6), struct.pack("<IIQQ", 0x46554747, 3, 2, 2**62)),
        (struct.pack("<IIQQ", 0x46554747, 3, 2, 6), struct.pack("<IIQQ", 0x46554747, 3 << 24, 2, 6)),
        (struct.pack("<IQQI", 2, 32, 2, 0), struct.pack("<IQQI", 2, 2**32, 2**32, 0)),
        (struct.pack("<IQQI", 2, 32, 2, 0), struct.pack("<IQQI", 2, 32, 2, 12)),
        (struct.pack("<IQQI", 2, 32, 2, 0), struct.pack("<IQQI", 2, 32, 2, 999)),
        (struct.pack("<IQI", 1, 32, 0) + struct.pack("<Q", 256), struct.pack("<IQI", 1, 32, 0) + bytes(8)),
    ],
    ids=[
        "strings", "integers", "nested", "tensors", "keys", "big-endian", "shape", "block", "type", "overlap"
    ],
)  # fmt: skip
def test_hostile_sizes_are_refused_at_once(tmp_path, small, old, new):
    assert small.count(old) == 1
    with pytest.raises(VerifyError, match="not a whole GGUF"):
        read(spoiled(tmp_path, small.replace(old, new)))


def test_spoiled_files_with_a_type_newer_than_gguf_py_are_refused(tmp_path):
    """There our own walk is all that stands between the bytes and the tensors."""
    coded = GRIDS["q2_0"].fit(torch.randn(3, 64), torch.ones(64))
    codes = GRIDS["q2_0"].encode(torch.randn(3, 64), coded, 0)
    stored = Coded(GRIDS["q2_0"], (3, 64), codes, coded)
    made = [
        Entry("a.weight", (3, 64), "q2_0", 54, stored),
        Entry("b.weight", (64,), "f32", 256, Dense.of(torch.arange(64.0))),
    ]
    write_file(tmp_path / "x.gguf", "llama", [KV.text("general.name", "x")], made, silent)
    file = read(tmp_path / "x.gguf")
    assert np.array_equal(file.tensors["a.weight"].values(), stored.decode().numpy())
    assert np.array_equal(file.tensors["b.weight"].values(), np.arange(64, dtype=np.float32))
    assert file.keys["general.name"] == "x"
    data = (tmp_path / "x.gguf").read_bytes()
    for n in range(4, len(data)):
        with pytest.raises(VerifyError):
            read(spoiled(tmp_path, data[:n]))
    with pytest.raises(VerifyError, match="same name"):
        read(spoiled(tmp_path, data.replace(b"b.weight", b"a.weight")))
    with pytest.raises(VerifyError, match="does not fit Q2_0"):
        read(spoiled(tmp_path, data.replace(struct.pack("<QQI", 64, 3, 42), struct.pack("<QQI", 96, 2, 42))))


def test_more_items_than_a_vocabulary_has_are_refused(tmp_path):
    """gguf-py would make three million arrays of three megabytes."""
    n = 3 << 20
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, n)
    with pytest.raises(VerifyError, match="items"):
        read(spoiled(tmp_path, struct.pack("<IIQQ", 0x46554747, 3, 0, 1) + key + bytes(n)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 2**31 - 1),
        ("attention.key_length", 3),
        ("block_count", 2**31),
        ("feed_forward_length", 0),
    ],
)
def test_sizes_that_are_not_the_tensors_cost_nothing(tmp_path, key, value):
    """Row orders of 2^31 heads would take 500 GB."""
    package, *_ = write(tmp_path / "x.gguf", make_desc("llama", dims=TINY), PLAIN)
    data = bytearray(package.path.read_bytes())
    name = f"llama.{key}".encode()
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    struct.pack_into("<I", data, at, value)
    with pytest.raises(VerifyError):
        read_model(spoiled(tmp_path, data))


@pytest.mark.timeout(10)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="not a regular file"):
        read(tmp_path / "x.gguf")


def test_no_gguf_at_all(tmp_path):
    for content in (b"", b"GGU", b"PK\3\4" * 99):
        with pytest.raises(InputError, match="not a GGUF file"):
            read(spoiled(tmp_path, content))
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match="not a regular file"):
        read(tmp_path)


def test_a_model_with_a_missing_or_misshapen_tensor_is_refused(tmp_path):
    for arch in ("llama", "qwen3"):
        desc = make_desc(arch, biases=OWN_BIASES.get(arch, ()))
        package, _, _ = write(tmp_path / "x.gguf", desc, PLAIN, Carrier.NONE)
        name = b"blk.1.ffn_up.weight"
        data = package.path.read_bytes()
        at = data.rindex(name)
        path = spoiled(tmp_path, data[:at] + b"blk.7.ffn_up.weight" + data[at + len(name) :])
        with pytest.raises(VerifyError, match="ffn_up"):
            read_model(path)
        path = spoiled(tmp_path, data[:at] + b"blk.1.ffn_uq.weight" + data[at + len(name) :])
        with pytest.raises(VerifyError, match="ffn_uq"):
            read_model(path)
    assert TensorId(Role.UP, 1) in read_model(package.path).tensors
