"""Rows of tools/bench_safetensors as a markdown table: each beside the best package that is not ours."""

import math
from dataclasses import dataclass

from hf_package import Facts
from metrics import Estimate, Positions, Score
from rows import best, markdown, note, number, plus_minus, versus


@dataclass(frozen=True)
class Row:
    """One package. Without facts or score it could not be made or measured, and ``note`` says why.

    ours: made by d2qconv. rival: of another method, so that ours is measured against it. seconds: of its whole
    process, from the start to the written package; quantize: of that the library's own work, nan where it is not
    told apart. gpu_bytes: peak of PyTorch's allocator, 0 without a GPU or not measured. parts: values by position.
    """

    who: str
    ours: bool
    rival: bool
    bits: int
    settings: str
    facts: Facts | None = None
    score: Score | None = None
    seconds: float = math.nan
    quantize: float = math.nan
    gpu_bytes: int = 0
    version: str = ""
    note: str = ""
    parts: tuple[Positions, ...] = ()


@dataclass(frozen=True)
class Against:
    """A row beside the best rival of its bits. delta: its KLD minus the rival's, paired by position."""

    rival: str
    ratio: float
    delta: Estimate


def best_rival(rows: list[Row], bits: int) -> Row | None:
    """The measured rival of the lowest KLD."""
    return best(r for r in rows if r.rival and r.bits == bits)


def against(rows: list[Row], row: Row) -> Against | None:
    """None without a score or a rival of these bits, and for the source."""
    rival = best_rival(rows, row.bits)
    found = versus(row, rival)
    if rival is None or found is None or row.score is None or not row.score.kld.mean > 0:
        return None
    return Against(rival.who, *found)


def table(rows: list[Row]) -> str:
    """Markdown in the order of bits and rows."""
    head = [
        "bits",
        "who",
        "settings",
        "bytes of linears",
        "bpw",
        "total bytes",
        "embedding, head",
        "perplexity",
    ]
    head += ["mean KLD", "to the best rival", "same top token", "seconds", "of it quantizing", "note"]
    lines = [head, ["--:", "---", "---", *["--:"] * 3, "---", *["--:"] * 6, "---"]]
    for row in sorted(rows, key=lambda r: (r.bits, r.ours)):
        cells = [str(row.bits), f"**{row.who}**" if row.ours else row.who, row.settings]
        f, s = row.facts, row.score
        cells += ["–"] * 4 if f is None else [
            f"{f.linear_bytes:,}", f"{f.bits_per_weight:.3f}", f"{f.total_bytes:,}", f.ends
        ]  # fmt: skip
        found = against(rows, row)
        cells += ["–"] * 4 if s is None else [
            plus_minus(s.perplexity, 3), plus_minus(s.kld, 4), "–" if found is None else f"{found.ratio:.3f}",
            plus_minus(s.same_top, 1, 100.0) + " %",
        ]  # fmt: skip
        cells += [
            number(row.seconds, 1),
            number(row.quantize, 1),
            note(row.note),
        ]
        lines.append(cells)
    return markdown(lines)
