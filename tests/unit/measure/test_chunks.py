"""A text cut as llama-perplexity cuts it."""

import hashlib

import pytest
import torch

from d2qconv.errors import InputError
from d2qconv.measure.chunks import check_context, cut

STREAM = torch.arange(100, 130)


def test_without_bos():
    got = cut(STREAM, 8, n_chunks=None, bos=None, where="t")
    assert got.tokens.tolist() == STREAM[:24].view(3, 8).tolist()
    assert (got.first, got.n_judged) == (4, 9)
    # Logits at positions 4, 5 and 6 are judged by the tokens at 5, 6 and 7.
    assert got.targets(1).tolist() == [113, 114, 115]
    digest = hashlib.sha256(STREAM[:24].numpy().astype("<i8").tobytes()).hexdigest()
    assert got.digest == digest


def test_bos_comes_before_the_text_and_then_takes_the_place_of_first_tokens():
    got = cut(STREAM, 8, n_chunks=2, bos=1, where="t")
    assert got.tokens.tolist() == [[1, *range(100, 107)], [1, *range(108, 115)]]
    assert STREAM[0] == 100


def test_an_odd_context_judges_the_shorter_half():
    got = cut(STREAM, 5, n_chunks=None, bos=None, where="t")
    assert (got.first, got.n_judged, got.targets(0).tolist()) == (2, 12, [103, 104])


@pytest.mark.parametrize(
    ("context", "n_chunks", "said"), [(31, None, "has 30 tokens"), (8, 0, "at least one chunk")]
)
def test_what_cannot_be_cut(context, n_chunks, said):
    with pytest.raises(InputError, match=said):
        cut(STREAM, context, n_chunks=n_chunks, bos=None, where="t")


def test_contexts_that_cannot_be_used():
    check_context(4, 4, "the source")
    for context, said in ((3, "at least 4"), (65, "longer than the 64 that the source takes")):
        with pytest.raises(InputError, match=said):
            check_context(context, 64, "the source")
