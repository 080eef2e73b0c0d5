"""Rows of tools/bench_safetensors as a markdown table: each beside the best package that is not ours."""

import math
from dataclasses import dataclass

from hf_package import Facts
from metrics import Estimate, Positions, Score, paired_difference


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
    found = [r for r in rows if r.rival and r.score is not None and r.bits == bits]
    return min(found, key=lambda r: r.score.kld.mean if r.score else math.inf, default=None)


def against(rows: list[Row], row: Row) -> Against | None:
    """None without a score or a rival of these bits, and for the source."""
    rival = best_rival(rows, row.bits)
    if row.score is None or rival is None or rival.score is None or not row.score.kld.mean > 0:
        return None
    delta = paired_difference(list(rival.parts), list(row.parts))
    return Against(rival.who, row.score.kld.mean / rival.score.kld.mean, delta)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def _estimate(value: Estimate, digits: int, scale: float = 1.0) -> str:
    # Adding 0 makes -0.0 0.0.
    return f"{round(value.mean * scale, digits) + 0.0:.{digits}f} ± {value.se * scale:.{digits}f}"


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
            _estimate(s.perplexity, 3), _estimate(s.kld, 4), "–" if found is None else f"{found.ratio:.3f}",
            _estimate(s.same_top, 1, 100.0) + " %",
        ]  # fmt: skip
        cells += [
            _number(row.seconds, 1),
            _number(row.quantize, 1),
            row.note.replace("|", "/").replace("\n", " "),
        ]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
