"""Tables of tools/ladder: one a grid, one line a row, four columns a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import metrics
from metrics import Estimate

#: A difference counts as one when it is larger than this many standard errors.
SIGMAS = 2.0


@dataclass(frozen=True)
class Cell:
    """One job's outcome. answer: status, and the numbers of `ladder_run.run_job`. kld: of every scored position."""

    model: str
    grid: str
    row: str
    parent: str
    changes: str
    answer: Mapping[str, Any]
    kld: "metrics.F64 | None"

    @property
    def is_ok(self) -> bool:
        return self.answer["status"] == "ok"


def against(cells: Sequence[Cell]) -> dict[int, tuple[str, Estimate]]:
    """Per number of a cell: the row it is compared with, and the mean paired difference in KL divergence.

    Compared with the parent; if that was not measured on this model and grid, with the row above that was. A joined
    cell has what its own run found.
    """
    places = {(c.model, c.grid, c.row): c for c in cells if c.is_ok}
    above: dict[tuple[str, str], Cell] = {}
    found = {}
    for number, cell in enumerate(cells):
        if not cell.is_ok:
            continue
        if cell.kld is None:
            kept = cell.answer.get("delta")
            if kept:
                found[number] = (kept["to"], Estimate(kept["mean"], kept["se"]))
            continue
        other = places.get((cell.model, cell.grid, cell.parent))
        if other is None and cell.parent:
            other = above.get((cell.model, cell.grid))
        above[cell.model, cell.grid] = cell
        if other is not None and other.kld is not None and other.kld.shape == cell.kld.shape:
            found[number] = (other.row, metrics.estimate(cell.kld - other.kld))
    return found


def same_weights(cells: Sequence[Cell]) -> dict[int, str]:
    """Per number of a cell: an earlier row that gave the very same model, so that its change did nothing at all."""
    seen: dict[tuple[str, str, str], str] = {}
    found = {}
    for number, cell in enumerate(cells):
        if cell.is_ok:
            first = seen.setdefault((cell.model, cell.grid, cell.answer["weights_sha256"]), cell.row)
            if first != cell.row:
                found[number] = first
    return found


def tables(cells: Sequence[Cell]) -> str:
    """Markdown, one table a grid."""
    compared, same = against(cells), same_weights(cells)
    parts = []
    for grid in dict.fromkeys(c.grid for c in cells):
        numbers = [n for n, c in enumerate(cells) if c.grid == grid]
        parts.append(_table(grid, numbers, cells, compared, same))
    return "\n".join(parts)


def _table(
    grid: str, numbers: Sequence[int], cells: Sequence[Cell], compared: Mapping[int, tuple[str, Estimate]],
    same: Mapping[int, str],
) -> str:  # fmt: skip
    models = list(dict.fromkeys(cells[n].model for n in numbers))
    head = "| row | change | minus |" + "".join(f" {m}: bytes | KLD | Δ | ppl |" for m in models) + " helps |"
    lines = [f"## {grid}", "", head, "|---|---|---|" + "--:|--:|--:|--:|" * len(models) + "---|"]
    lines.append("| source | | |" + "".join(_source(m, numbers, cells) for m in models) + " |")
    notes: dict[str, list[str]] = {}
    for row in dict.fromkeys(cells[n].row for n in numbers):
        here = {cells[n].model: n for n in numbers if cells[n].row == row}
        deltas = [compared[n] for n in here.values() if n in compared]
        minus = " / ".join(dict.fromkeys(other for other, _ in deltas))
        text = "".join(_columns(here.get(m), cells, compared) for m in models)
        lines.append(
            f"| {row} | {cells[next(iter(here.values()))].changes} | {minus} |{text} {_verdict(deltas)} |"
        )
        for model, n in here.items():
            if not cells[n].is_ok:
                answer = cells[n].answer
                notes.setdefault(f"{answer['status']}: {answer.get('reason', '')}", []).append(
                    f"{model} {row}"
                )
            elif n in same:
                notes.setdefault(f"the very same weights as {same[n]}", []).append(f"{model} {row}")
    lines.append("")
    lines += [f"- {', '.join(where)}: {note.replace('|', '/')}" for note, where in notes.items()]
    return "\n".join(lines) + "\n"


def _source(model: str, numbers: Sequence[int], cells: Sequence[Cell]) -> str:
    ok = next((cells[n] for n in numbers if cells[n].model == model and cells[n].is_ok), None)
    return " | | | |" if ok is None else f" | | | {ok.answer['perplexity_source']:.3f} |"


def _columns(number: int | None, cells: Sequence[Cell], compared: Mapping[int, tuple[str, Estimate]]) -> str:
    if number is None:
        return " | | | |"
    answer = cells[number].answer
    if answer["status"] != "ok":
        return f" | {answer['status']} | | |"
    delta = compared.get(number)
    change = "" if delta is None else f"{delta[1].mean:+.4f} ± {delta[1].se:.4f}"
    kld = f"{answer['kld']:.4f} ± {answer['kld_se']:.4f}"
    return f" {answer['bytes']:,} | {kld} | {change} | {answer['perplexity']:.3f} |"


def _verdict(deltas: Sequence[tuple[str, Estimate]]) -> str:
    """`3 of 4, hurts 1`: on how many models the difference is a gain, or a loss, beyond SIGMAS standard errors."""
    if not deltas:
        return ""
    sure = [d.mean for _, d in deltas if abs(d.mean) > SIGMAS * d.se]
    gains, losses = sum(m < 0 for m in sure), sum(m > 0 for m in sure)
    return f"{gains} of {len(deltas)}" + (f", hurts {losses}" if losses else "")


def finite(value: Any) -> Any:
    """JSON has no nan: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value
