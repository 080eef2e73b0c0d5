"""Byte-level tokenizers: special tokens, padding, templates, and the project's own tokenizer in llama.cpp."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from gguf import TokenType
from tokenizer_help import (
    CORPUS,
    MARKS,
    TEXTS,
    checkpoint_of,
    greedy_model,
    llama_vocab,
    load,
    put,
    split_bpe,
    value,
)
from tokenizers import Tokenizer

from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import InputError, PlanError
from d2qconv_gguf.tokenizer import (
    MAX_TEMPLATE_BYTES,
    tokenizer_metadata,
    tokenizer_refusals,
    tokenizer_warnings,
)

TINY_LLAMA = Path(__file__).parents[2] / "data" / "tiny-llama-5m"
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture
def small(tmp_path):
    """A byte-level tokenizer in tmp_path; its id numbers by text."""
    hf = split_bpe(greedy_model(), GPT2)
    checkpoint_of(tmp_path, hf)
    return hf.get_vocab()


def template(*parts: str | None, **ids: int) -> dict:
    """A post-processor; None stands for the text."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if p is None else {"SpecialToken": {"id": p, "type_id": 0}}
        for p in parts
    ]
    known = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


def edit(folder: Path, **more: object) -> None:
    parts = json.loads((folder / "tokenizer.json").read_text())
    put(folder, "tokenizer.json", {**parts, **more})


def test_our_own_tokenizer(tmp_path):
    checkpoint = open_checkpoint(str(TINY_LLAMA))
    assert tokenizer_refusals(checkpoint) == []
    assert tokenizer_warnings(checkpoint) == []
    keys = tokenizer_metadata(checkpoint, 8192)
    assert value(keys, "tokenizer.ggml.pre") == "qwen2"
    assert value(keys, "tokenizer.ggml.eos_token_id") == 0
    assert value(keys, "tokenizer.ggml.add_bos_token") is False
    hf = Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    tokenize = llama_vocab(tmp_path / "x.gguf", keys)
    for text in [*TEXTS, *MARKS, *CORPUS]:
        assert tokenize(text) == hf.encode(text).ids, text


def test_special_tokens_survive(tmp_path, small):
    put(
        tmp_path,
        "tokenizer_config.json",
        {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"},
    )
    end, start, pad = small["<|im_end|>"], small["<|im_start|>"], small["<|endoftext|>"]
    checkpoint = checkpoint_of(tmp_path, None, bos_token_id=start, eos_token_id=[pad, end], unk_token_id=-1)
    put(tmp_path, "generation_config.json", {"bos_token_id": pad})
    model = load(tmp_path / "x.gguf", tokenizer_metadata(checkpoint, len(small)))
    vocab = model.get_vocab()
    assert (vocab.token_bos(), vocab.token_eos(), vocab.token_pad()) == (start, end, pad)
    assert vocab.is_control(end)
    assert not vocab.is_control(small["<tool>"])
    assert list(vocab.tokenize("a<tool>", False, False))[-1] == small["<tool>"]
    assert list(vocab.tokenize("a<|im_end|>", False, False))[-1] != end


@pytest.mark.parametrize("n_more", [0, 1, 77])
def test_padding(tmp_path, small, n_more):
    size = len(small) + n_more
    keys = tokenizer_metadata(checkpoint_of(tmp_path, None), size)
    tokens, types = value(keys, "tokenizer.ggml.tokens"), value(keys, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == size
    assert tokens[len(small) :] == [f"[PAD{i}]" for i in range(len(small), size)]
    assert set(types[len(small) :]) <= {TokenType.UNUSED}
    assert load(tmp_path / "x.gguf", keys).get_vocab().n_vocab == size


def test_a_hole_in_the_vocabulary_is_padded(tmp_path):
    parts = greedy_model()
    vocab = {text: i + 5 * (i >= 300) for text, i in parts["model"]["vocab"].items()}
    text = json.dumps({**parts, "model": {**parts["model"], "vocab": vocab}, "pre_tokenizer": GPT2})
    keys = tokenizer_metadata(checkpoint_of(tmp_path, text, eos_token_id=0), len(vocab) + 5)
    assert value(keys, "tokenizer.ggml.tokens")[299:306][1:6] == [f"[PAD{i}]" for i in range(300, 305)]


def test_more_tokens_than_rows_is_refused(tmp_path, small):
    size = len(small) - 1
    with pytest.raises(PlanError, match=f"{size} embedding rows"):
        tokenizer_metadata(checkpoint_of(tmp_path, None), size)
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, None, vocab_size=size))
    assert "embedding rows" in refusal.why


def test_no_tokenizer_is_refused(tmp_path):
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, None))
    assert "tokenizer.json" in refusal.why
    assert "--base-gguf" in refusal.todo


def test_no_eos_is_refused(tmp_path, small):
    put(tmp_path, "tokenizer_config.json", {})
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, None))
    assert "eos_token" in refusal.why


def test_two_tokens_of_one_text_are_refused(tmp_path, small):
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    edit(tmp_path, added_tokens=[*added, {"id": len(small), "content": "<tool>", "special": False}])
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, None))
    assert "'<tool>'" in refusal.why


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_another_model_is_refused(tmp_path, small, kind):
    edit(tmp_path, model={"type": kind, "vocab": {"a": 0}})
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, None))
    assert kind in refusal.why


def test_merges_are_read_in_both_spellings(tmp_path, small):
    checkpoint = checkpoint_of(tmp_path, None)
    as_lists = tokenizer_metadata(checkpoint, len(small))
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert isinstance(model["merges"][0], list)
    edit(tmp_path, model={**model, "merges": [" ".join(m) for m in model["merges"]]})
    assert tokenizer_metadata(checkpoint, len(small)) == as_lists
    assert value(as_lists, "tokenizer.ggml.merges")[0] == " ".join(model["merges"][0])


@pytest.mark.parametrize(
    ("parts", "stated", "expected"),
    [
        ((None,), {}, (False, False)),
        (("<|im_start|>", None), {}, (True, False)),
        (("<|im_start|>", None, "<|im_end|>"), {}, (True, True)),
        (("<|im_start|>", None), {"add_bos_token": False}, (False, False)),
        ((None,), {"add_bos_token": True, "add_eos_token": False}, (True, False)),
        (("<tool>", None), {"add_bos_token": True}, (True, False)),
    ],
)
def test_bos_and_eos_are_added_as_stated(tmp_path, small, parts, stated, expected):
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    put(tmp_path, "tokenizer_config.json", {**names, **stated})
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    processors = [byte_level, template(*parts, **small)]
    edit(tmp_path, post_processor={"type": "Sequence", "processors": processors})
    checkpoint = checkpoint_of(tmp_path, None)
    vocab = load(tmp_path / "x.gguf", tokenizer_metadata(checkpoint, len(small))).get_vocab()
    assert (vocab.get_add_bos(), vocab.get_add_eos()) == expected
    ids = list(vocab.tokenize("a", True, True))
    assert (ids[0] == small["<|im_start|>"], ids[-1] == small["<|im_end|>"]) == expected


def test_other_tokens_around_a_text_are_refused(tmp_path, small):
    edit(tmp_path, post_processor=template("<tool>", "<|im_start|>", None, **small))
    (refusal,) = tokenizer_refusals(checkpoint_of(tmp_path, None))
    assert "post_processor" in refusal.where


def test_bos_is_not_added_where_there_is_none(tmp_path, small):
    put(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>", "add_bos_token": True})
    keys = tokenizer_metadata(checkpoint_of(tmp_path, None), len(small))
    assert value(keys, "tokenizer.ggml.add_bos_token") is False


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ 1 // 0 }}"
)


def test_a_chat_template_survives_unrendered(tmp_path, small):
    put(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    model = load(tmp_path / "x.gguf", tokenizer_metadata(checkpoint_of(tmp_path, None), len(small)))
    assert model.get_default_chat_template() == TEMPLATE


def test_named_templates(tmp_path, small):
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool-use", "template": "T"}]
    put(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": named})
    keys = tokenizer_metadata(checkpoint_of(tmp_path, None), len(small))
    assert value(keys, "tokenizer.chat_templates") == ["tool_use"]
    model = load(tmp_path / "x.gguf", keys)
    assert model.get_default_chat_template() == TEMPLATE
    assert model.get_default_chat_template_by_name("tool_use") == "T"


def test_templates_in_files_come_first(tmp_path, small):
    put(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R", encoding="utf-8")
    keys = tokenizer_metadata(checkpoint_of(tmp_path, None), len(small))
    assert value(keys, "tokenizer.chat_template") == TEMPLATE
    assert value(keys, "tokenizer.chat_template.rag") == "R"


def jinja(folder: Path, name: str = "rag.jinja") -> Path:
    """Where an additional template lies, beside a first one."""
    (folder / "chat_template.jinja").write_text("T", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    return folder / "additional_chat_templates" / name


def test_a_template_that_leaves_the_folder(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    checkpoint_of(folder, split_bpe(greedy_model(), GPT2))
    (tmp_path / "secret").write_text("S", encoding="utf-8")
    path = jinja(folder)
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"rag\.jinja.*leaves the folder"):
        tokenizer_refusals(checkpoint_of(folder, None))
    path.unlink()
    path.symlink_to("../chat_template.jinja")
    assert tokenizer_refusals(checkpoint_of(folder, None)) == []


@pytest.mark.parametrize("size", [MAX_TEMPLATE_BYTES, MAX_TEMPLATE_BYTES + 1])
@pytest.mark.parametrize("is_file", [True, False])
def test_a_template_has_a_greatest_length(tmp_path, small, size, is_file):
    if is_file:
        jinja(tmp_path).write_text("é" + "x" * (size - 2), encoding="utf-8")
    else:
        named = [{"name": "rag", "template": "é" + "x" * (size - 2)}]
        put(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": named})
    checkpoint = checkpoint_of(tmp_path, None)
    if size > MAX_TEMPLATE_BYTES:
        with pytest.raises(InputError, match="'rag' is longer"):
            tokenizer_refusals(checkpoint)
    else:
        assert tokenizer_refusals(checkpoint) == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_template_must_be_utf8(tmp_path, small, name):
    jinja(tmp_path)
    (tmp_path / name).write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        tokenizer_refusals(checkpoint_of(tmp_path, None))


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ([{"name": "default"}], "named texts"),
        ([{"template": "T"}], "named texts"),
        ([{"name": "default", "template": 3}], "named texts"),
        (["T"], "named texts"),
        ({"default": "T"}, "named texts"),
        (5, "named texts"),
        ([{"name": "a-b", "template": "T"}, {"name": "a_b", "template": "U"}], "name of another"),
        ([{"name": "", "template": "T"}], "no name"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_malformed_templates(tmp_path, small, name, stated, said):
    put(tmp_path, name, {"eos_token": "<|endoftext|>", "chat_template": stated})
    with pytest.raises(InputError, match=said):
        tokenizer_refusals(checkpoint_of(tmp_path, None))


@pytest.mark.parametrize(
    ("part", "value_"),
    [
        ("added_tokens", [{"id": 3}]),
        ("added_tokens", [{"content": "a"}]),
        ("added_tokens", 7),
        ("model", {"type": "BPE", "vocab": [["a", 0.0]]}),
        ("model", {"type": "BPE", "vocab": {"a": "0"}}),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": 3}),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [3]}),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", 3]]}),
        ("model", {"type": "BPE", "vocab": {"a": 2**40}}),
        ("model", {"type": "BPE", "vocab": {"a" * 5000: 0}}),
        ("model", {"type": ["BPE"], "vocab": {"a": 0}}),
        ("pre_tokenizer", 3),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [None]}),
        ("normalizer", {"type": "Sequence", "normalizers": "NFC"}),
        (
            "normalizer",
            functools.reduce(
                lambda x, _: {"type": "Sequence", "normalizers": [x]}, range(99), {"type": "NFC"}
            ),
        ),
    ],
)
def test_a_malformed_tokenizer(tmp_path, small, part, value_):
    edit(tmp_path, **{part: value_})
    checkpoint = checkpoint_of(tmp_path, None)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer_refusals(checkpoint)


def test_a_token_that_takes_white_space_is_a_warning(tmp_path, small):
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    edit(tmp_path, added_tokens=[{**added[0], "lstrip": True}, *added[1:]])
    assert added[0]["content"] in tokenizer_warnings(checkpoint_of(tmp_path, None))[0]
