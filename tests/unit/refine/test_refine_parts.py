"""The parts of the last pass, each against a plain formula."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as fn
from hypothesis import given
from hypothesis import strategies as st

import d2qconv.refine.attention as attention
import d2qconv.refine.divergence as divergence
from d2qconv.decoder.block import Ends
from d2qconv.refine.parameters import Pool, to_storage
from d2qconv.refine.settings import RefineSettings, Share


@pytest.mark.parametrize("score_bytes", [1 << 28, 1])
def test_attention_is_torchs(monkeypatch, score_bytes):
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, h, 9, 8, generator=generator) for h in (6, 2, 2, 6))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    wanted = fn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    slopes = torch.autograd.grad(wanted, leaves, weight)
    got = attention.CausalAttention.apply(q.reshape(4, 3, 9, 8), k.flatten(0, 1), v.flatten(0, 1))
    torch.testing.assert_close(got.view_as(wanted), wanted)
    for mine, theirs in zip(torch.autograd.grad(got.view_as(wanted), leaves, weight), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logit_bytes", [1 << 27, 4 * 50 * 7, 1])
def test_the_divergence_in_chunks_is_that_of_all_logits(monkeypatch, logit_bytes):
    monkeypatch.setattr(divergence, "LOGIT_BYTES", logit_bytes)
    generator = torch.Generator().manual_seed(1)
    x, source = torch.randn(2, 2, 10, 16, generator=generator)
    gain, source_gain = 1 + 0.1 * torch.randn(2, 16, generator=generator)
    head, source_head = torch.randn(2, 50, 16, generator=generator)
    desc = SimpleNamespace(norm_eps=1e-5)
    ends, source_ends = Ends(desc, head, gain, head), Ends(desc, head, source_gain, source_head)
    leaves = [t.clone().requires_grad_() for t in (x, gain, head)]
    log_q = Ends(desc, head, leaves[1], leaves[2]).logits(leaves[0]).log_softmax(-1)
    log_p = source_ends.logits(source).log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    slopes = torch.autograd.grad(wanted, leaves)
    d_head = torch.zeros_like(head)
    loss, dx, d_gain = divergence.divergence_backward(x, source, ends, source_ends, d_head)
    torch.testing.assert_close(loss, wanted.detach().double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx, slopes[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d_gain, slopes[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d_head, slopes[2], rtol=1e-4, atol=1e-6)
    assert divergence.divergence(x, source, ends, source_ends) == loss


def test_a_model_has_no_divergence_from_itself():
    x, head = torch.randn(3, 4, 16), torch.randn(40, 16)
    ends = Ends(SimpleNamespace(norm_eps=1e-5), head, torch.ones(16), head)
    loss, dx, _ = divergence.divergence_backward(x, x, ends, ends)
    assert abs(float(loss)) < 1e-6
    assert float(dx.abs().max()) < 1e-6


@given(
    n_seq=st.integers(2, 70),
    length=st.integers(1, 40),
    batch_tokens=st.integers(1, 400),
    steps=st.integers(1, 40),
    seed=st.integers(0, 3),
)
def test_batches_never_touch_the_reserved_sequences(n_seq, length, batch_tokens, steps, seed):
    settings = RefineSettings(steps=steps, batch_tokens=batch_tokens, seed=seed)
    share = Share.of(n_seq, length, settings)
    batches = list(share.batches(settings))
    assert len(batches) == steps
    assert all(0 <= b.start < b.stop <= share.reserved.start for b in batches)
    assert {b.stop - b.start for b in batches} == {share.batch}
    assert share.reserved.stop == n_seq
    assert share.reserved.stop - share.reserved.start == max(n_seq // 16, 1)
    assert share.batch == 1 or share.batch * length <= batch_tokens
    assert batches == list(share.batches(settings))
    covered = [i for piece in share.pieces(share.reserved) for i in range(piece.start, piece.stop)]
    assert covered == list(range(n_seq))[share.reserved]


def test_every_epoch_visits_what_it_can():
    settings = RefineSettings(steps=15, batch_tokens=1)
    assert sorted(b.start for b in Share.of(16, 8, settings).batches(settings)) == list(range(15))


@given(steps=st.integers(1, 500), warmup=st.floats(0, 1))
def test_the_rate_rises_and_falls(steps, warmup):
    settings = RefineSettings(steps=steps, warmup=warmup)
    slopes = [settings.slope(i) for i in range(steps)]
    top = slopes.index(max(slopes))
    assert all(0 < s <= 1 for s in slopes)
    assert slopes == sorted(slopes[: top + 1]) + sorted(slopes[top + 1 :], reverse=True)
    if steps > 50 and warmup < 0.9:
        assert max(slopes) == 1
        assert slopes[-1] < 0.05


def test_adam_is_torchs():
    settings = RefineSettings(gain_rate=0.03, betas=(0.8, 0.95))
    pool = Pool({"gain": 12}, torch.device("cpu"))
    leaf = pool.take("gain", (3, 4))
    other = torch.ones(3, 4, requires_grad=True)
    theirs = torch.optim.Adam([other], lr=0.03, betas=(0.8, 0.95), eps=1e-12)
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    for step in range(5):
        for tensor in (leaf, other):
            (weight * tensor.sin()).sum().backward()
        theirs.param_groups[0]["lr"] = 0.03 / (step + 1)
        pool.step(settings, 1 / (step + 1))
        theirs.step()
        theirs.zero_grad()
    torch.testing.assert_close(leaf, other)
    assert bool((leaf[0] == 1).all())


def test_storage_keeps_its_range():
    stored = to_storage(torch.tensor([1e9, -1e9, 1.0, 0.0, 65519.0]), torch.float16)
    assert stored.tolist() == [65504.0, -65504.0, 1.0, 0.0, 65504.0]
    assert bool(torch.isnan(to_storage(torch.tensor([torch.nan]), torch.float16)).all())
