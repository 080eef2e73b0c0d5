"""What one run is asked to do, and the fingerprint that says whether two runs are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from d2qconv.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized. Every field is a command-line option and a row of `tools/ladder`.

    Base. rounding: `gptq` feeds each column's rounding error forward to the columns not yet rounded; `nearest` does
    not. refit: choose a K-quant's inner scales again when the sweep reaches their group. damping: added to the
    Hessian's diagonal, as a fraction of its mean.
    rotation: turn the residual stream, 128 channels at a time, by random Hadamard or Walsh (sequency-ordered)
    matrices, before anything else; norm gains go into the linears and a tied head is untied.
    asymmetry: how far weights aim at the source's outputs on the quantized model's inputs: 0 not at all, 1 wholly.
    asymmetry_form: `closed` moves the weights there before the sweep; `gptaq` adds GPTAQ's term inside the sweep;
    `rescomp` the same against the source's weights instead of the compensated ones.
    polish: passes in which codes and scales are chosen again after a sweep, when all errors are known.
    order: `gar` rounds the columns of a group, and the groups and blocks, by falling diagonal of the Hessian.
    dsq: a learned scale per input column of down_proj, folded into up_proj (D²Quant §DSQ). norm_scales, value_scales:
    the same at q|k|v and gate|up, folded into the norm gain before them, and at o, folded into the rows of v.
    dac: measure the mean shift of the FFN norm's output and carry it (D²Quant §DAC). dac_gate: leave out channels
    whose μ²/σ² is below it. dac_final: the same at the final norm, by a rank-1 change of a head of its own.
    attention_weights: weigh the tokens in the Hessians of k and v by the attention that they receive.
    refine: steps of the last pass over scales, gains and biases with all codes frozen; -1 chooses by device.
    refine_scope: against the source's logits (`model`), block by block (`block`), or as memory allows (`auto`).
    """

    rounding: Literal["gptq", "nearest"] = "gptq"
    refit: bool = True
    rotation: Literal["none", "hadamard", "walsh"] = "none"
    asymmetry: float = 0.5
    asymmetry_form: Literal["closed", "gptaq", "rescomp"] = "closed"
    polish: int = 2
    order: Literal["natural", "gar"] = "gar"
    dsq: bool = False
    norm_scales: bool = False
    value_scales: bool = False
    dac: bool = False
    dac_gate: float = 0.0
    dac_final: bool = False
    attention_weights: bool = False
    damping: float = 0.01
    refine: int = -1
    refine_scope: Literal["auto", "model", "block"] = "auto"


@dataclass(frozen=True)
class CalibrationSpec:
    """Which tokens the statistics are measured on.

    source: `self` (sampled from the model), a text, JSONL or token file, or a hub data set `org/name[:split]`.
    sequences and length are in sequences and tokens; one more tenth of the sequences, never used for
    statistics, measures the KL divergence at the end. own: sequences sampled from the model for the last pass besides
    these, since it fits many numbers and what it has not seen decides; -1 chooses by the size of the model.
    """

    source: str = "self"
    sequences: int = 128
    length: int = 512
    seed: int = 0
    own: int = -1


def check_recipe(recipe: Recipe) -> None:
    """Raise InputError for numbers that no run can use."""
    if not (math.isfinite(recipe.damping) and recipe.damping > 0):
        raise InputError(f"damping must be above 0, not {recipe.damping:g}", where="--damping")
    if not 0 <= recipe.asymmetry <= 1:
        raise InputError(f"asymmetry must be between 0 and 1, not {recipe.asymmetry:g}", where="--asymmetry")
    if not (math.isfinite(recipe.dac_gate) and recipe.dac_gate >= 0):
        raise InputError(f"a gate is 0 or more, not {recipe.dac_gate:g}", where="--dac-gate")
    for name, number, least in (("--polish", recipe.polish, 0), ("--refine", recipe.refine, -1)):
        if number < least:
            raise InputError(f"{number} is less than {least}", where=name)


@dataclass(frozen=True)
class RunSpec:
    """Everything that determines the quantized weights: on one machine, equal fingerprints give equal weights.

    torch: its version. exporter: its name. model: digest of the config and of every weight. storage: planned type per
    tensor id. tokens: digest of the calibration. last_pass: its scope; the recipe says the steps that are taken.
    device: its type, since CPU and CUDA round differently. padding: widths that were filled up with zeros.
    """

    version: str
    torch: str
    exporter: str
    model: str
    recipe: Recipe
    calibration: CalibrationSpec
    tokens: str
    storage: dict[str, str]
    carrier: str
    last_pass: str
    device: str
    padding: str = ""

    def fingerprint(self) -> str:
        """SHA-256 of the spec's canonical JSON, hex."""
        # Not at the top: the command line loads this module for its options.
        import hashlib

        import msgspec

        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def describe(recipe: Recipe) -> str:
    """The recipe in one line, for people: `gptq + refit + gar + polish 2, asymmetry 0.5, damping 0.01`."""
    is_gptq = recipe.rounding == "gptq"
    parts: list[str] = [recipe.rounding]
    if recipe.rotation != "none":
        parts.insert(0, f"{recipe.rotation} rotation")
    if is_gptq:
        parts += ["refit"] * recipe.refit + ["gar"] * (recipe.order == "gar")
        parts += [f"polish {recipe.polish}"] * (recipe.polish > 0)
        parts += ["attention weights"] * recipe.attention_weights
    names = ("dsq", "norm_scales", "value_scales", "dac", "dac_final")
    parts += [name.replace("_", " ") for name in names if getattr(recipe, name)]
    parts += [f"last pass of {recipe.refine} steps"] * (recipe.refine > 0)
    form = "" if recipe.asymmetry_form == "closed" else f" ({recipe.asymmetry_form})"
    numbers = f", asymmetry {recipe.asymmetry:g}{form}, damping {recipe.damping:g}" if is_gptq else ""
    return " + ".join(parts) + numbers
