"""Which architecture a config.json names: the four tables here, then the entry points `d2qconv.architectures`.

An entry point's name is the model_type, its object an `Architecture`. It cannot replace a table of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from d2qconv.arch import llama, mistral, qwen2, qwen3
from d2qconv.arch.spec import Architecture
from d2qconv.errors import InputError, PlanError, PluginError

GROUP = "d2qconv.architectures"

BUILT_IN: Mapping[str, Architecture] = {
    module.ARCHITECTURE.model_type: module.ARCHITECTURE for module in (llama, mistral, qwen2, qwen3)
}


def supported() -> tuple[str, ...]:
    """Every model_type that can be looked up, sorted. Loads no plug-in."""
    return tuple(sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))}))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a parsed config.json.

    Raises InputError if `model_type` is missing or not a string, PlanError if nothing supports it,
    PluginError
    if a plug-in's table does not load.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        raise InputError(f"model_type must be a string, not {name!r}", where="config.json")
    if name in BUILT_IN:
        return BUILT_IN[name]
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        raise PlanError(
            f"model_type {name!r} is not supported; supported are {', '.join(supported())}",
            where="config.json",
            todo=f"a plug-in can add it (entry points {GROUP})",
        )
    if len(points) > 1:
        values = ", ".join(p.value for p in points)
        raise PluginError(
            f"several plug-ins bring architecture {name!r}: {values}", todo="uninstall all but one"
        )
    return _load(points[0])


def _load(point: EntryPoint) -> Architecture:
    where = f"{point.name} = {point.value}"
    try:
        found = point.load()
    # A plug-in may fail in any way while it is imported.
    except Exception as error:
        raise PluginError(f"the architecture does not load: {error}", where=where) from error
    if not isinstance(found, Architecture):
        raise PluginError(f"expected an Architecture, found {type(found).__name__}", where=where)
    if found.model_type != point.name:
        raise PluginError(f"its table is for model_type {found.model_type!r}", where=where)
    return found
