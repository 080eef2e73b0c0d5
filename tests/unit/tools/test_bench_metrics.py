"""tools/bench/metrics.py: perplexity and KL divergence against plain sums, and their laws."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FILE = Path(__file__).resolve().parents[3] / "tools" / "bench" / "metrics.py"


def load():
    spec = importlib.util.spec_from_file_location("bench_metrics", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_metrics"] = module
    spec.loader.exec_module(module)
    return module


metrics = load()


def random_chunk(seed, n=7, vocab=11, scale=3.0):
    rng = np.random.default_rng(seed)
    p = (scale * rng.standard_normal((n, vocab))).astype(np.float32)
    q = (scale * rng.standard_normal((n, vocab))).astype(np.float32)
    return p, q, rng.integers(0, vocab, n).astype(np.int32)


def plain_softmax(row):
    top = max(row)
    e = [math.exp(float(x) - float(top)) for x in row]
    return [x / sum(e) for x in e]


def test_equals_plain_sums():
    p, q, tokens = random_chunk(0)
    got = metrics.compare(metrics.log_softmax(p), metrics.log_softmax(q), tokens)
    for i in range(len(tokens)):
        a, b = plain_softmax(p[i]), plain_softmax(q[i])
        assert got.nll[i] == pytest.approx(-math.log(b[tokens[i]]), rel=1e-9)
        assert got.kld[i] == pytest.approx(
            sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)), rel=1e-9
        )
        assert got.same_top[i] == (a.index(max(a)) == b.index(max(b)))


def test_known_divergence():
    # KL([1/2, 1/2] || [1/4, 3/4]) = log 2 - log 3 / 2; the token of probability 1/4 has perplexity 4.
    log_p = np.log(np.array([[0.5, 0.5]]))
    log_q = np.log(np.array([[0.25, 0.75]]))
    got = metrics.compare(log_p, log_q, np.array([0], np.int32))
    assert got.kld[0] == pytest.approx(math.log(2) - math.log(3) / 2, abs=1e-12)
    assert math.exp(got.nll[0]) == pytest.approx(4)


def test_impossible_base_token_adds_nothing():
    log_p = np.array([[0.0, -np.inf]])
    log_q = np.log(np.array([[0.5, 0.5]]))
    assert metrics.compare(log_p, log_q, np.array([0], np.int32)).kld[0] == pytest.approx(math.log(2))


@given(st.integers(0, 10_000), st.floats(-50, 50))
def test_kld_is_not_negative_and_ignores_an_offset(seed, offset):
    p, q, tokens = random_chunk(seed)
    log_p = metrics.log_softmax(p)
    plain = metrics.compare(log_p, metrics.log_softmax(q), tokens)
    moved = metrics.compare(log_p, metrics.log_softmax((q + np.float32(offset)).astype(np.float32)), tokens)
    assert (plain.kld > -1e-12).all()
    np.testing.assert_allclose(moved.kld, plain.kld, rtol=1e-3, atol=1e-4)
    assert np.abs(metrics.compare(log_p, log_p, tokens).kld).max() == 0


def test_large_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    np.testing.assert_allclose(metrics.log_softmax(logits), [[0.0, -2e4, -1e4]])


def test_estimate_is_the_standard_error_of_the_mean():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    got = metrics.estimate(values)
    assert got.mean == 4.0
    assert got.se == pytest.approx(math.sqrt(np.var(values, ddof=1) / 4))
    assert math.isnan(metrics.estimate(values[:1]).se)


def test_score_joins_chunks():
    parts = []
    for seed in (1, 2):
        p, q, tokens = random_chunk(seed)
        parts.append(metrics.compare(metrics.log_softmax(p), metrics.log_softmax(q), tokens))
    got = metrics.score(parts)
    nll = np.concatenate([x.nll for x in parts])
    assert got.n_positions == 14
    assert got.perplexity.mean == pytest.approx(math.exp(nll.mean()))
    assert got.perplexity.se == pytest.approx(math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(14))
    assert got.kld_median <= got.kld_99 <= got.kld_max
    assert 0 <= got.same_top.mean <= 1


def test_paired_difference_removes_the_common_part():
    rng = np.random.default_rng(3)
    common = 10 * rng.random(500)
    zero, same = np.zeros(500), np.zeros(500, bool)
    a = [metrics.Positions(zero, common, same)]
    b = [metrics.Positions(zero, common + 0.5 + 0.01 * rng.standard_normal(500), same)]
    got = metrics.paired_difference(a, b)
    assert got.mean == pytest.approx(0.5, abs=0.01)
    assert got.se < 0.001 < metrics.score(a).kld.se
    with pytest.raises(ValueError, match="paired"):
        metrics.paired_difference(a, [*b, *b])
