"""Options that say how to quantize, where everything is quantized already: each is refused by name.

For `plan_adopted` (see `d2qconv.exporters.base.Adopting`). An option that does nothing there would be one that is
ignored without a word. Those at their defaults say nothing, and pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from d2qconv.errors import Refusal
from d2qconv.exporters.base import FloatType
from d2qconv.exporters.overrides import OverrideOption
from d2qconv.names import Role, TensorId

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from d2qconv.grids.base import Grid


def idle_options(options: DataclassInstance, names: Iterable[str]) -> list[Refusal]:
    """A refusal for each of these fields of an exporter's options that is not at its default."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(options)
    }
    return [
        _idle(f"option {name.replace('_', '-')}")
        for name in names
        if getattr(options, name) != defaults[name]
    ]


def idle_ends(
    options: DataclassInstance, ends: Mapping[str, Role], storages: Mapping[TensorId, Grid | FloatType]
) -> list[Refusal]:
    """The same for options about embedding and head, name → role, where that matrix is quantized already."""
    coded = {tensor.role for tensor in _coded(storages)}
    return idle_options(options, [name for name, role in ends.items() if role in coded])


def idle_rules(
    rules: OverrideOption, texts: Sequence[str], storages: Mapping[TensorId, Grid | FloatType]
) -> list[Refusal]:
    """The same for rules about single matrices of which any is quantized already."""
    coded = _coded(storages)
    return [
        _idle(rules.where(rule.text))
        for rule in rules.overrides(texts)
        if any(rule.holds(tensor) for tensor in coded)
    ]


def _coded(storages: Mapping[TensorId, Grid | FloatType]) -> list[TensorId]:
    return [tensor for tensor, storage in storages.items() if not isinstance(storage, FloatType)]


def _idle(where: str) -> Refusal:
    why = "the codes are there already, and their values say which type holds them"
    return Refusal(where, why, "leave it out, or quantize again with --requantize")
