"""tokenizer.json as far as it is looked at here, every part of the type that tokenizers gives it.

The file comes from a stranger. What walks through it afterwards may rely on the types of normalizer, pre-tokenizer
and model, on ids that a vocabulary can have, and on tokens of a bounded length. Keys that nothing here reads may
hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from d2qconv.checkpoint.special import MAX_ID
from d2qconv.errors import InputError

if TYPE_CHECKING:
    from d2qconv.checkpoint.open import Checkpoint

NAME = "tokenizer.json"
#: Characters of a token. Merges are looked at for every place where it can be cut.
MAX_TOKEN_CHARS = 4096
#: Sequences inside of sequences.
_MAX_DEPTH = 16
_AGAIN = "fetch the file again"
_T = TypeVar("_T")


class Step(msgspec.Struct):
    """A normalizer or pre-tokenizer. pattern: `{"Regex": …}` or `{"String": …}`."""

    type: str
    normalizers: list[Step] = msgspec.field(default_factory=list)
    pretokenizers: list[Step] = msgspec.field(default_factory=list)
    pattern: dict[str, str] | None = None
    behavior: str | None = None
    invert: bool | None = None
    individual_digits: bool | None = None
    add_prefix_space: bool | None = None
    use_regex: bool | None = None
    prepend: str | None = None
    content: str | None = None
    replacement: str | None = None
    prepend_scheme: str | None = None
    split: bool | None = None


class _Bpe(msgspec.Struct):
    """A model of type BPE; null where tokenizers has an option."""

    vocab: dict[str, int]
    merges: list[str | list[str]] | None = None
    ignore_merges: bool | None = None
    byte_fallback: bool | None = None
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


def read_tokenizer(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The parsed tokenizer.json of a checkpoint, its types checked, or None if there is none. Raises InputError.

    A model of another type than BPE is not looked at beyond its `vocab`: it is refused by its name.
    """
    found = checkpoint.json(NAME)
    if found is None:
        return None
    for key in ("normalizer", "pre_tokenizer"):
        if found.get(key) is not None and _depth(_convert(found[key], Step, key)) > _MAX_DEPTH:
            raise InputError(f"nested more than {_MAX_DEPTH} deep", where=f"{NAME}: {key}", todo=_AGAIN)
    model = found.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("vocab"), Mapping | list):
        raise InputError("it has no model with a vocab", where=NAME, todo=_AGAIN)
    if not isinstance(model.get("type", "BPE"), str):
        raise InputError("its model's type is no name", where=NAME, todo=_AGAIN)
    if model.get("type", "BPE") == "BPE":
        check_tokens(_convert(model, _Bpe, "model").vocab, f"{NAME}: model")
    return found


def check_tokens(vocab: Mapping[str, int], where: str) -> None:
    """Raise InputError for an id or a token that no vocabulary has."""
    for text, token in vocab.items():
        if not 0 <= token <= MAX_ID:
            raise InputError(f"token {text!r:.80} has the id {token}", where=where, todo=_AGAIN)
        if len(text) > MAX_TOKEN_CHARS:
            raise InputError(f"token {text!r:.80} has {len(text)} characters", where=where, todo=_AGAIN)


def _convert(value: object, kind: type[_T], key: str) -> _T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"malformed: {error}", where=f"{NAME}: {key}", todo=_AGAIN) from error


def _depth(step: Step) -> int:
    """How many sequences lie inside of each other, 1 for none; counted no further than matters."""
    depth, level = 0, [step]
    while level and depth <= _MAX_DEPTH:
        level = [inner for one in level for inner in (*one.normalizers, *one.pretokenizers)]
        depth += 1
    return depth
