"""What the tables of the comparisons share: a package beside the best of the others, numbers as text, markdown."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from metrics import Estimate, Positions, Score, paired_difference


class Measured(Protocol):
    """A package; score is None where it could not be made or measured. parts: its values by position."""

    @property
    def score(self) -> Score | None: ...

    @property
    def parts(self) -> Sequence[Positions]: ...


Row = TypeVar("Row", bound=Measured)


def best(rows: Iterable[Row]) -> Row | None:
    """The measured one of the lowest KLD."""
    measured = [(r.score.kld.mean, i, r) for i, r in enumerate(rows) if r.score is not None]
    return min(measured)[2] if measured else None


def versus(row: Measured, other: Measured | None) -> tuple[float, Estimate] | None:
    """KLD over the other's, nan if that is 0, and KLD minus the other's, paired; None where one was not measured."""
    if other is None or row.score is None or other.score is None:
        return None
    ratio = row.score.kld.mean / other.score.kld.mean if other.score.kld.mean > 0 else math.nan
    return ratio, paired_difference(list(other.parts), list(row.parts))


def plus_minus(value: Estimate, digits: int, scale: float = 1.0) -> str:
    """A mean and its error, both times scale."""
    # Adding 0 makes -0.0 0.0.
    return f"{round(value.mean * scale, digits) + 0.0:.{digits}f} ± {value.se * scale:.{digits}f}"


def number(value: float, digits: int) -> str:
    """A dash for nan."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def note(text: str) -> str:
    """On one line, without what ends a cell."""
    return text.replace("|", "/").replace("\n", " ")


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Cells, head and rule first, as a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
