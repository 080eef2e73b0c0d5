"""Texts scored in a runtime, and the harness' requests and results, without the harness itself."""

from __future__ import annotations

import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from d2qconv import harness
from d2qconv.continuation import Continuations
from d2qconv.errors import InputError, PluginError
from d2qconv.harness import TaskRun
from d2qconv.measure.statistics import Estimate
from d2qconv.progress import Unwatched

VOCAB = 128
#: log p of the next letter by the last two, so that what a window cuts off is seen.
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB, VOCAB)).astype(np.float32)
TABLE -= np.log(np.exp(TABLE).sum(-1, keepdims=True))


class Letters:
    """A runtime whose tokens are letters, and a space with the letter behind it one token."""

    name, version, settings, n_vocab, max_length = "letters", "1", "", VOCAB, 64

    def __init__(self, bos=None):
        self.bos = bos
        self.n_calls = 0

    def encode(self, text):
        tokens = []
        for i, letter in enumerate(text):
            if letter == " " and i + 1 < len(text):
                continue
            tokens.append(ord(letter.upper() if text[i - 1 : i] == " " else letter))
        return tokens

    def logits(self, tokens, first):
        self.n_calls += 1
        row = [0, *tokens[0]]
        found = [TABLE[a, b] + 3 for a, b in itertools.pairwise(row)]
        return np.stack(found)[None, first:]


def log_p(tokens, n_last):
    row = [0, *tokens]
    return sum(
        float(TABLE[row[i - 1], row[i], row[i + 1]]) for i in range(len(row) - 1 - n_last, len(row) - 1)
    )


def test_a_continuation_is_what_follows_its_context():
    scored = Continuations(Letters(), 64)
    # The space belongs to the letter behind it.
    assert scored.of("ab", " cd")[0] == pytest.approx(log_p([97, 98, 67, 100], 2), rel=1e-5)
    assert scored.of("ab ", "cd")[0] == pytest.approx(scored.of("ab", " cd")[0])


def test_bos_stands_before_a_context_and_alone_before_nothing():
    scored = Continuations(Letters(bos=1), 64)
    assert scored.of("ab", "c")[0] == pytest.approx(log_p([1, 97, 98, 99], 1), rel=1e-5)
    assert scored.of("", "ab")[0] == pytest.approx(log_p([1, 97, 98], 2), rel=1e-5)


def test_greedy_means_every_token_is_the_likeliest():
    scored = Continuations(Letters(), 64)
    first = int(TABLE[97, 98].argmax())
    second = int(TABLE[98, first].argmax())
    other = first % 26 + 97 if first % 26 + 97 != second else first % 25 + 98
    assert scored._score((97, 98, first, second), 2)[1]
    assert not scored._score((97, 98, first, other), 2)[1]


def test_a_long_context_loses_its_beginning():
    scored = Continuations(Letters(), 3)
    # Three tokens are read, and what stands before them is as if it were not there.
    assert scored.of("abcdef", "g")[0] == pytest.approx(log_p([100, 101, 102, 103], 1), rel=1e-5)


def test_a_whole_text_is_scored_window_by_window():
    tokens = [1, *map(ord, "abcdefg")]
    whole = Continuations(Letters(bos=1), 64).rolling("abcdefg")
    assert whole == pytest.approx(log_p(tokens, 7), rel=1e-5)
    # lm_eval/utils.py get_rolling_token_windows: what is left at the end is scored behind as much as the window takes.
    parts = log_p(tokens[:4], 3) + log_p(tokens[3:7], 3) + log_p(tokens[4:], 1)
    assert Continuations(Letters(bos=1), 3).rolling("abcdefg") == pytest.approx(parts, rel=1e-5)
    without = Continuations(Letters(), 64).rolling("abcdefg")
    assert without == pytest.approx(log_p(tokens[1:], 6), rel=1e-5)


def test_choices_of_one_token_cost_one_run():
    runtime = Letters()
    scored = Continuations(runtime, 64)
    found = [scored.of("What", f" {letter}")[0] for letter in "abcd"]
    assert runtime.n_calls == 1
    assert len(set(found)) == 4
    scored.of("Why", " a")
    assert runtime.n_calls == 2


@pytest.mark.parametrize(
    ("context", "continuation", "why"),
    [("", "ab", "no probability"), ("ab", "", "without a token"), ("a", "bcdefghi", "window of 7")],
)
def test_what_cannot_be_scored(context, continuation, why):
    with pytest.raises(InputError, match=why):
        Continuations(Letters(), 7).of(context, continuation)


# ---- the harness ----

RESULTS = {
    "results": {
        "t": {
            "alias": "t",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact,strict": 1,
            "exact_stderr,strict": "N/A",
        }
    },
    "versions": {"t": 2.0},
    "n-shot": {"t": 3},
    "n-samples": {"t": {"original": 9, "effective": 4}},
}


@pytest.fixture
def installed(monkeypatch):
    """A harness that asks for what the test says and answers RESULTS; gives the record of how it was called."""
    record = SimpleNamespace(requests=[], got=[], kwargs={})

    def simple_evaluate(*, model, **kwargs):
        record.kwargs = kwargs
        record.got = getattr(model, record.kind)(record.requests)
        return RESULTS

    modules = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": type("LM", (), {})},
        "lm_eval.evaluator": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": lambda include_path: SimpleNamespace(all_tasks=["t", include_path])},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return record


def test_requests_are_answered_and_results_read(installed, tmp_path):
    pairs = [("ab", " c"), ("ab", " d")]
    installed.kind = "loglikelihood"
    installed.requests = [SimpleNamespace(args=pair, task_name="t") for pair in pairs]
    run = TaskRun(("t",), limit=4, shots=3, folder=tmp_path)
    got = harness.run_tasks(run, Letters(), 1000, Unwatched())
    assert installed.got == [Continuations(Letters(), 64).of(*pair) for pair in pairs]
    assert (installed.kwargs["limit"], installed.kwargs["num_fewshot"]) == (4, 3)
    (score,) = got
    assert (score.task, score.version, score.n_shots, score.n_samples) == ("t", "2.0", 3, 4)
    assert score.metrics == {"acc": Estimate(0.5, 0.1), "exact,strict": Estimate(1, 0)}


def test_whole_texts_and_writing(installed):
    installed.kind, installed.requests = (
        "loglikelihood_rolling",
        [SimpleNamespace(args=("abc",), task_name="t")],
    )
    harness.run_tasks(TaskRun(("t",)), Letters(), 1000, Unwatched())
    assert installed.got == [Continuations(Letters(), 64).rolling("abc")]
    installed.kind = "generate_until"
    with pytest.raises(PluginError, match="1 samples ask the model to write"):
        harness.run_tasks(TaskRun(("t",)), Letters(), 1000, Unwatched())


def test_tasks_that_do_not_exist(installed):
    with pytest.raises(InputError, match="no task is called nothing, u"):
        harness.run_tasks(TaskRun(("u", "t", "nothing")), Letters(), 1000, Unwatched())


def test_what_the_harness_raises_is_said(installed):
    def unreachable(requests):
        raise ConnectionError("the hub cannot be reached")

    installed.requests, installed.kind = [], "loglikelihood"
    sys.modules["lm_eval.evaluator"].simple_evaluate = lambda **_: unreachable([])
    with pytest.raises(InputError, match="the hub cannot be reached"):
        harness.run_tasks(TaskRun(("t",)), Letters(), 1000, Unwatched())


def test_without_the_harness(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match="need the library lm-eval") as caught:
        harness.check_installed()
    assert "pip install 'd2qconv[tasks]'" in str(caught.value)
