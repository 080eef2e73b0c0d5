"""Costs of single matrices, against the same by another way: the whole model in memory, one tensor replaced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from d2qconv.allocate.sensitivity import Measuring, n_sequences
from d2qconv.arch.bind import bind
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import load_block, load_ends
from d2qconv.ir.coded import decoded
from d2qconv.measure.reference import logits
from d2qconv.names import Role, TensorId
from d2qconv.quant.sweep import round_to_nearest
from d2qconv.run import Recipe
from d2qconv.testing.models import make_checkpoint
from d2qconv.walk.activations import Place, Placement
from d2qconv.walk.rounding import Rounder
from d2qconv_gguf.grids import GRIDS

FEW, MANY = GRIDS["q4_0"], GRIDS["q8_0"]
TOKENS = torch.randint(128, (5, 24), generator=torch.Generator().manual_seed(1))
NEAREST = Rounder(Recipe(rounding="nearest"))
SIZES = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": 128, "layers": 3}
DOWN, VALUE, EMBED, HEAD = (
    TensorId(Role.DOWN, 0),
    TensorId(Role.V, 2),
    TensorId(Role.EMBED),
    TensorId(Role.HEAD),
)


class Counted:
    """A watch that remembers."""

    def __init__(self):
        self.total, self.steps = 0, []

    def stage(self, name, total):
        assert name == "sensitivity"
        self.total = total

    def step(self, done, what):
        self.steps.append(done)

    def note(self, text):
        raise AssertionError(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    return {
        tied: bind(open_checkpoint(str(make_checkpoint(folder / str(tied), "qwen3", tied=tied, **SIZES))))
        for tied in (True, False)
    }


def measure(desc, choices, rounder=NEAREST, place=Place.HOST, folder=None):
    watch = Counted()
    placement = Placement(place, torch.device("cpu"), folder)
    found = Measuring(desc, choices, TOKENS, rounder, placement, watch).run()
    assert watch.steps == list(range(1, watch.total + 1))
    return found


def divergence(desc, changed):
    """KL divergence of the model with those weights from the source, over all positions but each sequence's last."""
    other = replace(desc, tensors={**desc.tensors, **{t: Dense.of(w) for t, w in changed.items()}})
    p, q = (logits(m, TOKENS)[:, :-1].double().log_softmax(-1) for m in (desc, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def gram(desc, tensor):
    """E x xᵀ of the matrix's input in the source."""
    x = load_ends(desc, "cpu").embed(TOKENS)
    for i in range(tensor.block):
        x = load_block(desc, i, "cpu")(x)
    block = load_block(desc, tensor.block, "cpu")
    h = block.attention_input(x) if tensor.role is Role.V else block.gated(block.ffn_input(block.attend(x)))
    rows = h.reshape(-1, h.shape[-1])
    return rows.T @ rows / len(rows)


def nearest(desc, tensor, grid, importance):
    return decoded(round_to_nearest(desc.tensors[tensor].load().float(), importance, grid))


@pytest.mark.parametrize("tensor", [DOWN, VALUE], ids=str)
def test_a_matrix_costs_what_it_alone_does_to_the_output(models, tensor):
    desc = models[True]
    cost = measure(desc, {tensor: (MANY, FEW)}).costs[str(tensor)]
    got, h = {}, gram(desc, tensor)
    for grid in (FEW, MANY):
        got[grid.id] = nearest(desc, tensor, grid, h.diagonal())
    wanted = divergence(desc, {tensor: got["q4_0"]})
    assert cost.measured == ("q4_0",)
    assert cost.kld["q4_0"] == pytest.approx(wanted, rel=1e-3)
    w = desc.tensors[tensor].load().float()
    error = {n: float(((w - g) @ h * (w - g)).sum() / (w @ h * w).sum()) for n, g in got.items()}
    assert cost.errors == pytest.approx(error, rel=1e-3)
    # The other type's cost is carried over by the errors, and that is near the truth.
    assert cost.kld["q8_0"] == pytest.approx(wanted * error["q8_0"] / error["q4_0"], rel=1e-3)
    assert cost.kld["q8_0"] == pytest.approx(divergence(desc, {tensor: got["q8_0"]}), rel=0.5)


def test_a_tied_embedding_is_changed_at_both_ends(models):
    desc = models[True]
    cost = measure(desc, {EMBED: (FEW, MANY)}).costs[str(EMBED)]
    assert set(cost.measured) == {"q4_0", "q8_0"}
    for grid in (FEW, MANY):
        wanted = divergence(desc, {EMBED: nearest(desc, EMBED, grid, torch.ones(64))})
        assert cost.kld[grid.id] == pytest.approx(wanted, rel=1e-3)


def test_ends_of_their_own_are_measured_each(models):
    desc = models[False]
    found = measure(desc, {EMBED: (FEW,), HEAD: (FEW, MANY)}).costs
    wanted = divergence(desc, {EMBED: nearest(desc, EMBED, FEW, torch.ones(64))})
    assert found[str(EMBED)].kld == pytest.approx({"q4_0": wanted}, rel=1e-3)
    assert found[str(HEAD)].kld["q4_0"] > 20 * found[str(HEAD)].kld["q8_0"] > 0


def test_what_error_compensation_leaves_is_measured_in_the_middle_block(models):
    choices = {TensorId(Role.DOWN, i): (FEW, MANY) for i in range(3)}
    plain, swept = (
        measure(models[True], choices, rounder).costs for rounder in (NEAREST, Rounder(Recipe(polish=0)))
    )
    for name in ("q4_0", "q8_0"):
        gains = [swept[str(t)].kld[name] / plain[str(t)].kld[name] for t in choices]
        assert gains == pytest.approx([gains[0]] * 3)
        assert 0.2 < gains[0] < 1


def test_on_disk_the_same(models, tmp_path):
    choices = dict.fromkeys((EMBED, DOWN, VALUE), (FEW, MANY))
    assert measure(models[True], choices, place=Place.DISK, folder=tmp_path) == measure(models[True], choices)
    assert list(tmp_path.iterdir()) == []


def test_sequences_are_whole_and_at_least_one():
    assert n_sequences(100, 512) == (32, 8)
    assert n_sequences(3, 512) == (3, 3)
    assert n_sequences(3, 10**6) == (1, 1)
