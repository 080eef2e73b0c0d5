"""A report's page in a real browser: what it shows, held against its report.json. `tools/check_page` uses it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from browser import seen

from d2qconv.report.schema import Report, decode

#: Widths of a phone and of a desk.
WIDTHS = [375, 1280]
_READ = """
  const texts = (list) => [...list].map((e) => e.textContent);
  const data = Object.fromEntries([...document.querySelectorAll("data[id]")].map(
    (e) => [e.id, [Number(e.value), e.innerText]]));
  const cell = (td) => td.dataset.value === undefined ? td.innerText : Number(td.dataset.value);
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const tables = Object.fromEntries([...document.querySelectorAll("table[id]")].map((t) => [t.id,
    [...t.tBodies[0].rows].map((r) => [r.cells[0].innerText, ...[...r.cells].slice(1).map(cell)])]));
  const charts = Object.fromEntries([...document.querySelectorAll("svg[id]")].map((s) => [s.id,
    [...s.querySelectorAll("[data-value]")].map((e) => [e.dataset.name, Number(e.dataset.value)])]));
  const bar = document.querySelector("svg .bar"), view = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll")
    && e.getBoundingClientRect().right > view.clientWidth + 0.5).map((e) => e.tagName + "#" + e.id);
  return {data, tables, charts, wide, command: document.getElementById("command").innerText,
    json: document.getElementById("report").textContent,
    verdicts: texts(document.querySelectorAll(".checks li > span")),
    scroll: [view.scrollWidth, view.clientWidth], font: parseFloat(window.getComputedStyle(document.body).fontSize),
    fill: window.getComputedStyle(bar).fill, loaded: window.performance.getEntriesByType("resource").length};
"""


def views(page: bytes, folder: Path) -> list[Any]:
    """What the browser shows of a page at each of WIDTHS. folder: for its files."""
    return seen(page, WIDTHS, _READ, folder)


def n_equal(data: bytes, view: Any) -> int:
    """How many numbers of a view are those of report.json, whose bytes are `data`; AssertionError if one is not."""
    report = decode(data, "report.json")
    assert json.loads(view["json"]) == json.loads(data), "the page carries another report"
    n = 0
    for what, shown, wanted in _pairs(report, view):
        assert shown == wanted, f"{what}: {shown} on the page, {wanted} in the report"
        n += len(wanted) if isinstance(wanted, list | dict) else 1
    return n


def require_fits(view: Any) -> None:
    """Nothing reaches beyond the screen, nothing is fetched, and the style sheet passes the page's own policy."""
    assert view["scroll"][0] <= view["scroll"][1]
    assert view["wide"] == []
    assert view["loaded"] == 0
    assert view["font"] == 16
    assert view["fill"] in ("rgb(47, 98, 201)", "rgb(121, 165, 242)")


def _pairs(report: Report, view: Any) -> list[tuple[str, Any, Any]]:
    """(what, as shown, as reported) of every figure, table and chart; lists are flat."""
    data, tables, charts = view["data"], view["tables"], view["charts"]
    q, p, c = report.quality, report.package, report.contribution
    heads = {
        "kld": q.kld,
        "n_bytes": p.n_bytes,
        "bits_per_weight": report.bits_per_weight,
        "perplexity": q.perplexity,
        "same_top": q.same_top,
        "n_weights": report.source.n_weights,
        "tensor_bytes": p.tensor_bytes,
    }
    outputs = sorted(t.output_error for t in report.tensors if t.output_error is not None)
    pairs: list[tuple[str, Any, Any]] = [
        ("figures", {k: v for k, (v, _) in data.items() if k != "checks_passed"}, heads),
        ("checks", data["checks_passed"][0], sum(k.is_passed and not k.is_skipped for k in p.checks)),
        ("tensors", _flat(tables["tensors"], 0, 3, 4, 5), [
            x for t in report.tensors for x in (t.id, t.bits_per_weight, t.n_bytes, t.written)]),
        ("errors", _flat(tables["tensors"], 6, 7), [
            "–" if e is None else e for t in report.tensors for e in (t.weight_error, t.output_error)]),
        ("error map", sorted(v for _, v in charts["error-map"]), outputs),
        ("depth", [v for _, v in charts["depth-curve"]], [100 * b.error for b in report.blocks if b.error is not None]),
        ("histogram", [row[1] for row in tables["histogram"]], q.spread.counts),
        ("histogram's sum", sum(v for _, v in charts["kld-histogram"]), q.n_tokens),
        ("stages", [row[1] for row in tables["stages"]], list(report.stages.values())),
        ("files", _flat(tables[f"files-{p.format}"], 0, 1, 2), [
            x for f in p.files for x in (f.name, f.n_bytes, f.sha256)]),
        ("bytes", tables["predicted"][0][2:], [p.tensor_bytes, p.written, p.n_bytes]),
    ]  # fmt: skip
    if c is not None:
        parts = [c.embedding, *c.blocks, c.output]
        pairs.append(("contributions", [v for _, v in charts["kld-map"]], parts))
    return pairs


def _flat(table: Any, *columns: int) -> list[Any]:
    return [row[column] for row in table for column in columns]
