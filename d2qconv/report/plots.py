"""The charts of one run's page, each with the table of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from d2qconv.report.charts import Bar, Point, bars, cloud, curve, heat_map, histogram
from d2qconv.report.html import NONE, Cell, duration, figure, folded, number, significant, size, table
from d2qconv.report.schema import Contribution, MemoryEntry, Report, TensorEntry

#: Matrices of a block in the order of their use.
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
#: Of a cloud of packages.
AXES = ("MB", "nats")
_MARKS = {"50": "median", "99": "99 %"}


def drawn(report: Report) -> Iterator[str]:
    """Errors and bits."""
    yield _errors(report)
    yield _bits(report)
    if report.contribution is not None:
        yield _contribution(report.contribution)
    yield _depth(report)
    yield _spread(report)
    if report.allocation is not None:
        yield _prediction(report)


def costs(report: Report) -> Iterator[str]:
    """Memory and time."""
    for memory in report.memory:
        yield _memory(memory)
    yield _stages(report.stages)
    yield _block_seconds(report)


def _matrices(report: Report) -> list[TensorEntry]:
    return [t for t in report.tensors if t.part == "weight" and len(t.shape) == 2]


def _grid(report: Report, values: Mapping[str, tuple[float, str]], key: str, ramp: str, label: str) -> str:
    """A heat map by block and role; values: by tensor id. Embedding and head stand below the blocks."""
    rows: list[tuple[str, dict[str, tuple[float, str]]]] = []
    for block in report.blocks:
        own = [t for t in _matrices(report) if t.block == block.index and t.id in values]
        rows.append((f"{block.index}", {t.role: values[t.id] for t in own}))
    ends = [t for t in _matrices(report) if t.block is None and t.id in values]
    for tensor in ends:
        # In the first column, since none of the roles is theirs.
        rows.append((tensor.role, {ROLES[0]: values[tensor.id]}))
    return heat_map(key, label, ROLES, rows, ramp, len(report.blocks))


def _errors(report: Report) -> str:
    found = {
        t.id: (t.output_error, _percent(t.output_error))
        for t in _matrices(report)
        if t.output_error is not None
    }
    note = "Squared error of each matrix's output on the calibration inputs, in per cent of the output; log scale. "
    note += "Rows are blocks."
    rows = (
        [Cell(t.id), number(t.weight_error), number(t.output_error)]
        for t in _matrices(report)
        if t.output_error is not None
    )
    names = ("matrix", "weight error", "output error")
    numbers = folded("Numbers", table("errors", "Relative squared errors", names, rows))
    return figure(
        "Output error by block and matrix", _grid(report, found, "error-map", "e", note), note, numbers
    )


def _percent(value: float | None) -> str:
    if value is None:
        return NONE
    share = 100 * value
    return f"{share:.1e}" if 0 < share < 0.01 else significant(share, 2 if share >= 0.1 else 1)


def _bits(report: Report) -> str:
    found = {t.id: (t.bits_per_weight, f"{t.bits_per_weight:.2f}") for t in _matrices(report)}
    note = "Bits per weight of each matrix, parameters included. Rows are blocks."
    sizes: dict[tuple[str, str], list[TensorEntry]] = {}
    for t in report.tensors:
        sizes.setdefault((f"{t.role}.{t.part}", t.type), []).append(t)
    rows = (
        [
            Cell(role),
            Cell(kind),
            number(len(alike), str(len(alike))),
            number(alike[0].bits_per_weight),
            number(sum(t.n_bytes for t in alike), f"{sum(t.n_bytes for t in alike):,}"),
        ]
        for (role, kind), alike in sizes.items()
    )
    names = ("tensors", "type", "n", "bits", "bytes")
    numbers = folded("Numbers", table("bits", "By role and type", names, rows))
    return figure("Bits by block and matrix", _grid(report, found, "bits-map", "s", note), note, numbers)


def _contribution(c: Contribution) -> str:
    parts = [
        ("embedding", c.embedding),
        *((f"block {k}", v) for k, v in enumerate(c.blocks)),
        ("output", c.output),
    ]
    if c.last_pass is not None:
        parts.append(("last pass", c.last_pass))
    note = (
        f"{significant(c.total, 4)} nats per token on {c.n_tokens} held-out tokens: by how much the divergence rises "
        "as each part is quantized in turn, the rest being the source's. Below zero it makes up for those before it."
    )
    drawing = bars("kld-map", note, [Bar(name, v, significant(v)) for name, v in parts if v is not None])
    rows = ([Cell(name), number(v)] for name, v in (*parts, ("all", c.total)))
    numbers = folded("Numbers", table("contribution", "Nats per token", ("part", "contribution"), rows))
    return figure("Where the divergence comes from", drawing, note, numbers)


def _depth(report: Report) -> str:
    points = [
        Point(str(b.index), b.index, 100 * b.error, f"behind block {b.index}: {_percent(b.error)} %")
        for b in report.blocks
        if b.error is not None
    ]
    note = (
        "Squared error of the activations behind each block on held-out tokens, in per cent of the source's."
    )
    rows = ([Cell(f"block {b.index}"), number(b.error)] for b in report.blocks)
    numbers = folded("Numbers", table("depth", "Relative squared error", ("behind", "error"), rows))
    return figure("Error along the depth", curve("depth-curve", note, points, "block"), note, numbers)


def _spread(report: Report) -> str:
    s = report.quality.spread
    found = {name: s.quantiles.get(p) for p, name in _MARKS.items()} | {"mean": report.quality.kld}
    marks = {name: value for name, value in found.items() if value is not None}
    note = f"KL divergence of each of {report.quality.n_tokens:,} held-out tokens, in nats; log scale."
    drawing = histogram("kld-histogram", note, s.edges, s.counts, marks)
    rows = (
        [Cell(f"{s.edges[k]:.2g} to {s.edges[k + 1]:.2g}"), number(n, f"{n:,}")]
        for k, n in enumerate(s.counts)
    )
    ranks = ([Cell(f"{p} %"), number(value)] for p, value in s.quantiles.items())
    numbers = folded(
        "Numbers",
        table("quantiles", "Quantiles", ("of the tokens", "nats, interpolated"), ranks),
        table("histogram", "Bins", ("nats", "tokens"), rows),
    )
    return figure("Divergence over tokens", drawing, note, numbers)


def _prediction(report: Report) -> str:
    assert report.allocation is not None
    a, measured = report.allocation, report.quality.kld
    listed = [
        Bar("predicted", a.kld, significant(a.kld, 4), kind=1),
        *([] if measured is None else [Bar("measured", measured, significant(measured, 4))]),
    ]
    note = (
        f"The types were chosen for {a.asked} by what each costs alone; the sum is set against what came out."
    )
    return figure("Predicted and measured divergence", bars("prediction", note, listed), note)


def point(name: str, n_bytes: int, kld: float) -> Point:
    """A package in a cloud of size and divergence."""
    # A divergence of zero has no place on a logarithmic axis.
    tip = f"{name}: {size(n_bytes)}, {significant(kld, 4)} nats"
    return Point(name, max(n_bytes, 1) / 1e6, max(kld, 1e-9), tip)


def position(report: Report) -> Iterator[str]:
    """The packages as points of divergence over size; where types were chosen, on the curve that there was."""
    kld = report.quality.kld
    if kld is None:
        return
    points = [point(package.name, package.n_bytes, kld) for package in (report.package, *report.also)]
    curve: list[Point] = []
    note = "Mean KL divergence over the size of the package; both axes are logarithmic. "
    if report.allocation is not None:
        package = report.package
        points.append(point("predicted", package.n_bytes, report.allocation.kld))
        # The curve counts tensors alone.
        besides = package.n_bytes - package.tensor_bytes
        curve += [point("choice", max(n + besides, 0), nats) for n, nats in report.allocation.curve]
        note += "The line is what other sizes were predicted to give, from the same types to choose from. "
    note += "“d2qconv report THIS.report.json OTHER.report.json -o PAGE.html” sets it beside packages of other runs."
    yield figure("Divergence over size", cloud("position", note, points, curve, AXES), note)


def _memory(memory: MemoryEntry) -> str:
    listed = [
        Bar("predicted", memory.predicted, size(memory.predicted), kind=1),
        Bar("measured", memory.measured, size(memory.measured)),
    ]
    if memory.budget is not None and memory.budget <= 4 * max(memory.predicted, memory.measured):
        listed.append(Bar("budget", memory.budget, size(memory.budget), kind=1))
    note = f"Peak of {memory.kind} memory; predicted for the phase “{memory.phase}”."
    rows = ([Cell(name), number(n, f"{n:,}")] for name, n in memory.parts.items())
    numbers = folded(
        "What the prediction counts", table(f"memory-{memory.kind}", "Bytes", ("part", "bytes"), rows)
    )
    key = f"memory-{memory.kind}-bars"
    return figure(
        f"{memory.kind[:1].upper()}{memory.kind[1:]} memory", bars(key, note, listed), note, numbers
    )


def _stages(stages: Mapping[str, float]) -> str:
    listed = [Bar(name, seconds, duration(seconds)) for name, seconds in stages.items()]
    note = f"{duration(sum(stages.values()))} in all."
    rows = ([Cell(name), number(s)] for name, s in stages.items())
    numbers = folded("Numbers", table("stages", "Seconds", ("stage", "seconds"), rows))
    return figure("Time by stage", bars("stage-bars", note, listed), note, numbers)


def _block_seconds(report: Report) -> str:
    listed = [Bar(f"block {b.index}", b.seconds, duration(b.seconds)) for b in report.blocks]
    note = "Quantizing each block; nothing for those that an earlier run, cut off, had left."
    rows = (
        [
            Cell(f"block {b.index}"),
            number(b.seconds),
            number(b.n_bytes, f"{b.n_bytes:,}"),
            number(b.bits_per_weight),
        ]
        for b in report.blocks
    )
    names = ("block", "seconds", "bytes", "bits per weight")
    numbers = folded("Numbers", table("blocks", "Blocks", names, rows))
    return figure("Time by block", bars("block-bars", note, listed), note, numbers)
