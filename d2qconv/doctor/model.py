"""Whether a model can be taken: everything that the plan would refuse, of every exporter, and the memory it takes.

Of a hub id only what describes the model is fetched, no weights; then its tensors are those that config.json announces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2qconv.errors import D2qError, PlanError, PluginError
from d2qconv.exporters.base import Exporter, ExporterInfo, Padder
from d2qconv.exporters.diagnosis import Diagnosis, Finding
from d2qconv.exporters.discover import Found

if TYPE_CHECKING:
    from d2qconv.arch.spec import ModelDesc
    from d2qconv.checkpoint.open import Checkpoint
    from d2qconv.foreign.read import Foreign

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def model_diagnosis(model: str, found: Collection[Found]) -> Diagnosis:
    """Everything that is known of a model without reading its weights."""
    if find_spec("torch") is None:
        todo = "pip install 'd2qconv[quantize]'"
        return Diagnosis(model, {}, (Finding("model", "looking at it needs torch", PluginError, todo),))
    try:
        checkpoint = _open(model)
    except D2qError as error:
        return Diagnosis(model, {}, (Finding.of("checkpoint", error),))
    findings: list[Finding] = []
    facts: dict[str, Any] = {"source": checkpoint.name, "model_type": checkpoint.config.get("model_type")}
    facts["tokenizer"] = ", ".join(_tokenizers(checkpoint, findings)) or "none"
    try:
        foreign = _foreign(checkpoint)
    except D2qError as error:
        return Diagnosis(model, facts, (*findings, Finding.of("quantization_config", error)))
    if foreign is not None:
        facts["quantized"] = foreign.dialect
        checkpoint = foreign.checkpoint
    desc = _bound(checkpoint, findings)
    if desc is not None:
        facts |= _facts(checkpoint, desc)
        findings += _exporters(checkpoint, desc, found)
        findings.append(_memory(desc, checkpoint.name))
    return Diagnosis(model, facts, tuple(findings))


def _open(model: str) -> Checkpoint:
    """The checkpoint; one of the hub without its tensors. Raises InputError, PluginError."""
    from d2qconv.checkpoint.open import Checkpoint, is_hub_name, open_checkpoint

    if Path(model).expanduser().exists() or not is_hub_name(model):
        return open_checkpoint(model)
    from d2qconv.checkpoint.folder import find, read_json
    from d2qconv.checkpoint.hub import DESCRIBING, download
    from d2qconv.errors import InputError

    folder = download(model, None, DESCRIBING)
    config = find(folder, "config.json")
    if config is None:
        raise InputError("config.json is missing", where=model, todo="name a Hugging Face model")
    return Checkpoint(folder, model, folder.resolve().name, read_json(config), {}, "")


def _foreign(checkpoint: Checkpoint) -> Foreign | None:
    """What another tool quantized, if the tensors are there; raises InputError, PlanError."""
    from d2qconv.foreign.read import read_foreign

    return read_foreign(checkpoint) if checkpoint.tensors else None


def _tokenizers(checkpoint: Checkpoint, findings: list[Finding]) -> list[str]:
    """The tokenizer files that are there, each readable."""
    there = []
    for name in _TOKENIZERS:
        try:
            if checkpoint.file(name) is not None:
                there.append(name)
            if name.endswith(".json"):
                checkpoint.json(name)
        except D2qError as error:
            findings.append(Finding.of(name, error))
    return there


def _bound(checkpoint: Checkpoint, findings: list[Finding]) -> ModelDesc | None:
    """The model, or None with the reason why it is refused."""
    from d2qconv.arch.bind import bind
    from d2qconv.arch.config import read_config
    from d2qconv.arch.registry import architecture_of
    from d2qconv.doctor.memory import description

    try:
        arch = architecture_of(checkpoint.config)
        facts = read_config(arch, checkpoint.config)
    except D2qError as error:
        findings.append(Finding.of("config.json", error))
        return None
    findings.append(Finding("config.json", f"{arch.id}, every key is read or harmless"))
    if not checkpoint.tensors:
        findings.append(
            Finding("tensors", "not downloaded, so not looked at; sizes are those of config.json")
        )
        return description(arch, facts)
    try:
        desc = bind(checkpoint)
    except D2qError as error:
        findings.append(Finding.of("tensors", error))
        return None
    findings.append(
        Finding("tensors", f"{len(desc.tensors)}, each there with the shape that config.json says")
    )
    return desc


def _facts(checkpoint: Checkpoint, desc: ModelDesc) -> dict[str, Any]:
    dims = desc.dims
    found: dict[str, Any] = {
        "architecture": desc.arch.id,
        "weights": f"{desc.n_weights:,}",
        "blocks": dims.n_layers,
        "hidden": dims.hidden,
        "feed_forward": dims.ffn,
        "vocabulary": dims.vocab,
        "context_length": desc.max_positions,
    }
    if checkpoint.tensors:
        kinds = Counter(str(t.dtype).removeprefix("torch.") for t in desc.tensors.values())
        found["dtype"] = ", ".join(f"{kind} ({n} tensors)" for kind, n in kinds.most_common())
    return found


def _exporters(checkpoint: Checkpoint, desc: ModelDesc, found: Collection[Found]) -> list[Finding]:
    """What every exporter says of it with its default options. Wrong only if none takes it."""
    each: list[Finding] = []
    refused = 0
    for f in found:
        if f.info is None or not f.is_ready:
            continue
        try:
            refusals, warnings, n_bytes = _asked(f.info, checkpoint, desc)
        except D2qError as error:
            refusals, warnings, n_bytes = [str(error)], [], 0
        subject = f"to-{f.name}"
        if refusals:
            refused += 1
            each.append(Finding(subject, "by its defaults refused: " + "; ".join(refusals)))
        else:
            note = "".join(f"; {text}" for text in warnings)
            each.append(Finding(subject, f"takes it, {n_bytes:,} bytes by its defaults{note}"))
    if each and refused == len(each):
        return [replace(finding, error=PlanError) for finding in each]
    return each


def _asked(info: ExporterInfo, checkpoint: Checkpoint, desc: ModelDesc) -> tuple[list[str], list[str], int]:
    """Refusals, warnings and bytes of a plan without DAC, as the pipeline asks for it."""
    from d2qconv.exporters.base import Carrier
    from d2qconv.fold.padding import padded

    exporter: Exporter = info.load(info.default_options())
    choice = exporter.choose_padding(desc).padding if isinstance(exporter, Padder) else None
    target = exporter.plan(desc if choice is None else padded(desc, choice), Carrier.NONE)
    source = exporter.check_source(checkpoint)
    refusals = [str(refusal) for refusal in (*target.refusals, *source.refusals)]
    return refusals, [*target.warnings, *source.warnings], target.n_bytes


def _memory(desc: ModelDesc, name: str) -> Finding:
    from d2qconv.doctor.memory import memory_finding
    from d2qconv.pipeline import choose_device

    return memory_finding(desc, choose_device(None), name, is_asked=True)
