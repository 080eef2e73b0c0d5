"""SentencePiece vocabularies as llama.cpp's `llama` tokenizer reads them: pieces, scores, types.

llama.cpp merges the neighbouring pair whose joined text has the highest score, whatever the pair
(src/llama-vocab.cpp, `llm_tokenizer_spm_session`). SentencePiece's BPE does the same, its unigram model does not.
`tokenizer.model` is read here from its wire format (sentencepiece_model.proto), since the library does not tell
the model type nor the normalizer. A BPE tokenizer.json of the same kind (Llama 2, Mistral) has merges instead of
scores; minus the rank of a piece's first merge is its score.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from d2qconv.errors import InputError, Refusal
from d2qconv_gguf.pretokenizers import WAY_OUT, describe, normalizer_kinds
from d2qconv_gguf.tokenizer_json import MAX_TOKEN_CHARS

#: SentencePiece writes a space so.
SPACE = "\u2581"
#: Score of a token that no merge makes, and of added tokens, as llama.cpp's converter has it.
NO_SCORE = -1000.0
_UNIGRAM, _BPE = 1, 2
#: The largest vocabularies take some 5 MB.
MAX_BYTES = 100_000_000
#: A varint has ten bytes at most.
_MAX_SHIFT = 63
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Token:
    """One entry of the vocabulary. score: used by SentencePiece vocabularies only."""

    text: str
    type: TokenType
    score: float = 0.0


@dataclass(frozen=True)
class SpmModel:
    """A parsed tokenizer.model. charsmap: bytes of the normalizer's table, 0 for `identity`."""

    pieces: tuple[Token, ...]
    model_type: int
    charsmap: int
    has_prefix: bool
    is_collapsing: bool


def read_model(path: Path) -> SpmModel:
    """Parse a tokenizer.model; raises InputError if it is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return _parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(
            f"not a SentencePiece model: {error}", where=str(path), todo="fetch the file again, or remove it"
        ) from error


def _parse(data: bytes) -> SpmModel:
    pieces: list[Token] = []
    trainer: Mapping[int, int | bytes] = {}
    normalizer: Mapping[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(dict(_fields(_blob(value)))))
        elif number == 2:
            trainer = dict(_fields(_blob(value)))
        elif number == 3:
            normalizer = dict(_fields(_blob(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SpmModel(
        tuple(pieces),
        _number(trainer.get(3, _UNIGRAM)),
        len(_blob(normalizer.get(2, b""))),
        bool(_number(normalizer.get(3, 1))),
        bool(_number(normalizer.get(4, 1))),
    )


def _piece(fields: Mapping[int, int | bytes]) -> Token:
    text = _blob(fields.get(1, b"")).decode("utf-8")
    if not text or len(text) > MAX_TOKEN_CHARS:
        raise ValueError(f"a piece of {len(text)} characters")
    score = struct.unpack("<f", _blob(fields[2]))[0] if 2 in fields else 0.0
    if not math.isfinite(score):
        raise ValueError(f"piece {text!r:.80} has the score {score}")
    return Token(text, TokenType(_number(fields.get(3, 1))), score)


def _blob(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a message where a number should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: (number, varint or raw bytes)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"cut off at byte {len(data)}")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > _MAX_SHIFT:
            raise ValueError(f"a number of more than 64 bits at byte {at}")


def model_refusal(model: SpmModel, *, is_alone: bool) -> Refusal | None:
    """Why llama.cpp would not tokenize as this tokenizer.model, or None.

    is_alone: no tokenizer.json says what the normalizer is, so the one in the model counts.
    """
    where = "tokenizer.model"
    if model.model_type != _BPE:
        kind = "unigram" if model.model_type == _UNIGRAM else f"number {model.model_type}"
        return Refusal(
            where,
            f"its model type is {kind}; llama.cpp merges pairs by score, which is right for type BPE only",
            WAY_OUT,
        )
    if is_alone and (model.charsmap or model.is_collapsing):
        what = "normalizes characters" if model.charsmap else "removes extra white space"
        return Refusal(where, f"it {what} before it splits; llama.cpp does not", WAY_OUT)
    return _bytes_refusal(where, [p.text for p in model.pieces])


def _bytes_refusal(where: str, texts: Sequence[str]) -> Refusal | None:
    n_bytes = len({t.upper() for t in texts if _BYTE.fullmatch(t)})
    if n_bytes == 256:
        return None
    return Refusal(
        where,
        f"it has {n_bytes} of the 256 byte pieces <0x00> … <0xFF>; llama.cpp stops at a character that is "
        "neither a piece nor made of byte pieces",
        WAY_OUT,
    )


@dataclass(frozen=True)
class Prefix:
    """Whether a space is put before text. caveat: where llama.cpp's way to do it differs."""

    is_added: bool
    caveat: str = ""


_EVEN_TWO = "llama.cpp puts a space before a text even if it begins with a space; the tokenizer does not"
_METASPACE_CAVEATS = {
    "always": _EVEN_TWO,
    "first": _EVEN_TWO + ", nor after every special token as llama.cpp does",
}


def json_prefix(tokenizer: Mapping[str, Any]) -> Prefix | Refusal:
    """How a SentencePiece-like tokenizer.json treats spaces, or why llama.cpp cannot do the same.

    Known: normalizer Replace(" " → "▁") with or without Prepend("▁"), or pre-tokenizer Metaspace(split=False).
    """
    kinds = normalizer_kinds(tokenizer.get("normalizer"))
    pre = tokenizer.get("pre_tokenizer")
    if pre is None and kinds in (("Prepend", "Replace"), ("Replace",)) and _is_space_escape(tokenizer):
        return Prefix(kinds[0] == "Prepend")
    if pre is not None and pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE:
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        if not kinds and not pre.get("split", True):
            return Prefix(scheme != "never", _METASPACE_CAVEATS.get(scheme, ""))
    return Refusal(
        "tokenizer.json",
        f"normalizer {' → '.join(kinds) or 'none'}, pre-tokenizer {describe(pre)}: llama.cpp's SentencePiece "
        "tokenizer does nothing but write spaces as ▁ and merge",
        WAY_OUT,
    )


def _is_space_escape(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a normalizer of Prepend and Replace steps writes spaces as ▁, and only that."""
    normalizer = tokenizer["normalizer"]
    steps = normalizer.get("normalizers", [normalizer])
    return all(
        s.get("prepend") == SPACE
        if s["type"] == "Prepend"
        else s.get("pattern") == {"String": " "} and s.get("content") == SPACE
        for s in steps
    )


def json_tokens(
    tokenizer: Mapping[str, Any], merges: Sequence[tuple[str, str]], added: Set[str]
) -> dict[int, Token] | Refusal:
    """The vocabulary of a byte-fallback BPE tokenizer.json, with scores from the ranks of its merges.

    added: texts of its added tokens, which no merge has to make.
    """
    vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
    refusal = _bytes_refusal("tokenizer.json", list(vocab)) or _merge_refusal(vocab, merges, added)
    if refusal is not None:
        return refusal
    rank: dict[str, int] = {}
    for n, (left, right) in enumerate(merges):
        rank.setdefault(left + right, n)
    spaces = [text for text in rank if not text.strip(SPACE)]
    for text in spaces:
        rank[text] = rank[spaces[0]]
    return {
        token: Token(
            text,
            TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL,
            -float(rank[text]) if text in rank else NO_SCORE,
        )
        for text, token in vocab.items()
    }


def _merge_refusal(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Set[str]
) -> Refusal | None:
    """Whether merging by pair and merging by the joined text's score are the same.

    They are if every way to make a piece from two pieces is a merge, and all ways to make it have neighbouring
    ranks, as in a tokenizer.json that was converted from a tokenizer.model. Runs of spaces may lie mixed: in
    Llama 2's model they share one score.
    """
    pairs, seen, last = set(merges), set(), ""
    for left, right in merges:
        made = left + right
        if made != last and made in seen and made.strip(SPACE):
            return _order_refusal(made)
        seen.add(made)
        last = made
    for text in vocab:
        if text in added or _BYTE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in pairs:
                return _order_refusal(text)
    return None


def _order_refusal(text: str) -> Refusal:
    return Refusal(
        "tokenizer.json",
        f"the merges that make {text!r} are not all there, or not at one rank; llama.cpp knows one score per token "
        "and would merge in another order",
        WAY_OUT,
    )
