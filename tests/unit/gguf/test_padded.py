"""A model whose rows do not fit: padded with exact zeros, or stored in other types; by choice, and in numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_models import PLAIN, PROVENANCE, make_desc, write

from d2qconv.arch.spec import Dims, Padding
from d2qconv.checkpoint.dense import Dense
from d2qconv.exporters.base import Carrier, FloatType, silent
from d2qconv.fold.padding import padded
from d2qconv.ir.importance import Importance
from d2qconv.ir.model import QuantizedModel
from d2qconv.measure.reference import logits
from d2qconv.names import Role, TensorId
from d2qconv_gguf import GgufOptions, imatrix, widths, zeros
from d2qconv_gguf.container import read
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.reader import read_model
from d2qconv_gguf.runtime import LlamaCpp
from d2qconv_gguf.verify import verify_file

#: Nothing is a multiple of 256, all is one of 32; 3 heads of 32 are narrower than the stream.
ODD = Dims(vocab=512, hidden=160, ffn=224, n_layers=2, n_heads=3, n_kv_heads=1, head=32)
#: Nearly 256.
NEAR = Dims(vocab=512, hidden=224, ffn=256, n_layers=2, n_heads=4, n_kv_heads=2, head=64)
FLOAT = replace(PLAIN, type="f32", embedding="f32", head="f32")
TOKENS = [(7 * i + 3) % 512 for i in range(20)]


def asking(**options):
    """An exporter, and what it makes of a model with these options: (choice, the plan of what was chosen)."""
    exporter = GgufExporter(GgufOptions(**options))

    def plan(desc):
        choice = exporter.choose_padding(desc)
        wide = desc if choice.padding is None else padded(desc, choice.padding)
        return choice, exporter.plan(wide, Carrier.NONE), wide

    return plan


def kinds(plan):
    """Storage type by role, of block 0 and outside."""
    return {str(t.id.role): t.type_name for t in plan.tensors if t.id.block in (None, 0)}


@pytest.mark.parametrize(
    ("arch", "carrier"),
    [("llama", Carrier.BIAS), ("qwen2", Carrier.BIAS), ("qwen2", Carrier.NONE), ("qwen3", Carrier.NONE)],
)
def test_its_file_computes_the_source(tmp_path, arch, carrier):
    """In f32: our reader's logits, and llama.cpp's, are those of the model that was not padded."""
    desc = make_desc(arch, dims=ODD)
    wide = padded(desc, Padding(256, 256))
    write(tmp_path / "plain.gguf", desc, FLOAT, carrier, shift=0.0)
    # `write` has `require_same_function` compare the metadata with the padded model
    write(tmp_path / "wide.gguf", wide, FLOAT, carrier, shift=0.0)
    keys = read(tmp_path / "wide.gguf").keys
    layout = keys["general.architecture"]
    assert (keys[f"{layout}.embedding_length"], keys[f"{layout}.feed_forward_length"]) == (256, 256)
    assert (keys[zeros.HIDDEN], keys[zeros.FFN]) == (160, 224)
    same = ("attention.head_count", "attention.head_count_kv", "attention.key_length", "rope.dimension_count")
    assert [keys[f"{layout}.{k}"] for k in same] == [3, 1, 32, 32]
    ids = torch.tensor([TOKENS])
    wanted = logits(desc, ids)[0]
    rms = float(wanted.pow(2).mean().sqrt())
    ours = logits(read_model(tmp_path / "wide.gguf"), ids)[0]
    assert float((ours - wanted).abs().max()) < 1e-5 * rms
    with LlamaCpp(tmp_path / "plain.gguf") as a, LlamaCpp(tmp_path / "wide.gguf") as b:
        plain, found = a.logits(TOKENS), b.logits(TOKENS)
    assert np.abs(found - plain).max() < 1e-5 * rms
    assert np.abs(found - wanted.numpy()).max() < 1e-4 * rms


def test_qwen2_is_written_as_llama_where_its_own_loader_takes_no_such_width():
    """llama.cpp's qwen2 wants q as wide as the stream."""
    wide = padded(make_desc("qwen2"), Padding(512, 256))
    made = GgufExporter(FLOAT).plan(wide, Carrier.NONE)
    assert made.layout == "llama"
    assert "relabelled as llama" in made.warnings[0]
    assert GgufExporter(FLOAT).plan(make_desc("qwen2"), Carrier.NONE).layout == "qwen2"


def test_without_the_option_it_is_refused_with_the_price():
    desc = make_desc("llama", dims=ODD)
    made = GgufExporter(GgufOptions()).plan(desc, Carrier.NONE)
    assert made.refusals
    _, wide, _ = asking(pad="always")(desc)
    for refusal in made.refusals:
        assert (
            f"--pad always: exact zeros, hidden 160 → 256, ffn 224 → 256, {wide.n_bytes / 1e6:,.1f} MB"
            in refusal.todo
        )
    choice, plain, _ = asking(pad="never", type="q4_0")(desc)
    assert (choice.padding, choice.note, plain.refusals) == (None, "", ())


@pytest.mark.parametrize("pad", ["auto", "always"])
def test_what_fits_is_left_alone(pad):
    desc = make_desc("llama")
    choice, made, _ = asking(pad=pad)(desc)
    assert (choice.padding, choice.note) == (None, "")
    assert made == GgufExporter(GgufOptions()).plan(desc, Carrier.NONE)


def test_always_pads_and_o_takes_the_next_type():
    choice, made, _ = asking(pad="always")(make_desc("llama", dims=ODD))
    assert choice.padding == Padding(256, 256)
    assert made.refusals == ()
    found = kinds(made)
    assert {found[r] for r in ("q", "k", "v", "gate", "up", "down")} == {"q2_k"}
    fits = [g for g in GRIDS.values() if g.accepts((256, 96)) is None and g.bits_per_weight >= 2.625]
    assert GRIDS[found["o"]].bits_per_weight == min(g.bits_per_weight for g in fits)
    note = next(t.note for t in made.tensors if t.id == TensorId(Role.O, 0))
    assert note == "q2_k does not fit"
    assert {t.note for t in made.tensors if t.id.role is not Role.O} == {""}


def bytes_and_error(made, desc):
    """By hand, from the plan."""
    matrices = {t.id: t for t in made.tensors if len(t.shape) == 2}
    weights = {t: desc.tensors[t].n_elements for t in matrices}
    errors = sum(n * widths.error_of(matrices[t].storage) for t, n in weights.items())
    return made.n_bytes, errors / sum(weights.values())


@pytest.mark.parametrize("dims", [ODD, NEAR], ids=["odd", "near"])
@pytest.mark.parametrize("kind", ["q2_k", "q4_k"])
def test_auto_takes_the_better_one_and_says_both(dims, kind):
    desc = make_desc("llama", dims=dims)
    choice, made, _ = asking(pad="auto", type=kind)(desc)
    _, wide, _ = asking(pad="always", type=kind)(desc)
    bytes_wide, error_wide = bytes_and_error(wide, desc)
    others = []
    for name, grid in GRIDS.items():
        rows = (dims.hidden, dims.ffn, dims.n_heads * dims.head)
        if all(grid.accepts((1, n)) is None or GRIDS[kind].accepts((1, n)) is None for n in rows):
            plan = GgufExporter(GgufOptions(type=kind)).plan(desc, Carrier.NONE)
            assert plan.refusals
            full = GgufExporter(GgufOptions(type=name)).plan(desc, Carrier.NONE)
            mixed = tuple(
                replace(t, n_bytes=asked.n_bytes, storage=asked.storage)
                if (asked := plan.by_id.get(t.id))
                else t
                for t in full.tensors
            )
            others.append(bytes_and_error(replace(full, tensors=mixed), desc))
    within = [(error, n) for n, error in others if n <= bytes_wide]
    assert made.refusals == ()
    for n, error in ((bytes_wide, error_wide), min(within)[::-1] if within else (bytes_wide, error_wide)):
        assert f"{n / 1e6:,.1f} MB, error {error:.3g}" in choice.note
    bits_saved = 8 * (bytes_wide - min(within)[1]) / desc.n_weights if within else 0.0
    if within and min(within)[0] <= error_wide * 4**bits_saved:
        assert choice.padding is None
        assert bytes_and_error(made, desc) == pytest.approx(min(within)[::-1])
        assert choice.note.startswith("not padded")
    else:
        assert choice.padding is not None
        assert made == wide
        assert choice.note.startswith("padded (hidden")


def test_both_ways_are_taken_by_auto():
    """So that the test above sees both."""
    pairs = [(dims, kind) for dims in (ODD, NEAR) for kind in ("q2_k", "q4_k")]
    taken = {asking(pad="auto", type=k)(make_desc("llama", dims=d))[0].padding is None for d, k in pairs}
    assert taken == {True, False}


def test_only_rows_of_o_do_not_fit():
    """Heads of 96 columns in a stream of 256: nothing is padded, and the plan says which type o takes."""
    dims = replace(ODD, hidden=256, ffn=512)
    desc = make_desc("llama", dims=dims)
    choice, made, _ = asking(pad="always")(desc)
    assert choice.padding is None
    assert choice.note.startswith("not padded: ")
    assert made.refusals == ()
    assert kinds(made)["o"] != "q2_k"
    (refusal,) = GgufExporter(GgufOptions()).plan(desc, Carrier.NONE).refusals
    assert "a wider type where one does not fit" in refusal.todo


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_quantized_one_passes_every_check(tmp_path, arch):
    desc = make_desc(arch, dims=ODD)
    options = GgufOptions(type="q2_k", pad="always", max_shard_size="100kB")
    wide = padded(desc, Padding(256, 256))
    package, _, _ = write(tmp_path / "m.gguf", wide, options, shift=0.0)
    checks = {c.name: c for c in verify_file(package.path, silent)}
    assert all(c.is_passed and not c.is_skipped for c in checks.values()), checks
    assert "hidden 160 of 256, ffn 224 of 256" in checks["padding"].detail


@pytest.mark.parametrize(
    "tensor",
    [TensorId(Role.DOWN, 1), TensorId(Role.UP, 0), TensorId(Role.EMBED), TensorId(Role.FFN_NORM, 0)],
    ids=str,
)
def test_what_is_not_zero_in_a_file_is_found(tmp_path, tensor):
    wide = padded(make_desc("llama", dims=ODD), Padding(256, 256))
    values = wide.tensors[tensor].load().float().clone()
    values.view(-1)[-1] = 0.5
    broken = replace(wide, tensors={**wide.tensors, tensor: Dense.of(values)})
    write(tmp_path / "m.gguf", broken, FLOAT, Carrier.NONE)
    checks = {c.name: c for c in verify_file(tmp_path / "m.gguf", silent)}
    assert not checks["padding"].is_passed
    assert checks["decoded values"].is_passed


@pytest.mark.parametrize("name", GRIDS)
def test_rows_of_zeros_and_whole_blocks_of_them_are_held(name):
    """What o and down need of every type, and an embedding of 576 or 896 columns."""
    grid = GRIDS[name]
    importance = torch.rand(grid.block, generator=torch.Generator().manual_seed(0)) + 0.1
    params = grid.fit(torch.zeros(5, grid.block), importance)
    codes = grid.encode(torch.zeros(5, grid.block), params, 0)
    assert not grid.decode(codes, params).any()
    assert widths.holds_zeros(grid, 2 * grid.block)


def test_an_embedding_that_cannot_hold_zeros_is_refused():
    """Groups of 16 share a minimum in Q2_K: a zero beside other numbers is rounded."""
    grid = GRIDS["q2_k"]
    assert not widths.holds_zeros(grid, 152)
    assert widths.holds_zeros(grid, 160)
    dims = replace(ODD, hidden=152)
    choice, made, _ = asking(pad="always", embedding="q2_k")(make_desc("llama", dims=dims))
    assert choice.padding == Padding(256, 256)
    (refusal,) = made.refusals
    assert refusal.where == "embed"
    assert "zeros of a padded model" in refusal.why
    assert asking(pad="always")(make_desc("llama", dims=dims))[1].refusals == ()


def test_a_base_file_is_refused_and_an_importance_matrix_has_the_sources_columns(tmp_path):
    desc = make_desc("llama", dims=ODD)
    wide = padded(desc, Padding(256, 256))
    write(tmp_path / "base.gguf", desc, PLAIN, Carrier.NONE)
    exporter = GgufExporter(replace(PLAIN, base_gguf=tmp_path / "base.gguf"))
    assert exporter.plan(desc, Carrier.NONE).refusals == ()
    (refusal,) = exporter.plan(wide, Carrier.NONE).refusals
    assert "padding" in refusal.where
    squares = np.arange(1, 257, dtype=np.float32)
    found = {TensorId(r, 0): Importance((r,), squares.tobytes(), 10, 5, True) for r in (Role.Q, Role.DOWN)}
    imatrix.write(tmp_path / "i.gguf", QuantizedModel(wide, {}, PROVENANCE, found))
    tensors = read(tmp_path / "i.gguf").tensors
    for name, n in (("attn_q", 160), ("ffn_down", 224)):
        sums = np.array(tensors[f"blk.0.{name}.weight.in_sum2"].data)
        assert np.allclose(sums, 10 * squares[None, :n])


def test_the_error_of_a_type():
    assert widths.error_of(FloatType.F16) == 0.0
    errors = {name: widths.error_of(grid) for name, grid in GRIDS.items()}
    assert errors["q8_0"] < 1e-4 < errors["q4_k"] < 0.01 < errors["q3_k"] < errors["q2_k"] < 0.12
