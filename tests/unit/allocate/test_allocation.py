"""The choice of types from measured costs, what is kept of a measurement, and what is refused before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from d2qconv.allocate import allocation
from d2qconv.allocate.allocation import CURVE, Measurement, activation_bytes, allocate, refusals
from d2qconv.allocate.sensitivity import Sensitivity, TensorCost
from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.exporters.base import Candidates, Option
from d2qconv.ir.workdir import MEASURED
from d2qconv.names import Role, TensorId
from d2qconv.progress import Unwatched
from d2qconv.run import Recipe
from d2qconv.testing.models import make_checkpoint
from d2qconv.walk.activations import Place, Placement
from d2qconv.walk.rounding import Rounder
from d2qconv_gguf.grids import GRIDS

UP, DOWN, EMBED = TensorId(Role.UP, 0), TensorId(Role.DOWN, 0), TensorId(Role.EMBED)
WAYS = (Option(GRIDS["q4_0"], 400), Option(GRIDS["q8_0"], 800))
CANDIDATES = Candidates("--size 2kB", 2100, 100, {UP: WAYS, DOWN: WAYS, EMBED: WAYS[1:]})
COSTS = Sensitivity(
    {
        str(UP): TensorCost({"q4_0": 0.5, "q8_0": 0.1}, {}, ()),
        str(DOWN): TensorCost({"q4_0": 0.9, "q8_0": 0.2}, {}, ()),
        str(EMBED): TensorCost({"q8_0": 0.01}, {}, ()),
    },
    64,
)


def test_bytes_go_where_they_help_most():
    found = allocate(CANDIDATES, COSTS)
    assert {t: c.storage.id for t, c in found.tensors.items()} == {UP: "q4_0", DOWN: "q8_0", EMBED: "q8_0"}
    assert found.kld == pytest.approx(0.5 + 0.2 + 0.01)
    assert (found.budget, found.n_tokens, found.asked) == (2100, 64, "--size 2kB")
    assert allocate(replace(CANDIDATES, n_bytes=2500), COSTS).kld == pytest.approx(0.31)
    assert [n_bytes for n_bytes, _ in found.curve] == [1700, 2100, 2500]
    assert [kld for _, kld in found.curve] == pytest.approx([1.41, 0.71, 0.31])


def test_a_curve_of_many_matrices_keeps_some_points_and_both_ends():
    tensors = [TensorId(Role.UP, k) for k in range(200)]
    candidates = Candidates("--size 2kB", 100_000, 100, dict.fromkeys(tensors, WAYS))
    costs = {str(t): TensorCost({"q4_0": 0.5, "q8_0": 0.001 * k}, {}, ()) for k, t in enumerate(tensors)}
    curve = allocate(candidates, Sensitivity(costs, 64)).curve
    assert len(curve) <= CURVE + 1
    assert (curve[0][0], curve[-1][0]) == (100 + 200 * 400, 100 + 200 * 800)


def test_what_cannot_be_chosen_is_refused_with_the_least_there_is():
    assert list(refusals(replace(CANDIDATES, n_bytes=1700), Recipe())) == []
    [refused] = refusals(replace(CANDIDATES, n_bytes=1699), Recipe())
    assert refused.where == "--size 2kB"
    assert [r.where for r in refusals(CANDIDATES, Recipe(norm_scales=True))] == ["norm-scales"]


@pytest.fixture
def measurement(tmp_path):
    sizes = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": 128, "layers": 1}
    desc = bind(open_checkpoint(str(make_checkpoint(tmp_path / "m", "llama", **sizes))))
    tokens = torch.arange(32).view(2, 16)
    placement = Placement(Place.HOST, torch.device("cpu"))
    rounder = Rounder(Recipe(rounding="nearest"))
    return Measurement(desc, "content", tokens, rounder, placement, tmp_path / "work")


def no_measuring(monkeypatch):
    def run(self):
        raise AssertionError("measured again")

    monkeypatch.setattr(allocation.Measuring, "run", run)


def test_a_second_run_measures_nothing(measurement, monkeypatch):
    first = measurement.sensitivity(CANDIDATES, Unwatched())
    assert {n: list(c.kld) for n, c in first.costs.items()} == {
        str(UP): ["q4_0", "q8_0"], str(DOWN): ["q4_0", "q8_0"], str(EMBED): ["q8_0"],
    }  # fmt: skip
    no_measuring(monkeypatch)
    assert measurement.sensitivity(CANDIDATES, Unwatched()) == first
    # Another budget asks for nothing new.
    assert measurement.sensitivity(replace(CANDIDATES, n_bytes=9, asked="x"), Unwatched()) == first


@pytest.mark.parametrize(
    "change",
    [
        {"content": "other"},
        {"tokens": torch.arange(32).view(4, 8)},
        {"rounder": Rounder(Recipe(rounding="nearest", damping=0.5))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_it_depends_on_is_measured_anew(measurement, monkeypatch, change):
    measurement.sensitivity(CANDIDATES, Unwatched())
    no_measuring(monkeypatch)
    with pytest.raises(AssertionError, match="measured again"):
        replace(measurement, **change).sensitivity(CANDIDATES, Unwatched())
    fewer = replace(CANDIDATES, options={UP: WAYS[1:], DOWN: WAYS})
    with pytest.raises(AssertionError, match="measured again"):
        measurement.sensitivity(fewer, Unwatched())


def test_a_damaged_measurement_is_made_again(measurement):
    first = measurement.sensitivity(CANDIDATES, Unwatched())
    path = measurement.folder / MEASURED
    path.write_bytes(path.read_bytes().replace(b'"q8_0":', b'"q8_1":', 1))
    assert measurement.sensitivity(CANDIDATES, Unwatched()) == first


def test_activations_of_all_streams(measurement):
    """Two matrices of a block and one storage of the embedding, beside the source."""
    assert activation_bytes(measurement.desc, CANDIDATES, 2, 16) == 4 * 64 * 16 * 2 * 4
