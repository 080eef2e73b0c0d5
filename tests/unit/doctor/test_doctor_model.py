"""Whether a model can be taken, and a machine's word on memory."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from d2qconv.checkpoint.hub import ALLOWED, DESCRIBING
from d2qconv.doctor import memory
from d2qconv.doctor.memory import footprint, memory_finding, seven_b
from d2qconv.doctor.model import model_diagnosis
from d2qconv.doctor.report import diagnose
from d2qconv.errors import InputError, PlanError
from d2qconv.exporters.discover import discover
from d2qconv.testing.models import make_checkpoint

TOKENIZER = Path(__file__).parents[2] / "data" / "tiny-llama-5m"


@pytest.fixture
def model(tmp_path):
    return make_checkpoint(tmp_path / "model", "llama", layers=1, vocab=8192, shards=2, tokenizer=TOKENIZER)


def edit(folder, **keys):
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))


def by_subject(diagnosis):
    return {finding.subject: finding for finding in diagnosis.findings}


def test_a_model_that_is_taken(model):
    diagnosis = model_diagnosis(str(model), discover())
    assert diagnosis.wrong == ()
    assert diagnosis.facts["architecture"] == "llama"
    assert diagnosis.facts["tokenizer"] == "tokenizer.json"
    assert diagnosis.facts["dtype"] == "bfloat16 (11 tensors)"
    found = by_subject(diagnosis)
    assert found["to-gguf"].detail.startswith("takes it, ")
    assert "converts on" in found["memory for model"].detail


def test_every_reason_of_the_config_is_told(model):
    edit(model, sliding_window_size=4, hidden_act="gelu")
    (wrong,) = model_diagnosis(str(model), discover()).wrong
    assert (wrong.subject, wrong.error) == ("config.json", PlanError)
    assert "sliding_window_size" in wrong.detail
    assert "gelu" in wrong.detail


def test_an_unknown_architecture(model):
    edit(model, model_type="mamba")
    (wrong,) = model_diagnosis(str(model), discover()).wrong
    assert wrong.error is PlanError
    assert "'mamba' is not supported" in wrong.detail


def test_a_missing_shard(model):
    (model / "model-00002-of-00002.safetensors").unlink()
    (wrong,) = model_diagnosis(str(model), discover()).wrong
    assert wrong.error is InputError
    assert "missing: 'model-00002-of-00002.safetensors'" in wrong.detail
    assert wrong.todo == "download the checkpoint completely"


def test_without_a_tokenizer_some_formats_refuse_it(model):
    (model / "tokenizer.json").unlink()
    diagnosis = model_diagnosis(str(model), discover())
    found = by_subject(diagnosis)
    assert diagnosis.facts["tokenizer"] == "none"
    assert "refused" in found["to-gguf"].detail
    assert "the checkpoint has no tokenizer" in found["to-safetensors"].detail
    # Some take it, so the model is not what is wrong.
    assert diagnosis.wrong == ()


def test_no_exporter_takes_it(tmp_path):
    odd = make_checkpoint(tmp_path / "odd", "llama", layers=1, hidden=80, ffn=72, tokenizer=TOKENIZER)
    wrong = model_diagnosis(str(odd), discover()).wrong
    assert {f.error for f in wrong} == {PlanError}
    assert {f.subject for f in wrong} == {f"to-{f.name}" for f in discover()}


def test_a_broken_tokenizer(model):
    (model / "tokenizer.json").write_text("{")
    assert by_subject(model_diagnosis(str(model), discover()))["tokenizer.json"].error is InputError


def test_of_a_hub_id_no_weights_are_fetched(model, tmp_path, monkeypatch):
    calls = []
    folder = tmp_path / "described"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def snapshot_download(name, **options):
        calls.append(options["allow_patterns"])
        return str(folder)

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    diagnosis = diagnose("org/name", discover())
    assert calls == [list(DESCRIBING)]
    assert "*.safetensors" in ALLOWED
    assert "*.safetensors" not in DESCRIBING
    assert diagnosis.wrong == ()
    assert "not downloaded" in by_subject(diagnosis)["tensors"].detail
    assert diagnosis.facts["weights"] == model_diagnosis(str(model), discover()).facts["weights"]


def test_neither_folder_nor_id():
    (wrong,) = diagnose("no such thing", discover()).wrong
    assert wrong.error is InputError


def test_the_prediction_is_the_plans(monkeypatch):
    cpu, desc = torch.device("cpu"), seven_b()
    assert desc.n_weights == pytest.approx(6.74e9, rel=1e-3)
    from d2qconv.budget import Budget

    def room(n_bytes):
        monkeypatch.setattr(memory, "choose_budget", lambda *_: Budget(None, n_bytes))
        return memory_finding(desc, cpu, "a 7B model", is_asked=True)

    whole, file = footprint(desc, cpu).host_peak, footprint(desc, cpu, "file").host_peak
    assert file < whole
    assert "sample" not in room(whole + 1).detail
    assert "with --calibration FILE" in room(whole - 1).detail
    assert room(whole - 1).error is None
    assert room(1 << 20).error is PlanError
