"""Every option of a recipe through a whole walk of a very small model: what is stored is what was judged."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from d2qconv.arch.bind import bind
from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import Block, load_block, load_ends
from d2qconv.exporters.base import Carrier, FloatType, TargetPlan, TensorPlan
from d2qconv.fold.rotation import Rotation, rotated
from d2qconv.grids.affine import AffineGrid
from d2qconv.ir.coded import Coded
from d2qconv.ir.store import Store
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv.progress import Unwatched
from d2qconv.quant.dac import ShiftAccumulator
from d2qconv.refine.settings import RefineNotes
from d2qconv.run import Recipe
from d2qconv.team import Team
from d2qconv.testing.models import make_checkpoint
from d2qconv.walk import model as walk_model
from d2qconv.walk.activations import Place, Placement
from d2qconv.walk.block import BlockWalk
from d2qconv.walk.last_pass import LastPass
from d2qconv.walk.model import Walk
from d2qconv.walk.rounding import Rounder
from d2qconv.walk.sharing import SharedStore
from d2qconv.walk.stream import Stream
from d2qconv_gguf.grids import GRIDS

LINEARS = (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN)
AFFINE = AffineGrid(2, 32, "float")
#: Whatever the defaults are: what a case does not name is off, or as in plain GPTQ.
BASE = Recipe(
    rounding="gptq", refit=True, rotation="none", asymmetry=0.5, asymmetry_form="closed", polish=0, order="natural",
    dsq=True, norm_scales=False, value_scales=False, dac=True, dac_gate=0.0, dac_final=False, attention_weights=False,
    damping=0.01, refine=0,
)  # fmt: skip
ALL_GRIDS = {**GRIDS, AFFINE.id: AFFINE}
CPU = torch.device("cpu")


@pytest.fixture
def make(tmp_path):
    """A model of 2 blocks, its sizes the least that the grids take."""

    def made(model_type="llama", **sizes):
        sizes = {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 128} | sizes
        return bind(open_checkpoint(str(make_checkpoint(tmp_path / model_type, model_type, **sizes))))

    return made


def planned(model, carrier, grid):
    def storage(tensor_id, shape):
        if len(shape) == 1:
            return FloatType.F32
        return GRIDS["q8_0"] if tensor_id.role in (Role.EMBED, Role.HEAD) else grid

    shapes = {t: d.shape for t, d in model.tensors.items()}
    if carrier is Carrier.BIASES:
        for tensor_id, shape in list(shapes.items()):
            if tensor_id.role in LINEARS:
                shapes.setdefault(replace(tensor_id, part=Part.BIAS), shape[:1])
    tensors = tuple(TensorPlan(t, str(t), shape, storage(t, shape), 0) for t, shape in shapes.items())
    return TargetPlan("test", tensors, carrier, "", ())


def walk(
    model,
    folder,
    *,
    carrier=Carrier.NONE,
    grid=AFFINE,
    last_pass=LastPass(),  # noqa: B008
    sequences=8,
    **recipe,
):
    rows = torch.randint(128, (sequences + 2, 32), generator=torch.Generator().manual_seed(2))
    tokens = CalibrationTokens(rows[:-2], rows[-2:], "random")
    return Walk(
        model, planned(model, carrier, grid), Rounder(replace(BASE, **recipe)), tokens,
        SharedStore(Team.alone(), Store(folder, "f", ALL_GRIDS), ALL_GRIDS), CPU, Unwatched(),
        Placement(Place.HOST, CPU), last_pass=last_pass,
    )  # fmt: skip


def as_model(run):
    """The stored tensors as a model of their own, decoded."""
    tensors = run.store.leaders.tensors()

    def dense(held):
        return Dense.of(held.decode() if isinstance(held, Coded) else held.load())

    return replace(run.desc, tensors={t: dense(tensors[t]) for t in tensors})


def divergence(model, stored, tokens):
    p = logits(model, tokens)[:, :-1].double().log_softmax(-1)
    q = logits(stored, tokens)[:, :-1].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def codes(run):
    return {t: h.codes for t, h in run.store.leaders.tensors().items() if isinstance(h, Coded)}


def changed(run, base):
    """Roles whose codes differ in block 0, and at the ends."""
    mine, theirs = codes(run), codes(base)
    return {t.role for t in mine if t.block in (0, None) and not torch.equal(mine[t], theirs[t])}


@dataclass(frozen=True)
class Case:
    """What is switched on, and the folds that it must leave (name and carrier, per block or in all)."""

    recipe: dict[str, Any] = field(default_factory=dict)
    carrier: Carrier = Carrier.NONE
    arch: str = "llama"
    is_tied: bool = True
    folds: tuple[str, ...] = ()
    grid: Any = AFFINE
    rotation: str = ""


OFF = {"dsq": False, "dac": False}
GAINS = ("gain of attn_norm", "rows of v", "gain of ffn_norm")
CASES = {
    "plain": Case(OFF),
    "norm_scales": Case({**OFF, "norm_scales": True}, folds=(GAINS[0], GAINS[2]), grid=GRIDS["q4_0"]),
    "all_scales_with_bias": Case(
        {"norm_scales": True, "value_scales": True}, Carrier.BIAS, "qwen2",
        folds=("gate.bias and up.bias", *GAINS, "rows of up"),
    ),
    "all_scales_with_rank1": Case(
        {"norm_scales": True, "value_scales": True}, Carrier.RANK1, "qwen3",
        folds=("rank-1 term of gate and up", *GAINS, "rows of up"),
    ),
    "biases": Case(OFF, Carrier.BIASES),
    "biases_without_asymmetry": Case({**OFF, "asymmetry": 0.0}, Carrier.BIASES, "qwen2"),
    "biases_and_all_scales": Case(
        {"dac": False, "norm_scales": True, "value_scales": True}, Carrier.BIASES, "qwen2", folds=(*GAINS, "rows of up")
    ),
    "gar_gptaq": Case({**OFF, "order": "gar", "asymmetry_form": "gptaq"}),
    "gar_closed_dsq": Case({"dac": False, "order": "gar"}, folds=("rows of up",)),
    "gar_rescomp": Case({**OFF, "order": "gar", "asymmetry_form": "rescomp"}, Carrier.RANK1, "qwen3",
                        folds=("rank-1 term of gate and up",)),
    "polish": Case({"dac": False, "polish": 2}, folds=("rows of up",)),
    "rescomp": Case({**OFF, "asymmetry_form": "rescomp"}),
    "attention_weights": Case({**OFF, "attention_weights": True}, arch="qwen3"),
    "dac_final": Case({**OFF, "dac_final": True}, is_tied=False, folds=("rank-1 term of head",)),
    "hadamard": Case(OFF, rotation="hadamard"),
    "walsh": Case({"norm_scales": True, "value_scales": True, "dac_final": True}, Carrier.BIAS, "qwen2",
                  rotation="walsh", folds=("gate.bias and up.bias", *GAINS, "rows of up", "rank-1 term of head")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_stored_tensors_are_the_model_that_was_judged(make, tmp_path, name):
    case = CASES[name]
    source = make(case.arch, tied=case.is_tied)
    model = rotated(source, Rotation(case.rotation)) if case.rotation else source
    run = walk(model, tmp_path / "w", carrier=case.carrier, grid=case.grid, **case.recipe)
    result = run.run()
    stored = as_model(run)
    kl = divergence(source, stored, run.tokens.held_out)
    assert 0 < kl < 3
    assert result.divergence.mean_kl == pytest.approx(kl, rel=1e-3)
    assert result.divergence.n_tokens == run.tokens.held_out[:, 1:].numel()
    assert set(stored.tensors) >= set(model.tensors)
    for index in range(2):
        found = [fold.carrier for fold in result.folds if fold.block == index]
        assert sorted(found) == sorted(f for f in case.folds if "head" not in f)
    assert [f.carrier for f in result.folds if f.block == 2] == [f for f in case.folds if "head" in f]
    assert len(result.errors) == 14 + (not model.is_tied)
    assert (result.unrefined, result.refined) == (None, None)
    assert [(b.index, b.refined) for b in result.blocks] == [(0, None), (1, None)]
    assert all(0 < b.error < 1 and b.seconds > 0 for b in result.blocks)


def uneven(model):
    """The same function with rows of v, columns of o and gains against their readers of very different sizes."""
    generator = torch.Generator().manual_seed(5)

    def change(tensors, tensor_id, factor):
        held = tensors[tensor_id].load().float()
        tensors[tensor_id] = Dense.of(held * factor)

    def sizes(n):
        return torch.exp(torch.randn(n, generator=generator))

    tensors, dims = dict(model.tensors), model.dims
    for index in range(dims.n_layers):
        for norm, readers in model.arch.residual.readers.items():
            if norm is not Role.FINAL_NORM:
                c = sizes(dims.hidden)
                change(tensors, TensorId(norm, index), 1 / c)
                for role in readers:
                    change(tensors, TensorId(role, index), c)
        c = sizes(dims.n_kv_heads * dims.head)
        change(tensors, TensorId(Role.V, index), 1 / c[:, None])
        shared = dims.n_heads // dims.n_kv_heads
        change(
            tensors, TensorId(Role.O, index),
            c.view(dims.n_kv_heads, 1, -1).expand(-1, shared, -1).reshape(-1),
        )  # fmt: skip
    return replace(model, tensors=tensors)


@pytest.mark.parametrize("option", ["norm_scales", "value_scales"])
def test_scales_lower_the_error_of_matrices_whose_columns_are_not_alike(make, tmp_path, option):
    even = make()
    model = uneven(even)
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(logits(model, tokens), logits(even, tokens), atol=1e-3, rtol=1e-3)
    roles = (Role.O,) if option == "value_scales" else (Role.Q, Role.K, Role.V, Role.GATE, Role.UP)
    plain, scaled = (
        walk(model, tmp_path / str(on), asymmetry=0.0, **OFF, **{option: on}).run() for on in (False, True)
    )
    errors = [
        sum(e.output for e in result.errors if TensorId.parse(e.tensor).role in roles)
        for result in (plain, scaled)
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.folds and not case.rotation])
def test_the_folded_block_computes_what_the_student_did(make, tmp_path, name):
    """The walk measures on the student, whose scales and shift stand where they were found."""
    case = CASES[name]
    run = walk(make(case.arch), tmp_path / "w", carrier=case.carrier, grid=GRIDS["q4_0"], **case.recipe)
    teacher = load_block(run.desc, 0, "cpu")
    x = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(1))
    block_walk = BlockWalk(0, teacher, run.plan, run.rounder, run.team)
    quantized = block_walk.quantize(Stream.of(x.clone(), x.clone()))
    weights = {role: quantized.weight(role) for role in quantized.linears} | dict(quantized.norms)
    folded = Block(run.desc, weights, dict(quantized.biases))(x)
    wanted, source = block_walk.student(x), teacher(x)
    # The folds round steps to f16, and that is all.
    assert float((folded - wanted).square().mean()) < 1e-4 * float((source - wanted).square().mean())


def inputs_of(n_in, seed=0):
    """(w, statistics, and the error E‖S x − Ŵ x̃‖² of a result) for inputs that differ from the source's."""
    generator = torch.Generator().manual_seed(seed)
    mix, shift = torch.randn(2, n_in, n_in, generator=generator) / n_in**0.5
    x = torch.randn(1024, n_in, generator=generator) @ (torch.eye(n_in) + mix)
    x = x * torch.exp(0.5 * torch.randn(n_in, generator=generator))
    moved = x + 0.3 * x @ shift
    w = torch.randn(16, n_in, generator=generator) * 0.1
    gram, cross = moved.T @ moved / 1024, x.T @ moved / 1024
    statistics = InputStatistics(gram, moved.mean(0), cross, x.mean(0))
    return w, statistics, lambda got: float((x @ w.T - moved @ got.decode().T).square().mean())


@pytest.mark.parametrize("form", ["closed", "gptaq", "rescomp"])
def test_an_order_changes_nothing_of_what_the_weights_aim_at(form):
    """On 8 bits rounding is small, and what is left of the error is what the form of asymmetry leaves."""
    w, statistics, error = inputs_of(128)

    def rounded(**recipe):
        return error(Rounder(replace(BASE, **recipe))(w, GRIDS["q8_0"], statistics, "test"))

    plain = rounded(asymmetry=0.0)
    natural = rounded(asymmetry=1.0, asymmetry_form=form)
    ordered = rounded(asymmetry=1.0, asymmetry_form=form, order="gar")
    assert ordered != natural
    assert natural < 0.8 * plain
    assert ordered == pytest.approx(natural, abs=0.1 * plain)


def test_one_grid_must_store_all_readers_of_a_norm(make, tmp_path):
    """Else the columns' scales would not suit them all: that norm gets none."""
    run = walk(make(), tmp_path / "w", norm_scales=True, **OFF)
    tensors = tuple(replace(t, storage=FloatType.F16) if t.id.role is Role.V else t for t in run.plan.tensors)
    result = replace(run, plan=replace(run.plan, tensors=tensors)).run()
    assert [f.carrier for f in result.folds] == ["gain of ffn_norm"] * 2


def outputs(block, x):
    """(mean output of every linear, the block's output)."""
    h = block.attention_input(x)
    inputs = {Role.Q: h, Role.K: h, Role.V: h, Role.O: block.mix(h)}
    r = block.attend(x)
    f = block.ffn_input(r)
    inputs |= {Role.GATE: f, Role.UP: f, Role.DOWN: block.gated(f)}
    return {role: block.linear(role, y).mean((0, 1)) for role, y in inputs.items()}, block.feed(r)


@pytest.mark.parametrize("name", ["biases", "biases_and_all_scales"])
def test_biases_give_every_linear_the_mean_output_of_the_source(make, tmp_path, name):
    case = CASES[name]
    model = make(case.arch)
    run = walk(model, tmp_path / "w", carrier=case.carrier, grid=GRIDS["q4_0"], **case.recipe)
    run.run()
    stored = as_model(run)
    x, seen = (load_ends(m, "cpu").embed(run.tokens.calibration) for m in (model, stored))
    for index in range(2):
        wanted, x = outputs(load_block(model, index, "cpu"), x)
        got, seen = outputs(load_block(stored, index, "cpu"), seen)
        for role in LINEARS:
            assert TensorId(role, index, Part.BIAS) in stored.tensors
            if case.folds and role in (Role.V, Role.UP):
                continue  # Their outputs are scaled, and what reads them is scaled back.
            # A scale's fold rounds the steps of v and up to f16.
            torch.testing.assert_close(got[role], wanted[role], atol=5e-4, rtol=0, msg=f"{role} {index}")


def test_without_a_gptq_sweep_no_bias_takes_means(make, tmp_path):
    run = walk(make(), tmp_path / "w", carrier=Carrier.BIASES, rounding="nearest", **OFF)
    run.run()
    assert not [t for t in run.store.leaders.tensors() if t.part is Part.BIAS]


def test_attention_weights_concern_k_and_v_and_what_follows_them(make, tmp_path):
    model = make()
    base, run = (walk(model, tmp_path / str(on), attention_weights=on, **OFF) for on in (False, True))
    base.run()
    run.run()
    assert {Role.K, Role.V} <= changed(run, base)
    assert not {Role.EMBED, Role.Q} & changed(run, base)


def test_a_final_shift_concerns_the_head_alone(make, tmp_path):
    model = make(tied=False)
    base, run = (walk(model, tmp_path / str(on), dac_final=on, **OFF) for on in (False, True))
    base.run()
    (fold,) = run.run().folds
    assert (fold.name, fold.block, fold.carrier) == ("final_shift", 2, "rank-1 term of head")
    assert 0 <= fold.residual < 1
    assert changed(run, base) == {Role.HEAD}


def test_a_tied_head_takes_no_final_shift(make, tmp_path):
    assert walk(make(), tmp_path / "w", dac_final=True, **OFF).run().folds == []


@pytest.mark.parametrize(
    "option",
    [{"order": "gar"}, {"asymmetry_form": "gptaq"}, {"asymmetry_form": "rescomp"}, {"polish": 1}],
    ids=lambda option: "_".join(map(str, *option.items())),
)
def test_an_option_of_the_sweep_changes_the_codes(make, tmp_path, option):
    model = make()
    base, run = walk(model, tmp_path / "a", **OFF), walk(model, tmp_path / "b", **OFF, **option)
    base.run()
    run.run()
    assert Role.Q in changed(run, base)
    assert Role.EMBED not in changed(run, base)


@pytest.mark.parametrize(("scope", "carrier"), [("model", Carrier.BIAS), ("block", Carrier.BIASES)])
def test_a_last_pass_is_kept_stored_and_judged(make, tmp_path, scope, carrier):
    model = make(tied=False)
    with_pass = LastPass(scope, 6)
    # Sequences enough that what is reserved of them shows more than chance.
    run = walk(model, tmp_path / "w", carrier=carrier, last_pass=with_pass, sequences=48)
    result = run.run()
    stored = as_model(run)
    assert result.divergence.mean_kl == pytest.approx(
        divergence(model, stored, run.tokens.held_out), rel=1e-3
    )
    none = replace(with_pass, scope="none")
    plain = walk(model, tmp_path / "p", carrier=carrier, last_pass=none, sequences=48)
    before = plain.run()
    notes = [result.refined] if scope == "model" else [b.refined for b in result.blocks]
    assert [n.steps for n in notes] == [6] * (1 if scope == "model" else 2)
    assert all(n.kept == (n.reserved_after < n.reserved_before) for n in notes)
    assert notes[0].kept, notes
    assert result.divergence.mean_kl != before.divergence.mean_kl
    if scope == "model":
        assert result.unrefined.mean_kl == before.divergence.mean_kl
        for tensor_id, held in codes(run).items():
            assert torch.equal(held, codes(plain)[tensor_id])
    else:
        assert result.unrefined is None
        assert not {Role.Q, Role.DOWN} & changed(run, plain)
    gains = [m.tensors[TensorId(Role.FFN_NORM, 0)].load() for m in (stored, as_model(plain))]
    assert not torch.equal(*gains)


def test_a_last_pass_that_does_not_help_leaves_the_model_as_it_was(make, tmp_path, monkeypatch):
    def useless(desc, blocks, ends, *_):
        return blocks, ends.final_norm, RefineNotes(2, False, "no better")

    model = make()
    plain = walk(model, tmp_path / "p", last_pass=LastPass("none", 2), **OFF)
    wanted = plain.run()
    monkeypatch.setattr(walk_model, "refine_model", useless)
    run = walk(model, tmp_path / "w", last_pass=LastPass("model", 2), **OFF)
    result = run.run()
    assert (result.refined.kept, result.refined.why) == (False, "no better")
    assert (result.divergence.mean_kl, result.unrefined) == (wanted.divergence.mean_kl, None)
    for tensor_id, tensor in as_model(run).tensors.items():
        assert torch.equal(tensor.load(), as_model(plain).tensors[tensor_id].load())


def test_the_gate_leaves_out_channels_whose_mean_may_be_chance():
    """μ² / σ² of the four channels: ∞, 4, 1/4, 0."""
    teacher = torch.zeros(4, 4)
    student = torch.tensor([[1.0, 0, -0.5, 1], [1, 1.5, 1.5, -1], [1, 0.5, -0.5, 1], [1, 1, 1.5, -1]])
    square = student.square().mean(0)
    mean = student.mean(0)
    assert (mean.square() / (square - mean.square())).tolist()[1:] == pytest.approx([1.8, 0.25, 0])

    def finish(gate):
        shifts = ShiftAccumulator(4, "cpu")
        shifts.add(teacher, student)
        return shifts.finish(gate=gate)

    for gate, left in ((0.0, (1, 1, 1, 0)), (0.2, (1, 1, 1, 0)), (1.0, (1, 1, 0, 0)), (5.0, (1, 0, 0, 0))):
        mu, explained = finish(gate)
        torch.testing.assert_close(mu, -mean * torch.tensor(left))
        assert explained == pytest.approx(float((mean * torch.tensor(left)).square().sum() / square.sum()))


def test_a_gate_in_the_walk(make, tmp_path):
    model = make()
    explained = []
    for gate in (0.0, 0.05, 1e9):
        run = walk(model, tmp_path / str(gate), carrier=Carrier.BIAS, dsq=False, dac_gate=gate)
        explained.append(run.run().folds[0].explained)
        biases = [run.store.leaders.tensors()[TensorId(Role.UP, i, Part.BIAS)].load() for i in range(2)]
        assert all(bool(b.any()) == (gate < 1e9) for b in biases)
    assert explained[0] > explained[1] > explained[2] == 0
