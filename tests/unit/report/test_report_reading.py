"""Whatever stands in a report.json, reading it ends in a page or in one clear error."""

from __future__ import annotations

import json

import msgspec
import pytest
from report_samples import sample

from d2qconv.errors import InputError
from d2qconv.report.charts import Bar, Point, bars, curve, histogram
from d2qconv.report.compare import render_several
from d2qconv.report.html import duration, significant, size
from d2qconv.report.page import render
from d2qconv.report.schema import (
    AllocationEntry,
    Contribution,
    FoldEntry,
    LastPassEntry,
    decode,
    encode,
    is_intact,
)

STRANGE = (0, -1, 1e300, 5e-324, 2**70, 10**30, "", "\ud7ff</script>", None, [], {}, [[[]]], True)


def whole():
    """A sample with everything in it that may be missing."""
    report = sample("m.gguf", 1000, 0.5)
    note = LastPassEntry(6, True, "", 0.5, 0.25, 0.5, 0.375)
    return msgspec.structs.replace(
        report,
        contribution=Contribution(0.125, [0.25], -0.125, 0.25, 0.5, 512),
        folds=[FoldEntry("mean_shift", 0, "bias", 0.0, "of the norm", 0.5)],
        allocation=AllocationEntry("--bpw 2", 100, 0.375, 64),
        last_pass="6 steps",
        last_pass_notes=note,
        blocks=[msgspec.structs.replace(report.blocks[0], last_pass=note)],
        also=[report.package],
        warnings=["mind the gap"],
    )


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
