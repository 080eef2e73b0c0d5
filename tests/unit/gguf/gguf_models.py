"""Random models written as GGUF."""

from __future__ import annotations

from pathlib import Path

from random_models import (  # noqa: F401 the tests take them from here
    DIMS,
    LLAMA_5M,
    OWN_BIASES,
    PROVENANCE,
    ROPES,
    as_stored,
    make_desc,
    nearest,
    quantized,
    small_source,
)

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.exporters.base import Carrier, Package, TargetPlan, silent
from d2qconv.ir.model import QuantizedModel
from d2qconv_gguf import GgufOptions
from d2qconv_gguf.exporter import GgufExporter

#: the embedding is most of a tiny model: left in f16 where its type does not matter
FAST = GgufOptions(type="q4_0", embedding="f16")
PLAIN = GgufOptions(type="f16", embedding="f16", head="f16")


def write(
    path: Path,
    desc: ModelDesc,
    options: GgufOptions,
    carrier: Carrier | None = None,
    *,
    shift: float = 0.5,
    checkpoint: Checkpoint | None = None,
) -> tuple[Package, TargetPlan, QuantizedModel]:
    """Plan, round to nearest, write."""
    exporter = GgufExporter(options)
    plan = exporter.plan(desc, carrier)
    assert not plan.refusals, plan.refusals
    model = quantized(desc, plan, shift=shift)
    source = checkpoint or small_source()
    return exporter.write(model, source, plan, path, silent), plan, model
