"""Points of file size and KL divergence: joined runs, the curve of one maker, and where others lie against it.

The curve of a maker is its Pareto frontier, the files that no smaller or equal file of the same maker beats, joined by
lines in bytes and log KLD. Such a line is what a mix of the two types reaches, about; the points are what was measured.
Left of its first point the curve is extended along its first line, but by at most NEAR of the size: the difference in
metadata of two files of one type is less, and further left there is nothing to compare with. Right of its last point it
stays level: that file may be taken, being smaller.
Needs no plotting library.
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: How far left of its first point a curve reaches, as a part of that point's bytes.
NEAR = 0.01

#: What `who` starts with in the rows of tools/compare_llama_cpp.
OURS, STOCK = "d2qconv", "llama.cpp"
#: The "type" of the unquantized file's row there.
SOURCE = "source"


@dataclass(frozen=True)
class Point:
    """One measured file. kld: mean KL divergence in nats a token, > 0; se: its standard error."""

    type_name: str
    who: str
    n_bytes: int
    kld: float
    se: float


@dataclass(frozen=True)
class Joined:
    """All runs of one model. text, n_ctx, n_chunks: what was measured on; perplexity: the source file's."""

    model: str
    text: str
    n_ctx: int
    n_chunks: int
    perplexity: float
    points: tuple[Point, ...]

    def of(self, prefix: str) -> list[Point]:
        """The points whose maker starts so."""
        return [p for p in self.points if p.who.startswith(prefix)]


class Verdict(StrEnum):
    ABOVE = "above our curve"
    BELOW = "ON OR BELOW OUR CURVE"
    OUTSIDE = "SMALLER THAN ALL OF OURS"


@dataclass(frozen=True)
class Judged:
    """A point against a curve. ours: the curve's KLD at its bytes, nan where it has none. how: from which points."""

    point: Point
    ours: float
    how: str
    verdict: Verdict


class RunError(ValueError):
    """Runs that cannot be read or joined; the message says why."""


def joined(records: Iterable[Mapping[str, Any]]) -> list[Joined]:
    """One Joined a model, of the JSON records of tools/compare_llama_cpp; later rows replace equal (type, who).

    Rows without a score are left out. Raises RunError for runs of one model on different text.
    """
    models: dict[str, dict[tuple[str, str], Point]] = {}
    protocols: dict[str, Mapping[str, Any]] = {}
    perplexities: dict[str, float] = {}
    for record in records:
        if "model" not in record or "heldout" not in record:
            raise RunError(
                "a run names no model: measure it again with this version's tools/compare_llama_cpp"
            )
        name, heldout = record["model"], record["heldout"]
        if protocols.setdefault(name, heldout) != heldout:
            raise RunError(
                f"{name}: runs on different text cannot be joined: {protocols[name]} and {heldout}"
            )
        rows = models.setdefault(name, {})
        for row in record["rows"]:
            if row["type_name"] == SOURCE:
                perplexities[name] = row["score"]["perplexity"]["mean"]
            elif row["score"] is not None and row["score"]["kld"]["mean"] > 0:
                kld = row["score"]["kld"]
                rows[row["type_name"], row["who"]] = Point(
                    row["type_name"], row["who"], row["n_bytes"], kld["mean"], kld["se"] or 0.0
                )
    return [
        Joined(
            name, protocols[name]["text"], protocols[name]["n_ctx"], protocols[name]["n_chunks"],
            perplexities.get(name, math.nan), tuple(rows.values()),
        )
        for name, rows in models.items()
    ]  # fmt: skip


def frontier(points: Iterable[Point]) -> list[Point]:
    """Those that none of the others beats, by bytes: bytes rise, KLD falls, both strictly."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.n_bytes, p.kld)):
        if not kept or point.kld < kept[-1].kld:
            kept.append(point)
    return kept


def _line(left: Point, right: Point, n_bytes: int) -> float:
    """KLD at n_bytes on the line through two points, straight in bytes and log KLD."""
    part = (n_bytes - left.n_bytes) / (right.n_bytes - left.n_bytes)
    return math.exp(math.log(left.kld) + part * (math.log(right.kld) - math.log(left.kld)))


def at(curve: Sequence[Point], n_bytes: int) -> tuple[float, str]:
    """The curve's KLD at that size, and from which of its points; (nan, reason) left of what it reaches.

    curve: of `frontier`.
    """
    place = bisect.bisect_right([p.n_bytes for p in curve], n_bytes)
    if place == 0:
        if not curve:
            return math.nan, "we have none"
        first = curve[0]
        missing = f"{first.n_bytes - n_bytes:,} bytes left of {first.type_name}"
        if len(curve) < 2 or first.n_bytes - n_bytes > NEAR * first.n_bytes:
            return math.nan, missing
        return _line(first, curve[1], n_bytes), missing
    left = curve[place - 1]
    if place == len(curve) or left.n_bytes == n_bytes:
        return left.kld, left.type_name
    right = curve[place]
    return _line(left, right, n_bytes), f"{left.type_name} … {right.type_name}"


def judged(points: Iterable[Point], curve: Sequence[Point]) -> list[Judged]:
    """Each point against the curve, by bytes."""
    found = []
    for point in sorted(points, key=lambda p: (p.n_bytes, p.kld)):
        ours, how = at(curve, point.n_bytes)
        verdict = Verdict.BELOW if point.kld <= ours else Verdict.ABOVE
        found.append(Judged(point, ours, how, Verdict.OUTSIDE if math.isnan(ours) else verdict))
    return found


def table(rows: Sequence[Judged]) -> str:
    """Markdown, one line a point."""
    lines = [
        "| who | type | bytes | mean KLD | ours at these bytes | ours / theirs | from | |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        p = row.point
        ours, ratio = ("–", "–") if math.isnan(row.ours) else (f"{row.ours:.4f}", f"{row.ours / p.kld:.3f}")
        lines.append(
            f"| {p.who} | {p.type_name} | {p.n_bytes:,} | {p.kld:.4f} ± {p.se:.4f} | {ours} | {ratio} "
            f"| {row.how} | {row.verdict} |"
        )
    return "\n".join(lines) + "\n"
