"""A checkpoint's tokenizer as GGUF metadata.

Two kinds exist in llama.cpp for our architectures: `gpt2`, byte-level BPE with merges, and `llama`, SentencePiece
with scores (d2qconv_gguf.spm). Which text becomes which tokens is decided by tokenizer.json where there is one,
since Hugging Face reads nothing else. Keys and token types are those of llama.cpp's converter (conversion/base.py
`get_vocab_base`, `_create_vocab_sentencepiece`; gguf-py `SpecialVocab`), with three differences: `pre` is derived
from the pre-tokenizer's structure instead of a hash of one text's tokens, add_bos_token and add_eos_token are always
written (llama.cpp's default depends on `pre`), and what llama.cpp would tokenize differently is refused.
Templates are carried as text; nothing here renders them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from gguf import Keys, TokenType

from d2qconv.checkpoint.special import AddedToken, Ends, added_tokens, ends, special_ids
from d2qconv.errors import InputError, Refusal, refuse
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.pretokenizers import WAY_OUT, candidates, normalizer_kinds, unknown_pre
from d2qconv_gguf.spm import (
    NO_SCORE,
    SPACE,
    Prefix,
    Token,
    json_prefix,
    json_tokens,
    model_refusal,
    read_model,
)
from d2qconv_gguf.tokenizer_json import read_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from d2qconv.checkpoint.open import Checkpoint

_ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
}
#: Added tokens that steer the model although their checkpoint does not call them special.
_CONTROL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_CONTROL_SHAPES = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_PAD = re.compile(r"\[PAD(0|[1-9][0-9]{0,8})\]")
_TWO_DIGITS = re.compile("[0-9]{2}")
_TEMPLATE_NAME = frozenset(string.ascii_letters + string.digits)
#: A longer chat template is refused.
MAX_TEMPLATE_BYTES = 1 << 20
_AGAIN = "fetch the file again"


@dataclass(frozen=True)
class Vocabulary:
    """What decides how text becomes tokens.

    model: `gpt2` or `llama`. tokens: by id, holes allowed. merges: of a gpt2 vocabulary. prefix: of a llama one.
    caveat: rare texts in which llama.cpp is known to differ.
    """

    model: str
    pre: str
    tokens: Mapping[int, Token]
    merges: tuple[str, ...] = ()
    prefix: Prefix | None = None
    caveat: str = ""


@dataclass(frozen=True)
class _Made:
    """A vocabulary, its special ids, whether bos and eos are added, chat templates, and why it cannot be used."""

    vocabulary: Vocabulary
    ids: Mapping[str, int]
    ends: Ends
    templates: Mapping[str, str]
    refusals: tuple[Refusal, ...]


def tokenizer_metadata(checkpoint: Checkpoint, vocab_size: int) -> list[KV]:
    """All `tokenizer.*` keys. vocab_size: rows of the embedding; ids without a token become `[PADi]`.

    Raises PlanError with `tokenizer_refusals`, or if there are more tokens than rows; InputError for a broken file.
    """
    made = _made(checkpoint, vocab_size)
    refuse(made.refusals)
    vocabulary = made.vocabulary
    padding = Token("", TokenType.UNUSED, NO_SCORE)
    tokens = [vocabulary.tokens.get(i, padding) for i in range(vocab_size)]
    keys = [
        KV.text(Keys.Tokenizer.MODEL, vocabulary.model),
        KV.text(Keys.Tokenizer.PRE, vocabulary.pre),
        KV.texts(Keys.Tokenizer.LIST, [t.text or f"[PAD{i}]" for i, t in enumerate(tokens)]),
        KV.ints(Keys.Tokenizer.TOKEN_TYPE, [int(t.type) for t in tokens]),
    ]
    if vocabulary.model == "llama":
        keys.append(KV.reals(Keys.Tokenizer.SCORES, [t.score for t in tokens]))
    else:
        keys.append(KV.texts(Keys.Tokenizer.MERGES, vocabulary.merges))
    if vocabulary.prefix is not None:
        keys.append(KV.flag(Keys.Tokenizer.ADD_PREFIX, vocabulary.prefix.is_added))
    keys += [KV.count(_ID_KEYS[name], token) for name, token in made.ids.items()]
    keys.append(KV.flag(Keys.Tokenizer.ADD_BOS, made.ends.bos))
    keys.append(KV.flag(Keys.Tokenizer.ADD_EOS, made.ends.eos))
    return keys + _template_keys(made.templates)


def tokenizer_refusals(checkpoint: Checkpoint) -> list[Refusal]:
    """Why llama.cpp could not tokenize as this checkpoint does; empty if it can.

    Raises InputError for a broken file, chat templates included.
    """
    size = checkpoint.config.get("vocab_size")
    return list(_made(checkpoint, size if isinstance(size, int) else None).refusals)


def _made(checkpoint: Checkpoint, vocab_size: int | None) -> _Made:
    """Everything, in one reading of tokenizer.json."""
    tokenizer = read_tokenizer(checkpoint)
    templates = chat_templates(checkpoint)
    vocabulary = _vocabulary(checkpoint, tokenizer)
    if isinstance(vocabulary, Refusal):
        nothing = Vocabulary("", "", {})
        return _Made(nothing, {}, Ends(bos=False, eos=False), templates, (vocabulary,))
    found = _token_refusals(vocabulary.tokens, vocab_size)
    ids = special_ids(checkpoint, {t.text: i for i, t in vocabulary.tokens.items()})
    if "eos" not in ids:
        why = "no eos_token is named; llama.cpp would end every text at token 11 or 2, whatever that is"
        found.append(
            Refusal("tokenizer_config.json", why, "add eos_token to it, or eos_token_id to config.json")
        )
    around = ends(checkpoint, tokenizer, ids)
    if around.other:
        why = (
            f"{around.other} puts tokens around a text that are not bos and eos; llama.cpp can add only these"
        )
        found.append(Refusal("tokenizer.json: post_processor", why, WAY_OUT))
    return _Made(vocabulary, ids, around, templates, tuple(found))


def tokenizer_warnings(checkpoint: Checkpoint) -> list[str]:
    """What llama.cpp will do differently in rare texts, and no key can change; empty for a refused tokenizer."""
    tokenizer = read_tokenizer(checkpoint)
    vocabulary = _vocabulary(checkpoint, tokenizer)
    if isinstance(vocabulary, Refusal) or tokenizer is None:
        return []
    found = [vocabulary.caveat] if vocabulary.caveat else []
    if "NFC" in normalizer_kinds(tokenizer.get("normalizer")):
        found.append(
            "the tokenizer composes characters (NFC) before it splits; llama.cpp takes text as it is"
        )
    if vocabulary.prefix is not None and vocabulary.prefix.caveat:
        found.append(vocabulary.prefix.caveat)
    strip = [t.text for t in added_tokens(checkpoint, tokenizer) if t.is_stripping]
    if strip:
        found.append(
            f"white space beside {', '.join(strip[:3])} is dropped by the tokenizer, kept by llama.cpp"
        )
    ends = (checkpoint.json("generation_config.json") or {}).get("eos_token_id")
    if isinstance(ends, list) and len(ends) > 1:
        found.append(
            f"generation_config.json names {len(ends)} tokens that end a text; a GGUF holds one, "
            "llama.cpp knows others by their usual names only"
        )
    return found


def _token_refusals(tokens: Mapping[int, Token], vocab_size: int | None) -> list[Refusal]:
    found = []
    n_tokens = max(tokens, default=-1) + 1
    if vocab_size is not None and n_tokens > vocab_size:
        why = f"its last token has id {n_tokens - 1}, and the model has {vocab_size} embedding rows"
        found.append(Refusal("tokenizer", why, "use the tokenizer that belongs to this checkpoint"))
    texts = Counter(token.text for token in tokens.values())
    # An id without a token is written `[PADi]`.
    texts.update(f"[PAD{i}]" for i in _named_pads(tokens, vocab_size or 0))
    twice = [text for text, n in texts.items() if n > 1 or not text]
    if twice:
        why = (
            f"two tokens are written {twice[0]!r}, or it is empty; llama.cpp stops when it loads such a file"
        )
        found.append(Refusal("tokenizer", why, WAY_OUT))
    return found


def _named_pads(tokens: Mapping[int, Token], vocab_size: int) -> list[int]:
    """Ids without a token, as far as some token is written like their padding."""
    found = (_PAD.fullmatch(token.text) for token in tokens.values())
    ids = {int(match[1]) for match in found if match is not None}
    return [i for i in ids if i < max(vocab_size, max(tokens) + 1) and i not in tokens]


def _vocabulary(checkpoint: Checkpoint, tokenizer: Mapping[str, Any] | None) -> Vocabulary | Refusal:
    model_file = checkpoint.file("tokenizer.model")
    if tokenizer is None and model_file is None:
        todo = f"put tokenizer.json beside config.json, or {WAY_OUT}"
        return Refusal(str(checkpoint.path), "neither tokenizer.json nor tokenizer.model is there", todo)
    if tokenizer is None:
        return _spm_alone(checkpoint)
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        why = f"its model is {model['type']}; byte-level BPE and SentencePiece BPE can be written"
        return Refusal("tokenizer.json: model", why, WAY_OUT)
    odd = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if odd:
        return Refusal("tokenizer.json: model", f"llama.cpp has nothing for {', '.join(odd)}", WAY_OUT)
    added = added_tokens(checkpoint, tokenizer)
    if model.get("byte_fallback"):
        return _spm_like(checkpoint, tokenizer, added)
    return _byte_level(tokenizer, added)


def _byte_level(tokenizer: Mapping[str, Any], added: Sequence[AddedToken]) -> Vocabulary | Refusal:
    kinds = normalizer_kinds(tokenizer.get("normalizer"))
    if any(kind != "NFC" for kind in kinds):
        why = f"{' → '.join(kinds)} changes text before it is split; llama.cpp does not"
        return Refusal("tokenizer.json: normalizer", why, WAY_OUT)
    fitting = candidates(tokenizer)
    if not fitting:
        return unknown_pre(tokenizer)
    is_whole_word_first = bool(tokenizer["model"].get("ignore_merges"))
    exact = [p for p in fitting if p.is_whole_word_first is is_whole_word_first]
    if not exact and not _is_reached_by_merges(tokenizer):
        why = (
            f"ignore_merges is {is_whole_word_first}, and the only splitter that fits, {fitting[0].name}, does "
            "the opposite; this vocabulary has whole words that merging does not reach"
        )
        return Refusal("tokenizer.json: model", why, WAY_OUT)
    pre = (exact or list(fitting))[0]
    vocab = tokenizer["model"]["vocab"]
    number = next((text for text in vocab if _TWO_DIGITS.search(text)), None) if pre.joins_digits else None
    if number is not None:
        why = f"token {number!r} holds two digits, which llama.cpp's splitter {pre.name} does not cut"
        return Refusal("tokenizer.json: model", why, WAY_OUT)
    tokens = {i: Token(text, TokenType.NORMAL) for text, i in vocab.items()}
    tokens |= {t.id: Token(t.text, _added_type(t)) for t in added}
    # a raw space inside a merge is written as gguf's SpecialVocab does, by the byte-level letter for it
    merges = tuple(
        f"{a} {b}" if " " not in a + b else f"{a.replace(' ', 'Ġ')} {b.replace(' ', 'Ġ')}"
        for a, b in _merges(tokenizer)
    )
    return Vocabulary("gpt2", pre.name, tokens, merges, caveat=pre.caveat)


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, written `"a b"` (before tokenizers 0.20) or `["a", "b"]`; raises InputError."""
    found = []
    merges = tokenizer["model"].get("merges") or []
    for merge in merges:
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise InputError(f"{merge!r} is not a merge", where="tokenizer.json", todo=_AGAIN)
        found.append((pair[0], pair[1]))
    return found


def _is_reached_by_merges(tokenizer: Mapping[str, Any]) -> bool:
    """Whether every token that can be a whole word comes out of merging that word: then ignore_merges is idle."""
    import msgspec
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    model = {**tokenizer["model"], "ignore_merges": False}
    bare = {"version": "1.0", "added_tokens": [], "model": model}
    merging = Tokenizer.from_str(msgspec.json.encode(bare).decode())
    byte_level = decoders.ByteLevel()
    full = {**bare, "pre_tokenizer": tokenizer["pre_tokenizer"]}
    splitter: pre_tokenizers.PreTokenizer = Tokenizer.from_str(
        msgspec.json.encode(full).decode()
    ).pre_tokenizer
    texts = list(model["vocab"])
    missed = [t for t, e in zip(texts, merging.encode_batch(texts), strict=True) if e.tokens != [t]]
    words = (splitter.pre_tokenize_str(byte_level.decode([t])) for t in missed)
    return not any(len(w) == 1 and w[0][0] == t for t, w in zip(missed, words, strict=True))


def _added_type(token: AddedToken) -> TokenType:
    text = token.text
    looks = text in _CONTROL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _CONTROL_SHAPES)
    return TokenType.CONTROL if token.is_special or looks else TokenType.USER_DEFINED


def _spm_like(
    checkpoint: Checkpoint, tokenizer: Mapping[str, Any], added: Sequence[AddedToken]
) -> Vocabulary | Refusal:
    """A byte-fallback BPE tokenizer.json; scores from tokenizer.model if there is one with the same ids."""
    prefix = json_prefix(tokenizer)
    if isinstance(prefix, Refusal):
        return prefix
    if tokenizer["model"].get("ignore_merges"):
        return Refusal(
            "tokenizer.json: model", "ignore_merges: llama.cpp merges SentencePiece words", WAY_OUT
        )
    model_file = checkpoint.file("tokenizer.model")
    vocab = tokenizer["model"]["vocab"]
    tokens: dict[int, Token] | Refusal | None = None
    if model_file is not None:
        model = read_model(model_file)
        if all(vocab.get(p.text) == i for i, p in enumerate(model.pieces)):
            tokens = model_refusal(model, is_alone=False) or dict(enumerate(model.pieces))
    if tokens is None:
        tokens = json_tokens(tokenizer, _merges(tokenizer), {t.text for t in added})
    if isinstance(tokens, Refusal):
        return tokens
    return _with_added("tokenizer.json", tokens, added, prefix)


def _spm_alone(checkpoint: Checkpoint) -> Vocabulary | Refusal:
    path = checkpoint.file("tokenizer.model")
    assert path is not None
    model = read_model(path)
    refusal = model_refusal(model, is_alone=True)
    if refusal is not None:
        return refusal
    config = checkpoint.json("tokenizer_config.json") or {}
    stated = config.get("add_prefix_space")
    prefix = Prefix(stated if isinstance(stated, bool) else model.has_prefix)
    return _with_added(
        "tokenizer.model", dict(enumerate(model.pieces)), added_tokens(checkpoint, None), prefix
    )


def _with_added(
    model: str, tokens: Mapping[int, Token], added: Sequence[AddedToken], prefix: Prefix
) -> Vocabulary | Refusal:
    """A SentencePiece vocabulary with added tokens in place."""
    found = dict(tokens)
    found |= {t.id: Token(t.text, _added_type(t), NO_SCORE) for t in added}
    for token in found.values():
        if token.type is TokenType.USER_DEFINED and SPACE in token.text:
            why = f"token {token.text!r} is cut out whole and holds a ▁; llama.cpp would look for it in the bare text"
            return Refusal(model, why, WAY_OUT)
    return Vocabulary("llama", "default", found, prefix=prefix)


class _Template(msgspec.Struct):
    """One of several templates."""

    name: str
    template: str


def chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    """Chat templates by name, `default` for the one without; {} if there is none.

    chat_template.jinja and additional_chat_templates/*.jinja, else `chat_template` of tokenizer_config.json, else
    of chat_template.json: one text, or a list of named ones. A name has letters, digits and _ only; others become
    _. Raises InputError for a template that is no text, is longer than MAX_TEMPLATE_BYTES or leads out of the
    folder, and for two of one name.
    """
    file = checkpoint.file("chat_template.jinja")
    if file is not None:
        more = checkpoint.files("additional_chat_templates", ".jinja")
        named = [("default", _template_text(file)), *((p.stem, _template_text(p)) for p in more)]
        return _by_name(named, str(checkpoint.path))
    for where in ("tokenizer_config.json", "chat_template.json"):
        stated = (checkpoint.json(where) or {}).get("chat_template")
        if stated is not None:
            return _by_name(_stated_templates(stated, where), where)
    return {}


def _template_text(path: Path) -> str:
    """The text of a file, every line end as a line feed; no more than one character beyond the limit."""
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(MAX_TEMPLATE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"a chat template must be UTF-8: {error}", where=str(path), todo=_AGAIN) from error


def _stated_templates(stated: object, where: str) -> list[tuple[str, str]]:
    if isinstance(stated, str):
        return [("default", stated)]
    try:
        return [(t.name, t.template) for t in msgspec.convert(stated, list[_Template])]
    except msgspec.ValidationError as error:
        what = f"chat_template is neither a text nor a list of named texts: {error}"
        raise InputError(what, where=where, todo=_AGAIN) from error


def _by_name(templates: Sequence[tuple[str, str]], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for stated, text in templates:
        name = "".join(c if c in _TEMPLATE_NAME else "_" for c in stated)
        if not name or name in found:
            what = (
                f"chat template {stated!r} has the name of another" if name else "a chat template has no name"
            )
            raise InputError(what, where=where, todo="rename or remove it")
        if len(text.encode("utf-8")) > MAX_TEMPLATE_BYTES:
            what = f"chat template {stated!r} is longer than {MAX_TEMPLATE_BYTES} bytes"
            raise InputError(what, where=where, todo=_AGAIN)
        found[name] = text
    return found


def _template_keys(templates: Mapping[str, str]) -> list[KV]:
    keys, names = [], []
    for name, text in templates.items():
        if name == "default":
            keys.append(KV.text(Keys.Tokenizer.CHAT_TEMPLATE, text))
        else:
            keys.append(KV.text(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), text))
            names.append(name)
    return [*keys, KV.texts(Keys.Tokenizer.CHAT_TEMPLATES, names)] if names else keys
