"""Every fold leaves the function of the block unchanged."""

from dataclasses import replace

import pytest
import torch

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import Block, load_block
from d2qconv.fold.corrections import ColumnScale, MeanShift
from d2qconv.fold.rules import ScaleIntoRows, ShiftIntoBiases, ShiftIntoWeights
from d2qconv.ir.block import QuantizedBlock
from d2qconv.names import Role
from d2qconv.quant.sweep import round_to_nearest
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.grids import GRIDS

LINEARS = (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN)


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def model(request, tmp_path):
    return bind(open_checkpoint(str(make_checkpoint(tmp_path / "m", request.param))))


def float_block(block):
    """A block whose linears stay float: folds on it round nothing but f32."""
    return QuantizedBlock(
        {r: w for r, w in block.weights.items() if r in LINEARS},
        {r: w for r, w in block.weights.items() if r not in LINEARS},
        dict(block.biases),
    )


def computing(model, block, extra=None):
    weights = {r: block.weight(r) for r in block.linears} | dict(block.norms)
    return Block(model, weights, dict(block.biases) | (extra or {}))


def activations(model):
    return torch.randn(2, 9, model.dims.hidden, generator=torch.Generator().manual_seed(7))


def shift_of(model):
    mu = torch.randn(model.dims.hidden, generator=torch.Generator().manual_seed(8)) * 0.3
    return MeanShift(Role.FFN_NORM, mu, 0.5)


def test_a_shift_in_biases_changes_nothing(model):
    block, x, shift = float_block(load_block(model, 0, "cpu")), activations(model), shift_of(model)
    wanted = computing(model, block, {Role.FFN_NORM: shift.mu})(x)
    assert ShiftIntoBiases().check(model.arch, Role.FFN_NORM) == []
    folded, record = ShiftIntoBiases().apply(model.arch, 0, block, shift)
    assert torch.allclose(computing(model, folded)(x), wanted, atol=1e-5)
    assert record.residual == 0.0
    assert not torch.allclose(computing(model, block)(x), wanted, atol=1e-2)


def test_a_column_scale_in_rows_changes_nothing(model):
    block, x = float_block(load_block(model, 0, "cpu")), activations(model)
    c = torch.rand(model.dims.ffn, generator=torch.Generator().manual_seed(9)) + 0.5
    scaled = block.with_linear(Role.DOWN, block.weight(Role.DOWN) * c)
    wanted = computing(model, scaled)(x)
    assert ScaleIntoRows().check(model.arch, Role.DOWN) == []
    folded, record = ScaleIntoRows().apply(model.arch, 0, block, ColumnScale(Role.DOWN, c))
    assert torch.allclose(computing(model, folded)(x), wanted, atol=1e-5)
    assert record.residual == 0.0


def test_both_folds_compose_shift_first(model):
    block, x, shift = float_block(load_block(model, 1, "cpu")), activations(model), shift_of(model)
    c = torch.rand(model.dims.ffn, generator=torch.Generator().manual_seed(9)) + 0.5
    scaled = block.with_linear(Role.DOWN, block.weight(Role.DOWN) * c)
    wanted = computing(model, scaled, {Role.FFN_NORM: shift.mu})(x)
    folded, _ = ShiftIntoBiases().apply(model.arch, 1, block, shift)
    folded, _ = ScaleIntoRows().apply(model.arch, 1, folded, ColumnScale(Role.DOWN, c))
    assert torch.allclose(computing(model, folded)(x), wanted, atol=1e-5)


def test_on_codes_a_scale_rounds_steps_only_and_says_how_much(model):
    block = float_block(load_block(model, 0, "cpu"))
    coded = round_to_nearest(block.weight(Role.UP), torch.ones(model.dims.hidden), GRIDS["q2_k"])
    c = torch.rand(model.dims.ffn, generator=torch.Generator().manual_seed(9)) + 0.5
    folded, record = ScaleIntoRows().apply(
        model.arch, 0, block.with_linear(Role.UP, coded), ColumnScale(Role.DOWN, c)
    )
    up = folded.linears[Role.UP]
    assert torch.equal(up.codes, coded.codes)
    assert 0 < record.residual < 1e-3
    wanted = coded.decode() * c[:, None]
    largest = wanted.abs().amax(1, keepdim=True)
    assert float(((up.decode() - wanted).abs() / largest).max()) < 2e-3


def test_a_rank_1_fold_carries_the_shift_where_the_mean_is_strong(model):
    generator = torch.Generator().manual_seed(3)
    n = model.dims.hidden
    mean = torch.randn(n, generator=generator) * 2
    h = mean + torch.randn(20000, n, generator=generator) * 0.5
    rule = ShiftIntoWeights()
    a, left = rule.direction(h.T @ h / len(h), h.mean(0))
    assert left < 0.02
    assert float((h @ a - 1).square().mean()) == pytest.approx(left, rel=0.05)
    w = torch.randn(16, n, generator=generator)
    mu = torch.randn(n, generator=generator) * 0.1
    wanted = (h + mu) @ w.T
    got = h @ rule.apply(w, mu, a).T
    plain = h @ w.T
    assert float((got - wanted).square().mean()) < 0.05 * float((plain - wanted).square().mean())


def test_an_architecture_without_the_neighbourhood_is_refused(model):
    bare = replace(model.arch, couplings=())
    assert "column scale" in ScaleIntoRows().check(bare, Role.DOWN)[0].why
    assert "biases" in ShiftIntoBiases().check(bare, Role.FFN_NORM)[0].why
