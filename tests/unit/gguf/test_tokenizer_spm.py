"""SentencePiece vocabularies, trained here, in llama.cpp."""

from __future__ import annotations

import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from tokenizer_help import CORPUS, MARKS, TEXTS, checkpoint_of, llama_vocab, load, put, value
from tokenizers import Tokenizer

from d2qconv.errors import InputError
from d2qconv_gguf.spm import NO_SCORE, read_model
from d2qconv_gguf.tokenizer import tokenizer_metadata, tokenizer_refusals, tokenizer_warnings

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
#: Texts without the names of special tokens, which sentencepiece itself would not know.
PLAIN = [t for t in [*TEXTS, *MARKS, *CORPUS] if "<|" not in t]


@cache
def trained(
    model_type: str = "bpe", normalizer: str = "identity", symbol: str = "<tool>", **more: Any
) -> bytes:
    options = {"byte_fallback": True, "remove_extra_whitespaces": False, "split_digits": True, **more}
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS * 2 for line in text.splitlines()),
        model_writer=out,
        model_type=model_type,
        vocab_size=600,
        normalization_rule_name=normalizer,
        user_defined_symbols=[symbol],
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    put(tmp_path, "tokenizer_config.json", CONFIG)
    (tmp_path / "tokenizer.model").write_bytes(trained())
    return tmp_path


def library(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def as_json(model: bytes, normalizer: dict | None, pre: dict | None, **more: Any) -> str:
    """The tokenizer.json that a converter makes: every way to make a piece is a merge, ordered by its score."""
    pieces = read_of(model)
    vocab = {p.text: i for i, p in enumerate(pieces)}
    skipped = {p.text for p in pieces if p.type is not TokenType.NORMAL}
    merges = [
        (-p.score, vocab[p.text[:cut]], vocab[p.text[cut:]], p.text[:cut], p.text[cut:])
        for p in pieces
        if p.text not in skipped
        for cut in range(1, len(p.text))
        if p.text[:cut] in vocab and p.text[cut:] in vocab
    ]
    ranked = [[left, right] for *_, left, right in sorted(merges)]
    added = [
        {"id": i, "content": p.text, "special": p.type is not TokenType.USER_DEFINED, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for i, p in enumerate(pieces) if p.type in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
    ]  # fmt: skip
    kinds = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    parts = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre}
    return json.dumps({**parts, "model": {**kinds, "vocab": vocab, "merges": ranked, **more}})


@cache
def read_of(model: bytes):
    from d2qconv_gguf import spm

    return spm._parse(model).pieces


LEGACY = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def test_the_model_file_is_read_as_the_library_reads_it(folder):
    read, expected = read_model(folder / "tokenizer.model"), library(trained())
    assert len(read.pieces) == expected.vocab_size()
    for i, piece in enumerate(read.pieces):
        assert piece.text == expected.id_to_piece(i)
        assert piece.score == expected.get_score(i)
        assert (piece.type is TokenType.CONTROL) == expected.is_control(i)
        assert (piece.type is TokenType.UNKNOWN) == expected.is_unknown(i)
        assert (piece.type is TokenType.BYTE) == expected.is_byte(i)
    assert (read.charsmap, read.has_prefix, read.is_collapsing) == (0, True, False)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_llama_cpp_agrees_with_sentencepiece(tmp_path, has_prefix):
    model = trained(add_dummy_prefix=has_prefix)
    put(tmp_path, "tokenizer_config.json", CONFIG)
    (tmp_path / "tokenizer.model").write_bytes(model)
    checkpoint = checkpoint_of(tmp_path, None)
    assert tokenizer_refusals(checkpoint) == []
    keys = tokenizer_metadata(checkpoint, 620)
    tokenize = llama_vocab(tmp_path / "x.gguf", keys)
    for text in PLAIN:
        assert tokenize(text) == library(model).encode(text), text


def assert_equal(folder: Path, text: str, texts: list[str]) -> None:
    """That llama.cpp and tokenizer.json `text` tokenize alike."""
    keys = tokenizer_metadata(checkpoint_of(folder, text), 620)
    hf, tokenize = Tokenizer.from_str(text), llama_vocab(folder / "x.gguf", keys)
    assert [t for t in texts if tokenize(t) != hf.encode(t).ids] == []


#: Special tokens inside, each followed by text.
SPECIAL = ["a<tool>b", "x</s>y", "<s>[INST] Hi [/INST]"]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "pre"), [(LEGACY, None), (LEGACY["normalizers"][1], None), (None, METASPACE)]
)
@pytest.mark.parametrize("has_model_file", [True, False])
def test_llama_cpp_agrees_with_tokenizer_json(tmp_path, normalizer, pre, has_model_file):
    put(tmp_path, "tokenizer_config.json", CONFIG)
    text = as_json(trained(), normalizer, pre)
    if has_model_file:
        (tmp_path / "tokenizer.model").write_bytes(trained())
    checkpoint = checkpoint_of(tmp_path, text)
    assert tokenizer_refusals(checkpoint) == []
    assert tokenizer_warnings(checkpoint) == []
    assert_equal(tmp_path, text, [*PLAIN, *SPECIAL])


@pytest.mark.parametrize(("scheme", "also"), [("always", SPECIAL), ("first", [])])
def test_a_prefix_by_metaspace_is_a_warning(tmp_path, scheme, also):
    put(tmp_path, "tokenizer_config.json", CONFIG)
    text = as_json(trained(), None, {**METASPACE, "prepend_scheme": scheme})
    checkpoint = checkpoint_of(tmp_path, text)
    assert tokenizer_refusals(checkpoint) == []
    assert "begins with a space" in tokenizer_warnings(checkpoint)[0]
    assert ("after every special token" in tokenizer_warnings(checkpoint)[0]) is (scheme == "first")
    assert_equal(tmp_path, text, [t for t in PLAIN if not t.startswith(" ")] + also)


def test_special_tokens_and_padding(folder):
    put(folder, "added_tokens.json", {"<|im_end|>": 610, "<think>": 611})
    checkpoint = checkpoint_of(folder, None)
    keys = tokenizer_metadata(checkpoint, 620)
    n_pieces = library(trained()).vocab_size()
    tokens, scores = value(keys, "tokenizer.ggml.tokens"), value(keys, "tokenizer.ggml.scores")
    types = value(keys, "tokenizer.ggml.token_type")
    assert tokens[n_pieces:] == [
        {610: "<|im_end|>", 611: "<think>"}.get(i, f"[PAD{i}]") for i in range(n_pieces, 620)
    ]
    assert (types[610], types[611], types[619]) == (
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
    )
    assert scores[619] == NO_SCORE
    vocab = load(folder / "x.gguf", keys).get_vocab()
    assert (vocab.token_bos(), vocab.token_eos()) == (1, 2)
    assert (vocab.get_add_bos(), vocab.get_add_eos()) == (True, False)
    assert next(iter(vocab.tokenize("a", True, True))) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram"}, "unigram"),
        ({"normalizer": "nmt_nfkc"}, "normalizes"),
        ({"remove_extra_whitespaces": True}, "extra white space"),
        ({"byte_fallback": False}, "byte pieces"),
        ({"symbol": "▁▁"}, "'▁▁'"),
    ],
)
def test_what_llama_cpp_would_tokenize_differently_is_refused(folder, options, said):
    (folder / "tokenizer.model").write_bytes(trained(**options))
    (refusal,) = tokenizer_refusals(checkpoint_of(folder, None))
    assert said in refusal.why
    assert "--base-gguf" in refusal.todo


@pytest.mark.parametrize(
    ("normalizer", "pre"),
    [
        (None, None),
        ({"type": "NFKC"}, METASPACE),
        (None, {**METASPACE, "split": True}),
        ({"type": "Replace", "pattern": {"String": "a"}, "content": "b"}, None),
        (None, {"type": "Whitespace"}),
    ],
)
def test_other_treatment_of_spaces_is_refused(tmp_path, normalizer, pre):
    put(tmp_path, "tokenizer_config.json", CONFIG)
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, as_json(trained(), normalizer, pre)))
    assert "normalizer" in refusal.why


@pytest.mark.parametrize("change", ["missing", "moved", "ignore"])
def test_merges_that_scores_cannot_say_are_refused(tmp_path, change):
    put(tmp_path, "tokenizer_config.json", CONFIG)
    parts = json.loads(as_json(trained(), LEGACY, None, ignore_merges=change == "ignore"))
    merges = parts["model"]["merges"]
    twice = next(n for n, m in enumerate(merges[1:], 1) if "".join(m) == "".join(merges[n - 1]))
    if change != "ignore":
        merge = merges.pop(twice)
        if change == "moved":
            merges.append(merge)
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, json.dumps(parts)))
    assert "merge" in refusal.why


def test_malformed_added_tokens(folder):
    parts = json.loads(as_json(trained(), LEGACY, None))
    with pytest.raises(InputError, match="added_tokens"):
        tokenizer_refusals(checkpoint_of(folder, json.dumps({**parts, "added_tokens": [{"id": 1}]})))
    (folder / "tokenizer.json").unlink()
    put(folder, "added_tokens.json", {"<think>": "611"})
    with pytest.raises(InputError, match=r"added_tokens\.json"):
        tokenizer_refusals(checkpoint_of(folder, None))


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (b"", "a piece of 0 characters"),
        (b"\x0a\x01a\x15\x00\x00\xc0\x7f", "score nan"),
        (b"\x08\x01", "a number where a message"),
        (b"\x0a\x01a\x18" + b"\xff" * 200_000 + b"\x01", "64 bits"),
    ],
)
def test_a_model_file_that_is_none_of_sentencepiece(tmp_path, piece, said):
    n = len(piece)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        b"\x0a" + (bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14])) + piece
    )
    with pytest.raises(InputError, match=said):
        read_model(path)


def test_a_token_id_that_no_vocabulary_has(folder):
    put(
        folder,
        "tokenizer_config.json",
        CONFIG | {"added_tokens_decoder": {"9" * 5000: {"content": "<more>"}}},
    )
    with pytest.raises(InputError, match="not the id of a token"):
        tokenizer_refusals(checkpoint_of(folder, None))


def test_a_broken_model_file(folder):
    for broken in (b"", b"\xff" * 50, trained()[:-1], b"not a model at all"):
        (folder / "tokenizer.model").write_bytes(broken)
        with pytest.raises(InputError, match=r"tokenizer\.model"):
            tokenizer_refusals(checkpoint_of(folder, None))
