"""Special tokens: which ones a tokenizer adds, which ids have a role, and which are put around a text.

The one rule for all: calibration puts BOS where an exporter's file says that a runtime must put it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from d2qconv.errors import InputError

if TYPE_CHECKING:
    from d2qconv.checkpoint.open import Checkpoint

#: The roles that config files name, as `<role>_token` or `<role>_token_id`.
ROLES = ("bos", "eos", "unk", "sep", "pad", "mask", "eot", "eom")
_T = TypeVar("_T")
#: No vocabulary comes near; it keeps a hostile file from costing memory.
MAX_ID = (1 << 24) - 1
_Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of a text whole. is_stripping: it takes the white space beside it along."""

    id: int
    text: str
    is_special: bool
    is_stripping: bool


@dataclass(frozen=True)
class Ends:
    """Whether bos is put before a text and eos behind it; other: the step that adds anything else, or ''."""

    bos: bool
    eos: bool
    other: str = ""


class _Added(msgspec.Struct):
    """One entry of `added_tokens_decoder`."""

    content: str
    special: bool | None = None
    lstrip: bool | None = None
    rstrip: bool | None = None


class _AddedById(_Added, kw_only=True):
    """One entry of `added_tokens`."""

    id: _Id


class _Named(msgspec.Struct):
    """A special token of a template."""

    ids: list[_Id]


class _Piece(msgspec.Struct):
    """A special token's name, or which text."""

    id: str


class _Processor(msgspec.Struct):
    """A post-processor, as far as it is read here."""

    type: str
    processors: list[_Processor] = msgspec.field(default_factory=list)
    single: list[dict[str, _Piece]] = msgspec.field(default_factory=list)
    special_tokens: dict[str, _Named] = msgspec.field(default_factory=dict)


def added_tokens(checkpoint: Checkpoint, tokenizer: Mapping[str, Any] | None) -> tuple[AddedToken, ...]:
    """`added_tokens` of a parsed tokenizer.json; without one, those of the files beside tokenizer.model.

    The latter are `added_tokens_decoder` of tokenizer_config.json, then added_tokens.json for further ids.
    Raises InputError for entries that are malformed.
    """
    if tokenizer is not None:
        listed = _read(tokenizer.get("added_tokens") or [], list[_AddedById], "tokenizer.json: added_tokens")
        return tuple(_added(t.id, t) for t in listed)
    config = checkpoint.json("tokenizer_config.json") or {}
    where = "tokenizer_config.json: added_tokens_decoder"
    decoder = _read(config.get("added_tokens_decoder") or {}, dict[str, _Added], where)
    odd = next((i for i in decoder if not _is_id(i)), None)
    if odd is not None:
        raise InputError(f"{odd!r:.80} is not the id of a token", where=where, todo="fetch the file again")
    found = {int(i): _added(int(i), t) for i, t in decoder.items()}
    more = _read(checkpoint.json("added_tokens.json") or {}, dict[str, _Id], "added_tokens.json")
    for text, i in more.items():
        found.setdefault(i, AddedToken(i, text, is_special=False, is_stripping=False))
    return tuple(found.values())


def special_ids(checkpoint: Checkpoint, by_text: Mapping[str, int]) -> dict[str, int]:
    """The id of every role that the checkpoint names. by_text: every token of the vocabulary and its id.

    In this order: tokenizer_config.json, special_tokens_map.json (texts), config.json, generation_config.json
    (ids; the first of several). A text or id that is not in the vocabulary counts as not named.
    """
    known = set(by_text.values())
    named = [checkpoint.json("tokenizer_config.json") or {}, checkpoint.json("special_tokens_map.json") or {}]
    numbered = [checkpoint.config, checkpoint.json("generation_config.json") or {}]
    found = {}
    for role in ROLES:
        texts = [_content(source.get(f"{role}_token")) for source in named]
        numbers = [_first(source.get(f"{role}_token_id")) for source in numbered]
        hits = [by_text[t] for t in texts if t is not None and t in by_text] + [
            n for n in numbers if n in known
        ]
        if hits and hits[0] is not None:
            found[role] = hits[0]
    return found


def ends(checkpoint: Checkpoint, tokenizer: Mapping[str, Any] | None, ids: Mapping[str, int]) -> Ends:
    """What is put around a text. tokenizer: the parsed tokenizer.json; ids: of `special_ids`.

    The rule, first match wins, for each of bos and eos:

    1. add_bos_token or add_eos_token of tokenizer_config.json, if it is true or false;
    2. the post-processor of tokenizer.json, if there is that file;
    3. without tokenizer.json (a SentencePiece model alone): bos, not eos.

    If one of the two keys is stated, the post-processor's other tokens do not count. A role without an id is
    never put. llama.cpp's converter has the same order (gguf-py vocab.py, `SpecialVocab`); transformers 5 skips
    step 1 where there is a tokenizer.json. Raises InputError for a malformed post-processor.
    """
    config = checkpoint.json("tokenizer_config.json") or {}
    made = Ends(bos=True, eos=False) if tokenizer is None else _processor_ends(tokenizer, ids)
    bos, eos = config.get("add_bos_token"), config.get("add_eos_token")
    is_stated = isinstance(bos, bool) or isinstance(eos, bool)
    return Ends(
        bos=(bos if isinstance(bos, bool) else made.bos) and "bos" in ids,
        eos=(eos if isinstance(eos, bool) else made.eos) and "eos" in ids,
        other="" if is_stated else made.other,
    )


def _processor_ends(tokenizer: Mapping[str, Any], ids: Mapping[str, int]) -> Ends:
    processor = tokenizer.get("post_processor")
    if processor is None:
        return Ends(bos=False, eos=False)
    return _ends_of(_read(processor, _Processor, "tokenizer.json: post_processor"), ids)


def _ends_of(processor: _Processor, ids: Mapping[str, int]) -> Ends:
    if processor.type == "Sequence":
        parts = [_ends_of(p, ids) for p in processor.processors]
        return Ends(
            bos=any(p.bos for p in parts),
            eos=any(p.eos for p in parts),
            other=next((p.other for p in parts if p.other), ""),
        )
    if processor.type == "ByteLevel":
        return Ends(bos=False, eos=False)
    if processor.type != "TemplateProcessing":
        return Ends(bos=False, eos=False, other=processor.type)
    single = processor.single
    texts = [n for n, piece in enumerate(single) if "Sequence" in piece]
    if len(texts) != 1:
        return Ends(bos=False, eos=False, other=processor.type)
    before, after = (_ids(part, processor) for part in (single[: texts[0]], single[texts[0] + 1 :]))
    bos, eos = [ids.get("bos")], [ids.get("eos")]
    is_plain = before in ([], bos) and after in ([], eos)
    return Ends(bos=before[:1] == bos, eos=after[-1:] == eos, other="" if is_plain else processor.type)


def _ids(pieces: Sequence[Mapping[str, _Piece]], processor: _Processor) -> list[int]:
    names = [piece["SpecialToken"].id if "SpecialToken" in piece else "" for piece in pieces]
    absent = next((name for name in names if name not in processor.special_tokens), None)
    if absent is not None:
        raise InputError(
            f"its template names {absent!r}, which is not among its special_tokens",
            where="tokenizer.json: post_processor",
            todo="fetch the file again",
        )
    return [i for name in names for i in processor.special_tokens[name].ids]


def _read(value: object, kind: type[_T], where: str) -> _T:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"malformed: {error}", where=where, todo="fetch the file again") from error


def _is_id(text: str) -> bool:
    """Whether it is the number of a token, in digits."""
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= MAX_ID


def _added(token: int, entry: _Added) -> AddedToken:
    return AddedToken(token, entry.content, bool(entry.special), bool(entry.lstrip or entry.rstrip))


def _content(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _first(value: object) -> int | None:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None
