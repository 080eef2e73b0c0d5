"""The options that every conversion has, as dataclasses: the framework makes the command line and its help of them.

Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d2qconv.report_options import Flag, OutputPath, group
from d2qconv.run import CalibrationSpec, Recipe


@group("Output", 1)
@dataclass(frozen=True)
class Output:
    """What is written, and where."""

    output: OutputPath = None
    """The package. By default MODEL's own name with the exporter's suffix, in the current folder."""
    overwrite: Flag = False
    """Replace an existing output; until the new one is complete, the old one stays."""
    also: tuple[str, ...] = ()
    """FORMAT=PATH: write the same codes in another format too, where its storage holds every value exactly, such as
    onnx=model-onnx after --type q4_0. May be given again."""
    requantize: Flag = False
    """Quantize a checkpoint again that is quantized already (GPTQ, AWQ, compressed-tensors, AutoRound). By default its
    values are kept, every one, and what the format cannot hold is refused."""
    dry_run: Flag = False
    """Stop after the plan, and print it. Nothing is quantized; of a choice of types what was measured is kept."""
    all: Flag = False
    """With --dry-run: list every tensor instead of a summary by role."""
    report: bool = True
    """Write OUTPUT.report.json, and OUTPUT.report.html to look at: what the package is, where its errors come from,
    and everything needed to make it again. Of a checkpoint that stays quantized as it is there is none."""


@group("Calibration", 3)
@dataclass(frozen=True)
class Calibration:
    """CalibrationSpec, as options."""

    calibration: str = "self"
    """Tokens to measure on: self (sampled from the model), a text, JSONL or token file, or org/name[:split]."""
    sequences: int = CalibrationSpec.sequences
    """Number of sequences. A tenth more, never measured on, gives the KL divergence at the end."""
    length: int = CalibrationSpec.length
    """Tokens per sequence."""
    seed: int = CalibrationSpec.seed
    """Seed of the sampling."""

    own: int = CalibrationSpec.own
    """Sequences sampled from the model for the last pass besides these; -1 chooses by the size of the model."""

    def spec(self) -> CalibrationSpec:
        """The same as the pipeline wants it."""
        return CalibrationSpec(self.calibration, self.sequences, self.length, self.seed, self.own)


@group("Method", 4)
@dataclass(frozen=True)
class Method:
    """Recipe and carrier, as options."""

    rounding: Literal["gptq", "nearest"] = Recipe.rounding
    """gptq feeds each column's rounding error forward to the columns not yet rounded; nearest does not."""
    refit: bool = Recipe.refit
    """Choose a K-quant's inner scales again when the sweep reaches their group."""
    rotation: Literal["none", "hadamard", "walsh"] = Recipe.rotation
    """Turn the residual stream, 128 channels at a time, by random Hadamard or Walsh matrices before anything else."""
    asymmetry: float = Recipe.asymmetry
    """Share of the difference between full-precision and quantized inputs that is corrected for (GPTAQ); 0 is GPTQ."""
    asymmetry_form: Literal["closed", "gptaq", "rescomp"] = Recipe.asymmetry_form
    """closed moves the weights before the sweep, gptaq inside it, rescomp so too but aims at the source's weights."""
    polish: int = Recipe.polish
    """Passes in which codes and scales are chosen again after the sweep, when the errors of all columns are known."""
    order: Literal["natural", "gar"] = Recipe.order
    """gar rounds columns, groups and blocks by falling diagonal of the Hessian (group-aware reordering)."""
    dsq: bool = Recipe.dsq
    """Learn a scale per input column of down_proj and fold it into up_proj (D²Quant's DSQ)."""
    norm_scales: bool = Recipe.norm_scales
    """The same at q, k, v and at gate, up, folded into the gain of the norm before them."""
    value_scales: bool = Recipe.value_scales
    """The same at o_proj, folded into the rows of v_proj."""
    dac: bool = Recipe.dac
    """Measure the mean shift of the FFN norm's output and carry it in the package (D²Quant's DAC)."""
    dac_gate: float = Recipe.dac_gate
    """Leave out channels of the shift whose squared mean over variance is below this; 0 takes all."""
    dac_final: bool = Recipe.dac_final
    """The same at the final norm, carried by a rank-1 change of a head of its own."""
    attention_weights: bool = Recipe.attention_weights
    """Weigh the tokens in the Hessians of k and v by the attention that they receive."""
    damping: float = Recipe.damping
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    refine: int = Recipe.refine
    """Steps of the last pass over scales, gains and biases with all codes frozen; 0 is none, -1 chooses by device."""
    refine_scope: Literal["auto", "model", "block"] = Recipe.refine_scope
    """Run the last pass against the source's logits, block by block, or as memory allows."""
    carrier: Literal["auto", "bias", "biases", "rank1", "none"] = "auto"
    """How the package carries the mean shift: auto takes the most exact way that the target has; biases gives every
    linear that may have a bias one that makes its mean output the source's."""

    def recipe(self) -> Recipe:
        """The same as the pipeline wants it."""
        return Recipe(
            rounding=self.rounding,
            refit=self.refit,
            rotation=self.rotation,
            asymmetry=self.asymmetry,
            asymmetry_form=self.asymmetry_form,
            polish=self.polish,
            order=self.order,
            dsq=self.dsq,
            norm_scales=self.norm_scales,
            value_scales=self.value_scales,
            dac=self.dac,
            dac_gate=self.dac_gate,
            dac_final=self.dac_final,
            attention_weights=self.attention_weights,
            damping=self.damping,
            refine=self.refine,
            refine_scope=self.refine_scope,
        )


@group("Machine", 5)
@dataclass(frozen=True)
class Machine:
    """Where the work is done."""

    device: str | None = None
    """cpu, cuda, cuda:1, … By default the first GPU, or the CPU if there is none."""
    work_dir: Path | None = None
    """Keeps finished blocks, so that the same command goes on where it stopped. By default OUTPUT.work."""
    max_gpu_mem: str | None = None
    """GPU memory to stay within, such as 24GiB or 20GB. By default 90 % of what is free."""
    max_host_mem: str | None = None
    """Host memory to stay within; activations go to the GPU, to host memory or to disk accordingly. By default 80 %."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""


@dataclass(frozen=True)
class Settings:
    """Options of a conversion that are the same for every exporter."""

    output: Output = Output()
    calibration: Calibration = Calibration()
    method: Method = Method()
    machine: Machine = Machine()
