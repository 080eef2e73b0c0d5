"""tools/bench/pareto.py and tools/pareto: frontier, lines between points, verdicts, joining of runs, exit codes."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "tools" / "bench" / "pareto.py"


def load():
    spec = importlib.util.spec_from_file_location("bench_pareto", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_pareto"] = module
    spec.loader.exec_module(module)
    return module


pareto = load()
Verdict = pareto.Verdict


def point(n_bytes, kld, type_name="", who="d2qconv"):
    return pareto.Point(type_name or f"t{n_bytes}", who, n_bytes, kld, 0.0)


POINTS = st.lists(
    st.builds(point, st.integers(1, 60), st.floats(1e-6, 10.0, allow_subnormal=False)), max_size=12
)


@given(POINTS)
def test_the_frontier_is_what_no_other_point_beats(points):
    def beaten(p):
        return any(
            q.n_bytes <= p.n_bytes and q.kld <= p.kld and (q.n_bytes, q.kld) != (p.n_bytes, p.kld)
            for q in points
        )

    got = [(p.n_bytes, p.kld) for p in pareto.frontier(points)]
    assert got == sorted({(p.n_bytes, p.kld) for p in points if not beaten(p)})


@given(POINTS, st.integers(1, 80))
def test_the_curve_never_rises_and_meets_its_points(points, n_bytes):
    curve = pareto.frontier(points)
    for p in curve:
        assert pareto.at(curve, p.n_bytes) == (p.kld, p.type_name)
    here, after = pareto.at(curve, n_bytes)[0], pareto.at(curve, n_bytes + 1)[0]
    assert math.isnan(here) or after <= here * (1 + 1e-12)


def test_between_two_points_log_kld_is_straight():
    curve = [point(100, 1.0, "a"), point(200, 0.01, "b")]
    assert pareto.at(curve, 150) == (pytest.approx(0.1), "a … b")
    assert pareto.at(curve, 125)[0] == pytest.approx(10**-0.5)


def test_the_ends():
    curve = [point(10_000, 1.0, "a"), point(20_000, 0.01, "b")]
    assert pareto.at(curve, 10**9) == (0.01, "b")
    # Metadata's difference, 50 bytes, on the first line; 101 bytes are more than 1 %.
    near, how = pareto.at(curve, 9_950)
    assert near == pytest.approx(10 ** (2 * 50 / 10_000))
    assert how == "50 bytes left of a"
    assert math.isnan(pareto.at(curve, 9_899)[0])
    assert math.isnan(pareto.at(curve[:1], 9_950)[0])
    assert math.isnan(pareto.at([], 1)[0])


def test_verdicts():
    curve = [point(100, 1.0), point(200, 0.01)]
    rivals = [point(300, 0.01), point(300, 0.0101), point(150, 0.11), point(150, 0.099), point(50, 9.0)]
    got = [(j.point.n_bytes, j.point.kld, j.verdict) for j in pareto.judged(rivals, curve)]
    assert got == [
        (50, 9.0, Verdict.OUTSIDE),
        (150, 0.099, Verdict.BELOW),
        (150, 0.11, Verdict.ABOVE),
        (300, 0.01, Verdict.BELOW),
        (300, 0.0101, Verdict.ABOVE),
    ]


def row(type_name, who, n_bytes, kld):
    score = (
        None if kld is None else {"kld": {"mean": kld, "se": 0.001}, "perplexity": {"mean": 9.2, "se": 0.1}}
    )
    return {"type_name": type_name, "who": who, "n_bytes": n_bytes, "score": score}


def run(*rows, model="m", sha256="x"):
    heldout = {"text": "heldout.txt", "n_ctx": 512, "n_chunks": 40, "sha256": sha256}
    return {"model": model, "heldout": heldout, "rows": [row("source", "–", 999, 0.0), *rows]}


def test_later_runs_replace_rows_of_equal_type_and_maker():
    first = run(
        row("q2_k", "d2qconv", 10, 0.5), row("q3_k", "d2qconv", 20, 0.2), row("q2_k", "llama.cpp", 9, 1.0)
    )
    later = run(row("q2_k", "d2qconv", 11, 0.4), row("q4_k", "d2qconv", 0, None))
    other = run(row("q2_k", "d2qconv", 7, 0.3), model="n", sha256="y")
    m, n = pareto.joined([first, other, later])
    assert (m.model, m.perplexity, n.model) == ("m", 9.2, "n")
    assert [(p.type_name, p.n_bytes, p.kld) for p in m.of(pareto.OURS)] == [
        ("q2_k", 11, 0.4),
        ("q3_k", 20, 0.2),
    ]
    assert [p.n_bytes for p in m.of(pareto.STOCK)] == [9]
    assert [p.n_bytes for p in n.points] == [7]


def test_runs_on_different_text_are_not_joined():
    with pytest.raises(pareto.RunError, match="different text"):
        pareto.joined([run(), run(sha256="y")])
    with pytest.raises(pareto.RunError, match="names no model"):
        pareto.joined([{"rows": []}])


@pytest.mark.parametrize(
    ("stock", "code", "said"),
    [
        ((150, 0.11), 0, "above our curve"),
        ((150, 0.09), 1, "ON OR BELOW"),
        ((50, 5.0), 1, "SMALLER THAN ALL"),
    ],
)
def test_the_tool_fails_for_a_stock_point_that_our_curve_does_not_beat(tmp_path, stock, code, said):
    # Another maker's point is judged too, but the exit code is about stock llama.cpp.
    rows = [row("a", "d2qconv", 100, 1.0), row("b", "d2qconv", 200, 0.01), row("c", "other", 150, 0.01)]
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run(*rows, row("d", "llama.cpp + imatrix", *stock))))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "pareto", file], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")
    line = next(x for x in done.stdout.splitlines() if "| d |" in x)
    assert said in line
    assert "ON OR BELOW" in next(x for x in done.stdout.splitlines() if "| c |" in x)


def test_the_tool_wants_points_of_both_sides(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run(row("a", "d2qconv", 100, 1.0))))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "pareto", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no point of stock llama.cpp" in done.stderr
