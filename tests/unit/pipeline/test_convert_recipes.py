"""`convert` from checkpoint to verified GGUF with the options of the full recipe, cut off and started again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import d2qconv
from d2qconv import pipeline
from d2qconv.calibrate.tokens import load_tokens
from d2qconv.errors import ExportError, InputError, PlanError, RunError
from d2qconv.exporters.base import Carrier, Check
from d2qconv.ir.store import Store
from d2qconv.job import Also
from d2qconv.measure.reference import logits
from d2qconv.names import Part, Role, TensorId
from d2qconv.packaging import check_all_places
from d2qconv.pipeline import Job, convert, plan
from d2qconv.progress import Unwatched
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.testing.models import make_checkpoint
from d2qconv.walk import activations
from d2qconv.walk import model as walk_model
from d2qconv.walk.activations import Place
from d2qconv.walk.memory import Footprint
from d2qconv_gguf import INFO, GgufOptions
from d2qconv_gguf.container import read
from d2qconv_gguf.reader import read_model

LLAMA = Path(__file__).parent.parent.parent / "data" / "tiny-llama-5m"
QWEN3 = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
RECIPE = Recipe(asymmetry=0.25, dsq=True, dac=True, refine=0)
TEXT = "The old man and the little girl walked down to the river, where a dog was waiting for a ball. "


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Story {i}: {TEXT}" for i in range(80)))
    return path


@pytest.fixture
def small(tmp_path):
    """A random Llama with a real tokenizer, its sizes the least that q4_0 takes."""
    folder = tmp_path / "small"
    sizes = {"hidden": 64, "ffn": 96, "heads": 2, "kv_heads": 1, "head_dim": 32}
    return make_checkpoint(folder, "llama", vocab=8192, tokenizer=LLAMA, **sizes)


@pytest.fixture
def unverified(monkeypatch):
    """Files are not read back: for tests that compare bytes."""
    passed = [Check("not looked at", "", is_passed=True)]
    monkeypatch.setattr("d2qconv_gguf.exporter.verify_file", lambda *_: passed)
    monkeypatch.setattr("d2qconv_gguf.exporter.require_same_function", lambda *_: None)


def job(model, output, text, *, sequences=6, length=24, type_="q4_0", **changes):
    made = Job(
        str(model), INFO, GgufOptions(type=type_), output, device="cpu", recipe=RECIPE,
        calibration=CalibrationSpec(str(text), sequences, length),
    )  # fmt: skip
    return replace(made, **changes)


def run(asked):
    planned = plan(asked)
    outcome = convert(planned, Unwatched())
    assert outcome is not None
    assert all(check.is_passed for check in outcome.checks)
    assert not asked.output.with_name(asked.output.name + ".work").exists()
    return planned, outcome


def kl_of_the_file(planned, path):
    """The KL divergence on the held-out sequences, by the source and what is read back from the file."""
    tokens = load_tokens(
        planned.job.calibration, planned.checkpoint, planned.source, device="cpu", on_step=lambda _: None
    )
    p = logits(planned.source, tokens.held_out)[:, :-1].double().log_softmax(-1)
    q = logits(read_model(path), tokens.held_out)[:, :-1].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_biases_of_every_linear_are_in_a_file_that_llama_cpp_computes(tmp_path, text):
    out = tmp_path / "m.gguf"
    planned, outcome = run(job(LLAMA, out, text, carrier=Carrier.BIASES))
    file = read(out)
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    wanted = {f"blk.{block}.{name}.bias" for block in range(4) for name in linears}
    assert {name for name in file.tensors if name.endswith(".bias")} == wanted
    assert {file.tensors[name].type.name for name in wanted} == {"F32"}
    stored = read_model(out)
    biases = [stored.tensors[TensorId(role, 3, Part.BIAS)].load() for role in (Role.Q, Role.UP, Role.DOWN)]
    assert all(bool(bias.any()) for bias in biases)
    assert "llama.cpp computes it" in {check.name for check in outcome.checks}
    assert outcome.kld == pytest.approx(kl_of_the_file(planned, out), rel=1e-3)
    assert outcome.perplexity < 6 * outcome.perplexity_source
    assert {fold.name for fold in outcome.folds} == {"column_scale"}


def test_a_rotated_model_has_a_head_of_its_own_in_the_file(tmp_path, text):
    out = tmp_path / "m.gguf"
    recipe = replace(RECIPE, rotation="hadamard", norm_scales=True, value_scales=True, order="gar")
    planned, outcome = run(job(QWEN3, out, text, recipe=recipe))
    file = read(out)
    assert file.tensors["output.weight"].shape == file.tensors["token_embd.weight"].shape
    stored = read_model(out)
    assert not stored.is_tied
    assert planned.source.is_tied
    assert planned.desc.rotation == "hadamard 128, seed 0"
    assert outcome.kld == pytest.approx(kl_of_the_file(planned, out), rel=1e-3)
    assert outcome.perplexity < 6 * outcome.perplexity_source
    carriers = {fold.carrier for fold in outcome.folds}
    assert {"gain of attn_norm", "gain of ffn_norm", "rows of v", "rows of up"} <= carriers


def test_a_padded_model_goes_the_whole_way(tmp_path, text):
    """Widths that q4_0 does not take: folds, sweeps, a last pass that trains biases too, and zeros stay zeros."""
    sizes = {"hidden": 80, "ffn": 112, "heads": 2, "kv_heads": 1, "head_dim": 32}
    model = make_checkpoint(tmp_path / "odd", "llama", vocab=8192, tokenizer=LLAMA, **sizes)
    out = tmp_path / "m.gguf"
    recipe = replace(
        RECIPE, norm_scales=True, value_scales=True, order="gar", polish=1, refine=3, refine_scope="model"
    )
    asked = job(model, out, text, recipe=recipe, carrier=Carrier.BIASES)
    with pytest.raises(PlanError, match=r"--pad always: exact zeros, hidden 80 → 96, ffn 112 → 128"):
        plan(asked)
    options = GgufOptions(type="q4_0", pad="always", imatrix=tmp_path / "i.gguf")
    planned, outcome = run(replace(asked, options=options))
    assert (planned.source.dims.hidden, planned.desc.dims.hidden, planned.desc.dims.ffn) == (80, 96, 128)
    assert planned.n_weights == planned.source.n_weights
    assert planned.target.widths.startswith("padded (hidden 80 → 96, ffn 112 → 128): ")
    checks = {check.name: check.detail for check in outcome.checks}
    assert {"padding", "llama.cpp computes it"} <= checks.keys()
    assert "hidden 80 of 96, ffn 112 of 128" in checks["padding"]
    assert outcome.kld == pytest.approx(kl_of_the_file(planned, out), rel=1e-3)
    bias = read_model(out).tensors[TensorId(Role.O, 1, Part.BIAS)].load()
    assert bias[:80].all()
    assert not bias[80:].any()
    assert read(tmp_path / "i.gguf").tensors["blk.1.ffn_down.weight.in_sum2"].shape == (1, 112)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_last_pass_is_in_the_file(tmp_path, text, small, scope, request):
    asked = job(small, tmp_path / "b.gguf", text)
    recipe = replace(asked.recipe, refine=2, refine_scope=scope)
    if scope == "block":
        request.getfixturevalue("unverified")
    planned, refined = run(replace(asked, recipe=recipe))
    request.getfixturevalue("unverified")
    _, plain = run(replace(asked, output=tmp_path / "a.gguf"))
    assert (planned.last_pass.scope, planned.last_pass.steps) == (scope, 2)
    assert refined.kld == pytest.approx(kl_of_the_file(planned, refined.path), rel=1e-3)
    assert refined.kld != plain.kld
    assert refined.fingerprint != plain.fingerprint
    gains = [read_model(o.path).tensors[TensorId(Role.FFN_NORM, 1)].load() for o in (plain, refined)]
    assert not torch.equal(*gains)


class KilledError(Exception):
    """Stands for a kill: what it leaves is what was on the disk."""


def die(*_, **__):
    raise KilledError


def forbidden(*_, **__):
    raise AssertionError("this was done before the kill")


@pytest.mark.parametrize(
    "when", ["before the last pass", "after the last pass", "while the package is written"]
)
def test_a_run_cut_off_behind_the_blocks_goes_on_and_gives_the_same_bytes(
    tmp_path, text, small, unverified, monkeypatch, when
):
    asked = job(small, tmp_path / "a.gguf", text, recipe=replace(RECIPE, refine=3, refine_scope="model"))
    asked = replace(asked, calibration=replace(asked.calibration, own=2))
    _, straight = run(asked)
    asked = replace(asked, output=tmp_path / "b.gguf")
    work = tmp_path / "b.gguf.work"
    with monkeypatch.context() as patched:
        if when == "before the last pass":
            patched.setattr(walk_model, "refine_model", die)
        elif when == "after the last pass":
            patched.setattr(pipeline, "written_package", die)
        else:
            patched.setattr("d2qconv_gguf.exporter.require_same_function", die)
        with pytest.raises(KilledError):
            convert(plan(asked), Unwatched())
    assert (work / "refined.safetensors").exists() == (when != "before the last pass")
    assert (work / "output.safetensors").exists()
    assert not asked.output.exists()
    with monkeypatch.context() as patched:
        patched.setattr(walk_model.BlockWalk, "quantize", forbidden)
        if when != "before the last pass":
            patched.setattr(walk_model, "refine_model", forbidden)
        _, resumed = run(asked)
    assert asked.output.read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert (resumed.kld, resumed.fingerprint) == (straight.kld, straight.fingerprint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "small", "text.txt"]


def test_a_run_goes_on_with_the_sequences_that_were_sampled_for_its_last_pass(tmp_path, text, small):
    """Of types that are chosen by measurement the last pass is planned twice: what was sampled is the first plan's."""
    asked = job(small, tmp_path / "a.gguf", text, recipe=replace(RECIPE, refine=2))
    planned = plan(asked)
    known = pipeline._asked(asked, planned.checkpoint, planned.desc, planned.target, planned.device)
    for begun, scope, own in (
        (f"{known} block 5", "block", 5),
        (f"{known} block", "model", 0),
        ("x block 5", "model", 0),
    ):
        with Store(asked.work_folder, "f", {}, begun) as store:
            assert (plan(asked).last_pass.scope, plan(asked).last_pass.own) == (scope, own)
            store.delete()


def test_a_work_directory_that_is_damaged_is_no_matter_of_the_plan(tmp_path, text, small):
    asked = job(small, tmp_path / "a.gguf", text)
    asked.work_folder.mkdir()
    (asked.work_folder / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        convert(plan(asked), Unwatched())


def test_packages_of_one_run_must_have_room_together(tmp_path, text, small, monkeypatch):
    asked = job(small, tmp_path / "a.gguf", text)
    planned = plan(replace(asked, also=(Also(INFO, tmp_path / "b.gguf"),)))
    free = int(1.5 * planned.target.n_bytes)
    monkeypatch.setattr("d2qconv.exporters.package._free", lambda _: free)
    check_all_places([(planned.main, planned.most_bytes)], overwrite=False)
    sizes = [(to, to.target.n_bytes) for to in (planned.main, *planned.also)]
    with pytest.raises(InputError, match="the disk has"):
        check_all_places(sizes, overwrite=False)


def test_packages_of_one_run_appear_together_or_not_at_all(tmp_path, text, small, unverified, monkeypatch):
    """Also where the package that is written last fails, whichever that is: the same command goes on."""
    asked = job(small, tmp_path / "a.gguf", text)
    asked = replace(asked, also=tuple(Also(INFO, tmp_path / name) for name in ("b.gguf", "c.gguf")))
    n_written = 0

    def fail(*_):
        nonlocal n_written
        n_written += 1
        if n_written == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("d2qconv_gguf.exporter.require_same_function", fail)
        with pytest.raises(ExportError, match="No space left"):
            run(asked)
    assert not list(tmp_path.glob("*.gguf"))
    assert (tmp_path / "a.gguf.work").exists()
    _, outcome = run(asked)
    assert [also.path.name for also in outcome.also] == ["b.gguf", "c.gguf"]
    assert sorted(p.name for p in tmp_path.glob("*.gguf*")) == ["a.gguf", "b.gguf", "c.gguf"]


def test_a_run_with_another_last_pass_does_not_go_on_from_it(tmp_path, text, small, unverified, monkeypatch):
    notes = []

    class Notes(Unwatched):
        def note(self, text):
            notes.append(text)

    monkeypatch.setattr(pipeline, "written_package", die)
    asked = job(small, tmp_path / "a.gguf", text)
    for steps, scope in ((2, "model"), (2, "model"), (3, "model"), (3, "block"), (0, "model")):
        recipe = replace(asked.recipe, refine=steps, refine_scope=scope)
        with pytest.raises(KilledError):
            convert(plan(replace(asked, recipe=recipe)), Notes())
    said = "finished parts of another job were discarded"
    # Embedding, two blocks, output; and the changes of a last pass over the model.
    assert [note.split()[0] for note in notes if said in note] == ["5", "5", "4"]


@pytest.mark.parametrize("begun", ["model", "block"])
def test_a_run_goes_on_with_its_last_pass_whatever_memory_is_free_now(
    tmp_path, text, small, unverified, monkeypatch, begun
):
    free = {"model": 1 << 40, "block": 0}

    def leave(n_bytes):
        monkeypatch.setattr(Footprint, "free_for_last_pass", property(lambda _: n_bytes))

    recipe = replace(RECIPE, refine=2, refine_scope="auto")
    asked = job(small, tmp_path / "a.gguf", text, recipe=recipe)
    leave(free.pop(begun))
    assert plan(asked).last_pass.scope == begun
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "written_package", die)
        with pytest.raises(KilledError):
            convert(plan(asked), Unwatched())
    (other,) = free
    leave(free[other])
    # Of another job it is not.
    assert plan(replace(asked, recipe=replace(recipe, polish=0))).last_pass.scope == other
    if begun == "model":
        with pytest.raises(PlanError, match=r"began with one over the whole model.*\n.*--refine-scope block"):
            plan(asked)
        assert plan(replace(asked, recipe=replace(recipe, refine_scope="block"))).last_pass.scope == "block"
        leave(1 << 40)
    monkeypatch.setattr(walk_model.BlockWalk, "quantize", forbidden)
    planned, _ = run(asked)
    assert planned.last_pass.scope == begun


@pytest.mark.parametrize("refine", [{"refine": 0}, {"refine": 2, "refine_scope": "model"},
                                    {"refine": 2, "refine_scope": "block"}])  # fmt: skip
def test_activations_on_disk_give_the_same_bytes(tmp_path, text, small, unverified, monkeypatch, refine):
    asked = job(small, tmp_path / "host.gguf", text, sequences=16, recipe=replace(RECIPE, **refine))
    planned, on_host = run(asked)
    assert planned.footprint.place is Place.HOST
    asked = replace(asked, output=tmp_path / "disk.gguf", max_host_mem=str(planned.footprint.host_peak - 1))
    mapped = []
    make = activations._mapped

    def spy(path, shape):
        mapped.append(shape)
        return make(path, shape)

    monkeypatch.setattr(activations, "_mapped", spy)
    planned, on_disk = run(asked)
    assert planned.footprint.place is Place.DISK
    assert mapped.count((16, 24, 64)) >= 2
    assert (tmp_path / "disk.gguf").read_bytes() == (tmp_path / "host.gguf").read_bytes()
    assert on_disk.kld == on_host.kld
