"""Means, errors and percentiles against numpy and the definitions."""

import math

import numpy as np
import pytest
import torch

from d2qconv.measure.metrics import Divergence, Likelihood, paired
from d2qconv.measure.statistics import mean, percentiles, root_mean_square, share

RANDOM = torch.Generator().manual_seed(0)
P = torch.randn(60, 30, generator=RANDOM)
Q = P + 0.5 * torch.randn(60, 30, generator=RANDOM)
R = P + 0.6 * torch.randn(60, 30, generator=RANDOM)
TARGETS = torch.randint(30, (60,), generator=RANDOM)


def divergence(model, pieces=((0, 25), (25, 60))):
    found = Divergence()
    for a, b in pieces:
        found.add(P[a:b], model[a:b], TARGETS[a:b])
    return found


def log_softmax(x):
    x = x.double().numpy()
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def standard_error(x):
    """What a sample of independent values says of its mean's deviation."""
    return x.std(ddof=1) / math.sqrt(len(x))


def test_every_number_of_a_comparison():
    p, q, rows = log_softmax(P), log_softmax(Q), np.arange(60)
    kl = (np.exp(p) * (p - q)).sum(-1)
    true_p, true_q = p[rows, TARGETS], q[rows, TARGETS]
    dp = np.exp(true_q) - np.exp(true_p)
    found = divergence(Q)
    got = found.statistics()
    assert (got.kl.value, got.kl.error) == pytest.approx((kl.mean(), standard_error(kl)))
    points = {0.5: got.median, 0.9: got.p90, 0.95: got.p95, 0.99: got.p99, 0.999: got.p999, 1: got.maximum}
    for fraction, value in points.items():
        assert value == pytest.approx(np.quantile(kl, fraction))
    same = (p.argmax(-1) == q.argmax(-1)).astype(float)
    assert 0.2 < same.mean() < 0.95
    assert (got.same_top.value, got.same_top.error) == pytest.approx((same.mean(), standard_error(same)))
    assert got.mean_dp.value == pytest.approx(dp.mean())
    assert got.rms_dp.value == pytest.approx(math.sqrt((dp**2).mean()))
    # d sqrt(x) = dx / (2 sqrt(x))
    assert got.rms_dp.error == pytest.approx(standard_error(dp**2) / (2 * got.rms_dp.value))
    source = math.exp(-true_p.mean())
    assert got.perplexity_source.value == pytest.approx(source)
    assert got.perplexity_source.error == pytest.approx(source * standard_error(true_p))
    assert found.perplexity.value == pytest.approx(math.exp(-true_q.mean()))
    ratio = true_p - true_q
    assert got.log_ratio.value == pytest.approx(math.log(found.perplexity.value / source))
    assert got.log_ratio.error == pytest.approx(standard_error(ratio))


def test_two_models_are_compared_in_pairs():
    a, b = divergence(Q), divergence(R)
    got = paired(a, b)
    difference = torch.cat(a.kl) - torch.cat(b.kl)
    assert got.value == pytest.approx(a.mean_kl - b.mean_kl)
    assert got.error == pytest.approx(standard_error(difference.numpy()))
    assert paired(a, a).value == paired(a, a).error == 0


def test_a_model_alone_has_the_perplexity_of_the_comparison():
    alone = Likelihood()
    alone.add(Q[:10], TARGETS[:10])
    alone.add(Q[10:], TARGETS[10:])
    assert alone.perplexity == divergence(Q).perplexity


def test_few_values_have_no_error():
    one = torch.tensor([3.0], dtype=torch.float64)
    assert (mean(one).value, mean(one).error) == (3, 0)
    assert (share(1, 1).value, share(1, 1).error) == (1, 0)
    assert root_mean_square(torch.zeros(5, dtype=torch.float64)).error == 0
    assert percentiles(one, [0.5, 0.99]) == [3, 3]


def test_one_infinite_value_is_the_maximum_and_nothing_else():
    values = torch.tensor([0.3, 0.1, 0.2, math.inf], dtype=torch.float64)
    assert percentiles(values, [0, 1 / 3, 2 / 3, 1]) == pytest.approx([0.1, 0.2, 0.3, math.inf])
