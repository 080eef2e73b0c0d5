"""Column scales behind a norm go into its gain, and those of o into the rows of v: the block stays what it was."""

from dataclasses import replace

import pytest
import torch

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import Block, load_block
from d2qconv.fold.corrections import ColumnScale, MeanShift
from d2qconv.fold.rules import ScaleIntoGain, ScaleIntoRows, ShiftIntoBiases
from d2qconv.ir.block import QuantizedBlock
from d2qconv.names import Role
from d2qconv.quant.sweep import round_to_nearest
from d2qconv.quant.tied import column_scales
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.grids import GRIDS

HIDDEN, HEAD = 64, 32
READERS = {Role.ATTN_NORM: (Role.Q, Role.K, Role.V), Role.FFN_NORM: (Role.GATE, Role.UP)}


def make(folder, model_type="llama", **sizes):
    sizes = {"hidden": HIDDEN, "ffn": 96, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": HEAD} | sizes
    return bind(open_checkpoint(str(make_checkpoint(folder / "m", model_type, vocab=64, **sizes))))


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request, tmp_path):
    return make(tmp_path, request.param)


def float_block(model):
    """A block whose linears stay float: folds on it round nothing but f32."""
    block = load_block(model, 0, "cpu")
    norms = {r: w for r, w in block.weights.items() if w.dim() == 1}
    linears = {r: w for r, w in block.weights.items() if r not in norms}
    return QuantizedBlock(linears, norms, dict(block.biases))


def outputs(model, block, shift=None):
    """Of some activations; shift: added to the output of the FFN's norm."""
    weights = {r: block.weight(r) for r in block.linears} | dict(block.norms)
    biases = dict(block.biases) | ({} if shift is None else {Role.FFN_NORM: shift})
    x = torch.randn(2, 11, model.dims.hidden, generator=torch.Generator().manual_seed(7))
    return Block(model, weights, biases)(x)


def scales(n, seed=9):
    return torch.exp(0.5 * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def stored_scaled(block, roles, c):
    """What a file would hold: W / c in place of W, without the fold yet."""
    for role in roles:
        block = block.with_linear(role, block.weight(role) / c)
    return block


@pytest.mark.parametrize("norm", READERS)
def test_a_scale_in_the_gain_changes_nothing(model, norm):
    block, c = float_block(model), scales(HIDDEN)
    wanted = outputs(model, block)
    stored = stored_scaled(block, READERS[norm], c)
    assert ScaleIntoGain().check(model.arch, norm) == []
    folded, record = ScaleIntoGain().apply(model.arch, 3, stored, ColumnScale(norm, c))
    torch.testing.assert_close(outputs(model, folded), wanted, atol=2e-5, rtol=0)
    assert not torch.allclose(outputs(model, stored), wanted, atol=1e-2)
    assert torch.equal(folded.norms[norm], block.norms[norm] * c)
    assert {r: g is block.norms[r] for r, g in folded.norms.items()} == {
        r: r is not norm for r in block.norms
    }
    assert (record.name, record.block, record.carrier) == ("column_scale", 3, f"gain of {norm}")
    assert 0 < record.residual < 1e-7


def test_a_shift_of_the_norm_goes_in_times_its_scale(model):
    block, c = float_block(model), scales(HIDDEN)
    mu = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(8)) * 0.3
    wanted = outputs(model, block, mu)
    stored = stored_scaled(block, READERS[Role.FFN_NORM], c)

    def folded(shift):
        made, _ = ShiftIntoBiases().apply(model.arch, 0, stored, MeanShift(Role.FFN_NORM, shift, 0.5))
        return ScaleIntoGain().apply(model.arch, 0, made, ColumnScale(Role.FFN_NORM, c))[0]

    torch.testing.assert_close(outputs(model, folded(mu * c)), wanted, atol=2e-5, rtol=0)
    assert not torch.allclose(outputs(model, folded(mu)), wanted, atol=1e-2)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_all_folds_of_a_block_together(model, is_shifted):
    """Both gains, the rows of v, and down's scale into up, whose bias may carry a shift by then."""
    block, c = float_block(model), scales(HIDDEN)
    down, per_value = scales(96, 10), scales(2 * HEAD, 11)
    per_column = per_value.view(2, 1, HEAD).expand(-1, 2, -1).reshape(-1)
    mu = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(8)) * 0.3
    wanted = outputs(model, block, mu if is_shifted else None)
    for roles, scale in ((READERS[Role.ATTN_NORM], c), (READERS[Role.FFN_NORM], 1 / c), ((Role.O,), per_column),
                         ((Role.DOWN,), down)):  # fmt: skip
        block = stored_scaled(block, roles, scale)
    if is_shifted:
        block, _ = ShiftIntoBiases().apply(model.arch, 0, block, MeanShift(Role.FFN_NORM, mu / c, 0.5))
    folds = [
        (ScaleIntoGain(), Role.ATTN_NORM, c),
        (ScaleIntoRows(), Role.O, per_value),
        (ScaleIntoGain(), Role.FFN_NORM, 1 / c),
        (ScaleIntoRows(), Role.DOWN, down),
    ]
    for rule, source, scale in folds:
        block, _ = rule.apply(model.arch, 0, block, ColumnScale(source, scale))
    torch.testing.assert_close(outputs(model, block), wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_scale_of_o_in_the_rows_of_v_changes_nothing(tmp_path, model_type, kv_heads):
    """Every head for itself, shared value heads, one for all; Qwen2's v has a bias."""
    model = make(tmp_path, model_type, kv_heads=kv_heads)
    block, c = float_block(model), scales(kv_heads * HEAD)
    assert (Role.V in block.biases) == (model_type == "qwen2")
    per_column = c.view(kv_heads, 1, HEAD).expand(-1, 4 // kv_heads, -1).reshape(-1)
    wanted = outputs(model, block)
    stored = stored_scaled(block, (Role.O,), per_column)
    assert ScaleIntoRows().check(model.arch, Role.O) == []
    folded, record = ScaleIntoRows().apply(model.arch, 0, stored, ColumnScale(Role.O, c))
    torch.testing.assert_close(outputs(model, folded), wanted, atol=2e-5, rtol=0)
    assert not torch.allclose(outputs(model, stored), wanted, atol=1e-2)
    assert (record.carrier, record.residual) == ("rows of v", 0.0)
    if Role.V in block.biases:
        torch.testing.assert_close(folded.biases[Role.V], block.biases[Role.V] * c)


def test_codes_of_o_with_fitted_scales_and_of_v_compute_what_they_decode_to(tmp_path):
    """As the walk does it: o rounded on W / c, tied over a group of heads; v's codes stay and its steps take c."""
    model = make(tmp_path, "qwen2", hidden=64, heads=4, kv_heads=2)
    block = float_block(model)
    ties = torch.arange(2 * HEAD).view(2, 1, HEAD).expand(-1, 2, -1).reshape(-1)
    w, energy, grid = block.weight(Role.O), scales(4 * HEAD, 3), GRIDS["q4_0"]
    c = column_scales(w, energy, grid, ties)
    per_value = torch.empty(2 * HEAD)
    per_value[ties] = c
    v = round_to_nearest(block.weight(Role.V), torch.ones(HIDDEN), grid)
    o = round_to_nearest(w / c, energy * c.square(), grid)
    block = block.with_linear(Role.V, v).with_linear(Role.O, o)
    wanted = outputs(model, block.with_linear(Role.O, o.decode() * c))
    folded, record = ScaleIntoRows().apply(model.arch, 0, block, ColumnScale(Role.O, per_value))
    assert torch.equal(folded.linears[Role.V].codes, v.codes)
    assert folded.linears[Role.O] is o
    assert 0 < record.residual <= 2**-11
    # What is left is the rounding of v's steps to f16.
    torch.testing.assert_close(outputs(model, folded), wanted, atol=2e-3, rtol=0)
    assert not torch.allclose(outputs(model, block), wanted, atol=2e-2)


def test_a_norm_that_is_not_of_the_residual_stream_is_refused(tmp_path):
    model = make(tmp_path, "qwen3")
    for arch, source in ((model.arch, Role.Q_NORM), (model.arch, Role.DOWN), (replace(model.arch, residual=None),
                                                                            Role.FFN_NORM)):  # fmt: skip
        (refusal,) = ScaleIntoGain().check(arch, source)
        assert "no gain" in refusal.why
    (refusal,) = ScaleIntoRows().check(replace(model.arch, couplings=()), Role.O)
    assert "column scale of o" in refusal.why
