"""Every row of the pre-tokenizer table, shown in llama.cpp itself.

For each chain a byte-level BPE is trained with exactly that pre-tokenizer, written as a vocab-only GGUF by our code,
loaded by stock llama.cpp, and both tokenize texts that such splitters disagree on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from tokenizer_help import (
    CORPUS,
    MARKS,
    TEXTS,
    checkpoint_of,
    digitless_model,
    greedy_model,
    llama_vocab,
    split_bpe,
    value,
)
from tokenizers import Tokenizer

from d2qconv.errors import PlanError
from d2qconv_gguf import pretokenizers as pre
from d2qconv_gguf.tokenizer import tokenizer_metadata, tokenizer_refusals, tokenizer_warnings

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_BYTES = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def chain(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(steps)}


POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

#: name, pre-tokenizer as its checkpoints write it, ignore_merges
ROWS = [
    ("gpt-2", GPT2_BYTES, False),
    ("gpt-2", chain(split(pre.GPT2), BYTES), False),
    ("smollm", chain(DIGITS, GPT2_BYTES), False),
    ("llama-bpe", chain(split(pre.LLAMA3), BYTES), True),
    ("llama-bpe", chain(split(POSSESSIVE), BYTES), True),
    ("dbrx", chain(split(pre.LLAMA3), BYTES), False),
    ("dbrx", chain(split(pre.LLAMA3, "Removed", True), BYTES), False),
    ("qwen2", chain(split(pre.QWEN2), BYTES), False),
    ("qwen35", chain(split(pre.QWEN35), BYTES), False),
    ("seed-coder", chain(split(pre.SEED_CODER.replace(r"\r\n]+|\s*", "\r\n]+|\\s*")), BYTES), False),
    ("gpt-4o", chain(split(pre.GPT4O), BYTES), False),
    ("tekken", chain(split(pre.TEKKEN), BYTES), True),
    ("deepseek-llm", chain(*map(split, pre.DEEPSEEK_LLM[:-1]), DIGITS, BYTES), False),
    ("deepseek-coder", chain(*map(split, pre.DEEPSEEK_CODER[:-1]), DIGITS, BYTES), False),
    ("deepseek-v3", chain(*map(split, pre.DEEPSEEK_V3), BYTES), False),
]

#: Texts in which llama.cpp's splitter is known to differ; tokenizer_warnings says so.
KNOWN = {
    "gpt-4o": MARKS[:4],
    "tekken": MARKS[:4],
    "deepseek-llm": ["\u3000full\u3000width"],
    "deepseek-coder": ["\u3000full\u3000width"],
}


def tokenizer_for(name: str, pre_tokenizer: dict, ignore_merges: bool) -> Tokenizer:
    model = digitless_model() if name == "deepseek-llm" else greedy_model()
    return split_bpe(model, pre_tokenizer, ignore_merges)


def differing(hf: Tokenizer, tokenize: Callable[[str], list[int]]) -> list[str]:
    texts = [*TEXTS, *MARKS, *CORPUS]
    return [t for t in texts if hf.encode(t, add_special_tokens=False).ids != tokenize(t)]


@pytest.mark.parametrize(("name", "pre_tokenizer", "ignore_merges"), ROWS)
def test_llama_cpp_splits_as_hugging_face(tmp_path, name, pre_tokenizer, ignore_merges):
    hf = tokenizer_for(name, pre_tokenizer, ignore_merges)
    checkpoint = checkpoint_of(tmp_path, hf)
    assert tokenizer_refusals(checkpoint) == []
    assert bool(tokenizer_warnings(checkpoint)) is (name in KNOWN)
    keys = tokenizer_metadata(checkpoint, hf.get_vocab_size())
    assert value(keys, "tokenizer.ggml.pre") == name
    assert differing(hf, llama_vocab(tmp_path / "x.gguf", keys)) == KNOWN.get(name, [])


@pytest.mark.parametrize(
    ("name", "wrong"), [("qwen2", "llama-bpe"), ("dbrx", "llama-bpe"), ("gpt-2", "smollm"), ("smollm", "gpt-2"),
                        ("seed-coder", "qwen2"), ("tekken", "gpt-4o"), ("deepseek-v3", "llama-bpe")]
)  # fmt: skip
def test_the_comparison_sees_a_wrong_name(tmp_path, name, wrong):
    _, pre_tokenizer, ignore_merges = next(row for row in ROWS if row[0] == name)
    hf = tokenizer_for(name, pre_tokenizer, ignore_merges)
    keys = tokenizer_metadata(checkpoint_of(tmp_path, hf), hf.get_vocab_size())
    keys = [replace(kv, value=wrong) if kv.key == "tokenizer.ggml.pre" else kv for kv in keys]
    found = differing(hf, llama_vocab(tmp_path / "x.gguf", keys))
    assert set(found) - set(KNOWN.get(name, []))


def test_every_row_of_the_table_is_shown():
    assert {row[0] for row in ROWS} == {p.name for p in pre.CHAINS}


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "Whitespace"},
        {**GPT2_BYTES, "add_prefix_space": True},
        chain(split(pre.QWEN2.replace("{N}", "{N}{1,2}")), BYTES),
        chain(split(pre.QWEN2), DIGITS, BYTES),
        chain(split(pre.QWEN2, "MergedWithNext"), BYTES),
        chain(split(pre.QWEN2, "Isolated", True), BYTES),
        chain(split(r"\p{N}", "Removed", True), BYTES),
        chain({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"}, BYTES),
        chain(split(pre.QWEN2)),
        chain(BYTES, split(pre.QWEN2)),
    ],
)
def test_an_unknown_splitter_is_refused(tmp_path, pre_tokenizer):
    text = json.dumps({**greedy_model(), "pre_tokenizer": pre_tokenizer})
    checkpoint = checkpoint_of(tmp_path, text, eos_token_id=0)
    (refusal,) = tokenizer_refusals(checkpoint)
    assert "pre_tokenizer" in refusal.where
    assert "--base-gguf" in refusal.todo
    with pytest.raises(PlanError, match="pre_tokenizer"):
        tokenizer_metadata(checkpoint, 10_000)


def test_a_message_shows_the_splitter(tmp_path):
    text = json.dumps({**greedy_model(), "pre_tokenizer": chain(split("a+"), BYTES)})
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, text))
    assert "'a+'" in refusal.why
    assert "Isolated" in refusal.why


def test_ignore_merges_may_differ_where_it_does_nothing(tmp_path):
    qwen2 = chain(split(pre.QWEN2), BYTES)
    # no merge makes `11`, but it is never one word in this chain; `ba` is
    vocab = {"a": 0, "b": 1, "ab": 2, "1": 3, "11": 4}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b"], "ignore_merges": True}
    text = json.dumps({"model": model, "pre_tokenizer": qwen2})
    assert tokenizer_refusals(checkpoint_of(tmp_path, text, eos_token_id=0)) == []
    text = json.dumps({"model": {**model, "vocab": {**vocab, "ba": 5}}, "pre_tokenizer": qwen2})
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, text, eos_token_id=0))
    assert "ignore_merges" in refusal.why


def test_a_number_in_a_vocabulary_whose_digits_are_cut(tmp_path):
    _, pre_tokenizer, _ = next(row for row in ROWS if row[0] == "deepseek-llm")
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, split_bpe(greedy_model(), pre_tokenizer)))
    assert "two digits" in refusal.why


@pytest.mark.parametrize("normalizer", [{"type": "NFKC"}, {"type": "Lowercase"}])
def test_a_normalizer_is_refused(tmp_path, normalizer):
    text = json.dumps({**greedy_model(), "pre_tokenizer": GPT2_BYTES, "normalizer": normalizer})
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, text, eos_token_id=0))
    assert "normalizer" in refusal.where


def test_nfc_is_a_warning(tmp_path):
    parts = {**greedy_model(), "pre_tokenizer": GPT2_BYTES, "normalizer": {"type": "NFC"}}
    checkpoint = checkpoint_of(tmp_path, json.dumps(parts), eos_token_id=0)
    assert tokenizer_refusals(checkpoint) == []
    assert "NFC" in tokenizer_warnings(checkpoint)[0]
