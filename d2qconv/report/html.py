"""HTML by small functions: everything that comes from a report is escaped here and nowhere else.

A number appears twice, rounded for a person and exact for a program: `<data value="0.0381972" id="kld">0.0382</data>`,
`<td data-value="0.0381972">`, `<rect data-value="0.0381972">`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from d2qconv import __version__, progress

#: Stands for a number that is not there.
NONE = "–"
#: Begins the version that drew a page.
_DRAWN_BY = '<meta name="generator" content="d2qconv '
#: Begins the JSON that a page carries along.
_CARRIER = '<script type="application/json" id="report">'


def tag(name: str, attributes: Mapping[str, str | float | None], *content: str) -> str:
    """An element; attributes of None are left out. content: HTML."""
    listed = "".join(f' {k}="{escape(str(v))}"' for k, v in attributes.items() if v is not None)
    return f"<{name}{listed}>{''.join(content)}</{name}>"


def text(value: object) -> str:
    """Anything as text."""
    return escape(str(value))


def datum(key: str, value: float | None, shown: str) -> str:
    """A number that a program can find by its key."""
    if value is None:
        return tag("span", {"id": key}, text(shown))
    return tag("data", {"id": key, "value": exact(value)}, text(shown))


def exact(value: float) -> str:
    """All digits that tell the number from its neighbours."""
    return repr(value)


def significant(value: float | None, digits: int = 3) -> str:
    """`0.0382`, `12.1`, `1.3e-05`: so many significant digits, an exponent only below a thousandth; a dash for None."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(digits - 1, 1)}e}"
    shown = f"{value:.{digits}g}"
    if "e" in shown:
        return f"{value:,.0f}"
    n_seen = len(shown.lstrip("-0.").replace(".", ""))
    missing = digits - n_seen
    if missing > 0:
        shown += ("" if "." in shown else ".") + "0" * missing
    return shown


def perplexity(value: float | None) -> str:
    """`11.235`; of a model that is broken with few digits, or a dash."""
    return f"{value:.3f}" if value is not None and abs(value) < 1e9 else significant(value)


def size(n_bytes: float) -> str:
    """`4.27 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 999.5:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{significant(n_bytes)} {unit}"
        n_bytes /= 1000
    return f"{significant(n_bytes)} TB"


def duration(seconds: float) -> str:
    """`2 min 10 s`, `0.4 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return progress.duration(seconds)


@dataclass(frozen=True)
class Cell:
    """One cell of a table. value: the exact number, None for text."""

    shown: str
    value: float | None = None
    is_code: bool = False

    def html(self) -> str:
        """As a data cell."""
        if self.value is not None:
            return tag("td", {"class": "n", "data-value": exact(self.value)}, text(self.shown))
        inner = tag("code", {}, text(self.shown)) if self.is_code else text(self.shown)
        return tag("td", {}, inner)


def number(value: float | None, shown: str | None = None) -> Cell:
    """A cell with a number; a dash for None."""
    if value is None:
        return Cell(NONE)
    return Cell(significant(value) if shown is None else shown, value)


def table(key: str, caption: str, names: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table that scrolls within itself where it is too wide; the first column names the row."""
    head = tag("tr", {}, *(tag("th", {"scope": "col"}, text(n)) for n in names))
    body = "".join(
        tag("tr", {}, tag("th", {"scope": "row"}, text(row[0].shown)), *(c.html() for c in row[1:]))
        for row in rows
    )
    inner = tag("table", {"id": key}, tag("caption", {}, text(caption)), tag("thead", {}, head))
    inner = inner.removesuffix("</table>") + tag("tbody", {}, body) + "</table>"
    return tag("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}, inner)


def folded(summary: str, *content: str) -> str:
    """Content that opens on a click; works without a script."""
    return tag("details", {}, tag("summary", {}, text(summary)), *content)


def pairs(listed: Iterable[tuple[str, str]]) -> str:
    """A description list of names and HTML."""
    return tag("dl", {}, *(tag("div", {}, tag("dt", {}, text(n)), tag("dd", {}, v)) for n, v in listed))


def figure(title: str, drawing: str, note: str, details: str = "", *, is_wide: bool = False) -> str:
    """A chart with its title, what it shows, and its numbers as a table."""
    return tag(
        "figure",
        {"class": "wide" if is_wide else None},
        tag("figcaption", {}, tag("h3", {}, text(title)), tag("p", {}, text(note))),
        drawing,
        details,
    )


def document(title: str, body: str, data: bytes = b"") -> bytes:
    """A whole page. It runs no script, loads nothing, and says so to the browser. data: JSON to carry along."""
    style = files("d2qconv.report").joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'{_DRAWN_BY}{escape(__version__)}">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f"<title>{text(title)}</title><style>{style}</style>"
    )
    along = f"{_CARRIER}{in_script(data)}</script>" if data else ""
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}{along}</body></html>\n'
    return page.encode()


def carried(page: bytes) -> bytes:
    """The JSON that a page of any version carries along, as `in_script` wrote it; empty if there is none."""
    return _between(page, _CARRIER, "</script>")


def version_of(page: bytes) -> str:
    """The version of d2qconv that drew a page, as it says itself; empty if it does not."""
    return _between(page, _DRAWN_BY, '">').decode(errors="replace")


def _between(page: bytes, begin: str, end: str) -> bytes:
    _, has_begin, rest = page.partition(begin.encode())
    found, has_end, _ = rest.partition(end.encode())
    return found if has_begin and has_end else b""


def in_script(data: bytes) -> str:
    """JSON that no HTML parser can take for the end of its element: these characters stand in strings alone."""
    found = data.decode()
    for character in "<>&\u2028\u2029":
        found = found.replace(character, f"\\u{ord(character):04x}")
    return found
