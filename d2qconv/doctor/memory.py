"""What a conversion would take of this machine's memory: the plan's own prediction, without a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from d2qconv.arch.bind import described, expected_tensors
from d2qconv.arch.config import ConfigFacts
from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import Architecture, Dims, ModelDesc, Rope
from d2qconv.budget import choose_budget, gibibytes
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import D2qError, PlanError
from d2qconv.exporters.diagnosis import Finding
from d2qconv.pipeline import n_held_out
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.walk.memory import Footprint, predict

if TYPE_CHECKING:
    from torch import Tensor

#: Llama 2 7B, a shape that everybody knows: what `doctor` tells the machine's memory by.
_SEVEN_B = Dims(vocab=32000, hidden=4096, ffn=11008, n_layers=32, n_heads=32, n_kv_heads=32, head=128)


def _never() -> Tensor:
    raise AssertionError("a description has no weights")


def description(arch: Architecture, facts: ConfigFacts) -> ModelDesc:
    """A model by its config alone: every tensor with its shape, in bf16, none that could be read."""
    tensors = {
        tensor: Dense(shape, torch.bfloat16, _never) for tensor, (_, shape) in expected_tensors(arch, facts)
    }
    return described(arch, facts, tensors)


def seven_b() -> ModelDesc:
    """A model of 7 billion weights."""
    facts = ConfigFacts(
        dims=_SEVEN_B,
        rope=Rope(10000.0),
        norm_eps=1e-5,
        is_tied=False,
        max_positions=4096,
        bos_ids=(1,),
        eos_ids=(2,),
        has_attention_bias=False,
        has_mlp_bias=False,
    )
    return description(BUILT_IN["llama"], facts)


def footprint(desc: ModelDesc, device: torch.device, source: str = "self") -> Footprint:
    """Memory of a conversion by the defaults on that device, but for the last pass: that takes what is left.

    source: of the calibration. Raises InputError where the system does not say what it has.
    """
    spec, recipe = CalibrationSpec(source), Recipe(refine=0)
    return predict(desc, spec, n_held_out(spec), recipe, choose_budget(None, None, device), device)


def memory_finding(desc: ModelDesc, device: torch.device, what: str, *, is_asked: bool) -> Finding:
    """Whether this model fits, in a sentence. is_asked: it is the user's, so that it is wrong if it does not."""
    subject = f"memory for {what}"
    try:
        found = footprint(desc, device)
    except D2qError as error:
        return Finding.of(subject, error)
    if not found.refusals:
        return Finding(subject, f"converts on {device}, takes at most about {_told(found)}")
    from_file = footprint(desc, device, "file")
    if not from_file.refusals:
        detail = (
            f"converts on {device} with --calibration FILE, takes at most about {_told(from_file)}; to sample its "
            f"calibration from the model itself takes {_told(found)}, which is not there"
        )
        return Finding(subject, detail, None, found.refusals[0].todo)
    why = "; ".join(refusal.why for refusal in from_file.refusals)
    todo = "; ".join(refusal.todo for refusal in from_file.refusals)
    return Finding(subject, f"does not fit on {device}: {why}", PlanError if is_asked else None, todo)


def _told(found: Footprint) -> str:
    """Both peaks, and where the activations are."""
    needs = f"{gibibytes(found.host_peak)} of host memory"
    if found.gpu:
        needs = f"{gibibytes(found.gpu_peak)} of the GPU and {needs}"
    where = {"device": "on the GPU", "host": "in host memory", "disk": "on disk"}[found.place]
    return f"{needs} (activations {where})"
