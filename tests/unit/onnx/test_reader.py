"""The reader against ONNX Runtime itself, and against files that lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
from d2qconv.export.base import silent
from d2qconv_onnx.codec import pack
from d2qconv_onnx.container import Span, open_model
from d2qconv_onnx.reader import Matrix, desc_of, read_model
from d2qconv_onnx.runtime import lacks
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
    found = next(n for n in proto.graph.node if n.name == node)
    next(a for a in found.attribute if a.name == name).i = value


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
        (lambda p: attribute(p, "blk.0.attention", "num_heads", 0), "do not make a decoder"),
        (lambda p: p.metadata_props.pop(0) and p.metadata_props.clear(), "is of architecture ''"),
        (lambda p: p.graph.node.remove(p.graph.node[-1]), "no head"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(package, tmp_path, change, says):
    folder = changed(package, tmp_path, change)
    with pytest.raises(VerifyError, match=says):
        desc_of(read_model(open_model(folder)))


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
