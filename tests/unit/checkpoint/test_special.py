"""Which tokens are added, which have a role, and which are put around a text."""

import json
from pathlib import Path

import pytest

from d2qconv.checkpoint.open import Checkpoint
from d2qconv.checkpoint.special import AddedToken, Ends, added_tokens, ends, special_ids
from d2qconv.errors import InputError

IDS = {"bos": 1, "eos": 2}


def checkpoint_of(folder: Path, **files: object) -> Checkpoint:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Checkpoint(folder, "local", "", {}, {}, "")


def template(*parts: str | None) -> dict[str, object]:
    """None stands for the text; `<2>` for a token of that id."""
    single = [{"Sequence": {"id": "A"}} if p is None else {"SpecialToken": {"id": p}} for p in parts]
    known = {p: {"id": p, "ids": [int(p[1:-1])]} for p in parts if p is not None}
    return {"type": "TemplateProcessing", "single": single, "special_tokens": known}


OTHER = "TemplateProcessing"
NEITHER = Ends(bos=False, eos=False)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, NEITHER),
        ({"type": "ByteLevel"}, NEITHER),
        (template(None), NEITHER),
        (template("<1>", None), Ends(bos=True, eos=False)),
        (template("<1>", None, "<2>"), Ends(bos=True, eos=True)),
        (template("<2>", None), Ends(bos=False, eos=False, other=OTHER)),
        (template("<1>", "<5>", None), Ends(bos=True, eos=False, other=OTHER)),
        (template(None, "<5>", "<2>"), Ends(bos=False, eos=True, other=OTHER)),
        (template("<1>", None, None), Ends(bos=False, eos=False, other=OTHER)),
        ({"type": "RobertaProcessing", "cls": ["<1>", 1]}, Ends(False, False, "RobertaProcessing")),
        (
            {"type": "Sequence", "processors": [template("<1>", None), {"type": "ByteLevel"}]},
            Ends(bos=True, eos=False),
        ),
    ],
)
def test_the_post_processor_decides_where_nothing_is_stated(tmp_path, processor, expected):
    checkpoint = checkpoint_of(tmp_path)
    assert ends(checkpoint, {"post_processor": processor}, IDS) == expected
    # Without ids, no role can be put.
    assert not ends(checkpoint, {"post_processor": template("<1>", None)}, {}).bos


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Ends(bos=True, eos=False)),
        ({"add_bos_token": None}, Ends(bos=True, eos=False)),
        ({"add_bos_token": False}, NEITHER),
        ({"add_eos_token": True}, Ends(bos=True, eos=True)),
    ],
)
def test_what_is_stated_comes_first(tmp_path, stated, expected):
    checkpoint = checkpoint_of(tmp_path, tokenizer_config=stated)
    assert ends(checkpoint, None, IDS) == expected
    assert ends(checkpoint, {"post_processor": template("<1>", None)}, IDS) == expected
    assert ends(checkpoint, {}, {"eos": 2}).bos is False


@pytest.mark.parametrize(
    "processor",
    [
        "TemplateProcessing",
        {},
        {"type": "Sequence", "processors": [None]},
        {"type": OTHER, "single": [{"SpecialToken": {}}]},
        {"type": OTHER, "single": [{"SpecialToken": {"id": "<9>"}}, {"Sequence": {"id": "A"}}]},
        {"type": OTHER, "single": [{"SpecialToken": "<9>"}]},
    ],
)
def test_a_malformed_post_processor(tmp_path, processor):
    with pytest.raises(InputError, match="post_processor"):
        ends(checkpoint_of(tmp_path), {"post_processor": processor}, IDS)


def test_ids_by_text_come_before_ids_by_number(tmp_path):
    by_text = {"<s>": 1, "</s>": 2, "<pad>": 3}
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<gone>"}
    numbers = {"bos_token_id": 3, "eos_token_id": [2, 3], "pad_token_id": 7}
    checkpoint = checkpoint_of(tmp_path, tokenizer_config=config, generation_config=numbers)
    assert special_ids(checkpoint, by_text) == {"bos": 1, "eos": 2}


def test_added_tokens(tmp_path):
    entry = {"id": 5, "content": "<t>", "special": True, "lstrip": False, "rstrip": True}
    checkpoint = checkpoint_of(
        tmp_path,
        tokenizer_config={"added_tokens_decoder": {"6": {"content": "<u>"}}},
        added_tokens={"<u2>": 6, "<v>": 7},
    )
    assert added_tokens(checkpoint, {"added_tokens": [entry]}) == (AddedToken(5, "<t>", True, True),)
    assert added_tokens(checkpoint, {}) == ()
    texts = {t.id: t.text for t in added_tokens(checkpoint, None)}
    assert texts == {6: "<u>", 7: "<v>"}


@pytest.mark.parametrize(
    "listed", [[{"id": 5}], [{"content": "a"}], [{"id": "5", "content": "a"}], {"a": 1}, [3]]
)
def test_malformed_added_tokens(tmp_path, listed):
    with pytest.raises(InputError, match="added_tokens"):
        added_tokens(checkpoint_of(tmp_path), {"added_tokens": listed})


@pytest.mark.parametrize("decoder", [{"x": {"content": "a"}}, {"1": {}}, [1], {"-1": {"content": "a"}}])
def test_a_malformed_decoder_of_added_tokens(tmp_path, decoder):
    checkpoint = checkpoint_of(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(InputError, match="added_tokens_decoder"):
        added_tokens(checkpoint, None)
