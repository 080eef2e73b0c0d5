"""tools/ladder: what the rows are, what is compared with what, that a bad job stops no other, what is measured."""

import dataclasses
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.exporters.base import Carrier, FloatType
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv.run import Recipe
from d2qconv.testing.models import make_checkpoint
from d2qconv_gguf.grids import GRIDS

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tools" / "bench"))

import ladder_report  # noqa: E402
import ladder_rows  # noqa: E402
import ladder_run  # noqa: E402
from ladder_pool import Pool  # noqa: E402

CPU = torch.device("cpu")


def fields_that_differ(a, b):
    return {f.name for f in dataclasses.fields(Recipe) if getattr(a, f.name) != getattr(b, f.name)}


def test_every_row_is_its_parent_with_the_changes_that_it_names():
    rows = ladder_rows.all_rows()
    for row in rows.values():
        if row.parent:
            changed = fields_that_differ(rows[row.parent].recipe, row.recipe)
            said = {item.split()[0] for item in row.changes.split(", ")}
            assert changed == said - {"carrier"}
            assert said, row.name


def test_groups_are_cumulative_or_single_changes():
    paper = ladder_rows.parse_rows(["paper"])
    for above, row in pairwise(paper):
        assert row.parent == above.name
    assert paper[0].recipe.rounding == "nearest"
    assert paper[-1].recipe.rotation == "hadamard"
    assert all(row.recipe.refine == 0 for row in paper)
    minus = ladder_rows.parse_rows(["minus"])
    assert minus[0].recipe == Recipe()
    assert len({row.recipe for row in minus}) == len(minus) > 3
    names = [row.name for row in ladder_rows.parse_rows(["all", "gptq"])]
    assert len(set(names)) == len(names)


def test_ad_hoc_rows():
    one, two = ladder_rows.parse_rows(
        ["a:asymmetry=0.75,dac=true,carrier=rank1", "b:from=a,order=gar,refine=7"]
    )
    assert one.recipe == dataclasses.replace(ladder_rows.BASE, asymmetry=0.75, dac=True)
    assert (one.parent, one.carrier) == ("gptq", "rank1")
    assert two.recipe == dataclasses.replace(one.recipe, order="gar", refine=7)
    assert (two.parent, two.carrier, two.changes) == ("a", "rank1", "order gar, refine 7")


@pytest.mark.parametrize(
    "item",
    ["nothing", "a:nothing=1", "a:dac=maybe", "a:asymmetry=x", "a:from=nothing", "gptq:dac=1", ":dac=1"],
)
def test_wrong_rows_are_refused(item):
    with pytest.raises(ladder_rows.RowError):
        ladder_rows.parse_rows([item])


def cell(row, parent, kld, *, model="m", digest=None, status="ok"):
    values = None if kld is None else np.asarray(kld, np.float64)
    answer = {"status": status, "reason": "why"}
    if status == "ok":
        answer |= {"kld": 1.0, "kld_se": 0.1, "perplexity": 9.0, "perplexity_source": 8.0, "bytes": 10}
        answer |= {"weights_sha256": digest or f"{model}{row}"}
    return ladder_report.Cell(model, "g", row, parent, "", answer, values)


def test_a_row_is_compared_with_its_parent_else_with_the_row_above():
    cells = [
        cell("one", "", [1.0, 2.0, 3.0]),
        cell("two", "one", [0.5, 1.5, 2.5]),
        cell("three", "one", [2.0, 2.0, 2.0]),
        cell("four", "absent", [2.0, 2.0, 3.0]),
        cell("five", "one", None, status="failed"),
        cell("six", "five", [2.0, 2.0, 3.0]),
        cell("two", "one", [7.0, 7.0, 7.0], model="other"),
    ]
    found = ladder_report.against(cells)
    assert {n: other for n, (other, _) in found.items()} == {1: "one", 2: "one", 3: "three", 5: "four"}
    assert (found[1][1].mean, found[1][1].se) == (-0.5, 0.0)
    assert found[2][1].mean == 0.0
    assert found[2][1].se == pytest.approx(math.sqrt(2 / 3 / 2))
    assert found[3][1].mean == pytest.approx(1 / 3)


def test_tables_name_what_did_not_happen_and_what_changed_nothing():
    cells = [cell("one", "", [1.0, 2.0]), cell("two", "one", [1.0, 2.0], digest="mone")]
    cells += [
        cell("one", "", None, model="n", status="skipped"),
        cell("two", "one", None, model="n", status="failed"),
    ]
    text = ladder_report.tables(cells)
    assert "n one: skipped: why" in text
    assert "n two: failed: why" in text
    assert "m two: the very same weights as one" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if job == "die":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    if job == "hang":
        time.sleep(100)
    print(json.dumps({"status": "ok", "job": job, "pid": os.getpid()}), flush=True)
"""


def pooled(tmp_path, jobs, *, n_workers, seconds):
    answers = {}
    Pool((sys.executable, "-c", WORKER), {}, n_workers, seconds, tmp_path, answers.__setitem__).run(
        [json.dumps(job) for job in jobs]
    )
    return [answers[n] for n in range(len(jobs))]


def test_a_job_that_kills_its_worker_stops_no_other(tmp_path):
    answers = pooled(tmp_path, ["a", "die", "b", "c"], n_workers=1, seconds=math.inf)
    assert [a["status"] for a in answers] == ["ok", "failed", "ok", "ok"]
    assert "3" in answers[1]["reason"]
    assert "last words" in answers[1]["reason"]
    assert answers[0]["pid"] != answers[2]["pid"] == answers[3]["pid"]


def test_what_has_not_finished_in_time_is_given_up(tmp_path):
    answers = pooled(tmp_path, ["hang", "a"], n_workers=1, seconds=1.0)
    assert [a["status"] for a in answers] == ["not run", "not run"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_checkpoint(
        folder / "tiny", "llama", hidden=64, ffn=128, heads=2, kv_heads=1, head_dim=32, vocab=96
    )


def settings(tmp_path, **changed):
    ids = np.random.default_rng(0).integers(0, 96, 600)
    np.save(tmp_path / "calibration.npy", ids[:300])
    np.save(tmp_path / "heldout.npy", ids[300:])
    given = {"sequences": 6, "length": 32, "ctx": 32, "chunks": 3, "threads": 1, **changed}
    return ladder_run.Settings(str(tmp_path / "calibration.npy"), str(tmp_path / "heldout.npy"), **given)


def test_measured_as_llama_perplexity_does(model):
    """Against plain sums over full logits; two models that differ in one bias."""
    desc = bind(open_checkpoint(str(model)))
    bias = TensorId(Role.UP, 0, Part.BIAS)
    made = {**desc.tensors, bias: ladder_run.Dense.of(torch.full((128,), 0.3))}
    chunks = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(0))
    second, everywhere = ladder_run.measure(desc, desc, made, chunks, CPU, is_all=True)
    log_p = torch.log_softmax(logits(desc, chunks).double(), -1)
    log_q = torch.log_softmax(logits(dataclasses.replace(desc, tensors=made), chunks).double(), -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kl.min() > 1e-6
    torch.testing.assert_close(torch.cat(second.kl), kl[:, 6:-1].reshape(-1))
    torch.testing.assert_close(torch.cat(everywhere.kl), kl[:, :-1].reshape(-1))
    nll = -log_q[:, 6:-1].gather(-1, chunks[:, 7:, None]).mean()
    assert second.perplexity.value == pytest.approx(float(nll.exp()))


def test_a_plan_has_every_tensor_and_the_biases_of_its_carrier(model):
    desc = bind(open_checkpoint(str(model)))
    none = ladder_run.make_plan(desc, GRIDS["q4_0"], FloatType.F32, Carrier.NONE)
    assert {t.id for t in none.tensors} == set(desc.tensors)
    assert none.storage(TensorId(Role.EMBED)) is FloatType.F32
    n = sum(d.n_elements for t, d in desc.tensors.items() if t.block is not None and len(d.shape) == 2)
    floats = desc.n_weights - n
    assert none.n_bytes == n * 18 // 32 + 4 * floats
    bias = ladder_run.make_plan(desc, GRIDS["q4_0"], FloatType.F32, Carrier.BIAS)
    extra = {t.id for t in bias.tensors} - set(desc.tensors)
    assert {(t.role, t.part) for t in extra} == {(Role.GATE, Part.BIAS), (Role.UP, Part.BIAS)}
    with pytest.raises(ladder_run.Skipped, match="256"):
        ladder_run.make_plan(desc, GRIDS["q2_k"], FloatType.F32, Carrier.NONE)


def job(model, tmp_path, row, grid="q4_0", **changed):
    kld = str(tmp_path / f"{row.name}.npy")
    return ladder_run.Job(str(model), "tiny", grid, row.name, row.recipe, kld, settings(tmp_path, **changed))


def test_jobs_give_the_numbers_of_the_tables(model, tmp_path):
    rows = {
        row.name: row for row in ladder_rows.parse_rows(["gptq", "closed", "+rotation", "again:refit=false"])
    }
    found = {name: ladder_run.run_job(job(model, tmp_path, row)) for name, row in rows.items()}
    desc = bind(open_checkpoint(str(model)))
    plan = ladder_run.make_plan(desc, GRIDS["q4_0"], GRIDS["q8_0"], Carrier.NONE)
    for name, numbers in found.items():
        kld = np.load(tmp_path / f"{name}.npy")
        assert len(kld) == numbers["n_positions"] == 3 * 15
        assert numbers["kld"] == pytest.approx(float(kld.mean()), rel=1e-5)
        assert 0 < numbers["kld"] < 1
        assert numbers["perplexity_source"] == found["gptq"]["perplexity_source"]
        assert numbers["block_bits_per_weight"] == 4.5
    assert found["gptq"]["bytes"] == found["closed"]["bytes"] == plan.n_bytes
    assert found["+rotation"]["bytes"] == plan.n_bytes + 96 * 64 * 34 // 32
    digests = {name: numbers["weights_sha256"] for name, numbers in found.items()}
    assert digests["again"] == digests["gptq"]
    assert len(set(digests.values())) == 3


def test_what_does_not_fit_is_skipped_and_what_breaks_has_failed(model, tmp_path):
    row = ladder_rows.parse_rows(["gptq"])[0]
    encode = ladder_run.msgspec.json.encode
    answer = ladder_run.answer(encode(job(model, tmp_path, row, "q2_k")))
    assert (answer["status"], "256" in answer["reason"]) == ("skipped", True)
    assert ladder_run.answer(encode(job(model, tmp_path, row, "q9_9")))["status"] == "skipped"
    assert ladder_run.answer(encode(job(tmp_path / "absent", tmp_path, row)))["status"] == "failed"
    short = job(model, tmp_path, row, length=200)
    assert ladder_run.answer(encode(short))["status"] == "skipped"


def test_it_runs_without_the_command_line_libraries(model, tmp_path):
    """As on a machine that has torch, numpy, msgspec and safetensors only; and the whole tool once."""
    given = settings(tmp_path)
    for name in ("cyclopts", "rich", "tokenizers", "sentencepiece", "transformers", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not for the ladder')\n")
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "ladder"), f"small={model}", "--grids", "q4_0,q2_k", "--rows", "rtn",
            "gptq", "--calibration", given.calibration, "--heldout", given.heldout, "--sequences", "4", "--length",
            "32", "--ctx", "32", "--chunks", "2", "--threads", "1", "--device", "cpu", "--json",
            str(tmp_path / "all.json"),
        ],
        capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "all.json").read_text())["cells"]
    assert [(c["grid"], c["answer"]["status"]) for c in cells] == [("q4_0", "ok"), ("q2_k", "skipped")] * 2
    assert cells[2]["answer"]["delta"]["to"] == "rtn"
    assert "## q4_0" in done.stdout
