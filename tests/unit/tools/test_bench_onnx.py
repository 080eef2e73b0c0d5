"""tools/bench_onnx: packing, what is read from a graph, 8-bit ends, ratios, and a whole run on the embedded model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tools" / "bench"))

import metrics  # noqa: E402
import onnx_nbits  # noqa: E402
import onnx_package  # noqa: E402
import onnx_report  # noqa: E402
from onnx_speed import Speed  # noqa: E402

VOCAB, HIDDEN, BLOCK = 64, 64, 32


@given(st.data(), st.sampled_from([2, 4, 8]))
def test_packing_is_a_little_endian_stream_of_bits(data, container):
    rows = data.draw(st.lists(st.lists(st.integers(0, 2**container - 1), min_size=5, max_size=5), min_size=1))
    packed = onnx_nbits.pack(np.array(rows, np.uint8), container)
    for row, found in zip(rows, packed, strict=True):
        number = sum(value << (container * i) for i, value in enumerate(row))
        assert found.tobytes() == number.to_bytes(math.ceil(5 * container / 8), "little")


def graph(*, tied):
    """input_ids → embedding → one linear → logits, as the genai builder lays a float graph out."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(HIDDEN, VOCAB)).astype("f4")
    constants = {"head": head, "linear": rng.normal(size=(HIDDEN, HIDDEN)).astype("f4")}
    nodes = []
    table = "table"
    if tied:
        nodes.append(helper.make_node("Transpose", ["head"], ["table"], perm=[1, 0]))
    else:
        constants["table"] = rng.normal(size=(VOCAB, HIDDEN)).astype("f4")
    nodes += [
        helper.make_node("Gather", [table, "input_ids"], ["x"], name="embed"),
        helper.make_node("MatMul", ["x", "linear"], ["y"], name="linear"),
        helper.make_node("MatMul", ["y", "head"], ["logits"], name="head"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, None])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None, VOCAB])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def run(model, level=None):
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and level is not None:
                attribute.i = level
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input_ids": np.arange(VOCAB, dtype=np.int64)[None]})[0]


def saved(model, folder):
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=16,
    )
    return onnx_package.facts(folder)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_stored_matrix_is_what_its_codes_say(bits, tmp_path):
    model = graph(tied=False)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (HIDDEN, HIDDEN)).astype("u1")
    scales = rng.uniform(0.5, 1.0, (HIDDEN, 2)).astype("f4")
    zeros = rng.integers(0, 2**bits, (HIDDEN, 2)).astype("u1")
    decoded = (codes.astype("f4") - zeros.repeat(BLOCK, 1)) * scales.repeat(BLOCK, 1)
    wanted = graph(tied=False)
    wanted.graph.initializer[1].CopyFrom(numpy_helper.from_array(decoded.T.copy(), "linear"))
    container = 4 if bits == 3 else bits
    (node,) = onnx_package.Graph(model).linears()
    name = onnx_nbits.as_nbits(model, node, onnx_nbits.Rounded(codes, scales, zeros), BLOCK, container, 1)
    onnx_nbits.drop_unread(model)
    np.testing.assert_allclose(run(model), run(wanted), rtol=1e-4, atol=1e-2)
    if container != bits:
        entry = model.metadata_props.add()
        entry.key, entry.value = onnx_package.CODE_BITS, json.dumps({name: bits})
    facts = saved(model, tmp_path)
    n_codes = HIDDEN * HIDDEN * container // 8
    assert (facts.bits, facts.block, facts.levels, facts.float_zeros) == (bits, BLOCK, (1,), False)
    assert facts.linear_bytes == n_codes + HIDDEN * 2 * 4 + HIDDEN * math.ceil(2 * container / 8)
    assert facts.linear_weights == HIDDEN * HIDDEN
    assert facts.ends == "f32, apart"
    assert facts.total_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_the_ends_in_8_bits_are_near_the_float_ones(tied, tmp_path):
    wanted = run(graph(tied=tied))
    model = graph(tied=tied)
    onnx_nbits.quantize_ends(model, BLOCK)
    onnx_nbits.drop_unread(model)
    error = np.abs(run(model, level=1) - wanted).max() / np.abs(wanted).max()
    assert 0 < error < 0.02
    assert saved(model, tmp_path).ends == f"8-bit, {'shared' if tied else 'apart'}"
    assert {t.name for t in model.graph.initializer}.isdisjoint({"head", "table"})


def test_a_copy_at_another_level_has_the_same_tensors(tmp_path):
    model = graph(tied=True)
    onnx_nbits.quantize_ends(model, BLOCK)
    given_folder, out = tmp_path / "given", tmp_path / "out"
    given_folder.mkdir()
    saved(model, given_folder)
    before = (given_folder / "model.onnx").read_bytes()
    onnx_package.at_level(given_folder, 1, out)
    levels = {
        onnx_package.attribute(n, "accuracy_level", 0)
        for n in onnx_package.graph_of(out).graph.node
        if n.op_type == "MatMulNBits"
    }
    assert levels == {1}
    assert (out / "model.onnx.data").read_bytes() == (given_folder / "model.onnx.data").read_bytes()
    assert (given_folder / "model.onnx").read_bytes() == before


def row(who, kld, *, ours=False, bits=2, block=32):
    values = np.array([kld - 0.01, kld + 0.01])
    parts = (metrics.Positions(values, values, np.array([True, False])),)
    return onnx_report.Row(who, ours, bits, block, None, metrics.score(list(parts)), parts=parts)


def test_the_ratio_is_to_the_best_peer_of_equal_bits_and_block():
    mine = row("d2qconv", 0.2, ours=True)
    rows = [row("a", 0.8), row("b", 0.5), row("c", 0.1, block=64), row("d", 0.1, bits=4), mine]
    found = onnx_report.against(rows, mine)
    assert found.peer == "b"
    assert found.ratio == pytest.approx(0.4)
    assert found.delta.mean == pytest.approx(-0.3)
    assert found.reached
    assert not onnx_report.against([*rows, row("e", 0.3)], mine).reached
    assert onnx_report.against(rows, row("d2qconv", 0.2, ours=True, bits=3)) is None
    text = onnx_report.table(rows, quality=True, exact=False, speed=False)
    assert "| **d2qconv** |" in text
    assert "0.400 (reaches 0.5)" in text


def test_the_best_round_counts_and_an_error_stays():
    first, second = Speed(10.0, 2.0, 1.0), Speed(8.0, 3.0, 0.5)
    assert Speed().best(first).best(second) == Speed(10.0, 3.0, 0.5)
    assert first.best(Speed(error="x")).error == "x"


def test_a_whole_run_on_the_embedded_model(tmp_path):
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text(
        "The river ran past the old mill, and nobody in the village remembered who had built it. " * 30
    )
    work, out = tmp_path / "work", tmp_path / "table.json"
    command = [sys.executable, ROOT / "tools" / "bench_onnx", ROOT / "d2qconv" / "data" / "tiny-qwen3-5m"]
    command += ["--heldout", text, "--bits", "2,3", "--blocks", "64", "--algorithms", "rtn,k_quant"]
    command += ["--ctx", "64", "--chunks", "2", "--rounds", "1", "--decode", "4", "--threads", "1"]
    command += ["--work", work, "--json", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {(r["who"], r["bits"]): r for r in json.loads(out.read_text())["rows"]}
    source = rows["float (genai builder)", 32]
    assert abs(source["score"]["kld"]["mean"]) < 1e-6
    for who in ("onnxruntime rtn", "onnxruntime k_quant"):
        assert rows[who, 2]["score"]["kld"]["mean"] > rows[who, 3]["score"]["kld"]["mean"] > 0.01
        assert rows[who, 3]["facts"]["ends"] == "8-bit, shared"
        assert rows[who, 2]["speed"]["decode"] > 0
    (peer,) = work.glob("*/rtn-2b-g64-ends-8")
    again = [*command, "--no-builder", "--ours", f"mine={peer}", "--ours", f"gone={tmp_path}"]
    done = subprocess.run(list(map(str, again)), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "gone: failed" in done.stderr
    mine = next(r for r in json.loads(out.read_text())["rows"] if r["who"] == "mine")
    assert (mine["bits"], mine["block"]) == (2, 64)
    assert mine["score"]["kld"]["mean"] == rows["onnxruntime rtn", 2]["score"]["kld"]["mean"]
    assert mine["against"]["target"] == 0.5
