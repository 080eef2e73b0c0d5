"""Rotary position embedding as config.json describes it, in the style of transformers 4 and of transformers 5.

4: `rope_theta` beside `rope_scaling` (an object with `type` or `rope_type`). 5: all in `rope_parameters`.
As in transformers' modeling_rope_utils.py: a `rope_theta` inside wins over one outside, the base defaults
to 10000, and `original_max_position_embeddings` to `max_position_embeddings`. What contradicts itself is
refused, not resolved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2qconv.arch.reader import FULL, MAX_SIZE, SLIDING, ConfigReader, is_int, is_number, shown
from d2qconv.arch.spec import Rope

_ORIGINAL = "original_max_position_embeddings"
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "llama3": (_ORIGINAL,),
    "yarn": (
        *(_ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
#: Of every kind; `finetuned` is a remark of the first YaRN checkpoints that nothing reads.
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
_UNSUPPORTED: Mapping[str, str] = {
    "dynamic": "its frequencies depend on the length of the sequence",
    "longrope": "its frequencies depend on the length of the sequence",
    "su": "its frequencies depend on the length of the sequence",
    "mrope": "multimodal rotary positions are not supported",
    "proportional": "it turns a part of a head",
    "axial": "its positions have two axes",
}


def read_rope(r: ConfigReader, max_positions: int) -> Rope:
    """The rotary embedding; what cannot be computed is added to the reader's refusals."""
    found = _parameters(r)
    kind = _kind(r, found)
    theta = _theta(r, found)
    if kind not in _NEEDED:
        why = _UNSUPPORTED.get(kind, "only " + ", ".join(_NEEDED) + " are known")
        r.refuse(f"rotary embedding of kind {kind!r} is not supported: {why}")
        return Rope(theta)
    _check_names(r, kind, found)
    partial = found.get("partial_rotary_factor")
    if partial is not None and not (is_number(partial) and partial == 1):
        r.refuse(f"partial_rotary_factor is {shown(partial)}: turning a part of a head is not supported")
    if found.get("truncate", True) is not True:
        r.refuse("YaRN with truncate = false is not supported: its ramp is rounded to whole dimensions here")
    rope = Rope(
        theta=theta,
        kind=kind,
        factor=_number(r, kind, found, "factor", 1.0),
        low_freq_factor=_number(r, kind, found, "low_freq_factor", 1.0),
        high_freq_factor=_number(r, kind, found, "high_freq_factor", 4.0),
        original_max_positions=_original(r, kind, found, max_positions),
        attention_factor=_optional(r, kind, found, "attention_factor"),
        beta_fast=_number(r, kind, found, "beta_fast", 32.0),
        beta_slow=_number(r, kind, found, "beta_slow", 1.0),
        mscale=_optional(r, kind, found, "mscale"),
        mscale_all_dim=_optional(r, kind, found, "mscale_all_dim"),
    )
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        r.refuse("rotary embedding: high_freq_factor must be greater than low_freq_factor")
    return rope


def _parameters(r: ConfigReader) -> Mapping[str, Any]:
    """The one object that describes the embedding, {} if there is none."""
    given: list[Mapping[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = r.value(name)
        if value is not None and not isinstance(value, dict):
            r.refuse(f"{name} must be an object or null, not {shown(value)}")
        elif value:
            given.append(value)
    if len(given) == 2 and given[0] != given[1]:
        r.refuse("rope_parameters and rope_scaling say different things", "keep the one that is meant")
    return given[0] if given else {}


def _kind(r: ConfigReader, found: Mapping[str, Any]) -> str:
    """`rope_type`, or `type` as it was called before."""
    kinds = [found[name] for name in ("rope_type", "type") if found.get(name) is not None]
    if any(not isinstance(k, str) for k in kinds) or len(set(map(str, kinds))) > 1:
        r.refuse(f"rope_type and type must be one name, not {shown(kinds)}")
    return str(kinds[0]) if kinds else "default"


def _theta(r: ConfigReader, found: Mapping[str, Any]) -> float:
    """The base. Greater than 1, or its logarithm would not be positive."""
    outside = r.value("rope_theta", 10000.0)
    theta = found.get("rope_theta", outside)
    if not (is_number(theta) and theta > 1):
        r.refuse(f"rope_theta must be a number greater than 1, not {shown(theta)}")
        return 10000.0
    if "rope_theta" in r.config and theta != outside:
        r.refuse(
            f"rope_theta is {shown(outside)} outside and {shown(theta)} inside the rotary parameters",
            "keep the one that is meant",
        )
    return float(theta)


def _check_names(r: ConfigReader, kind: str, found: Mapping[str, Any]) -> None:
    """Parameters that are missing, and parameters that this kind does not have."""
    for name in _NEEDED[kind]:
        if name not in found:
            r.refuse(f"rotary embedding of kind {kind!r}: {name} is missing")
    for name in found:
        if name.startswith("mrope"):
            r.refuse(f"rotary parameter {name!r}: multimodal rotary positions are not supported")
        elif name in (FULL, SLIDING):
            r.refuse(f"rotary parameters per kind of layer ({name!r}) are not supported")
        elif name not in (*_ALWAYS, *_NEEDED[kind], *_OPTIONAL[kind]) and found[name] is not None:
            r.refuse(
                f"rotary parameter {name!r} does not belong to kind {kind!r}; it may change the function"
            )


def _optional(r: ConfigReader, kind: str, found: Mapping[str, Any], name: str) -> float | None:
    """A positive number, or None if it is absent, null or not of this kind."""
    value = found.get(name)
    if value is None or name not in (*_NEEDED[kind], *_OPTIONAL[kind]):
        return None
    if not (is_number(value) and value > 0):
        r.refuse(f"rotary parameter {name} must be a positive number, not {shown(value)}")
        return None
    return float(value)


def _number(r: ConfigReader, kind: str, found: Mapping[str, Any], name: str, default: float) -> float:
    """A positive number. A needed one must not be null."""
    value = _optional(r, kind, found, name)
    if value is None and name in found and name in _NEEDED[kind] and found[name] is None:
        r.refuse(f"rotary parameter {name} must be a positive number, not null")
    return default if value is None else value


def _original(r: ConfigReader, kind: str, found: Mapping[str, Any], max_positions: int) -> int:
    """Positions of the pretraining; 0 for kinds that do not use them."""
    if _ORIGINAL not in _OPTIONAL[kind]:
        return 0
    value = found.get(_ORIGINAL, max_positions)
    if not (is_int(value) and 1 <= value <= MAX_SIZE):
        r.refuse(f"rotary parameter {_ORIGINAL} must be a positive integer, not {shown(value)}")
        return max_positions
    return int(value)
