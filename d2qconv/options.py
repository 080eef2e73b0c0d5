"""The options that every conversion has, as dataclasses: the framework makes the command line and its help of them.

Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from d2qconv.errors import InputError
from d2qconv.run import CalibrationSpec, Recipe

if TYPE_CHECKING:
    from d2qconv.console import Console


def _group(title: str, place: int) -> Parameter:
    """Fields of a dataclass as options of their own, under one heading of the help."""
    return Parameter(name="*", group=Group(title, sort_key=place))


Flag = Annotated[bool, Parameter(negative="", show_default=False)]
OutputPath = Annotated[Path | None, Parameter(name=("--output", "-o"))]


@_group("Output", 1)
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
    and everything needed to make it again."""


@_group("Calibration", 3)
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


@_group("Method", 4)
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


@_group("Machine", 5)
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


@_group("Measure", 1)
@dataclass(frozen=True)
class Measure:
    """What a package is measured with."""

    source: str | None = None
    """Folder or hub id of the model that the package was made from; without it only the package's own perplexity is
    measured."""
    text: str | None = None
    """A text, JSONL or token file, or a hub data set org/name[:split]; by default tokens sampled from the source."""
    chunks: int | None = None
    """Chunks to read, the first ones. By default the whole text, or 20 sampled ones."""
    context: int | None = None
    """Tokens of a chunk, by default 512; what its second half says of the next tokens is judged, as llama-perplexity
    does. With --tasks: of the longest prompt, by default 2048."""
    baseline: Path | None = None
    """Another package, measured at the same tokens and compared."""
    tasks: str | None = None
    """Tasks of lm-evaluation-harness to score the package by, such as arc_easy,hellaswag; those whose output is chosen
    or scored, not written."""
    limit: int | None = None
    """Samples of each task, its first ones. By default all."""
    shots: int | None = None
    """Examples before each sample. By default the task's own number."""
    task_folder: Path | None = None
    """A folder with task files of one's own."""
    seed: int = 0
    """Seed of the sampling."""
    device: str | None = None
    """Where the source is computed: cpu, cuda, cuda:1, … By default the first GPU, or the CPU if there is none."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    output: OutputPath = None
    """Write what --json prints into this file too."""
    overwrite: Flag = False
    """Replace that file if it exists."""


@_group("Report", 6)
@dataclass(frozen=True)
class Report:
    """What is printed."""

    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"), negative="", show_default=False)] = False
    """Print only the last line."""
    json: Flag = False
    """Print one JSON object on standard output, and nothing else."""
    progress: Literal["auto", "bar", "lines", "json", "none"] = "auto"
    """On standard error: a bar, lines, or a JSON object a line. auto is a bar on a terminal, lines elsewhere, and
    nothing with --quiet or --json."""

    def tell(self, console: Console) -> None:
        """Have the console print so."""
        console.ask(is_json=self.json, is_quiet=self.quiet, progress=self.progress)


@_group("Deep", 2)
@dataclass(frozen=True)
class Deep:
    """How far a package is verified."""

    deep: Flag = False
    """Compute again everything that the package's report says, and compare: of package, report and page every byte."""
    report: Path | None = None
    """With --deep: the report. By default PACKAGE.report.json."""
    source: str | None = None
    """With --deep: the model that was quantized; its config and weights are read and compared."""
    revision: str | None = None
    """With --source: branch, tag or commit of a hub checkpoint."""

    def check(self) -> None:
        """Raise InputError for options that would do nothing."""
        alone = [
            name
            for name in ("report", "source", "revision")
            if getattr(self, name) is not None and not self.deep
        ]
        if alone:
            raise InputError("does nothing without --deep", where=f"--{alone[0]}", todo="add --deep")


@dataclass(frozen=True)
class Settings:
    """Options of a conversion that are the same for every exporter."""

    output: Output = Output()
    calibration: Calibration = Calibration()
    method: Method = Method()
    machine: Machine = Machine()
