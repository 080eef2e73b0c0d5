"""config.json read against an architecture's table: every key is read, known to be harmless, or refused.

Defaults of absent keys are those of transformers' configuration classes (an architecture's own in its
`config_defaults`). All refusals are collected and raised at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from d2qconv.arch.reader import FULL, MAX_SIZE, SLIDING, WHERE, ConfigReader, is_int, is_number, shown
from d2qconv.arch.rope import read_rope
from d2qconv.arch.spec import Architecture, Dims, Rope
from d2qconv.errors import Refusal, refuse

#: No model comes near; it keeps a hostile file from costing memory.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class ConfigFacts:
    """What config.json says. has_attention_bias, has_mlp_bias: whether the sites that can have a bias have one."""

    dims: Dims
    rope: Rope
    norm_eps: float
    is_tied: bool
    max_positions: int
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    has_attention_bias: bool
    has_mlp_bias: bool


def read_config(arch: Architecture, config: Mapping[str, Any]) -> ConfigFacts:
    """Everything that config.json determines. Raises one PlanError with all refusals."""
    r = ConfigReader(arch, config)
    r.refusals.extend(_check_keys(arch, config))
    _check_classes(r)
    dims = _read_dims(r)
    max_positions = r.count("max_position_embeddings")
    eps = r.value("rms_norm_eps", 1e-6)
    if not (is_number(eps) and 0 < eps < 1):
        r.refuse(f"rms_norm_eps must be a number between 0 and 1, not {shown(eps)}")
        eps = 1e-6
    _check_windows(r, dims.n_layers, max_positions)
    facts = ConfigFacts(
        dims=dims,
        rope=read_rope(r, max_positions),
        norm_eps=float(eps),
        is_tied=r.flag("tie_word_embeddings"),
        max_positions=max_positions,
        bos_ids=r.tokens("bos_token_id", dims.vocab),
        eos_ids=r.tokens("eos_token_id", dims.vocab),
        has_attention_bias=r.flag("attention_bias"),
        has_mlp_bias=r.flag("mlp_bias"),
    )
    refuse(r.refusals)
    return facts


def _check_keys(arch: Architecture, config: Mapping[str, Any]) -> Iterator[Refusal]:
    """Keys that no table names, and keys whose value is not among those that are computed."""
    known = {key.name: key for key in arch.config_keys}
    for name, value in config.items():
        key = known.get(name)
        if key is None:
            yield Refusal(WHERE, f"unknown key {name!r}; it may change the function")
        elif key.must_be is not None and not any(_equal(value, m) for m in key.must_be):
            yield Refusal(WHERE, f"{name} is {shown(value)}: {key.why}")


def _equal(a: object, b: object) -> bool:
    """Equality of JSON values, where 1 and true differ."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _check_classes(r: ConfigReader) -> None:
    """`architectures` may only name the causal model; another class has another head or another function."""
    names = r.value("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not all(n in r.arch.class_names for n in names):
        wanted = " or ".join(r.arch.class_names)
        r.refuse(f"architectures is {shown(names)}: only {wanted} is supported")


def _read_dims(r: ConfigReader) -> Dims:
    """Sizes. head_dim defaults to hidden / heads, num_key_value_heads to heads."""
    before = len(r.refusals)
    hidden, heads = r.count("hidden_size"), r.count("num_attention_heads")
    dims = Dims(
        vocab=r.count("vocab_size"),
        hidden=hidden,
        ffn=r.count("intermediate_size"),
        n_layers=r.count("num_hidden_layers", most=MAX_LAYERS),
        n_heads=heads,
        n_kv_heads=r.count("num_key_value_heads", heads),
        head=r.count("head_dim", max(hidden // heads, 1)),
    )
    if len(r.refusals) > before:
        # What follows from a wrong number is not worth a line.
        return replace(dims, vocab=MAX_SIZE)
    if r.value("head_dim") is None and hidden % heads:
        r.refuse(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    elif dims.head % 2:
        r.refuse(f"head_dim {dims.head} is odd: rotary embedding turns pairs")
    if heads % dims.n_kv_heads:
        r.refuse(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {dims.n_kv_heads}")
    return dims


def _check_windows(r: ConfigReader, n_layers: int, max_positions: int) -> None:
    """Refuse an active sliding window, and layer types other than attention.

    A window is active where a position can see less than all before it: window < max_position_embeddings,
    in a layer that uses it. Which layers do: those that `layer_types` calls sliding; without `layer_types`
    those from `max_window_layers` on (all of them in an architecture without that key); none if the
    architecture has `use_sliding_window` and that is false (transformers' Qwen2Config and MistralConfig).
    """
    keys = {key.name for key in r.arch.config_keys}
    if "sliding_window" not in keys:
        return
    first = r.value("max_window_layers", 28) if "max_window_layers" in keys else 0
    if not (is_int(first) and first >= 0):
        r.refuse(f"max_window_layers must be an integer, not {shown(first)}")
        first = 0
    layers = r.value("layer_types") if "layer_types" in keys else None
    if layers is None:
        is_sliding = first < n_layers
    elif isinstance(layers, list) and all(t in (FULL, SLIDING) for t in layers) and len(layers) == n_layers:
        is_sliding = SLIDING in layers
    else:
        r.refuse(
            f"layer_types must be {n_layers} times '{FULL}' or '{SLIDING}', not {shown(layers)}: "
            "other kinds of layers are not supported"
        )
        return
    window = r.value("sliding_window")
    if window is not None and not (is_int(window) and window > 0):
        r.refuse(f"sliding_window must be a positive integer or null, not {shown(window)}")
        return
    is_used = r.flag("use_sliding_window") if "use_sliding_window" in keys else True
    if is_used and is_sliding and window is not None and window < max_positions:
        r.refuse(
            f"attention in a sliding window of {window} (max_position_embeddings is {max_positions}) "
            "is not supported",
            f"for contexts of at most {window} tokens set max_position_embeddings to {window}",
        )
