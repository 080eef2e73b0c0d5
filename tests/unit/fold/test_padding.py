"""A padded model is the same function, in wider rows.

BOUND: gains are rounded to f32 once more (6e-8 relative), and sums of squares get exact zeros; the logits' largest
difference was 1e-6 to 3e-6 of their rms. Forgetting to scale a gain, or the epsilon of a norm with small inputs, moves
them by percents.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2qconv.arch.bind import bind
from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import Dim, Padding, Site
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import load_block, load_ends
from d2qconv.errors import PlanError
from d2qconv.fold.padding import check, padded
from d2qconv.fold.rotation import Rotation, rotated
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv.testing.models import make_checkpoint

BOUND = 1e-5
ODD = {"hidden": 144, "ffn": 208, "heads": 3, "kv_heads": 1, "head_dim": 32}
WIDE = Padding(256, 512)
MODELS = {
    "llama-tied": ("llama", {}),
    "llama-biases": ("llama", {"tied": False, "attention_bias": True, "mlp_bias": True}),
    "llama-large-epsilon": ("llama", {"norm_eps": 0.3}),
    "mistral": ("mistral", {"tied": False, "dtype": torch.float16}),
    "qwen2": ("qwen2", {"attention_bias": True}),
    "qwen3": ("qwen3", {"tied": False}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model by its name in MODELS; made once."""
    made = {}

    def make(name):
        if name not in made:
            arch, options = MODELS[name]
            folder = make_checkpoint(tmp_path_factory.mktemp("m") / name, arch, **ODD, **options)
            made[name] = bind(open_checkpoint(str(folder)))
        return made[name]

    return make


def distance(a, b):
    """Largest difference of the logits over the rms of b's, on the same random tokens."""
    tokens = torch.randint(0, b.dims.vocab, (2, 20), generator=torch.Generator().manual_seed(1))
    x, y = logits(a, tokens), logits(b, tokens)
    return float((x - y).abs().max() / y.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [WIDE, Padding(144, 256), Padding(160, 208)], ids=str)
def test_the_function_stays(models, name, padding):
    desc = models(name)
    wide = padded(desc, padding)
    assert distance(wide, desc) < BOUND
    assert (wide.dims.hidden, wide.dims.ffn) == (padding.hidden, padding.ffn)
    assert replace(wide.dims, hidden=144, ffn=208) == desc.dims == wide.unpadded
    assert wide.n_weights == desc.n_weights
    assert (wide.rope, wide.is_tied, wide.tensors.keys()) == (desc.rope, desc.is_tied, desc.tensors.keys())
    for tensor, dense in wide.tensors.items():
        values, old = dense.load(), desc.tensors[tensor].load()
        assert (tuple(values.shape), values.dtype) == (dense.shape, dense.dtype)
        inner = values[tuple(slice(n) for n in old.shape)]
        if tensor.role not in desc.arch.residual.readers or padding.hidden == 144:
            assert torch.equal(inner, old)
        assert int(values.count_nonzero()) == int(inner.count_nonzero())


def test_the_new_channels_are_exactly_zero_all_the_way(models):
    wide = padded(models("llama-biases"), WIDE)
    x = load_ends(wide, "cpu").embed(torch.arange(40).reshape(2, 20))
    for index in range(wide.dims.n_layers):
        block = load_block(wide, index, "cpu")
        r = block.attend(x)
        h = block.ffn_input(r)
        for values in (x, r, h):
            assert values[..., :144].any()
            assert not values[..., 144:].any()
        assert not block.gated(h)[..., 208:].any()
        x = block(x)


def test_what_readers_hold_in_the_new_columns_does_not_matter(models):
    """A grid may round these zeros to anything."""
    wide = padded(models("qwen3"), WIDE)
    tensors = dict(wide.tensors)
    for tensor, dense in wide.tensors.items():
        site = wide.arch.site(tensor.role)
        if site.n_in is not None and tensor.role is not Role.EMBED and site.n_in in (Dim.HIDDEN, Dim.FFN):
            values = dense.load().float()
            values[:, 144 if site.n_in is Dim.HIDDEN else 208 :] = 3.0
            tensors[tensor] = Dense.of(values)
    assert distance(replace(wide, tensors=tensors), wide) == 0.0


@pytest.mark.parametrize("role", [Role.O, Role.DOWN, Role.EMBED])
def test_a_number_that_is_not_zero_is_seen(models, role):
    """So the exact zeros of these three are what the function hangs on."""
    wide = padded(models("qwen3"), WIDE)
    tensor = TensorId(role, None if role is Role.EMBED else 0)
    values = wide.tensors[tensor].load().float()
    if role is Role.EMBED:
        values[:, 144:] = 0.3
    else:
        values[144:] = 0.3
    moved = replace(wide, tensors={**wide.tensors, tensor: Dense.of(values)})
    assert distance(moved, wide) > 1e-3


@pytest.mark.parametrize("gain", [True, False])
def test_a_forgotten_factor_is_seen(models, gain):
    desc = models("llama-large-epsilon")
    wide = padded(desc, WIDE)
    if gain:
        tensor = TensorId(Role.FFN_NORM, 1)
        plain = torch.nn.functional.pad(desc.tensors[tensor].load().float(), (0, 112))
        wrong = replace(wide, tensors={**wide.tensors, tensor: Dense.of(plain)})
    else:
        wrong = replace(wide, norm_eps=desc.norm_eps)
    assert distance(wrong, desc) > 1e-2


def test_a_rotated_model_can_be_padded(models):
    desc = models("llama-tied")
    wide = padded(rotated(desc, Rotation("hadamard")), WIDE)
    assert distance(wide, desc) < 5e-5
    assert wide.n_weights == desc.n_weights


@settings(deadline=None, max_examples=8)
@given(hidden=st.integers(144, 400), ffn=st.integers(208, 400))
def test_any_width_will_do(models, hidden, ffn):
    desc = models("llama-tied")
    assert distance(padded(desc, Padding(hidden, ffn)), desc) < BOUND


def test_refusals(models):
    desc = models("llama-tied")
    wide = padded(desc, WIDE)
    with pytest.raises(PlanError, match=r"padded already \(hidden 144 → 256, ffn 208 → 512\)"):
        padded(wide, Padding(512, 512))
    with pytest.raises(PlanError, match="144 and 208 channels cannot become 128 and 208"):
        padded(desc, Padding(128, 208))
    table = BUILT_IN["llama"]
    sites = (*table.sites, Site(Role.Q_NORM, "x", Dim.HIDDEN))
    (refusal,) = check(replace(desc, arch=replace(table, sites=sites)), WIDE)
    assert "does not say what it does" in refusal.why
    (refusal,) = check(replace(desc, arch=replace(table, residual=None)), WIDE)
    assert "who reads and writes" in refusal.why
    biased = tuple(replace(s, can_have_bias=s.can_have_bias or s.role is Role.FFN_NORM) for s in table.sites)
    (refusal,) = check(replace(desc, arch=replace(table, sites=biased)), WIDE)
    assert "no RMSNorm" in refusal.why
    assert TensorId(Role.Q, 0, Part.BIAS) not in desc.tensors
