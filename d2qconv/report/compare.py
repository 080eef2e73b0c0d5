"""The page of several runs: their divergence over their size, and the ladder from one to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from d2qconv.report.charts import Point, cloud
from d2qconv.report.html import (
    NONE,
    Cell,
    document,
    figure,
    number,
    perplexity,
    significant,
    table,
    tag,
    text,
)
from d2qconv.report.plots import AXES, point
from d2qconv.report.schema import LARGEST, Report


def render_several(reports: Sequence[Report]) -> bytes:
    """The page, smallest package first. Equal reports give equal pages."""
    listed = sorted(reports, key=_place)
    front = pareto(listed)
    rows = ([*_row(r), *_step(listed, k), Cell("yes" if r in front else "no")] for k, r in enumerate(listed))
    names = ("package", "type", "bytes", "bits per weight", "KL divergence", "same top", "perplexity", "method",
             "KL divergence over the row above", "on the front")  # fmt: skip
    ladder = table("ladder", "Smallest first; KL divergence in nats per token", names, rows)
    note = "Mean KL divergence from the source over the size of the package; both axes are logarithmic. Joined are the "
    note += "packages that none is both smaller and closer than."
    drawing = cloud("pareto", note, _points(listed), _points(front), AXES)
    warnings = [tag("li", {}, text(w)) for w in differences(listed)]
    body = tag(
        "main",
        {},
        tag("h1", {}, text(f"{len(listed)} packages compared")),
        tag("ul", {"class": "lead", "id": "mind"}, *warnings) if warnings else "",
        tag("div", {"class": "charts single"}, figure("Divergence over size", drawing, note)),
        tag("section", {}, tag("h2", {}, "Ladder"), tag("div", {"class": "card"}, ladder)),
        tag(
            "footer", {}, tag("p", {}, "Each row is the report of a run of d2qconv. The page runs no script.")
        ),
    )
    return document(f"{len(listed)} packages · d2qconv", body)


def pareto(reports: Sequence[Report]) -> list[Report]:
    """Those that no other one beats in size or divergence without losing in the other; by size."""
    found: list[Report] = []
    for report in sorted(reports, key=_place):
        if not found or _place(report)[1] < _place(found[-1])[1]:
            found.append(report)
    return found


def _place(report: Report) -> tuple[int, float]:
    """Size, and divergence: what was not finite is the worst."""
    kld = report.quality.kld
    return report.package.n_bytes, math.inf if kld is None else kld


def differences(reports: Sequence[Report]) -> list[str]:
    """Why these runs' figures may not be compared, as far as their reports tell."""
    found = []
    if len({r.source.sha256 for r in reports}) > 1:
        found.append("They are of different sources: their divergences say nothing about each other.")
    if len({r.quality.held_out_sha256 for r in reports}) > 1:
        found.append(
            "They were not measured on the same tokens: small differences of the divergence mean nothing."
        )
    return found


def _points(reports: Sequence[Report]) -> list[Point]:
    """Those that have a divergence."""
    return [
        point(r.package.name, r.package.n_bytes, r.quality.kld) for r in reports if r.quality.kld is not None
    ]


def _row(report: Report) -> list[Cell]:
    q = report.quality
    return [
        Cell(report.package.name),
        Cell(report.kind),
        number(report.package.n_bytes, f"{report.package.n_bytes:,}"),
        number(report.bits_per_weight, f"{report.bits_per_weight:.3f}"),
        number(q.kld, significant(q.kld, 4)),
        number(q.same_top, f"{q.same_top:.1%}"),
        number(q.perplexity, perplexity(q.perplexity)),
        Cell(report.recipe),
    ]


def _step(listed: Sequence[Report], k: int) -> list[Cell]:
    """The ratio to the row above."""
    before, kld = listed[k - 1].quality.kld if k else None, listed[k].quality.kld
    if before is None or kld is None or before <= 0 or kld / before > LARGEST:
        return [Cell(NONE)]
    return [Cell(f"{kld / before:.3f}", kld / before)]
