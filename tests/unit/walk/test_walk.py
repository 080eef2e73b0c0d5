"""The whole walk on tiny models: order, folds, resume."""

import threading
from dataclasses import replace

import pytest
import torch

import d2qconv.walk.model as walk_model
from d2qconv.arch.bind import bind
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.exporters.base import Carrier, FloatType, TargetPlan, TensorPlan
from d2qconv.ir.coded import Coded
from d2qconv.ir.store import Store
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv.progress import Unwatched
from d2qconv.run import Recipe
from d2qconv.team import Team
from d2qconv.testing.models import make_checkpoint
from d2qconv.walk.activations import Place, Placement
from d2qconv.walk.model import Walk
from d2qconv.walk.rounding import Rounder
from d2qconv.walk.sharing import SharedStore
from d2qconv_gguf.grids import GRIDS

ENDS = (Role.EMBED, Role.HEAD)


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request, tmp_path):
    sizes = {"hidden": 64, "ffn": 128, "heads": 2, "kv_heads": 1, "head_dim": 32}
    folder = make_checkpoint(tmp_path / "m", request.param, tied=request.param != "qwen2", **sizes)
    return bind(open_checkpoint(str(folder)))


def planned(model, grid, carrier):
    def storage(tensor_id, shape):
        if len(shape) == 1:
            return FloatType.F32
        return GRIDS["q8_0"] if tensor_id.role in ENDS else GRIDS[grid]

    return TargetPlan(
        "test",
        tuple(TensorPlan(t, str(t), d.shape, storage(t, d.shape), 0) for t, d in model.tensors.items()),
        carrier,
        "",
        (),
    )


def walk(model, folder, *, grid="q2_0", carrier=Carrier.BIAS, **recipe):
    rows = torch.randint(512, (18, 48), generator=torch.Generator().manual_seed(2))
    tokens = CalibrationTokens(rows[:16], rows[16:], "random")
    store = Store(folder, "f", GRIDS)
    device = torch.device("cpu")
    return Walk(
        model, planned(model, grid, carrier), Rounder(Recipe(**recipe)), tokens,
        SharedStore(Team.alone(), store, GRIDS), device, Unwatched(), Placement(Place.HOST, device),
    )  # fmt: skip


def leaders(run):
    """The store itself."""
    return run.store.leaders


def as_model(model, store):
    """The stored tensors as a model of their own, decoded."""
    tensors = store.tensors()

    def dense(tensor_id):
        held = tensors[tensor_id]
        return Dense.of(held.decode() if isinstance(held, Coded) else held.load())

    return replace(model, tensors={t: dense(t) for t in tensors})


@pytest.mark.parametrize("carrier", [Carrier.BIAS, Carrier.RANK1, Carrier.NONE])
def test_the_stored_tensors_are_the_model_that_was_judged(model, tmp_path, carrier):
    run = walk(model, tmp_path / "w", carrier=carrier)
    result = run.run()
    stored = as_model(model, leaders(run))
    has_bias = TensorId(Role.GATE, 0, Part.BIAS) in stored.tensors
    assert has_bias == (carrier is Carrier.BIAS)
    tokens = run.tokens.held_out
    p = logits(model, tokens)[:, :-1].double().log_softmax(-1)
    q = logits(stored, tokens)[:, :-1].double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert result.divergence.mean_kl == pytest.approx(kl, rel=1e-3)
    assert result.divergence.n_tokens == tokens[:, 1:].numel()


def test_more_bits_are_closer(model, tmp_path):
    kl = [walk(model, tmp_path / g, grid=g).run().divergence.mean_kl for g in ("q2_0", "q4_0", "q8_0")]
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] < 0.02 * kl[0]


def test_compensation_is_closer_than_rounding(model, tmp_path):
    nearest = walk(
        model, tmp_path / "a", carrier=Carrier.NONE, rounding="nearest", dsq=False, dac=False
    ).run()
    full = walk(model, tmp_path / "b", dsq=True, dac=True).run()
    outputs = [sum(e.output for e in r.errors) for r in (nearest, full)]
    assert outputs[1] < outputs[0]
    assert len(full.errors) == len(nearest.errors)
    assert {f.name for f in full.folds} == {"mean_shift", "column_scale"}
    assert nearest.folds == []


def test_a_run_that_was_cut_off_goes_on_and_gives_the_same_bytes(model, tmp_path, monkeypatch):
    straight = walk(model, tmp_path / "a")
    wanted = straight.run()
    leaders(straight).close()

    class KilledError(Exception):
        pass

    class DiesInBlock1(walk_model.BlockWalk):
        def quantize(self, stream):
            if self.index == 1:
                raise KilledError
            return super().quantize(stream)

    monkeypatch.setattr(walk_model, "BlockWalk", DiesInBlock1)
    killed = walk(model, tmp_path / "b")
    with pytest.raises(KilledError):
        killed.run()
    leaders(killed).close()
    monkeypatch.undo()
    quantized = []

    class Counts(walk_model.BlockWalk):
        def quantize(self, stream):
            quantized.append(self.index)
            return super().quantize(stream)

    monkeypatch.setattr(walk_model, "BlockWalk", Counts)
    got = walk(model, tmp_path / "b").run()
    assert quantized == [1]
    assert got.divergence.mean_kl == wanted.divergence.mean_kl
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_linears_may_stay_float(model, tmp_path):
    run = walk(model, tmp_path / "w", carrier=Carrier.NONE)
    tensors = tuple(
        replace(t, storage=FloatType.F16) if t.id.role in (Role.DOWN, Role.Q) else t for t in run.plan.tensors
    )
    run = replace(run, plan=replace(run.plan, tensors=tensors))
    run.run()
    down = leaders(run).tensors()[TensorId(Role.DOWN, 0)]
    assert isinstance(down, Dense)
    assert torch.equal(down.load(), model.tensors[TensorId(Role.DOWN, 0)].load().half())


def test_a_finished_block_is_written_even_if_the_run_ends_just_then(model, tmp_path):
    """The thread that writes may not have begun."""
    run = walk(model, tmp_path / "a")
    with walk_model._Files(model, run.store) as files:
        block = threading.Event()
        for _ in range(2):
            files._threads.submit(block.wait, 5)
        files.read_ahead(0)
        files.write("block-0000", {}, None)
        threading.Timer(0.2, block.set).start()
    assert leaders(run).parts() == ("block-0000",)
