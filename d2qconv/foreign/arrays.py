"""The arrays of one quantized linear, and what every dialect checks of them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import InputError, Refusal, refuse
from d2qconv.foreign.linear import BITS

#: What the tools store the group of every column in.
_INDEX_TYPES = (torch.int32, torch.int64)


class Arrays:
    """The arrays of one linear."""

    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        self._tensors, self._path, self.module = checkpoint.tensors, checkpoint.path, module

    def words(self, part: str) -> Dense:
        """Packed codes i32[rows, n_words], which must be there: in words of another width they lie elsewhere."""
        found = self._matrix(part)
        if found.dtype != torch.int32:
            raise self.error(f"{part} is of {_name(found.dtype)}, and codes are read from 32-bit words")
        return found

    def scales(self, part: str) -> Dense:
        """Steps, a float matrix that must be there."""
        found = self._matrix(part)
        if not found.dtype.is_floating_point:
            raise self.error(f"{part} is of {_name(found.dtype)}, and scales are floats")
        return found

    def index(self, part: str, n_in: int, n_groups: int) -> Callable[[], Tensor] | None:
        """What reads the group of every column, i32[n_in] or i64; None if it is not there."""
        found = self.optional(part)
        if found is None:
            return None
        if found.shape != (n_in,):
            raise self.error(f"{part} has shape {list(found.shape)}, and there are {n_in} columns")
        if found.dtype not in _INDEX_TYPES:
            raise self.error(f"{part} is of {_name(found.dtype)}, and groups are numbered by int32 or int64")

        def read() -> Tensor:
            column = found.load()
            if n_groups > 1 and not bool(column.any()):
                raise self.error(
                    f"{part} is 0 everywhere, and there are {n_groups} groups: some readers take the first one for "
                    "all columns, some take each in its turn"
                )
            return column

        return read

    def _matrix(self, part: str) -> Dense:
        """One that must be there, two-dimensional and not empty."""
        found = self.optional(part)
        if found is None:
            raise self.error(f"{part} is missing")
        if len(found.shape) != 2 or min(found.shape) < 1:
            raise self.error(f"{part} has shape {list(found.shape)}")
        return found

    def optional(self, part: str) -> Dense | None:
        """One that may be there."""
        return self._tensors.get(f"{self.module}.{part}")

    def names(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Full names of those that are there."""
        return tuple(f"{self.module}.{part}" for part in parts if self.optional(part) is not None)

    def whole(self, n: int, by: int, *parts: str) -> int:
        """The quotient n / by, which must be a whole number above 0."""
        if by < 1 or n < by or n % by:
            raise self.error(f"the shapes of {' and '.join(parts)} do not fit together")
        return n // by

    def whole_groups(self, n_in: int, n_groups: int, index: str) -> None:
        """Columns that no index puts into groups must be as many in each. index: what is not there."""
        if n_in % n_groups:
            raise self.error(
                f"{n_in} columns cannot be split into {n_groups} groups of one length, and there is no {index} that "
                "says which column is in which group"
            )

    def check_group(self, said: object, n_in: int, n_groups: int) -> None:
        """A group size of config.json, -1 for a whole row; the tools' last group may be shorter than the others."""
        group = n_in if said == -1 else said
        if type(group) is not int or group < 1 or -(-n_in // group) != n_groups:
            meant = "one group a row" if said == -1 else f"groups of {said!r:.20} columns"
            raise self.error(
                f"config.json says {meant}, and by its shapes there are {n_groups} groups for {n_in} columns"
            )

    def expect(self, part: str, found: int, wanted: int) -> None:
        """A length must be that of the others."""
        if found != wanted:
            raise self.error(f"{part} has {found} where {wanted} belong by the shape of scales")

    def error(self, what: str) -> InputError:
        """That this linear is not sound."""
        return InputError(f"{self.module}: {what}", where=str(self._path))


def _name(dtype: torch.dtype) -> str:
    """`int64`."""
    return str(dtype).removeprefix("torch.")


def check_bits(arrays: Arrays, bits: int) -> None:
    """Raise InputError unless codes of so many bits are read here."""
    if bits not in BITS:
        raise arrays.error(f"has {bits} bits by its shapes; {', '.join(map(str, BITS))} are read")


def one_of(key: str, value: object, known: Collection[str]) -> None:
    """Raise PlanError unless a value of config.json is one of those that are read."""
    if not isinstance(value, str) or value not in known:
        names = ", ".join(known)
        refuse([Refusal("config.json", f"{key} is {value!r:.80}; only {names} is read")])
