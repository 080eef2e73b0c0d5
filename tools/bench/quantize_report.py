"""Tables of `tools/bench_quantize`, in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize_flops import operations
from quantize_model import Made, Shape
from quantize_run import RunResult

GIB = 1 << 30
#: Which phases of `d2qconv.timing` do the counted operations; `target` is computed where `factor` is.
DOES = {
    "forward": ("forward",),
    "statistics": ("statistics",),
    "factor": ("factor", "target"),
    "sweep": ("sweep",),
    "refine": ("refine",),
}


@dataclass(frozen=True)
class Measured:
    """One run, and what it ran on. refine: steps of the last pass."""

    shape: Shape
    sequences: int
    held_out: int
    length: int
    refine: int
    made: Made
    result: RunResult

    @property
    def blocks(self) -> list[float]:
        """Seconds of each block; the steps after them are the output's."""
        return self.result.blocks[: self.shape.blocks]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows)) + "\n"


def gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f}"


def summary(m: Measured) -> str:
    r, shape = m.result, m.shape
    blocks = shape.blocks if shape.blocks == shape.full_blocks else f"{shape.blocks} of {shape.full_blocks}"
    lines = [
        f"## {shape.name}, {blocks} blocks, {m.sequences} × {m.length} tokens, {r.device}, torch {r.torch}",
        "",
        f"Made in {m.made.seconds:.1f} s ({m.made.n_bytes / 1e9:.2f} GB, drawing {m.made.seconds_drawing:.1f} s, "
        f"writing {m.made.seconds_writing:.1f} s), not counted below. Just written, so its pages may be cached.",
        f"Held out: {m.held_out} sequences. Package {r.n_bytes / 1e9:.3f} GB, {r.bits_per_weight:.3f} bits a weight. "
        f"Mean KLD {r.kld:.4f} (of random weights, says nothing). Checks: {'; '.join(r.checks)}.",
        "",
    ]
    lines += [f"- {note}" for note in r.notes]
    return "\n".join(lines) + "\n"


def stages(m: Measured) -> str:
    r = m.result
    rows = [[name, f"{s:.2f}", f"{s / r.seconds:.1%}"] for name, s in r.stages.items()]
    rows.append(["between", f"{r.seconds - sum(r.stages.values()):.2f}", ""])
    rows.append(["**all**", f"**{r.seconds:.2f}**", ""])
    out = table(["stage", "s", "share"], rows)
    if m.blocks:
        listed = ", ".join(f"{s:.2f}" for s in m.blocks[:12])
        after = sum(r.blocks[len(m.blocks) :])
        out += f"\nSeconds a block: {listed}{' …' if len(m.blocks) > 12 else ''}; the output: {after:.2f}.\n"
    return out


def memory(m: Measured) -> str:
    p = m.result.peaks
    rows = [
        ["GPU, tensors (torch allocated)", gib(p.torch_allocated)],
        ["GPU, torch reserved", gib(p.torch_reserved)],
        ["GPU, whole device over the start (NVML)", gib(p.gpu_used)],
        ["host, anonymous + shared", gib(p.host)],
        ["host, with mapped files (VmHWM)", gib(p.host_with_files)],
    ]
    rows += [[f"predicted: {name}", gib(value)] for name, value in m.result.predicted.items()]
    return table(["peak", "GiB"], rows)


def phases(m: Measured) -> str:
    """Seconds, needed operations, and the share of each of the chip's rates, by phase."""
    r = m.result
    counted = operations(
        m.shape, m.sequences * m.length, m.held_out * m.length, m.length, refine=m.refine
    )  # fmt: skip
    kinds = list(r.rates)
    rows = []
    for name in dict.fromkeys([*r.phases, *DOES]):
        needed = sum(counted.get(part, 0.0) for part in DOES.get(name, ()))
        seconds = r.phases.get(name, 0.0)
        if not needed and not seconds:
            continue
        rate = needed / seconds if seconds and needed else 0.0
        cells = [f"{rate / r.rates[k]:.1%}" if rate else "" for k in kinds]
        rows.append([
            name, f"{seconds:.2f}" if seconds else "–", f"{seconds / r.seconds:.1%}" if seconds else "–",
            f"{needed / 1e12:.4g}" if needed else "", f"{rate / 1e12:.3g}" if rate else "", *cells,
        ])  # fmt: skip
    named = sum(s for name, s in r.phases.items() if not name.endswith("(beside)"))
    rows.append(
        ["in no span", f"{r.seconds - named:.2f}", f"{1 - named / r.seconds:.1%}", *[""] * (2 + len(kinds))]
    )
    total = sum(counted.values())
    whole = [f"{total / r.seconds / r.rates[k]:.1%}" for k in kinds]
    rows.append(
        ["**all**", f"{r.seconds:.2f}", "", f"{total / 1e12:.4g}", f"{total / r.seconds / 1e12:.3g}", *whole]
    )
    chip = ", ".join(f"{k} {rate / 1e12:.3g} TFLOP/s" for k, rate in r.rates.items())
    head = ["phase", "s", "share", "needed TFLOP", "TFLOP/s", *[f"of {k}" for k in kinds]]
    return f"The chip's matrix rate, measured in this run: {chip}.\n\n" + table(head, rows)


def extrapolated(m: Measured) -> dict[str, float]:
    """Seconds of the whole model from a shortened one; {} if it is whole or shows no blocks.

    Blocks: the mean over all but the first, which warms up. Reading, writing and verifying: by weights. The rest
    as it is. The run keeps no more of a longer model in memory than of a short one, but what the plan says.
    """
    r, shape = m.result, m.shape
    if shape.blocks == shape.full_blocks or len(m.blocks) < 2:
        return {}
    block = sum(m.blocks[1:]) / (len(m.blocks) - 1)
    full = shape.full_blocks * shape.block_weights + shape.end_weights
    ratio = full / (shape.blocks * shape.block_weights + shape.end_weights)
    by_size = sum(r.stages.get(name, 0.0) for name in ("read", "write", "verify"))
    rest = r.seconds - by_size - sum(m.blocks)
    first_extra = max(m.blocks[0] - block, 0.0)
    total = by_size * ratio + block * shape.full_blocks + first_extra + rest
    return {
        "block": block,
        "read, write, verify": by_size * ratio,
        "the rest": rest + first_extra,
        "all": total,
    }


def extrapolation(m: Measured) -> str:
    found = extrapolated(m)
    if not found:
        return ""
    rows = [[name, f"{s:.1f}"] for name, s in found.items()]
    return f"All {m.shape.full_blocks} blocks, extrapolated:\n\n" + table(["", "s"], rows)


def scaling(runs: Sequence[Measured]) -> str:
    """One row a run: how time and memory move with tokens and width."""
    head = ["model", "tokens", "s", "s a block", *DOES, "GPU GiB", "host GiB"]
    rows = []
    for m in runs:
        r = m.result
        later = m.blocks[1:] or m.blocks or [0.0]
        spans = [f"{r.phases[name]:.2f}" if name in r.phases else "–" for name in DOES]
        rows.append([
            f"{m.shape.name}, {m.shape.blocks} blocks", f"{m.sequences} × {m.length}", f"{r.seconds:.2f}",
            f"{sum(later) / len(later):.2f}", *spans, gib(r.peaks.torch_allocated), gib(r.peaks.host),
        ])  # fmt: skip
    return table(head, rows)


def peers(m: Measured, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Every peer beside ours, on the same folder and tokens; ratios are peer / ours."""
    r = m.result
    rows = [[
        "d2qconv (whole run, from file to verified file)", f"{r.bits_per_weight:.2f} of all", "–",
        f"{r.seconds - r.stages.get('write', 0) - r.stages.get('verify', 0):.1f}",
        f"{r.stages.get('write', 0) + r.stages.get('verify', 0):.1f}", f"{r.seconds:.1f}", "1",
        gib(r.peaks.torch_allocated), "1", gib(r.peaks.host), "1",
    ]]  # fmt: skip
    failed = []
    for name, got in found.items():
        if "error" in got:
            failed.append(f"- {name}: {got['error']}")
            continue
        total = got["load"] + got["quantize"] + got["save"]
        gpu, host = got["peaks"]["torch_allocated"], got["peaks"]["host"]
        rows.append([
            f"{name} {got['version']}: {got['what']}", got["bits"], f"{got['load']:.1f}", f"{got['quantize']:.1f}",
            f"{got['save']:.1f}", f"{total:.1f}", f"{total / r.seconds:.2f}", gib(gpu),
            f"{gpu / r.peaks.torch_allocated:.2f}" if r.peaks.torch_allocated else "–", gib(host),
            f"{host / r.peaks.host:.2f}",
        ])  # fmt: skip
    head = [
        "who",
        "bits",
        "load s",
        "quantize s",
        "save s",
        "all s",
        "ratio",
        "GPU GiB",
        "ratio",
        "host GiB",
        "ratio",
    ]
    return table(head, rows) + ("\n" + "\n".join(failed) + "\n" if failed else "")


def report(m: Measured, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Everything about one run."""
    parts = [summary(m), stages(m), memory(m), phases(m), extrapolation(m), peers(m, found) if found else ""]
    return "\n".join(part for part in parts if part)
