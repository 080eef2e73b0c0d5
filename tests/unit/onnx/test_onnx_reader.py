"""The reader against ONNX Runtime itself, and against files that lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_models import write
from random_models import as_stored, make_desc

from d2qconv.errors import D2qError, VerifyError
from d2qconv.exporters.base import Carrier, silent
from d2qconv.exporters.manifest import file_records, read_manifest, write_manifest
from d2qconv_onnx.codec import pack
from d2qconv_onnx.container import Span, open_model
from d2qconv_onnx.reader import Matrix, desc_of, read_model
from d2qconv_onnx.runtime import OrtModel, genai_greedy, lacks
from d2qconv_onnx.verify import verify_folder


def random_matrix(tmp_path, bits, block, n_out=7, n_blocks=3, seed=0):
    """A matrix of random bytes in a file."""
    rng = np.random.default_rng(seed)
    row = -(-n_blocks * bits // 8)
    zeros = rng.integers(0, 256, (n_out, row), dtype=np.uint8)
    spare = row * 8 - n_blocks * bits
    zeros[:, -1] &= 0xFF >> spare
    arrays = {
        "codes": rng.integers(0, 256, (n_out, n_blocks, block * bits // 8), dtype=np.uint8),
        "scales": rng.standard_normal((n_out, n_blocks)).astype(np.float32),
        "zeros": zeros,
    }
    spans = {}
    with (tmp_path / "data").open("wb") as file:
        for name, array in arrays.items():
            spans[name] = Span(tmp_path / "data", file.tell(), array.nbytes, array.shape, array.dtype)
            file.write(array.tobytes())
    return Matrix("x", (n_out, n_blocks * block), bits, bits, block, **spans), arrays


def run(nodes, inputs, outputs, initializers, feed):
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(a, n) for n, a in initializers]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_values_are_those_that_onnx_runtime_multiplies_with(tmp_path, bits, block):
    matrix, arrays = random_matrix(tmp_path, bits, block)
    n_out, n_in = matrix.shape
    node = helper.make_node(
        "MatMulNBits", ["a", "codes", "scales", "zeros"], ["y"], domain="com.microsoft",
        K=n_in, N=n_out, bits=bits, block_size=block, accuracy_level=1,
    )  # fmt: skip
    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, [n_in, n_in])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [n_in, n_out])
    # Times the identity: one product a value, so nothing is rounded twice.
    found = run([node], [a], [y], arrays.items(), {"a": np.eye(n_in, dtype=np.float32)})
    assert np.array_equal(found.T, matrix.load().numpy())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [32, 128])
def test_rows_are_those_that_onnx_runtime_gathers(tmp_path, bits, block):
    matrix, arrays = random_matrix(tmp_path, bits, block)
    arrays["codes"] = arrays["codes"].reshape(matrix.shape[0], -1)
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "i", "scales", "zeros"], ["y"], domain="com.microsoft",
        bits=bits, block_size=block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    i = helper.make_tensor_value_info("i", TensorProto.INT64, [matrix.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(matrix.shape))
    found = run([node], [i], [y], arrays.items(), {"i": np.arange(matrix.shape[0])})
    assert np.array_equal(found, matrix.load().numpy())


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "p"
    _, _, model = write(folder, make_desc("qwen3"), type="int3", block_size="32")
    return folder, model


def test_the_model_comes_back(package):
    folder, model = package
    found, wanted = desc_of(read_model(open_model(folder))), as_stored(model)
    assert (found.dims, found.rope, found.is_tied) == (wanted.dims, wanted.rope, wanted.is_tied)
    assert found.norm_eps == pytest.approx(wanted.norm_eps, rel=1e-7)
    assert set(found.tensors) == set(wanted.tensors)
    for tensor, dense in wanted.tensors.items():
        assert np.array_equal(found.tensors[tensor].load().numpy(), dense.load().float().numpy()), tensor


def test_a_code_that_its_container_would_hold_and_its_grid_has_not_is_found(package, tmp_path):
    _, model = package
    coded = next(t for t in model.tensors.values() if hasattr(t, "codes") and t.grid.bits == 3)
    packed = pack(coded)
    packed.codes[0, 0, 0] |= 0x08
    (tmp_path / "d").write_bytes(packed.codes.tobytes())
    spans = [
        Span(tmp_path / "d", 0, packed.codes.nbytes, packed.codes.shape, packed.codes.dtype) for _ in range(3)
    ]
    with pytest.raises(VerifyError, match="more than 3 bits"):
        Matrix("x", coded.shape, 4, 3, coded.grid.group, *spans).load()


def changed(package, tmp_path, change):
    """A copy of the package whose graph was changed."""
    folder = tmp_path / "copy"
    shutil.copytree(package[0], folder)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder


def entry(proto, key, value):
    tensor = next(t for t in proto.graph.initializer if t.name == "blk.0.q.weight.codes")
    next(e for e in tensor.external_data if e.key == key).value = value


def attribute(proto, node, name, value):
    """Set an attribute, of whatever type the value is, or add it."""
    found = next(n for n in proto.graph.node if n.name == node)
    kept = [a for a in found.attribute if a.name != name]
    del found.attribute[:]
    found.attribute.extend([*kept, helper.make_attribute(name, value)])


def reshape(proto, name, shape, n_bytes, data_type=None):
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.ClearField("dims")
    tensor.dims.extend(shape)
    tensor.data_type = data_type or tensor.data_type
    next(e for e in tensor.external_data if e.key == "length").value = str(n_bytes)


def metadata(proto, key, value):
    next(m for m in proto.metadata_props if m.key == key).value = value


def rename(proto, node, name):
    next(n for n in proto.graph.node if n.name == node).name = name


def place_head(proto, data_file):
    """Let the head lie at the embedding's offsets in another file."""
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("head.weight."):
            next(e for e in tensor.external_data if e.key == "location").value = data_file


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: entry(p, "location", "../x"), "no file of its folder"),
        (lambda p: entry(p, "location", "/etc/hostname"), "no file of its folder"),
        (lambda p: entry(p, "location", "absent"), "not there"),
        (lambda p: entry(p, "offset", "-64"), "outside"),
        (lambda p: entry(p, "offset", str(1 << 60)), "outside"),
        (lambda p: entry(p, "offset", "many"), "does not say where"),
        (lambda p: entry(p, "length", "7"), "not its shape"),
        (lambda p: attribute(p, "blk.0.q", "bits", 3), "3 bits in blocks"),
        (lambda p: attribute(p, "blk.0.q", "block_size", 64), "do not fit"),
        (lambda p: attribute(p, "blk.0.q", "N", 5), "says 5"),
        (lambda p: attribute(p, "blk.0.attention", "num_heads", 0), r"\(0, 2\) heads"),
        (lambda p: p.metadata_props.pop(0) and p.metadata_props.clear(), "is of architecture ''"),
        (lambda p: p.graph.node.remove(p.graph.node[-1]), "no head"),
        # Values that Python or numpy would stumble over.
        (lambda p: entry(p, "location", "x" * 5000), "not there"),
        (lambda p: entry(p, "location", "x\0"), "not there"),
        (lambda p: attribute(p, "blk.0.q", "block_size", "32"), "block_size is no whole number"),
        (lambda p: attribute(p, "blk.0.q", "bits", [4]), "bits is no whole number"),
        (lambda p: attribute(p, "blk.0.q", "K", 0), "do not fit"),
        (lambda p: attribute(p, "blk.0.attention", "num_heads", [4]), "num_heads is no whole number"),
        (lambda p: attribute(p, "final_norm", "epsilon", float("nan")), "epsilon is no finite number"),
        (lambda p: reshape(p, "rope.cos", [], 4), "its cos and sin are"),
        (lambda p: reshape(p, "rope.cos", [1 << 40, 0], 0), "type or shape"),
        (lambda p: reshape(p, "rope.cos", [1] * 70 + [256 * 32], 256 * 32 * 4), "type or shape"),
        (lambda p: reshape(p, "blk.0.q.weight.scales", [0, 0], 0), "type or shape"),
        (lambda p: reshape(p, "blk.0.q.weight.zeros", [256, 4], 4096, TensorProto.FLOAT), "is of float32"),
        (lambda p: reshape(p, "final_norm.weight", [16, 16], 1024), "has 2 dimensions"),
        (lambda p: metadata(p, "d2qconv.rope", "[" * 100_000), "not JSON"),
        (
            lambda p: metadata(p, "d2qconv.rope", '{"theta": 1e4, "kind": "x"}'),
            "rotary embedding is not known",
        ),
        (lambda p: metadata(p, "d2qconv.rope", '{"theta": 1e4, "kind": "yarn"}'), "rotary embedding is not"),
        (lambda p: metadata(p, "d2qconv.code_bits", '{"blk.0.q.weight": true}'), "record says True"),
        # What logits at 48 positions would not show, or a tensor that nobody would have decoded.
        (lambda p: attribute(p, "blk.0.attention", "local_window_size", 64), "local_window_size"),
        (lambda p: attribute(p, "blk.1.attention", "scale", 0.2), "of 2 kinds"),
        (lambda p: attribute(p, "blk.1.ffn_norm", "epsilon", 1e-6), "not all the same"),
        (lambda p: rename(p, "blk.0.k", "blk.0.v"), "two nodes are called"),
        (lambda p: p.graph.node[-1].input.append("x"), "has inputs"),
        (lambda p: p.functions.add(), "inside its graph"),
        (lambda p: place_head(p, "d2qconv.json"), "outside"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(package, tmp_path, change, says):
    folder = changed(package, tmp_path, change)
    with pytest.raises(VerifyError, match=says):
        desc_of(read_model(open_model(folder)))


def test_names_that_are_no_text_are_refused(package, tmp_path):
    folder = changed(package, tmp_path, lambda _: None)
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"rope.cos", b"rope.c\xff\xfe"))
    with pytest.raises(VerifyError, match="not UTF-8"):
        read_model(open_model(folder))


@pytest.mark.timeout(60, func_only=True)
@pytest.mark.parametrize("name", ["model.onnx", "genai_config.json", "d2qconv.json"])
@pytest.mark.parametrize("is_pipe", [True, False])
def test_a_pipe_or_link_is_no_file_of_a_package(package, tmp_path, name, is_pipe):
    folder = changed(package, tmp_path, lambda _: None)
    (folder / name).rename(tmp_path / name)
    if is_pipe:
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(VerifyError, match=r"no regular file|no manifest"):
        verify_folder(folder, silent)


def test_a_head_in_another_file_is_not_taken_for_the_embedding(package, tmp_path):
    folder = changed(package, tmp_path, lambda p: place_head(p, "other.data"))
    shutil.copy(folder / "model.onnx.data", folder / "other.data")
    model = read_model(open_model(folder))
    assert not model.is_tied
    assert "head.weight" in model.tensors
    assert read_model(open_model(package[0])).is_tied


@pytest.mark.parametrize(
    ("key", "value"),
    [("context_length", 4096), ("vocab_size", 8), ("type", "llama"), ("eos_token_id", "0"), ("decoder", {})],
)
def test_a_config_that_is_not_the_graphs_is_refused(package, tmp_path, key, value):
    folder = changed(package, tmp_path, lambda _: None)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"][key] = value
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match=key if key != "decoder" else "session_options"):
        desc_of(read_model(open_model(folder)))


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (("model", "decoder", "session_options"), "custom_ops_library", "evil.so"),
        (("model", "decoder", "session_options"), "provider_options", [{"cuda": {}}]),
        (("model", "decoder"), "pipeline", [{}]),
        (("model",), "vision", {"filename": "evil.onnx"}),
        ((), "engine", {}),
    ],
)
def test_a_config_that_makes_genai_load_something_else_is_refused(package, tmp_path, place, key, value):
    folder = changed(package, tmp_path, lambda _: None)
    config = json.loads((folder / "genai_config.json").read_text())
    inner = config
    for name in place:
        inner = inner[name]
    inner[key] = value
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="is not a config"):
        verify_folder(with_new_records(folder), silent)


def test_a_file_that_no_package_has_is_refused(package, tmp_path):
    folder = changed(package, tmp_path, lambda _: None)
    (folder / "evil.so").touch()
    with pytest.raises(VerifyError, match=r"does not write: evil\.so"):
        verify_folder(with_new_records(folder), silent)


def test_a_constant_in_another_file_is_refused(package, tmp_path):
    def add(proto):
        tensor = helper.make_tensor("x", TensorProto.UINT8, [1], b"0", raw=True)
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "../letter"
        proto.graph.node.append(helper.make_node("Constant", [], ["x"], "x", value=tensor))

    with pytest.raises(VerifyError, match="external tensors"):
        open_model(changed(package, tmp_path, add))


def with_new_records(folder):
    """Let the manifest say what the files are now, so that only what is in them is judged."""
    manifest = read_manifest(folder)
    write_manifest(folder, msgspec.structs.replace(manifest, files=file_records(folder)))
    return folder


@pytest.mark.parametrize(("theta", "is_passed"), [(10000.0, True), (10000.5, False), (20000.0, False)])
def test_cos_and_sin_are_those_of_the_rope_that_is_named(package, tmp_path, theta, is_passed):
    rope = json.dumps({"theta": theta})
    folder = with_new_records(changed(package, tmp_path, lambda p: metadata(p, "d2qconv.rope", rope)))
    check = next(c for c in verify_folder(folder, silent) if c.name == "structure")
    assert check.is_passed == is_passed, check.detail


def test_another_machines_last_places_are_accepted(package, tmp_path):
    folder = changed(package, tmp_path, lambda _: None)
    for name in ("rope.cos", "rope.sin"):
        span = open_model(folder).spans[name]
        table = np.memmap(span.file, span.dtype, "r+", span.offset, span.shape)
        table[:] = np.nextafter(table, np.float32(2))
        table.flush()
    checks = verify_folder(with_new_records(folder), silent)
    assert all(check.is_passed for check in checks), checks
    assert "cos and sin within" in next(c for c in checks if c.name == "structure").detail


def test_a_model_that_ends_at_once_is_compared_all_the_same(tmp_path):
    """This one's likeliest first token is its end token."""
    folder = tmp_path / "p"
    write(folder, make_desc("llama"), Carrier.BIAS, type="int2", block_size="32")
    checks = verify_folder(folder, silent)
    assert [c for c in checks if not c.is_passed or c.is_skipped] == []
    prompt = [5, 6, 7]
    free = OrtModel(folder).greedy(prompt, 8)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = ends = [free[0], free[-1]]
    (folder / "genai_config.json").write_text(json.dumps(config))
    found = OrtModel(folder).greedy(prompt, 8, never=[*ends, 100_000])
    assert not set(ends) & set(found)
    assert genai_greedy(folder, prompt, 8) == found


def test_ways_of_sampling_in_the_config_do_not_count(package, tmp_path):
    """A checkpoint's generation_config.json may ask for them, as Qwen2.5's do."""
    folder = changed(package, tmp_path, lambda _: None)
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"] |= {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "top_k": 99}
    (folder / "genai_config.json").write_text(json.dumps(config))
    checks = verify_folder(with_new_records(folder), silent)
    assert [c for c in checks if not c.is_passed] == []


def test_a_runtime_that_refuses_the_model_is_a_failed_check(package, tmp_path):
    def change(proto):
        last = next(n for n in proto.graph.node if n.op_type == "Sigmoid")
        last.op_type, last.domain = "NobodyKnowsIt", "com.microsoft"

    checks = verify_folder(with_new_records(changed(package, tmp_path, change)), silent)
    assert [c.name for c in checks if not c.is_passed] == ["ONNX Runtime loads it"]
    assert "NobodyKnowsIt" in checks[-1].detail


def test_a_link_as_data_file_is_refused(package, tmp_path):
    folder = changed(package, tmp_path, lambda _: None)
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerifyError, match="not there"):
        read_model(open_model(folder))


@pytest.mark.parametrize("name", ["rope.cos", "blk.1.down.weight.scales", "blk.0.ffn_norm.weight"])
def test_one_changed_bit_of_any_tensor_fails_verification(package, tmp_path, name):
    folder = changed(package, tmp_path, lambda _: None)
    span = open_model(folder).spans[name]
    data = bytearray(Path(span.file).read_bytes())
    data[span.offset + 5] ^= 1
    span.file.write_bytes(data)
    failed = {check.name for check in verify_folder(folder, silent) if not check.is_passed}
    assert failed == {"files", "structure" if name == "rope.cos" else "decoded values"}


@settings(
    max_examples=40, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    at=st.floats(0, 1),
    bit=st.integers(0, 7),
    cut=st.booleans(),
    file=st.sampled_from(["model.onnx", "genai_config.json"]),
)
def test_corrupted_files_give_errors_of_ours_alone(package, tmp_path_factory, at, bit, cut, file):
    folder = tmp_path_factory.mktemp("fuzz") / "p"
    shutil.copytree(package[0], folder, copy_function=shutil.copy)
    data = bytearray((folder / file).read_bytes())
    place = min(int(at * len(data)), len(data) - 1)
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    (folder / file).write_bytes(data)
    try:
        desc_of(read_model(open_model(folder)))
    except D2qError:
        pass
    finally:
        shutil.rmtree(folder)


def test_a_library_that_is_too_old_is_named():
    assert lacks({"onnxruntime": "1.0"}) == ""
    assert "is older than 99.0" in lacks({"onnxruntime": "99.0"})
    assert "is not installed" in lacks({"onnxruntime-of-nobody": "1.0"})


def test_the_check_is_left_out_where_the_runtime_is_too_old(package, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(package[0], folder)
    manifest = json.loads((folder / "d2qconv.json").read_text())
    manifest["requires"]["onnxruntime"] = "99.0"
    (folder / "d2qconv.json").write_text(json.dumps(manifest))
    last = verify_folder(folder, silent)[-1]
    assert last.is_skipped
    assert "is older than 99.0" in last.detail
