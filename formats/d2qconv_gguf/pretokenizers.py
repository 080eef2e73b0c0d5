"""From the pre-tokenizer of a tokenizer.json to the name that makes llama.cpp split text the same way.

llama.cpp does not read regular expressions from the file. `tokenizer.ggml.pre` names one of the splitters compiled
into it (src/llama-vocab.cpp, `llm_tokenizer_bpe`). So the name is derived from what tokenizer.json says: every
pre-tokenizer is written as a chain of isolating regular expressions (`chain`), spelling variants that match the same
text are made one (`canonical`), and the chain is looked up in `CHAINS`. A chain that is not there is refused: the
model would see other tokens than it was trained on.

Several of llama.cpp's names share one splitter (`smollm`, `starcoder`, `command-r`, …); the table keeps one. The
other effects of a name, whether BOS is added and whether merges are ignored for whole words, are written as keys of
their own or are part of the look-up. tests/unit/gguf/test_tokenizer_pre.py shows every row in llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2qconv.errors import Refusal

WAY_OUT = "give --base-gguf FILE, a GGUF of this model that llama.cpp's own converter made"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
#: A word in two halves, upper and lower case; `{end}` is what may follow it.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+END"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*END"
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_TAIL}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
_CASED_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
GPT4O = _CASED.replace("END", _CONTRACTIONS + "?") + r"|\p{N}{1,3}|" + _CASED_TAIL
TEKKEN = _CASED.replace("END", "") + r"|\p{N}|" + _CASED_TAIL
_CJK = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+".replace('\\"', '"')
    + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _TAIL,
)
#: Letters that have a case, as deepseek-llm spells them out.
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-"
    "\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e"
    "\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-"
    "\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_LETTERS}]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    _CJK,
    r"\p{N}",
)


@dataclass(frozen=True)
class Pre:
    """One of llama.cpp's splitters.

    is_whole_word_first: it looks a whole word up before it merges its bytes. joins_digits: it keeps runs of digits
    together where the chain cuts them, which is the same if no token holds two digits. caveat: texts in which it
    is known to differ.
    """

    name: str
    chain: tuple[str, ...]
    is_whole_word_first: bool = False
    joins_digits: bool = False
    caveat: str = ""


_ASCII_CASE = "llama.cpp knows upper and lower case and combining marks inside words for ASCII letters only"
_WIDE_SPACE = "llama.cpp does not cut at an ideographic space (U+3000) as the tokenizer does"

#: What llama.cpp splits as tokenizer.json does.
CHAINS = (
    Pre("gpt-2", (GPT2,)),
    Pre("smollm", (r"\p{N}", GPT2)),
    Pre("llama-bpe", (LLAMA3,), is_whole_word_first=True),
    Pre("dbrx", (LLAMA3,)),
    Pre("qwen2", (QWEN2,)),
    Pre("qwen35", (QWEN35,)),
    Pre("seed-coder", (SEED_CODER,)),
    Pre("gpt-4o", (GPT4O,), caveat=_ASCII_CASE),
    Pre("tekken", (TEKKEN,), is_whole_word_first=True, caveat=_ASCII_CASE),
    Pre("deepseek-llm", DEEPSEEK_LLM, joins_digits=True, caveat=_WIDE_SPACE),
    Pre("deepseek-coder", DEEPSEEK_CODER, caveat=_WIDE_SPACE),
    Pre("deepseek-v3", DEEPSEEK_V3),
)

#: Spellings that match exactly the same text, and the one used here. `\s*` takes line ends too, so one more line end
#: behind it and several are the same; a possessive quantifier gives nothing back, and in these places nothing could be.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"[^\r\n\p{L}\p{N}]?+\p{L}+", _WORD),
    (r"[^\s\p{L}\p{N}]++[\r\n]*", r"[^\s\p{L}\p{N}]+[\r\n]*"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
)


def canonical(regex: str) -> str:
    """The one spelling of a regular expression that the table uses."""
    for spelled, kept in _SPELLINGS:
        regex = regex.replace(spelled, kept)
    return regex


def chain(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """A byte-level pre-tokenizer as isolating regular expressions, applied one after the other.

    None if it is none of that kind: a piece is dropped, joined to a neighbour, or not turned into bytes at the end.
    """
    steps = _steps(pre_tokenizer)
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    found = []
    for step in steps[:-1]:
        regex = _isolating(step)
        if regex is None:
            return None
        found.append(regex)
    last = steps[-1]
    if last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        found.append(GPT2)
    return tuple(found)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    return [step for inner in pre_tokenizer.get("pretokenizers", []) for step in _steps(inner)]


def _isolating(step: Mapping[str, Any]) -> str | None:
    """The regular expression whose matches this step cuts out, or None if it does anything else."""
    kind = step.get("type")
    if kind == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if kind != "Split":
        return None
    regex = (step.get("pattern") or {}).get("Regex")
    if not isinstance(regex, str):
        return None
    regex = canonical(regex)
    how = (step.get("behavior"), bool(step.get("invert")))
    # `Removed` and inverted drops what does not match: nothing, for an expression that matches every character.
    covers_all = regex in (GPT2, LLAMA3, QWEN2, QWEN35, SEED_CODER, GPT4O, TEKKEN)
    if how == ("Isolated", False) or (how == ("Removed", True) and covers_all):
        return regex
    return None


def candidates(tokenizer: Mapping[str, Any]) -> tuple[Pre, ...]:
    """llama.cpp's splitters that cut text as this tokenizer.json does; none if it has none."""
    found = chain(tokenizer.get("pre_tokenizer"))
    return tuple(pre for pre in CHAINS if pre.chain == found)


def unknown_pre(tokenizer: Mapping[str, Any]) -> Refusal:
    """Why a pre-tokenizer is refused that no splitter of llama.cpp equals."""
    shown = describe(tokenizer.get("pre_tokenizer"))
    return Refusal(
        "tokenizer.json: pre_tokenizer",
        f"none of the splitters known to be in llama.cpp cuts text as {shown} does; "
        "it would hand the model other tokens than it was trained on",
        WAY_OUT,
    )


def describe(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """A pre-tokenizer in a few words, for messages."""
    steps = _steps(pre_tokenizer)
    return " → ".join(_describe(step) for step in steps) if steps else "no pre-tokenizer at all"


def _describe(step: Mapping[str, Any]) -> str:
    options = {k: v for k, v in step.items() if k not in ("type", "trim_offsets")}
    inside = ", ".join(f"{k}={v!r}" for k, v in options.items())
    return f"{step.get('type')}({inside})"


def normalizer_kinds(normalizer: Mapping[str, Any] | None) -> Sequence[str]:
    """The types of a normalizer's steps, in order."""
    if normalizer is None:
        return ()
    if normalizer.get("type") != "Sequence":
        return (str(normalizer.get("type")),)
    return tuple(kind for inner in normalizer.get("normalizers", []) for kind in normalizer_kinds(inner))
