"""What one run is asked to do, and the fingerprint that says whether two runs are the same."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from d2qconv.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized. Field order is the order of the ladder; every field is a command-line option.

    rounding: `gptq` feeds each column's rounding error forward to the columns not yet rounded; `nearest` does not.
    refit: choose a K-quant's inner scales again when the sweep reaches their group. dsq: a learned scale per
    input column of down_proj, folded into up_proj (D²Quant §DSQ). dac: measure the mean shift of the FFN norm's
    output and carry it (D²Quant §DAC). asymmetry: how far weights aim at the source's outputs on the quantized
    model's inputs (GPTAQ): 0 not at all, 1 wholly. damping: added to the Hessian's diagonal, as a fraction of its mean.
    """

    rounding: Literal["gptq", "nearest"] = "gptq"
    refit: bool = True
    dsq: bool = True
    dac: bool = True
    asymmetry: float = 0.5
    damping: float = 0.01


@dataclass(frozen=True)
class CalibrationSpec:
    """Which tokens the statistics are measured on.

    source: `self` (sampled from the model), a text, JSONL or token file, or a hub data set `org/name[:split]`.
    sequences and length are in sequences and tokens; one more tenth of the sequences, never used for
    statistics, measures the KL divergence at the end.
    """

    source: str = "self"
    sequences: int = 128
    length: int = 512
    seed: int = 0


def check_recipe(recipe: Recipe) -> None:
    """Raise InputError for numbers that no run can use."""
    if not (math.isfinite(recipe.damping) and recipe.damping > 0):
        raise InputError(f"damping must be above 0, not {recipe.damping:g}", where="--damping")
    if not 0 <= recipe.asymmetry <= 1:
        raise InputError(f"asymmetry must be between 0 and 1, not {recipe.asymmetry:g}", where="--asymmetry")


class RunSpec(msgspec.Struct, frozen=True):
    """Everything that determines the quantized weights: on one machine, equal fingerprints give equal weights.

    torch: its version. exporter: its name. model: digest of the config and of every weight. storage: planned type per
    tensor id. tokens: digest of the calibration. device: its type, since CPU and CUDA round differently.
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
    device: str

    def fingerprint(self) -> str:
        """SHA-256 of the spec's canonical JSON, hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def describe(recipe: Recipe) -> str:
    """The recipe in one line, for people: `gptq + refit + dsq + dac, damping 0.01`."""
    is_gptq = recipe.rounding == "gptq"
    parts = [recipe.rounding] + ["refit"] * (recipe.refit and is_gptq)
    parts += ["dsq"] * recipe.dsq + ["dac"] * recipe.dac
    numbers = f", asymmetry {recipe.asymmetry:g}, damping {recipe.damping:g}" if is_gptq else ""
    return " + ".join(parts) + numbers
