"""The picture of tools/pareto, by matplotlib: 5 × 5 inches, so that its text is readable at a phone's width too."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox
from pareto import OURS, STOCK, Joined, Point, frontier

INCHES, DPI = (5.0, 5.2), 200
#: Ours, stock, then the others: colours of Okabe and Ito, which the colour-blind tell apart too.
STYLES = (
    ("#0072B2", "o", "-"), ("#D55E00", "s", "-"), ("#009E73", "^", "--"), ("#CC79A7", "v", "--"),
    ("#7F7F7F", "D", ":"), ("#E69F00", "P", ":"), ("#56B4E9", "X", ":"),
)  # fmt: skip
#: Shift from the point in points of 1/72 inch, horizontal and vertical alignment.
Place: TypeAlias = tuple[float, float, str, str]
_SIDES: tuple[Place, ...] = (
    (1, 0.7, "left", "bottom"), (-1, -0.7, "right", "top"), (1, -0.7, "left", "top"),
    (-1, 0.7, "right", "bottom"), (1.2, 0, "left", "center"), (-1.2, 0, "right", "center"),
    (0, 1.2, "center", "bottom"), (0, -1.2, "center", "top"),
)  # fmt: skip
#: Places of a point's name, nearest first.
PLACES: tuple[Place, ...] = tuple(
    (x * r, y * r, ha, va) for r in (5, 8, 12, 18, 26) for x, y, ha, va in _SIDES
)
#: A name shifted by more points has a line to its point.
FAR = 11.0


@dataclass(frozen=True)
class Series:
    """One maker's points, and how they are drawn."""

    who: str
    points: tuple[Point, ...]
    colour: str
    marker: str
    line: str


@dataclass(frozen=True)
class Scene:
    """What names must keep clear of, all in pixels: boxes of the markers and the legend, points on lines, the axes."""

    markers: dict[Point, Bbox]
    taken: list[Bbox]
    paths: list[tuple[float, float]]
    frame: Bbox


def series(run: Joined) -> list[Series]:
    """All of ours in one, then stock, then the others in the order of the runs."""
    makers = dict.fromkeys(p.who for p in run.points if not p.who.startswith(OURS))
    groups = [(OURS, run.of(OURS))]
    for who in sorted(makers, key=lambda w: not w.startswith(STOCK)):
        groups.append((who, [p for p in run.points if p.who == who]))
    return [
        Series(who, tuple(points), *STYLES[i % len(STYLES)])
        for i, (who, points) in enumerate(groups)
        if points
    ]


def draw(run: Joined, file: Path) -> None:
    """Write the picture; the file name's end says the format."""
    # The salt: the same input gives the same SVG.
    mpl.rcParams.update({"font.size": 9.5, "svg.hashsalt": OURS})
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, name = (1e9, "GB") if max(p.n_bytes for p in run.points) >= 1e9 else (1e6, "MB")
    drawn = series(run)
    for s in drawn:
        _lines(axes, s, unit)
    _axes(axes, run, name)
    canvas.draw()  # type: ignore[no-untyped-call]
    _names(axes, canvas.get_renderer(), drawn, unit)  # type: ignore[no-untyped-call]
    metadata: dict[str, Any] = {"Date": None} if file.suffix == ".svg" else {}
    figure.savefig(file, metadata=metadata)


def _lines(axes: Axes, s: Series, unit: float) -> None:
    """All points with their standard errors, joined along the frontier."""
    best = frontier(s.points)
    axes.plot(
        [p.n_bytes / unit for p in best], [p.kld for p in best], s.line, color=s.colour, lw=1.2, alpha=0.8
    )
    axes.errorbar(
        [p.n_bytes / unit for p in s.points], [p.kld for p in s.points], [p.se for p in s.points],
        fmt=s.marker, color=s.colour, ms=5, elinewidth=0.8, label=s.who, zorder=3,
    )  # fmt: skip


def _axes(axes: Axes, run: Joined, unit: str) -> None:
    """Scales, ticks, titles, legend."""
    axes.set_yscale("log")
    low, high = min(p.kld for p in run.points), max(p.kld for p in run.points)
    # Space for names below the lowest and above the highest point.
    axes.set_ylim(low / 1.35, high * 1.35)
    axes.margins(x=0.09)
    axes.yaxis.set_major_locator(FixedLocator([d * 10.0**e for e in range(-7, 3) for d in (1, 2, 5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, which="major", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"file size, {unit}")
    axes.set_ylabel("mean KL divergence to the source, nats a token")
    axes.set_title(run.model, loc="left", fontsize=11, fontweight="bold", pad=18)
    about = f"{run.text}, {run.n_chunks} × {run.n_ctx} tokens; perplexity of the source {run.perplexity:.2f}"
    said = axes.text(0, 1.015, about, transform=axes.transAxes, fontsize=8, color="#555555")
    said.set_in_layout(False)
    axes.legend(loc="upper right", frameon=False)


def _names(axes: Axes, renderer: RendererAgg, drawn: Sequence[Series], unit: float) -> None:
    """Each point's type at the cheapest of PLACES; one further off than FAR gets a thin line to its point."""
    markers = {p: _box(axes, p.n_bytes / unit, p.kld) for s in drawn for p in s.points}
    legend = axes.get_legend()
    scene = Scene(
        markers,
        [*markers.values(), *([legend.get_window_extent(renderer)] if legend is not None else [])],
        [pixel for s in drawn for pixel in _path(axes, s, unit)],
        axes.get_window_extent(renderer),
    )
    for s in drawn:
        for p in sorted(s.points, key=lambda q: q.n_bytes):
            text = axes.annotate(
                p.type_name.upper(), (p.n_bytes / unit, p.kld), (0, 0), textcoords="offset points",
                fontsize=8, color=s.colour, zorder=4,
            )  # fmt: skip
            costs = [_cost(scene, p, _put(text, place, renderer)) for place in PLACES]
            best = PLACES[costs.index(min(costs))]
            scene.taken.append(_put(text, best, renderer))
            if max(abs(best[0]), abs(best[1])) > FAR:
                axes.annotate(
                    "", (p.n_bytes / unit, p.kld), best[:2], textcoords="offset points",
                    arrowprops={"arrowstyle": "-", "lw": 0.5, "color": s.colour, "shrinkA": 0, "shrinkB": 2},
                )  # fmt: skip


def _put(text: Annotation, place: Place, renderer: RendererAgg) -> Bbox:
    """Move a name; its box in pixels."""
    text.set(position=place[:2], ha=place[2], va=place[3])
    return text.get_window_extent(renderer)


def _box(axes: Axes, x: float, y: float) -> Bbox:
    """A marker's box in pixels."""
    px, py = axes.transData.transform((x, y))
    half = 3.2 * DPI / 72
    return Bbox.from_extents(px - half, py - half, px + half, py + half)


def _path(axes: Axes, s: Series, unit: float) -> list[tuple[float, float]]:
    """Pixels along a series' line, close enough that no name fits between them."""
    best = [axes.transData.transform((p.n_bytes / unit, p.kld)) for p in frontier(s.points)]
    return [
        (float(a[0] + (b[0] - a[0]) * i / 60), float(a[1] + (b[1] - a[1]) * i / 60))
        for a, b in pairwise(best)
        for i in range(61)
    ]


def _gap(a: Bbox, b: Bbox) -> float:
    """Pixels between two boxes, 0 if they touch."""
    x = max(a.x0 - b.x1, b.x0 - a.x1, 0.0)
    y = max(a.y0 - b.y1, b.y0 - a.y1, 0.0)
    return float((x * x + y * y) ** 0.5)


def _area(a: Bbox, b: Bbox) -> float:
    """Pixels² that two boxes have in common."""
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else float(common.width * common.height)


def _cost(scene: Scene, p: Point, box: Bbox) -> float:
    """How bad a place is: names and points covered, lines through it, parts outside, distance, another point nearer."""
    own = _gap(box, scene.markers[p])
    others: Iterable[float] = (_gap(box, other) for q, other in scene.markers.items() if q != p)
    cost = own + 5.0 * sum(_area(box, other) for other in scene.taken)
    cost += sum(20.0 for x, y in scene.paths if box.contains(x, y))
    cost += 10.0 * (box.width * box.height - _area(box, scene.frame))
    return cost + (150.0 if min(others, default=own + 1) <= own else 0.0)
