"""tools/bench_safetensors: GPTQ's layout as packed by hand, what of a folder counts, ratios, scores."""

import json
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.names import Role, TensorId
from d2qconv.testing.models import make_checkpoint

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tools" / "bench"))

import hf_package  # noqa: E402
import hf_report  # noqa: E402
import metrics  # noqa: E402

GROUP = 32


def words(row, bits):
    """The values of a row as one integer, the first in its lowest bits, cut into 32-bit words."""
    number = sum(int(value) << (bits * i) for i, value in enumerate(row))
    n_words = -(-len(row) * bits // 32)
    return [number >> (32 * i) & 0xFFFFFFFF for i in range(n_words)]


@given(st.data(), st.sampled_from([2, 3, 4, 8]))
def test_codes_are_read_as_they_were_packed(data, bits):
    n = data.draw(st.integers(1, 70))
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n))
    packed = np.array([words(row, bits), words(row[::-1], bits)], np.uint32)
    found = hf_package.unpack(packed, n, bits)
    assert found.tolist() == [row, row[::-1]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(
        folder, "llama", hidden=64, ffn=128, heads=2, kv_heads=1, head_dim=32, vocab=8192, layers=1, tied=True,
        tokenizer=ROOT / "d2qconv" / "data" / "tiny-qwen3-5m",
    )  # fmt: skip


def packed_folder(source, path, layout, offset):
    """The source with q of its only block packed at 3 bits; returns what q decodes to, and the bytes of its arrays."""
    desc = bind(open_checkpoint(str(source)))
    rng = np.random.default_rng(0)
    q = "model.layers.0.self_attn.q_proj"
    arrays = {
        desc.arch.site(t.role).module.format(i=t.block) + f".{t.part}": dense.load().float().numpy()
        for t, dense in desc.tensors.items()
    }
    n_out, n_in = arrays.pop(f"{q}.weight").shape
    codes, zeros = rng.integers(0, 8, (n_out, n_in)), rng.integers(1, 8, (n_out, n_in // GROUP))
    scales = rng.uniform(0.5, 1.0, zeros.shape).astype(np.float16)
    made = {
        "qweight": np.array([words(row, 3) for row in codes], np.uint32).T.copy().view(np.int32),
        "qzeros": np.array([words(col, 3) for col in zeros.T - offset], np.uint32).view(np.int32),
        "scales": scales.T.copy(),
    }
    path.mkdir()
    save_file({**arrays, **{f"{q}.{name}": a for name, a in made.items()}}, path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "x", "bits": 3, "group_size": GROUP, **layout}
    (path / "config.json").write_text(json.dumps(config))
    steps = scales.astype(np.float32).repeat(GROUP, 1)
    return (codes - zeros.repeat(GROUP, 1)) * steps, sum(a.nbytes for a in made.values())


@pytest.mark.parametrize(
    ("layout", "offset"),
    [
        ({"packing_format": "auto_round"}, 0),
        ({"packing_format": "auto_round:auto_gptq"}, 1),
        ({"checkpoint_format": "gptq_v2"}, 0),
        ({"checkpoint_format": "gptq"}, 1),
    ],
)
def test_a_rivals_folder_decodes_to_what_its_codes_say(layout, offset, source, tmp_path):
    wanted, n_bytes = packed_folder(source, tmp_path / "made", layout, offset)
    desc = bind(open_checkpoint(str(source)))
    found = hf_package.read(tmp_path / "made", desc)
    tensor = TensorId(Role.Q, 0)
    np.testing.assert_array_equal(found.desc.tensors[tensor].load().numpy(), wanted.astype(np.float32))
    for other in set(desc.tensors) - {tensor}:
        assert found.desc.tensors[other].load().equal(desc.tensors[other].load().float())
    facts = found.facts
    assert (facts.bits, facts.group, facts.linear_weights) == (3, GROUP, wanted.size)
    assert facts.linear_bytes == n_bytes
    assert facts.total_bytes == (tmp_path / "made" / "model.safetensors").stat().st_size
    assert facts.ends == "f32, shared"


def test_what_cannot_be_read_is_refused(source, tmp_path):
    packed_folder(source, tmp_path / "made", {"packing_format": "auto_round:auto_awq"}, 0)
    with pytest.raises(ValueError, match="auto_awq"):
        hf_package.read(tmp_path / "made", bind(open_checkpoint(str(source))))
    with pytest.raises(ValueError, match="quantization_config"):
        hf_package.read(source, bind(open_checkpoint(str(source))))


def row(who, kld, *, ours=False, rival=True, bits=2):
    values = np.array([kld - 0.01, kld + 0.01])
    parts = (metrics.Positions(values, values, np.array([True, False])),)
    return hf_report.Row(who, ours, rival, bits, "", score=metrics.score(list(parts)), parts=parts)


def test_the_ratio_is_to_the_best_rival_of_equal_bits():
    mine = row("d2qconv", 0.2, ours=True, rival=False)
    rows = [row("a", 0.8), row("b", 0.5), row("d", 0.1, bits=4), mine, row("e", 0.1, ours=True, rival=False)]
    found = hf_report.against(rows, mine)
    assert found.rival == "b"
    assert found.ratio == pytest.approx(0.4)
    assert found.delta.mean == pytest.approx(-0.3)
    assert hf_report.against(rows, row("d2qconv", 0.2, ours=True, rival=False, bits=3)) is None
    lines = hf_report.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["a", "b", "**d2qconv**", "**e**", "d"]


@pytest.fixture(scope="module")
def tool():
    loader = SourceFileLoader("bench_safetensors", str(ROOT / "tools" / "bench_safetensors"))
    module = module_from_spec(spec_from_loader("bench_safetensors", loader))
    sys.modules["bench_safetensors"] = module
    loader.exec_module(module)
    return module


def test_a_package_is_scored_against_its_source(tool, source, tmp_path, monkeypatch):
    for name in ("sound", "broken"):
        packed_folder(source, tmp_path / name, {"packing_format": "auto_round"}, 0)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    text = tmp_path / "text.txt"
    text.write_text("The river ran past the old mill, and nobody remembered who had built it. " * 30)
    argv = [
        "x",
        str(source),
        "--calibration",
        str(text),
        "--heldout",
        str(text),
        "--sequences",
        "3",
        "--length",
        "16",
    ]
    argv += ["--ctx", "32", "--chunks", "2", "--work", str(tmp_path), "--", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    args = tool.options()
    assert args.extra == ["--seed", "1"]
    bench = tool.prepared(args)
    assert np.load(bench.tokens).shape == (3, 16)
    assert metrics.score(bench.reference.own()).kld.mean == 0
    row = hf_report.Row("a", False, True, 3, "")
    sound = tool.scored(bench, row, tmp_path / "sound")
    assert sound.facts.bits == 3
    assert sound.score.n_positions == 2 * 15
    assert sound.score.kld.mean > 1e-3
    broken = tool.scored(bench, row, tmp_path / "broken")
    assert broken.score is None
    assert broken.note.startswith("cannot be read: VerifyError")
    argv.insert(2, "--no-ours")
    argv[argv.index("--") :] = ["--peers", ""]
    assert [r.who for r in tool.rows(tool.prepared(tool.options()))] == ["source"]
