"""Rows of tools/bench_onnx: the ratio to the best peer of equal bits and block size, as a markdown table."""

import math
from dataclasses import dataclass

from metrics import Estimate, Positions, Score
from onnx_package import Facts
from onnx_speed import Speed
from rows import best, markdown, note, number, plus_minus, versus

#: KLD over the best peer's that ours has to reach, by bits.
TARGETS = {2: 0.5, 4: 0.7}


@dataclass(frozen=True)
class Row:
    """One package. Without facts or score it could not be made or measured, and ``note`` says why.

    exact: mean KLD with every MatMulNBits at accuracy_level 1. parts: values by position, for paired differences.
    seconds: to make it, nan if it was given. digest: SHA-256 over graph and data.
    """

    who: str
    ours: bool
    bits: int
    block: int
    facts: Facts | None
    score: Score | None = None
    exact: Estimate | None = None
    speed: Speed | None = None
    note: str = ""
    failed: bool = False
    seconds: float = math.nan
    digest: str = ""
    parts: tuple[Positions, ...] = ()


@dataclass(frozen=True)
class Against:
    """A row beside the best peer of its bits and block. delta: KLD minus the peer's, paired. target: nan if none."""

    peer: str
    ratio: float
    delta: Estimate
    target: float

    @property
    def reached(self) -> bool:
        return self.ratio <= self.target


def best_peer(rows: list[Row], bits: int, block: int) -> Row | None:
    """The measured peer of the lowest KLD."""
    return best(r for r in rows if not r.ours and (r.bits, r.block) == (bits, block))


def against(rows: list[Row], row: Row) -> Against | None:
    """None without a score or a peer of these bits and block."""
    peer = best_peer(rows, row.bits, row.block) if row.bits <= 8 else None
    found = versus(row, peer)
    if peer is None or found is None:
        return None
    return Against(peer.who, *found, TARGETS.get(row.bits, math.nan) if row.ours else math.nan)


def _quality(rows: list[Row], row: Row, exact: bool) -> list[str]:
    if row.score is None:
        return ["–"] * (5 if exact else 4)
    found = against(rows, row)
    ratio = "–" if found is None else f"{found.ratio:.3f}"
    if found is not None and not math.isnan(found.target):
        ratio += f" ({'reaches' if found.reached else 'misses'} {found.target})"
    cells = [plus_minus(row.score.perplexity, 3), plus_minus(row.score.kld, 4)]
    if exact:
        cells.append("–" if row.exact is None else plus_minus(row.exact, 4))
    return [*cells, ratio, plus_minus(row.score.same_top, 1, 100.0) + " %"]


def _sizes(row: Row) -> list[str]:
    if row.facts is None:
        return ["–"] * 4
    f = row.facts
    return [f"{f.linear_bytes:,}", f"{f.bits_per_weight:.3f}", f"{f.total_bytes:,}", f.ends]


def _notes(row: Row) -> str:
    notes = [row.note] if row.note else []
    if row.facts is not None and row.bits <= 8:
        if row.facts.float_zeros:
            notes.append("float zeros: no int8 kernel")
        elif row.facts.levels != (4,):
            notes.append(f"accuracy_level {', '.join(map(str, row.facts.levels))}")
    if row.speed is not None and row.speed.error:
        notes.append(f"onnxruntime-genai: {row.speed.error}")
    return note("; ".join(notes))


def table(rows: list[Row], *, quality: bool, exact: bool, speed: bool) -> str:
    """Markdown, in the order of bits, block and rows; only the columns of what was measured."""
    head = ["bits", "block", "who", "bytes of linears", "bpw", "total bytes", "embedding / head"]
    if quality:
        head += [
            "perplexity",
            "mean KLD",
            *(["KLD, level 1"] if exact else []),
            "ratio to best peer",
            "same top token",
        ]
    if speed:
        head += ["prompt tok/s", "decode tok/s"]
    head.append("note")
    lines = [head, ["--:", "--:", "---", *["--:"] * 3, "---", *["--:"] * (len(head) - 8), "---"]]
    for row in sorted(rows, key=lambda r: (r.bits, r.block, r.ours)):
        name = f"**{row.who}**" if row.ours else row.who
        cells = [str(row.bits), str(row.block or "–"), name, *_sizes(row)]
        if quality:
            cells += _quality(rows, row, exact)
        if speed:
            found = row.speed or Speed()
            cells += [number(found.prompt, 0), number(found.decode, 1)]
        lines.append([*cells, _notes(row)])
    return markdown(lines)
