"""The options of every command, and what options are made of.

By themselves, since every start of the command line needs them: those of a conversion are in `options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from d2qconv.console import Console


def group(title: str, place: int) -> Parameter:
    """Fields of a dataclass as options of their own, under one heading of the help."""
    return Parameter(name="*", group=Group(title, sort_key=place))


Flag = Annotated[bool, Parameter(negative="", show_default=False)]
OutputPath = Annotated[Path | None, Parameter(name=("--output", "-o"))]


@group("Report", 6)
@dataclass(frozen=True)
class Report:
    """What is printed."""

    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"), negative="", show_default=False)] = False
    """Print only the last line."""
    json: Flag = False
    """Print one JSON object on standard output, and nothing else."""
    progress: Literal["auto", "bar", "lines", "json", "none"] = "auto"
    """On standard error: a bar, lines, or a JSON object a line. auto is a bar on a terminal, lines elsewhere, and
    nothing with --quiet or --json."""

    def tell(self, console: Console) -> None:
        """Have the console print so."""
        console.ask(is_json=self.json, is_quiet=self.quiet, progress=self.progress)
