import math

import pytest
import torch

from d2qconv.measure.metrics import Divergence


def test_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, 30, generator=generator)
    q = p + 0.5 * torch.randn(50, 30, generator=generator)
    targets = torch.randint(30, (50,), generator=generator)
    judged = Divergence()
    judged.add(p[:20], q[:20], targets[:20])
    judged.add(p[20:], q[20:], targets[20:])
    pd, qd = p.double().softmax(-1), q.double().softmax(-1)
    assert judged.mean_kl == pytest.approx(float((pd * (pd / qd).log()).sum(-1).mean()))
    nll = -qd[torch.arange(50), targets].log().mean()
    assert judged.perplexity.value == pytest.approx(math.exp(float(nll)))
    assert judged.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert judged.n_tokens == 50


def test_a_model_equals_itself():
    p = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    judged = Divergence()
    judged.add(p, p, torch.zeros(10, dtype=torch.int64))
    assert judged.mean_kl == 0
    assert judged.same_top == 1
    assert judged.perplexity == judged.perplexity_source
