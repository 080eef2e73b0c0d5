"""Predicted memory, the place that follows from it, refusals."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import d2qconv
from d2qconv.arch.bind import bind
from d2qconv.budget import CUDA_CONTEXT, Budget
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import InputError, PlanError
from d2qconv.names import Part, Role, TensorId
from d2qconv.pipeline import Job, _check_work_dir, n_held_out, plan
from d2qconv.quant.slabs import SLAB_ELEMENTS
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.walk.activations import Place
from d2qconv.walk.last_pass import LastPass
from d2qconv.walk.memory import GAPS, Footprint, MemoryPart, Phase, footprint_facts, peak, predict
from d2qconv_gguf import INFO, GgufOptions

MODEL = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30
SPEC = CalibrationSpec("text.txt", 128, 2048)


@pytest.fixture(scope="module")
def llama_8b():
    """Llama-3.1-8B's shapes; no weight can be read."""
    tiny = bind(open_checkpoint(str(MODEL)))
    dims = replace(
        tiny.dims, vocab=128256, hidden=4096, ffn=14336, n_layers=32, n_heads=32, n_kv_heads=8, head=128
    )

    def unread():
        raise AssertionError("a plan reads no weights")

    tensors = {}
    for site in tiny.arch.sites:
        shape = (dims.size(site.n_out),) + (() if site.n_in is None else (dims.size(site.n_in),))
        is_end = site.role in (Role.EMBED, Role.HEAD, Role.FINAL_NORM)
        for block in [None] if is_end else range(32):
            tensors[TensorId(site.role, block, Part.WEIGHT)] = Dense(shape, torch.bfloat16, unread)
    return replace(tiny, dims=dims, is_tied=False, tensors=tensors)


def footprint(model, gpu=None, host=1 << 50, device=GPU, spec=SPEC, recipe=Recipe(), held=12):  # noqa: B008
    return predict(model, spec, held, recipe, Budget(gpu, host), device)


def test_8b_at_the_issues_size_stays_on_a_gpu_of_24_gib(llama_8b):
    found = footprint(llama_8b, 24 * GIB, 24 * GIB)
    assert found.place is Place.DEVICE
    assert found.refusals == ()
    assert 16 * GIB < found.gpu_peak <= 24 * GIB
    assert found.host_peak <= 24 * GIB
    by_name = {part.name: part.n_bytes for part in found.gpu}
    assert by_name["activations"] == by_name["source activations"] == 128 * 2048 * 4096 * 4
    assert by_name["Gram and cross moments"] == 2 * 14336**2 * 4
    assert by_name["Hessian in its order, and inverted in f64"] == 14336**2 * (4 + 2 * 8)


def test_a_gpu_holds_cuda_and_gaps_beside_the_tensors(llama_8b):
    """Measured at 8B on an H200, in GiB: 15.9 of tensors, 18.3 reserved for them, 19.1 taken of the GPU."""
    found = footprint(llama_8b, 24 * GIB, 24 * GIB)
    phase, n_bytes = peak(found.gpu)
    beside = ("gaps between tensors", "CUDA context and libraries")
    tensors = sum(p.n_bytes for p in found.gpu if phase in p.phases and p.name not in beside)
    assert 15.9 * GIB < tensors < 1.1 * 15.9 * GIB
    assert n_bytes == tensors + tensors // GAPS + CUDA_CONTEXT
    assert 19.1 * GIB < n_bytes < 1.1 * 19.1 * GIB


def test_a_large_head_goes_in_slabs(llama_8b):
    """Of 128256 × 4096 weights a sweep's arrays would take five times 2 GiB."""
    by_name = {part.name: part.n_bytes for part in footprint(llama_8b, 1 << 50).gpu}
    assert by_name["sweep temporaries of the head"] < 5 * (SLAB_ELEMENTS * 4) + (1 << 29)
    assert by_name["sweep temporaries"] == 5 * 28672 * 4096 * 4


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_last_pass_counts(llama_8b, scope):
    plain = footprint(llama_8b, 1 << 50)
    last = LastPass(scope, 60, 30 * GIB)
    found = predict(llama_8b, SPEC, 12, Recipe(), Budget(1 << 50, 1 << 50), GPU, last)
    assert peak(found.gpu)[0] is Phase.REFINE
    extra = {part.name for part in found.gpu} - {part.name for part in plain.gpu}
    assert extra == {"last pass"} | ({"inputs of the block for its last pass"} if scope == "block" else set())
    refused = predict(llama_8b, SPEC, 12, Recipe(), Budget(30 * GIB, 1 << 50), GPU, last)
    assert "--refine 0" in refused.refusals[0].todo


def test_the_branches_of_the_attribution_count(llama_8b):
    plain = footprint(llama_8b, 1 << 50)
    found = predict(llama_8b, SPEC, 12, Recipe(), Budget(1 << 50, 1 << 50), GPU, is_attributed=True)
    (extra,) = [part for part in found.gpu if part.name not in {p.name for p in plain.gpu}]
    assert extra.n_bytes == 32 * 2 * 256 * 4096 * 4
    assert found.gpu_peak > plain.gpu_peak + extra.n_bytes


def test_the_place_follows_from_the_budgets(llama_8b):
    everywhere = footprint(llama_8b, 1 << 50)
    assert everywhere.place is Place.DEVICE
    on_host = footprint(llama_8b, everywhere.gpu_peak - 1)
    assert on_host.place is Place.HOST
    assert on_host.gpu_peak < everywhere.gpu_peak
    assert on_host.host_peak > everywhere.host_peak
    on_disk = footprint(llama_8b, everywhere.gpu_peak - 1, on_host.host_peak - 1)
    assert on_disk.place is Place.DISK
    assert on_disk.disk_bytes == (2 * 128 + 2 * 12) * 2048 * 4096 * 4
    assert on_disk.host_peak == everywhere.host_peak
    assert (everywhere.disk_bytes, on_host.disk_bytes, on_disk.refusals) == (0, 0, ())


def test_nothing_fits(llama_8b):
    found = footprint(llama_8b, GIB, GIB)
    assert found.place is Place.DISK
    gpu, host = found.refusals
    assert "of GPU memory, and the budget is 1.0 GiB" in gpu.why
    assert f"--max-gpu-mem {-(-found.gpu_peak >> 20)}MiB" in gpu.todo
    assert "of host memory" in host.why
    enough = footprint(llama_8b, -(-found.gpu_peak >> 20) << 20, -(-found.host_peak >> 20) << 20)
    assert enough.refusals == ()


def test_sampling_that_does_not_fit_is_refused_with_the_way_out(llama_8b):
    spec = replace(SPEC, source="self")
    found = footprint(llama_8b, 24 * GIB, spec=spec)
    sampled = [part for part in found.gpu if part.phases == (Phase.SAMPLE,)]
    needed = sum(part.n_bytes for part in sampled)
    assert needed > 18 * GIB
    assert found.refusals == ()
    for held in (16, 18):
        refused = footprint(llama_8b, held * GIB, spec=spec)
        (refusal,) = refused.refusals
        assert "sampling needs" in refusal.why
        assert "--calibration FILE" in refusal.todo
        assert footprint(llama_8b, held * GIB).refusals == ()


def test_on_the_cpu_all_is_host_memory(llama_8b):
    found = footprint(llama_8b, device=CPU)
    assert (found.place, found.gpu, found.gpu_peak) == (Place.HOST, (), 0)
    assert found.host_peak > footprint(llama_8b, 1 << 50).gpu_peak
    assert footprint(llama_8b, device=CPU, host=found.host_peak - 1).place is Place.DISK


def test_what_the_recipe_leaves_out_takes_nothing(llama_8b):
    whole = footprint(llama_8b, 1 << 50)
    plain = footprint(llama_8b, 1 << 50, recipe=Recipe(rounding="nearest", refine=0))
    names = {part.name for part in whole.gpu} - {part.name for part in plain.gpu}
    assert names == {
        "source activations",
        "Hessian in its order, and inverted in f64",
        "factor",
        "sweep temporaries",
        "sweep temporaries of the head",
        "recorded kernels",
    }
    no_source = footprint(llama_8b, 1 << 50, recipe=Recipe(asymmetry=0.0, refine=0))
    assert "source activations" not in {part.name for part in no_source.gpu}


def test_a_peak_is_the_largest_phase():
    parts = (
        MemoryPart("a", 5, (Phase.FACTOR,)),
        MemoryPart("b", 3, (Phase.SWEEP,)),
        MemoryPart("c", 3, (Phase.SWEEP,)),
    )
    assert peak(parts) == (Phase.SWEEP, 6)


def test_facts_add_up(llama_8b):
    found = footprint(llama_8b, 1 << 50)
    facts = footprint_facts(found)
    phase = facts["gpu"]["phase"]
    assert facts["gpu"]["peak"] == sum(p["n_bytes"] for p in facts["gpu"]["parts"] if phase in p["phases"])
    assert facts["activations"] == "device"
    assert footprint_facts(footprint(llama_8b, device=CPU))["gpu"] is None


def job(tmp_path, **changes):
    made = Job(str(MODEL), INFO, GgufOptions(), tmp_path / "m.gguf", device="cpu")
    return replace(made, **changes)


def test_a_plan_has_a_footprint_within_its_budget(tmp_path):
    planned = plan(job(tmp_path, max_host_mem="8GiB"))
    assert planned.footprint.budget == Budget(None, 8 * GIB)
    assert planned.footprint.place is Place.HOST
    assert planned.footprint.host_peak <= 8 * GIB


def test_a_plan_beyond_the_budget_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"of host memory, and the budget is 100 MiB"):
        plan(job(tmp_path, max_host_mem="100MiB"))
    with pytest.raises(InputError, match="not a size"):
        plan(job(tmp_path, max_host_mem="lots"))
    with pytest.raises(InputError, match="no GPU in use"):
        plan(job(tmp_path, max_gpu_mem="1GiB"))


def test_activations_need_room_on_the_disk(tmp_path):
    planned = plan(job(tmp_path))
    _check_work_dir(planned)
    big = replace(planned.footprint, disk_bytes=1 << 60)
    with pytest.raises(InputError, match="the disk has") as caught:
        _check_work_dir(replace(planned, footprint=big))
    assert "fewer or shorter sequences" in caught.value.todo


def test_held_out_sequences():
    assert [n_held_out(CalibrationSpec(sequences=n)) for n in (1, 9, 10, 128)] == [1, 1, 1, 12]


def test_a_footprint_is_quick(llama_8b):
    began = time.perf_counter()
    assert isinstance(footprint(llama_8b, GIB, GIB), Footprint)
    assert time.perf_counter() - began < 1
