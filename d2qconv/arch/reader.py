"""Typed access to the values of config.json, collecting what is wrong instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2qconv.arch.spec import Architecture
from d2qconv.errors import Refusal

WHERE = "config.json"
#: No model comes near; it keeps a hostile file from costing memory.
MAX_SIZE = 2**31 - 1
FULL, SLIDING = "full_attention", "sliding_attention"


class ConfigReader:
    """Reads values of the types it is asked for and collects what is wrong.

    A value that is wrong is replaced by one that lets reading go on; `refusals` then says that it must not be
    used.
    """

    def __init__(self, arch: Architecture, config: Mapping[str, Any]) -> None:
        self.arch = arch
        self.config = config
        self.refusals: list[Refusal] = []

    def refuse(self, why: str, todo: str = "") -> None:
        """Add a refusal."""
        self.refusals.append(Refusal(WHERE, why, todo))

    def value(self, name: str, default: object = None) -> Any:
        """The key's value; if it is absent, the architecture's default, else `default`."""
        return self.config.get(name, self.arch.config_defaults.get(name, default))

    def count(self, name: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        """A positive integer. Null and absence mean `default`; without one the key is needed."""
        found = self.value(name)
        if found is None and default is not None:
            return default
        if is_int(found) and 1 <= found <= most:
            return int(found)
        if name in self.config:
            self.refuse(f"{name} must be an integer from 1 to {most}, not {shown(found)}")
        else:
            self.refuse(f"key {name!r} is missing")
        return 1

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean; absence means `default`."""
        found = self.value(name, default)
        if not isinstance(found, bool):
            self.refuse(f"{name} must be true or false, not {shown(found)}")
            return default
        return found

    def tokens(self, name: str, vocab: int) -> tuple[int, ...]:
        """Token numbers: an integer, a list of integers, or null."""
        found = self.value(name)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(is_int(i) and 0 <= i < vocab for i in ids):
            self.refuse(f"{name} must be token numbers below vocab_size = {vocab}, not {shown(found)}")
            return ()
        return tuple(int(i) for i in ids)


def is_int(value: object) -> bool:
    """Whether a JSON value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def shown(value: object) -> str:
    """A value for an error message, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
