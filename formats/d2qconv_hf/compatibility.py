"""Which runtime loads what, as data: asked by the plan before a run, and printed in the README.

`run`: loaded here or on the machines of this project, and compared with the float reference. `source`: read in the
runtime's code, not run. Versions are those that were looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from d2qconv_hf.config import Labelled
from d2qconv_hf.dialects.base import Content


class Verdict(StrEnum):
    """What becomes of a package in a runtime."""

    LOADS = "loads"
    NEEDS = "loads with"
    FAILS = "refuses"
    WRONG = "loads and computes something else"


@dataclass(frozen=True)
class Row:
    """One line of the table. Sets that are empty mean any.

    bits: of the codes. zero: `integer` or `none`. is_mixed: the line is about packages with several types (None: about
    both). has_bias: about packages with biases of gate and up that were added. how: what it needs, or what goes wrong.
    """

    dialect: str
    runtime: str
    version: str
    verdict: Verdict
    how: str
    evidence: str
    bits: frozenset[int] = field(default_factory=frozenset)
    zero: frozenset[str] = field(default_factory=frozenset)
    is_mixed: bool | None = None
    has_bias: bool | None = None
    labels: frozenset[str] = field(default_factory=frozenset)

    def is_about(self, asked: Asked) -> bool:
        """Whether it says something about such a package."""
        return (
            self.dialect == asked.dialect
            and (not self.bits or bool(asked.bits & self.bits))
            and (not self.zero or bool(asked.zero & self.zero))
            and self.is_mixed in (None, asked.is_mixed)
            and self.has_bias in (None, asked.has_bias)
            and (not self.labels or asked.label in self.labels)
        )


@dataclass(frozen=True)
class Asked:
    """What a package is like."""

    dialect: str
    bits: frozenset[int]
    zero: frozenset[str]
    is_mixed: bool
    has_bias: bool
    label: str

    @classmethod
    def of(cls, dialect: str, content: Content, label: Labelled) -> Asked:
        """From a plan."""
        schemes = content.schemes
        return cls(
            dialect,
            frozenset(scheme.bits for scheme in schemes),
            frozenset("integer" if scheme.has_zero else "none" for scheme in schemes),
            len(schemes) > 1,
            label.label is not None,
            label.model_type,
        )


_LOW = frozenset({2, 3})
_WITH, _WITHOUT = frozenset({"integer"}), frozenset({"none"})
_HY, _LLAMA = frozenset({"hy_v3"}), frozenset({"llama"})
_CT = "with compressed-tensors 0.18 to 0.20"

#: The first line about a package in a runtime decides, so exceptions come first.
TABLE: tuple[Row, ...] = (
    Row("safetensors", "transformers", "5.23", Verdict.LOADS, f"{_CT}; decoded to floats at the start", "run"),
    Row(
        "safetensors", "vLLM", "0.33", Verdict.NEEDS,
        "--model-impl transformers: its own hy_v3 drops the biases without a word", "source",
        has_bias=True, labels=_HY,
    ),
    Row("safetensors", "vLLM", "0.33", Verdict.LOADS, "on CUDA (Humming); on a CPU 4 bits only", "source"),
    Row(
        "safetensors", "SGLang", "0.5", Verdict.WRONG,
        "its MLP has no bias, and it skips what it does not know", "source", has_bias=True,
    ),
    Row("safetensors", "SGLang", "0.5", Verdict.FAILS, "only 4 and 8 bits", "source", bits=_LOW),
    Row("safetensors", "SGLang", "0.5", Verdict.LOADS, "", "source"),
    Row("safetensors", "mlx-lm", "0.32", Verdict.WRONG, "takes all for groups of 32 in 4 bits", "source"),
    Row("auto-round", "transformers", "5.23", Verdict.LOADS, "with auto-round 0.16; stays packed", "run"),
    Row("auto-round", "vLLM", "0.33", Verdict.FAILS, "knows only AutoRound's GPTQ and AWQ packings", "source"),
    Row("gptq", "GPTQModel", "7.7", Verdict.LOADS, "also mixed types", "source"),
    Row(
        "gptq", "transformers", "5.23", Verdict.FAILS, "optimum does not read `dynamic`", "source", is_mixed=True
    ),
    Row("gptq", "transformers", "5.23", Verdict.LOADS, "with optimum and gptqmodel", "source"),
    Row("gptq", "vLLM", "0.33", Verdict.NEEDS, "--quantization humming", "source", bits=_LOW),
    Row("gptq", "vLLM", "0.33", Verdict.NEEDS, "--quantization humming", "source", zero=_WITH),
    Row("gptq", "vLLM", "0.33", Verdict.LOADS, "", "source", zero=_WITHOUT),
    Row("mlx", "mlx-lm", "0.32", Verdict.LOADS, "on Apple chips and on a CPU", "run"),
)  # fmt: skip


def lines(asked: Asked) -> Iterator[Row]:
    """For every runtime the line that decides."""
    seen: set[str] = set()
    for row in TABLE:
        if row.runtime not in seen and row.is_about(asked):
            seen.add(row.runtime)
            yield row


def loads_in(asked: Asked) -> tuple[str, ...]:
    """Where a package loads, with what that needs."""
    good = [row for row in lines(asked) if row.verdict in (Verdict.LOADS, Verdict.NEEDS)]
    return tuple(
        f"{row.runtime} {row.version}" + (f" ({row.how})" if row.how else "")
        + (", not run here" if row.evidence != "run" else "")
        for row in good
    )  # fmt: skip


def warnings(asked: Asked) -> tuple[str, ...]:
    """Runtimes that load it and are wrong."""
    bad = [row for row in lines(asked) if row.verdict is Verdict.WRONG]
    return tuple(f"not for {row.runtime} {row.version}: {row.how}" for row in bad)
