"""Whatever stands in a report.json, reading it ends in a page or in one clear error."""

from __future__ import annotations

import json
from itertools import pairwise

import msgspec
import pytest
from report_samples import sample, whole

from d2qconv.errors import InputError
from d2qconv.report.charts import Bar, Point, bars, cloud, curve, histogram
from d2qconv.report.compare import render_several
from d2qconv.report.html import duration, significant, size
from d2qconv.report.page import render
from d2qconv.report.schema import decode, encode, is_intact

STRANGE = (0, -1, 1e300, 5e-324, 2**70, 10**30, "", "\ud7ff</script>", None, [], {}, [[[]]], True)


def leaves(value, path=()):
    """The places of all that is not a list or an object, and of those too."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from leaves(below, (*path, key))


def test_the_sample_itself_is_read_and_drawn():
    data = encode(whole())
    report = decode(data, "here")
    assert report == msgspec.structs.replace(whole(), digest=report.digest)
    assert is_intact(data, report)
    page = render(report, data).decode()
    position = page[page.index('<svg id="position"') :].partition("</svg>")[0]
    # The package, the same as a further one, and the prediction; the curve is a line.
    assert [part.split('"')[0] for part in position.split('data-name="')[1:]] == [
        "m.gguf",
        "m.gguf",
        "predicted",
    ]
    (curve,) = [part for part in position.split("<polyline ")[1:] if 'class="curve"' in part]
    assert curve.split('points="')[1].split('"')[0].count(",") == 2
    for text in ("mind the gap", "chosen for --bpw 2", "last pass", "-0.125", "6 steps", "error removed"):
        assert text in page


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_any_value_at_any_place_is_drawn_or_refused(strange):
    text = encode(whole()).decode()
    n_drawn = 0
    for path in leaves(json.loads(text)):
        found = json.loads(text)
        if path:
            at = found
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = strange
        else:
            found = strange
        data = json.dumps(found).encode()
        try:
            report = decode(data, "here")
        except InputError:
            continue
        page = render(report, data)
        assert page.count(b"</script") == 1
        assert b"<svg" in page
        render_several([report, sample("other", 10, 0.25)])
        n_drawn += 1
    # Texts may be anything, and some numbers.
    assert n_drawn > 0 or strange in (1e300, 2**70, 10**30) or not isinstance(strange, str | int | float)


def changed(report, path, value):
    """The report as JSON with another value at a place."""
    found = at = json.loads(encode(report))
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("quality", "spread"), {"quantiles": {}, "edges": [1.0], "counts": []}, "the bins"),
        (("quality", "spread", "edges"), [0.1, 0.1, 1.0], "do not rise"),
        (("package", "files"), [], "without a file"),
        (("package", "files", 0, "name"), "../../etc/passwd", "the name of a package"),
        (("also", 0, "name"), "..", "the name of a package"),
        (("resumed_blocks",), 2, "more blocks were done before"),
        (("tensors", 0, "n_bytes"), 1 << 61, "out of all range"),
        (("quality", "kld"), 1e101, "out of all range"),
        (("options", "seed"), 1 << 64, "out of all range"),
        (("also", 0, "tensor_bytes"), -1, "negative"),
    ],
)
def test_what_no_run_can_have_written_is_refused(path, value, why):
    with pytest.raises(InputError, match=why):
        decode(changed(whole(), path, value), "here")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("options", "seed"), (1 << 63) - 1),
        (("options", "much"), 1e300),
        (("quality", "perplexity"), 1e99),
        (("quality", "kld"), None),
        (("quality", "spread"), {"quantiles": {}, "edges": [5e-324, 1e100], "counts": [0]}),
        (("quality", "spread", "quantiles"), {"50": None}),
        (("contribution", "blocks"), [None]),
        (("blocks", 0, "error"), None),
        (("tensors",), []),
        (("memory",), []),
        (("stages",), {}),
    ],
)
def test_what_a_run_may_write_is_drawn(path, value):
    data = changed(whole(), path, value)
    report = decode(data, "here")
    assert not is_intact(data, report)
    for page in (render(report, data), render_several([report, sample("other", 10, 0.25)])):
        assert b"<svg" in page


def test_what_is_no_text_is_refused_where_nobody_reads_it():
    data = encode(whole()).replace(b'"digest"', b'"unknown": "\xff", "digest"', 1)
    with pytest.raises(InputError, match="not a report"):
        decode(data, "here")


def test_packages_of_broken_models_alone_are_drawn():
    broken = [decode(changed(sample(name, 10, 0.5), ("quality", "kld"), None), "") for name in "ab"]
    assert render_several(broken).count(b"<circle") == 0
    assert render_several([*broken, sample("c", 100, 0.5)]).count(b"<circle") == 1


def test_a_changed_byte_is_seen_whatever_it_is():
    data = encode(whole())
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        try:
            report = decode(bytes(changed), "here")
        except InputError:
            continue
        assert not is_intact(bytes(changed), report), place


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0381972, "0.0382"), (12.06, "12.1"), (0.5, "0.500"), (1.3e-5, "1.30e-05"), (0, "0"), (-0.125, "-0.125"),
     (123456.0, "123,456"), (2.0, "2.00"), (1e9, "1.00e+09"), (0.001, "0.00100")],
)  # fmt: skip
def test_numbers_for_people(value, shown):
    assert significant(value) == shown


def test_sizes_and_times_for_people():
    assert [size(n) for n in (0, 999, 1000, 4_271_104, 3e12)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "4.27 MB",
        "3.00 TB",
    ]
    assert [duration(s) for s in (0.04, 59.7, 130, 3900)] == [
        "0.0 s",
        "1 min 00 s",
        "2 min 10 s",
        "1 h 05 min",
    ]


def test_bars_below_zero_go_left_of_it():
    drawn = bars("k", "l", [Bar("up", 1.0, "1"), Bar("down", -1.0, "-1")])
    up, down = drawn.split("<rect ")[1:]
    x = [float(part.split('x="')[1].split('"')[0]) for part in (up, down)]
    width = [float(part.split('width="')[1].split('"')[0]) for part in (up, down)]
    assert x[1] + width[1] == pytest.approx(x[0])
    assert width[0] == pytest.approx(width[1])
    assert "below" in down
    assert "below" not in up


def test_a_curve_and_a_histogram_of_nothing_are_drawn():
    assert "<svg" in curve("k", "l", [Point("0", 0, 0.0, "")], "block")
    assert "<svg" in histogram("k", "l", [0.1, 1.0, 10.0], [0, 0], {})


def test_names_of_points_that_lie_together_do_not_cover_each_other():
    points = [Point(name, 1.0, 0.5 + k / 1000, "") for k, name in enumerate(("one", "two", "three"))]
    drawn = cloud("k", "l", points, [], ("MB", "nats"))
    names = [part for part in drawn.split("<text ") if 'class="value"' in part]
    heights = sorted(float(part.split(' y="')[1].split('"')[0]) for part in names)
    assert len(heights) == 3
    assert all(b - a >= 11 for a, b in pairwise(heights))
