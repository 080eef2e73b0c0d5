"""Whether a run ends with a last pass, and over what; see `d2qconv.refine`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.exporters.base import FloatType, TargetPlan
from d2qconv.grids.base import Grid
from d2qconv.names import Role, TensorId
from d2qconv.refine.memory import predict_bytes
from d2qconv.refine.settings import BLOCK_SETTINGS, RefineSettings
from d2qconv.run import CalibrationSpec, Recipe

#: Steps on a GPU where the recipe leaves the number open, by scope. On a CPU a last pass takes longer than the rest.
STEPS: Mapping[str, int] = {"model": 600, "block": 60}
#: Mean bits per weight of the blocks' matrices above which a last pass must be asked for: there is little left to gain.
MOST_BITS = 4.0
#: Sequences sampled for a last pass, and the size of a model from which on sampling them would take too long.
OWN, MOST_WEIGHTS = 1024, 1_000_000_000


@dataclass(frozen=True)
class LastPass:
    """scope: against the source's logits with the whole model on the device, or block by block during the walk.

    n_bytes: predicted peak on the device, activations not counted. own: sequences to sample for it besides the
    calibration's.
    """

    scope: Literal["none", "model", "block"] = "none"
    steps: int = 0
    n_bytes: int = 0
    own: int = 0

    @property
    def settings(self) -> RefineSettings:
        """For `refine_model` and `refine_block`."""
        return replace(BLOCK_SETTINGS if self.scope == "block" else RefineSettings(), steps=self.steps)


def own_sequences(spec: CalibrationSpec, recipe: Recipe, desc: ModelDesc, device: torch.device) -> int:
    """How many sequences a last pass would have sampled for it."""
    if recipe.refine == 0 or spec.own >= 0:
        return spec.own if recipe.refine else 0
    return OWN if device.type == "cuda" and desc.n_weights < MOST_WEIGHTS else 0


def choose_last_pass(
    recipe: Recipe,
    desc: ModelDesc,
    plan: TargetPlan,
    spec: CalibrationSpec,
    free: int,
    device: torch.device,
    begun: str = "",
) -> LastPass:
    """What the recipe asks for, or what suits device and types where it leaves that open.

    free: bytes on the device that the run leaves to a last pass. begun: the scope of an interrupted run that this one
    goes on with, whatever is free now.
    """
    grids = _grids(plan)
    steps = recipe.refine
    if steps == 0 or not grids:
        return LastPass()
    if steps < 0 and (device.type == "cpu" or recipe.rounding != "gptq" or _mean_bits(plan) > MOST_BITS):
        return LastPass()

    def made(scope: Literal["model", "block"]) -> LastPass:
        n_steps = STEPS[scope] if steps < 0 else steps
        settings = RefineSettings(steps=n_steps)
        n_bytes = predict_bytes(desc, grids, spec.length, settings, scope)
        own = own_sequences(spec, recipe, desc, device) if scope == "model" or spec.own > 0 else 0
        return LastPass(scope, n_steps, n_bytes, own)

    if recipe.refine_scope != "auto":
        return made(recipe.refine_scope)
    whole = made("model")
    is_whole = begun == "model" or (begun != "block" and whole.n_bytes <= free)
    return whole if is_whole else made("block")


def _grids(plan: TargetPlan) -> dict[Role, Grid]:
    """The grid of each role's matrices, of several that with the most bits; float matrices have none."""
    found: dict[Role, Grid] = {}
    for tensor, grid in _quantized(plan):
        before = found.get(tensor.role)
        if before is None or grid.bits_per_weight > before.bits_per_weight:
            found[tensor.role] = grid
    return found


def _mean_bits(plan: TargetPlan) -> float:
    """Bits per weight over all quantized matrices of the blocks; there is one at least."""
    sizes = [(math.prod(plan.by_id[t].shape), grid.bits_per_weight) for t, grid in _quantized(plan)]
    return sum(n * bits for n, bits in sizes) / sum(n for n, _ in sizes)


def _quantized(plan: TargetPlan) -> Iterator[tuple[TensorId, Grid]]:
    """The blocks' matrices that are on a grid."""
    for planned in plan.tensors:
        if planned.id.block is not None and not isinstance(planned.storage, FloatType):
            yield planned.id, planned.storage
