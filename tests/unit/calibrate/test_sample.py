"""Sampling from the model: groups, dtypes, memory."""

import pytest
import torch

import d2qconv.calibrate.sample as sample
from d2qconv.arch.bind import bind
from d2qconv.calibrate.sample import group_size, sample_bytes, sample_sequences
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import Past, load_block, load_ends
from d2qconv.errors import RunError
from d2qconv.names import Role
from d2qconv.testing.models import make_checkpoint

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    folder = make_checkpoint(
        tmp_path / "m",
        "qwen3",
        tied=request.param,
        hidden=64,
        ffn=96,
        heads=2,
        kv_heads=1,
        head_dim=32,
        vocab=96,
    )
    return bind(open_checkpoint(str(folder)))


def draw(model, n_seq=5, length=7, *, bos=None, seed=3):
    steps = []
    tokens = sample_sequences(model, n_seq, length, bos=bos, seed=seed, device="cpu", on_token=steps.append)
    return tokens, steps


@torch.inference_mode()
def drawn_at_once(model, n_seq, length, bos, seed):
    """All sequences together, one generator: what sampling gave before there were groups."""
    generator = torch.Generator().manual_seed(seed)
    ends = load_ends(model, "cpu")
    blocks = [load_block(model, i, "cpu") for i in range(model.dims.n_layers)]
    pasts = [Past.empty(model, n_seq, length, "cpu") for _ in blocks]
    tokens = torch.empty(n_seq, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(model.dims.vocab, (n_seq,), generator=generator) if bos is None else bos
    for position in range(1, length):
        x = ends.embed(tokens[:, position - 1 : position])
        for block, past in zip(blocks, pasts, strict=True):
            x = block(x, past)
        uniform = torch.rand(n_seq, model.dims.vocab, generator=generator).clamp_(1e-20, 1 - 1e-7)
        tokens[:, position] = (ends.logits(x[:, 0]) - (-uniform.log()).log()).argmax(-1)
    return tokens


@pytest.mark.parametrize("bos", [None, 7])
def test_one_group_draws_as_ever(model, bos):
    tokens, steps = draw(model, bos=bos)
    assert torch.equal(tokens, drawn_at_once(model, 5, 7, bos, 3))
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not torch.equal(tokens, draw(model, bos=bos, seed=4)[0])


def test_groups_are_drawn_by_themselves(model, monkeypatch):
    monkeypatch.setattr(sample, "GROUP_BYTES", 2 * sample._past_bytes(model, 7, CPU))
    assert group_size(model, 7, CPU) == 2
    tokens, steps = draw(model)
    assert torch.equal(tokens, draw(model)[0])
    assert torch.equal(tokens[:2], drawn_at_once(model, 2, 7, None, 3))
    assert torch.equal(tokens[4:], drawn_at_once(model, 1, 7, None, (3 + 4 * sample.STRIDE) % (1 << 63)))
    assert steps == sorted(steps)
    assert steps[-1] == 6
    assert len({tuple(row) for row in tokens.tolist()}) == 5


def test_a_group_has_at_least_one_sequence(model, monkeypatch):
    monkeypatch.setattr(sample, "GROUP_BYTES", 1)
    assert group_size(model, 7, CPU) == 1


def test_predicted_bytes(model):
    dims, n = model.dims, model.n_weights
    found = sample_bytes(model, 5, 7, CPU)
    assert found.weights == 4 * n
    assert found.past == 5 * 7 * 2 * dims.n_layers * dims.n_kv_heads * dims.head * 4
    assert found.total == found.weights + found.past + found.step
    gpu = sample_bytes(model, 5, 7, META)
    assert gpu.past == found.past // 2
    assert gpu.weights == 2 * (n if model.is_tied else n - dims.vocab * dims.hidden)


def test_blocks_in_their_own_dtype_compute_almost_the_same(model):
    stored, exact = sample._load_stored(model, 0, CPU), load_block(model, 0, "cpu")
    assert {w.dtype for w in stored.weights.values() if w.dim() == 2} == {torch.bfloat16}
    assert stored.weights[Role.ATTN_NORM].dtype == torch.float32
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    dims = model.dims
    shape = (3, dims.n_kv_heads, 5, dims.head)
    past = sample._ShortPast(torch.empty(shape).bfloat16(), torch.empty(shape).bfloat16())
    steps = torch.cat([stored(x[:, i : i + 1], past) for i in range(5)], dim=1)
    want = exact(x)
    assert steps.dtype == torch.float32
    assert float((steps - want).norm() / want.norm()) < 0.02
    assert not torch.equal(steps, want)


def test_values_that_are_not_finite_are_an_error(model):
    decoder = sample._Decoder.load(model, CPU)
    decoder.final_norm[0] = torch.inf
    with pytest.raises(RunError, match="not finite"):
        decoder.draw(2, 4, None, torch.Generator().manual_seed(0), lambda _: None)
