"""The last pass: what falls, what stays, and that it is the same every time."""

from dataclasses import replace
from functools import cached_property

import pytest
import torch

import d2qconv.refine.attention as attention
import d2qconv.refine.descent as descent
from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import load_block, load_ends
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Coded
from d2qconv.names import Role
from d2qconv.quant.sweep import round_to_nearest
from d2qconv.refine.blockwise import refine_block
from d2qconv.refine.ends import HeldEnds, TrainedEnds
from d2qconv.refine.memory import _n_parameters, predict_bytes
from d2qconv.refine.model import _Task, refine_model
from d2qconv.refine.parameters import Pool, TrainedBlock, count
from d2qconv.refine.settings import RefineSettings, Share
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.grids import GRIDS

QUICK = RefineSettings(steps=16, scale_rate=0.01, gain_rate=0.005, bias_rate=0.01, batch_tokens=128)
LINEARS = (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN)


def quiet(done, text):
    pass


class Case:
    """A model whose rows were quantized up to a third too small, beside its source, on 36 sequences of 32 tokens."""

    def __init__(self, folder, model_type, grid="q2_k", **sizes):
        sizes = {"layers": 2, "ffn": 256, "head_dim": 64, "vocab": 96, **sizes}
        self.desc = bind(open_checkpoint(str(make_checkpoint(folder, model_type, **sizes))))
        self.ends = load_ends(self.desc, "cpu")
        self.tokens = torch.randint(96, (36, 32), generator=torch.Generator().manual_seed(3))
        self.sources = [load_block(self.desc, i, "cpu") for i in range(self.desc.dims.n_layers)]
        self.blocks = [self.quantized(block, GRIDS[grid]) for block in self.sources]
        self.held = HeldEnds(
            self.matrix(self.ends.embedding),
            self.ends.final_norm,
            None if self.desc.is_tied else self.matrix(self.ends.head),
        )
        self.inputs = [self.ends.embed(self.tokens)]
        for block in self.sources:
            self.inputs.append(block(self.inputs[-1]))

    def matrix(self, w):
        return round_to_nearest(w, torch.ones(w.shape[1]), GRIDS["q8_0"])

    def quantized(self, block, grid):
        linears = {}
        for role in LINEARS:
            coded = round_to_nearest(block.weights[role], torch.ones(256), grid)
            scale = 1 - torch.rand(coded.shape[0], generator=torch.Generator().manual_seed(1)) / 3
            linears[role], _ = coded.scale_rows(scale)
        return QuantizedBlock(
            linears, {r: w for r, w in block.weights.items() if w.dim() == 1}, dict(block.biases)
        )

    def refine(self, settings=QUICK, on_step=quiet):
        return refine_model(
            self.desc, self.blocks, self.held, lambda rows: self.inputs[-1][rows], self.ends, self.tokens,
            settings, on_step,
        )  # fmt: skip

    @cached_property
    def refined(self):
        return self.refine()

    def refine_one(self, settings=QUICK):
        return refine_block(
            self.desc, self.blocks[0], lambda rows: self.inputs[0][rows], lambda rows: self.inputs[1][rows],
            (36, 32), settings, quiet,
        )  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("qwen2"), "qwen2", tied=False)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("qwen3"), "qwen3", layers=1)


def tensors_of(block):
    """Every tensor of a block by name, in storage."""
    named = {}
    for role, held in block.linears.items():
        named[f"{role}.codes"] = held.codes
        named |= {f"{role}.{name}": p for name, p in held.params.items()}
    named |= {f"{role}.gain": gain for role, gain in block.norms.items()}
    return named | {f"{role}.bias": bias for role, bias in block.biases.items()}


def is_same(first, second):
    first, second = tensors_of(first), tensors_of(second)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_divergence_falls(name, request):
    case = request.getfixturevalue(name)
    _, ends, notes = case.refined
    assert notes.kept
    assert notes.why == ""
    assert notes.steps == QUICK.steps
    assert notes.trained_after < 0.8 * notes.trained_before
    assert notes.reserved_after < 0.85 * notes.reserved_before
    assert not torch.equal(ends.final_norm, case.ends.final_norm)
    assert torch.equal(ends.embedding.codes, case.held.embedding.codes)
    assert not torch.equal(ends.embedding.params["d"], case.held.embedding.params["d"])


def test_only_scales_gains_and_biases_change(qwen2):
    blocks, _, _ = qwen2.refined
    for old, new in zip(qwen2.blocks, blocks, strict=True):
        was, now = tensors_of(old), tensors_of(new)
        assert was.keys() == now.keys()
        for name in was:
            assert now[name].dtype == was[name].dtype
            assert now[name].shape == was[name].shape
            assert bool(torch.isfinite(now[name].float()).all())
            kind = name.split(".")[1]
            assert torch.equal(was[name], now[name]) == (kind in ("codes", "sc", "m")), name


def test_the_notes_are_about_what_is_returned(llama):
    blocks, held, notes = llama.refined
    ends = held.decoded(llama.desc)
    x = ends.embed(llama.tokens)
    for block, source in zip(blocks, llama.sources, strict=True):
        weights = {r: held.decode() for r, held in block.linears.items()}
        x = replace(source, weights={**weights, **block.norms})(x)
    p = llama.ends.logits(llama.inputs[-1][-2:]).double().log_softmax(-1)
    q = ends.logits(x[-2:]).double().log_softmax(-1)
    assert notes.reserved_after == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_what_is_zero_stays_zero(llama):
    block = llama.blocks[0]
    coded = block.linears[Role.UP]
    dmin = coded.params["dmin"].clone()
    dmin[::2] = 0
    block = block.with_linear(Role.UP, replace(coded, params={**coded.params, "dmin": dmin}))
    block = block.with_bias(Role.O, torch.zeros(256))
    new, _ = refine_block(
        llama.desc, block, lambda r: llama.inputs[0][r], lambda r: llama.inputs[1][r], (36, 32), QUICK, quiet
    )
    assert bool((new.linears[Role.UP].params["dmin"][::2] == 0).all())
    assert not torch.equal(new.linears[Role.UP].params["dmin"][1::2], dmin[1::2])
    assert not bool(new.biases[Role.O].any())


def test_float_matrices_stay(llama):
    down = llama.blocks[0].linears[Role.DOWN].decode().half()
    block = llama.blocks[0].with_linear(Role.DOWN, down)
    new, notes = refine_block(
        llama.desc, block, lambda r: llama.inputs[0][r], lambda r: llama.inputs[1][r], (36, 32), QUICK, quiet
    )
    assert notes.kept
    assert new.linears[Role.DOWN] is down


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_block_alone_gets_closer(name, request):
    case = request.getfixturevalue(name)
    new, notes = case.refine_one()
    assert notes.kept
    assert notes.reserved_after < 0.93 * notes.reserved_before
    weights = {**{r: held.decode() for r, held in new.linears.items()}, **new.norms}
    y, wanted = replace(case.sources[0], weights=weights)(case.inputs[0][-2:]), case.inputs[1][-2:]
    error = ((y - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert notes.reserved_after == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("rate", [3.0, 1e30])
def test_a_pass_that_makes_it_worse_changes_nothing(llama, rate):
    absurd = replace(QUICK, steps=4, scale_rate=rate, gain_rate=rate)
    blocks, ends, notes = llama.refine(absurd)
    assert not notes.kept
    assert "did not fall" in notes.why or "not finite" in notes.why
    assert ends is llama.held
    assert all(new is old for new, old in zip(blocks, llama.blocks, strict=True))
    block, notes = llama.refine_one(absurd)
    assert not notes.kept
    assert block is llama.blocks[0]


def test_a_loss_that_is_not_finite_ends_it(llama):
    target = llama.inputs[1].clone()
    target[0, 3, 5] = torch.nan
    block, notes = refine_block(
        llama.desc, llama.blocks[0], lambda r: llama.inputs[0][r], lambda r: target[r], (36, 32), QUICK, quiet
    )
    assert block is llama.blocks[0]
    assert not notes.kept
    assert notes.steps < QUICK.steps
    assert "not finite" in notes.why


@pytest.mark.parametrize(("steps", "n_seq", "why"), [(0, 36, "no steps"), (4, 1, "one sequence")])
def test_nothing_to_do(llama, steps, n_seq, why):
    settings = replace(QUICK, steps=steps)
    blocks, _, notes = refine_model(
        llama.desc, llama.blocks, llama.held, lambda r: llama.inputs[-1][r], llama.ends,
        llama.tokens[:n_seq], settings, quiet,
    )  # fmt: skip
    assert blocks == llama.blocks
    assert why in notes.why
    assert llama.refine_one(replace(QUICK, steps=0))[0] is llama.blocks[0]


def test_it_tells_its_steps(qwen3):
    told = []
    qwen3.refine(replace(QUICK, steps=2), lambda done, text: told.append((done, text[:5])))
    assert told == [(1, "loss "), (2, "loss ")]


def test_it_gives_the_same_bits_again(qwen3):
    first, ends, notes = qwen3.refined
    second, again, also = qwen3.refine()
    assert is_same(first[0], second[0])
    assert torch.equal(ends.final_norm, again.final_norm)
    assert torch.equal(ends.embedding.params["d"], again.embedding.params["d"])
    assert notes == also
    other, _, _ = qwen3.refine(replace(QUICK, seed=1))
    assert not is_same(first[0], other[0])


def test_it_works_inside_inference_mode_on_its_tensors(qwen2):
    with torch.inference_mode():
        blocks = [
            QuantizedBlock(
                {
                    r: replace(h, codes=h.codes.clone(), params={n: p.clone() for n, p in h.params.items()})
                    for r, h in b.linears.items()
                },
                {r: g.clone() for r, g in b.norms.items()},
                {r: g.clone() for r, g in b.biases.items()},
            )
            for b in qwen2.blocks
        ]
        blocks[1] = blocks[1].with_linear(Role.UP, blocks[1].linears[Role.UP].decode())
        ends, final = load_ends(qwen2.desc, "cpu"), qwen2.inputs[-1].clone()
        head = None if qwen2.desc.is_tied else qwen2.matrix(ends.head)
        held = HeldEnds(qwen2.matrix(ends.embedding), ends.final_norm.clone(), head)
        inputs = qwen2.inputs[0].clone()
        settings = replace(QUICK, steps=3)
        new, _, notes = refine_model(
            qwen2.desc, blocks, held, lambda r: final[r], ends, qwen2.tokens.clone(), settings, quiet
        )
        assert notes.steps == 3
        assert new[0].linears[Role.Q].params["d"].dtype == torch.float16
        _, notes = refine_block(
            qwen2.desc, blocks[0], lambda r: inputs[r], lambda r: final[r], (36, 32), settings, quiet
        )
        assert notes.steps == 3


def gradients(case):
    """Loss and gradients of the parameters on all sequences; and a function: parameters → loss."""
    share = Share(slice(0, 36), slice(0, 1), slice(0, 36), 36)
    task = _Task(case.ends, lambda rows: case.inputs[-1][rows], case.tokens, share)
    sizes = {k: n + sum(count(b)[k] for b in case.blocks) for k, n in case.held.count().items()}
    pool = Pool(sizes, torch.device("cpu"))
    trained = [TrainedBlock.of(case.desc, b, pool) for b in case.blocks]
    ends = TrainedEnds.of(case.desc, case.held, pool)
    loss = task.gradient(trained, ends, slice(0, 36))

    def loss_at(kind, step):
        with torch.no_grad():
            pool.values[kind].add_(step)
            found = task.loss([b.computed for b in trained], ends.computed(), slice(0, 36))
            pool.values[kind].sub_(step)
        return found

    return float(loss), pool.gradients, loss_at


def test_the_gradient_is_the_slope_of_the_loss(qwen2):
    loss, slopes, loss_at = gradients(qwen2)
    for kind, slope in slopes.items():
        assert loss_at(kind, 0 * slope) == pytest.approx(loss, rel=1e-5)
        step = 1e-2 * slope / slope.norm()
        change = loss_at(kind, step) - loss_at(kind, -step)
        assert change / 2e-2 == pytest.approx(float(slope.norm()), rel=0.01), kind
        one = torch.zeros_like(slope)
        at = int(slope.abs().argmax())
        one[at] = 2e-2
        change = loss_at(kind, one) - loss_at(kind, -one)
        assert change / 4e-2 == pytest.approx(float(slope[at]), rel=0.03), kind


def test_the_gradient_does_not_depend_on_how_work_is_cut(qwen3, monkeypatch):
    _, whole, _ = gradients(qwen3)
    monkeypatch.setattr(descent, "BLOCK_BYTES", 1)
    monkeypatch.setattr(attention, "SCORE_BYTES", 1)
    _, cut, _ = gradients(qwen3)
    for kind, slope in whole.items():
        torch.testing.assert_close(cut[kind], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_decoding_carries_gradients_to_every_scale(name):
    grid, generator = GRIDS[name], torch.Generator().manual_seed(5)
    coded = round_to_nearest(torch.randn(3, 512, generator=generator), torch.ones(512), grid)
    weight = torch.randn(3, 512, generator=generator)
    pool = Pool({"scale": sum(coded.params[n].numel() for n in grid.scales)}, torch.device("cpu"))
    leaves = {n: pool.take("scale", coded.params[n].shape) for n in grid.scales}
    scales = {n: coded.params[n].float() * leaves[n] for n in grid.scales}
    value = grid.decode(coded.codes, {**coded.params, **scales})
    assert torch.equal(value.detach(), coded.decode())
    (value * weight).sum().backward()
    n_blocks = 512 // grid.block
    for scale in grid.scales:
        # Decoding is linear: the slope is the share of this scale in the sum.
        others = {n: torch.zeros_like(p) for n, p in coded.params.items() if n in grid.scales and n != scale}
        alone = replace(coded, params={**coded.params, **others}).decode()
        wanted = (alone * weight).view(3, n_blocks, -1).sum(-1)
        torch.testing.assert_close(leaves[scale].grad, wanted, rtol=1e-4, atol=1e-4)


def test_the_prediction_counts_the_parameters_that_there_are(qwen3):
    grids = dict.fromkeys(LINEARS, GRIDS["q2_k"])
    biases = sum(c.shape[0] for c in qwen3.blocks[0].linears.values())
    n_parameters = sum(count(qwen3.blocks[0]).values())
    assert n_parameters <= _n_parameters(qwen3.desc, grids) <= n_parameters + biases
    one = predict_bytes(qwen3.desc, grids, 32, QUICK, "block")
    whole = predict_bytes(qwen3.desc, grids, 32, QUICK, "model")
    deeper = replace(qwen3.desc, dims=replace(qwen3.desc.dims, n_layers=11))
    held = sum(
        t.numel() * t.element_size() for c in qwen3.blocks[0].linears.values() for t in tensors_of_one(c)
    )
    each = (predict_bytes(deeper, grids, 32, QUICK, "model") - whole) / 10
    trained = 5 * 4 * _n_parameters(qwen3.desc, grids)
    assert held <= each - trained - 4 * 128 * 256 <= 1.3 * held
    assert one < whole


def tensors_of_one(coded: Coded):
    return [coded.codes, *coded.params.values()]
