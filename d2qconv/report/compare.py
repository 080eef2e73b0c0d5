"""The page of several runs: their divergence over their size, and the ladder from one to the next."""

from __future__ import annotations

from collections.abc import Sequence

from d2qconv.report.charts import Point, cloud
from d2qconv.report.html import Cell, document, figure, number, significant, size, table, tag, text
from d2qconv.report.schema import Report


def render_several(reports: Sequence[Report]) -> bytes:
    """The page, smallest package first. Equal reports give equal pages."""
    listed = sorted(reports, key=lambda r: (r.package.n_bytes, r.quality.kld))
    front = pareto(listed)
    rows = ([*_row(r), *_step(listed, k), Cell("yes" if r in front else "no")] for k, r in enumerate(listed))
    names = ("package", "type", "bytes", "bits per weight", "KL divergence", "same top", "perplexity", "method",
             "KL divergence over the row above", "on the front")  # fmt: skip
    ladder = table("ladder", "Smallest first; KL divergence in nats per token", names, rows)
    note = "Mean KL divergence from the source over the size of the package; both axes are logarithmic. Joined are the "
    note += "packages that none is both smaller and closer than."
    drawing = cloud("pareto", note, [_point(r) for r in listed], [_point(r) for r in front], ("MB", "nats"))
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
    for report in sorted(reports, key=lambda r: (r.package.n_bytes, r.quality.kld)):
        if not found or report.quality.kld < found[-1].quality.kld:
            found.append(report)
    return found


def differences(reports: Sequence[Report]) -> list[str]:
    """Why these runs' figures may not be compared, as far as their reports tell."""
    found = []
    if len({r.source.sha256 for r in reports}) > 1:
        found.append("They are of different sources: their divergences say nothing about each other.")
    if len({r.tokens_sha256 for r in reports}) > 1:
        found.append(
            "They were not measured on the same tokens: small differences of the divergence mean nothing."
        )
    return found


def _point(report: Report) -> Point:
    # A divergence of zero has no place on a logarithmic axis.
    kld, n = max(report.quality.kld, 1e-9), report.package.n_bytes
    tip = f"{report.package.name}: {size(n)}, {significant(report.quality.kld, 4)} nats"
    return Point(report.package.name, max(n, 1) / 1e6, kld, tip)


def _row(report: Report) -> list[Cell]:
    q = report.quality
    return [
        Cell(report.package.name),
        Cell(report.kind),
        number(report.package.n_bytes, f"{report.package.n_bytes:,}"),
        number(report.bits_per_weight, f"{report.bits_per_weight:.3f}"),
        number(q.kld, significant(q.kld, 4)),
        number(q.same_top, f"{q.same_top:.1%}"),
        number(q.perplexity, f"{q.perplexity:.3f}"),
        Cell(report.recipe),
    ]


def _step(listed: Sequence[Report], k: int) -> list[Cell]:
    """The ratio to the row above."""
    if k == 0 or listed[k - 1].quality.kld <= 0:
        return [Cell("–")]
    ratio = listed[k].quality.kld / listed[k - 1].quality.kld
    return [Cell(f"{ratio:.3f}", ratio)]
