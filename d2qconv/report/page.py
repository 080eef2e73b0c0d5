"""The page of one run: what the file is, how good it is, where its errors are, and how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from d2qconv.progress import resumed
from d2qconv.report import plots
from d2qconv.report.html import (
    Cell,
    datum,
    document,
    duration,
    exact,
    folded,
    number,
    pairs,
    perplexity,
    significant,
    size,
    table,
    tag,
    text,
)
from d2qconv.report.schema import CheckEntry, PackageEntry, Report


def render(report: Report, data: bytes) -> bytes:
    """The page. data: the bytes of report.json, which it carries along. Equal bytes give equal pages."""
    body = tag(
        "main",
        {},
        _head(report),
        _section("What it is", _about(report)),
        _section(
            "Where the error is, and where the bits are",
            tag("div", {"class": "charts"}, *plots.drawn(report)),
        ),
        _section("Predicted and measured", *_predicted(report)),
        _section("Checks", _checks(report.package.checks)),
        *(_section(f"The same codes as {p.format}", _also(p)) for p in report.also),
        _corrections(report),
        _section("Memory and time", *_costs(report)),
        _section("Every tensor", folded(f"{len(report.tensors)} tensors", _tensors(report))),
        _section("To make it again", *_again(report)),
        _section("Files", *_files(report)),
        _foot(report),
    )
    return document(f"{report.package.name} · d2qconv report", body, data)


def _section(title: str, *content: str) -> str:
    return tag("section", {}, tag("h2", {}, text(title)), *content)


def _head(report: Report) -> str:
    q, package = report.quality, report.package
    n_ok = sum(c.is_passed and not c.is_skipped for c in package.checks)
    n_skipped = sum(c.is_skipped for c in package.checks)
    skipped = f", {n_skipped} not made here" if n_skipped else ""
    failed = len(package.checks) - n_ok - n_skipped
    tiles = (
        ("size", datum("n_bytes", package.n_bytes, size(package.n_bytes)), f"{package.n_bytes:,} bytes"),
        (
            "bits per weight",
            datum("bits_per_weight", report.bits_per_weight, f"{report.bits_per_weight:.3f}"),
            f"{report.kind}; metadata not counted",
        ),
        (
            "KL divergence",
            datum("kld", q.kld, significant(q.kld, 4)),
            f"nats per token from the source, {q.n_tokens:,} held-out tokens",
        ),
        (
            "perplexity",
            datum("perplexity", q.perplexity, perplexity(q.perplexity)),
            f"source {perplexity(q.perplexity_source)}, same tokens",
        ),
        ("same top token", datum("same_top", q.same_top, f"{q.same_top:.1%}"), "as the source"),
        (
            "checks",
            datum("checks_passed", n_ok, f"{n_ok} passed"),
            f"{failed} failed{skipped}",
        ),
    )
    drawn = (
        tag(
            "div",
            {},
            tag("span", {"class": "name"}, text(name)),
            tag("b", {}, value),
            tag("span", {}, text(note)),
        )
        for name, value, note in tiles
    )
    lead = f"{package.format} package of {report.source.name}, quantized on the grid that the file stores."
    return tag(
        "header",
        {},
        tag("h1", {}, text(package.name)),
        tag("p", {"class": "lead"}, text(lead)),
        tag("div", {"class": "tiles"}, *drawn),
    )


def _about(report: Report) -> str:
    s, package = report.source, report.package

    def listed() -> Iterator[tuple[str, str]]:
        yield "source", text(s.name)
        yield "revision", text(s.revision or "a folder, no revision")
        yield "licence", text(s.license or "the checkpoint names none")
        yield "weights", datum("n_weights", s.n_weights, f"{s.n_weights:,}") + text(f", {s.architecture}")
        yield "stored as", text(f"{report.kind}, layout {package.layout}")
        yield (
            "tensors take",
            datum("tensor_bytes", package.tensor_bytes, f"{package.tensor_bytes:,}")
            + text(f" bytes as planned; the whole package {package.n_bytes:,}"),
        )
        yield "loads in", text(", ".join(package.loads_in))
        yield "method", text(report.recipe)
        yield "calibration", text(report.calibration)
        yield "mean shift", text(f"{report.carrier}: {report.carrier_note}")
        if report.last_pass:
            yield "last pass", text(report.last_pass)
        if report.allocation is not None:
            a = report.allocation
            yield (
                "types",
                text(f"chosen for {a.asked}; predicted KL divergence ")
                + datum("predicted_kld", a.kld, significant(a.kld, 4))
                + text(f", measured {significant(report.quality.kld, 4)}"),
            )
        for warning in report.warnings:
            yield "mind", text(warning)

    return tag("div", {"class": "card"}, pairs(listed()))


def _predicted(report: Report) -> Iterator[str]:
    """Bytes as planned and as they came out, of every package, and where the package stands among others."""
    rows = (
        [
            Cell(p.name),
            Cell(p.format),
            number(p.tensor_bytes, f"{p.tensor_bytes:,}"),
            number(p.written, None if p.written is None else f"{p.written:,}"),
            number(p.n_bytes, f"{p.n_bytes:,}"),
        ]
        for p in (report.package, *report.also)
    )
    names = ("package", "format", "tensors, predicted", "tensors, measured", "all files, measured")
    caption = "Bytes; what the files have besides tensors are metadata and the tokenizer"
    yield tag("div", {"class": "card"}, table("predicted", caption, names, rows))
    yield tag("div", {"class": "charts single"}, *plots.position(report))


def _verdict(check: CheckEntry) -> str:
    if check.is_skipped:
        return "skipped"
    return "ok" if check.is_passed else "failed"


def _checks(checks: list[CheckEntry]) -> str:
    items = (
        tag(
            "li",
            {"data-name": c.name, "data-verdict": _verdict(c)},
            tag("span", {"class": _verdict(c)}, _verdict(c)),
            tag("span", {}, tag("b", {}, text(c.name)), text(f": {c.detail}")),
        )
        for c in checks
    )
    return tag("div", {"class": "card"}, tag("ul", {"class": "checks"}, *items))


def _also(package: PackageEntry) -> str:
    about = [("package", text(package.name)), ("size", text(f"{package.n_bytes:,} bytes"))]
    about.append(("loads in", text(", ".join(package.loads_in))))
    return tag("div", {"class": "card"}, pairs(about)) + _checks(package.checks)


def _corrections(report: Report) -> str:
    """Which carrier each correction took, and what it left; what a last pass did, block by block."""
    parts = []
    if report.folds:
        rows = (
            [
                Cell(f"block {f.block}"),
                Cell(f.name.replace("_", " ")),
                Cell(f.carrier),
                number(f.residual),
                Cell(f.meaning),
                number(f.explained, None if f.explained is None else f"{f.explained:.1%}"),
            ]
            for f in report.folds
        )
        names = ("block", "correction", "carrier", "left", "which is", "error removed")
        parts.append(
            folded(f"{len(report.folds)} corrections", table("folds", "What was carried how", names, rows))
        )
    passes = {f"block {b.index}": b.last_pass for b in report.blocks if b.last_pass is not None}
    if report.last_pass_notes is not None:
        passes["whole model"] = report.last_pass_notes
    if passes:
        rows = (
            [
                Cell(name),
                number(p.steps, str(p.steps)),
                Cell("kept" if p.kept else f"not kept: {p.why}"),
                number(p.trained_before),
                number(p.trained_after),
                number(p.reserved_before),
                number(p.reserved_after),
            ]
            for name, p in passes.items()
        )
        columns = (
            "where",
            "steps",
            "result",
            "loss before",
            "after",
            "on reserved sequences before",
            "after",
        )
        parts.append(folded("Last pass", table("last_pass", "Loss of storable values", columns, rows)))
    return _section("Corrections", *parts) if parts else ""


def _costs(report: Report) -> Iterator[str]:
    if report.resumed_blocks:
        note = resumed(report.resumed_blocks, len(report.blocks))
        yield tag("p", {"class": "lead", "id": "resumed"}, text(f"{note}."))
    yield tag("div", {"class": "charts"}, *plots.costs(report))


def _tensors(report: Report) -> str:
    rows = (
        [
            Cell(t.id),
            Cell(t.type),
            Cell("×".join(map(str, t.shape))),
            number(t.bits_per_weight),
            number(t.n_bytes, f"{t.n_bytes:,}"),
            number(t.written, None if t.written is None else f"{t.written:,}"),
            number(t.weight_error),
            number(t.output_error),
            number(t.kld),
            Cell(t.stored_as),
            Cell(t.note),
        ]
        for t in report.tensors
    )
    names = ("tensor", "type", "shape", "bits per weight", "bytes predicted", "bytes written", "weight error",
             "output error", "predicted KLD", "stored as", "note")  # fmt: skip
    caption = "Relative squared errors, of the weights and of the outputs on the calibration inputs"
    return table("tensors", caption, names, rows)


def _again(report: Report) -> Iterator[str]:
    if report.command:
        yield tag("div", {"class": "card"}, tag("pre", {"id": "command"}, text(shlex.join(report.command))))
        yield tag("p", {"class": "lead"}, "Names of files are given without their folders. Equal fingerprints on one "
                  "machine give equal weights.")  # fmt: skip
    e = report.environment
    about = [
        ("fingerprint", _code("fingerprint", report.fingerprint)),
        ("source, SHA-256 of config and weights", _code("source_sha256", report.source.sha256)),
        ("tokens, SHA-256", _code("tokens_sha256", report.tokens_sha256)),
        ("of them held out, SHA-256", _code("held_out_sha256", report.quality.held_out_sha256)),
        (
            "device",
            text(
                f"{e.device}, {e.threads} thread{'s' * (e.threads > 1)}, {e.processes} process"
                + "es" * (e.processes > 1)
            ),
        ),
        ("system", text(e.system)),
        ("versions", text(", ".join(f"{name} {version}" for name, version in e.versions.items()))),
    ]
    yield tag("div", {"class": "card"}, pairs(about))
    rows = ([Cell(name), Cell(value)] for name, value in _flat(report.options))
    yield folded("Every option in force", table("options", "Options", ("option", "value"), rows))


def _code(key: str, value: str) -> str:
    return tag("code", {"id": key}, text(value))


def _flat(options: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _files(report: Report) -> Iterator[str]:
    for package in (report.package, *report.also):
        rows = (
            [Cell(f.name), number(f.n_bytes, f"{f.n_bytes:,}"), Cell(f.sha256, is_code=True)]
            for f in package.files
        )
        names = ("file", "bytes", "SHA-256")
        drawn = table(f"files-{package.format}", f"{package.name}, {package.format}", names, rows)
        yield tag("div", {"class": "card"}, drawn)
        kept = ([Cell(name), Cell(value)] for name, value in package.provenance.items())
        yield folded(
            "What the package says of itself",
            table(f"says-{package.format}", "Provenance", ("key", "value"), kept),
        )


def _foot(report: Report) -> str:
    made = report.environment.versions.get("d2qconv", "")
    how = f"d2qconv {made}; report.json with digest {report.digest[:16]}… is in this page. The page runs no script."
    return tag("footer", {"data-digest": report.digest, "data-seconds": exact(report.seconds)}, tag("p", {}, text(
        f"{how} The run took {duration(report.seconds)}."
    )))  # fmt: skip
