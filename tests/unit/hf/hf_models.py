"""Random models written as Hugging Face folders."""

from __future__ import annotations

from functools import cache

from random_models import quantized
from session_folder import new_folder

from d2qconv.arch.bind import bind
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.exporters.base import silent
from d2qconv.testing.models import make_checkpoint
from d2qconv_hf import HfOptions
from d2qconv_hf.exporter import AutoRoundExporter, CompressedTensorsExporter, GptqExporter, MlxExporter

EXPORTERS = {
    "safetensors": CompressedTensorsExporter,
    "auto-round": AutoRoundExporter,
    "gptq": GptqExporter,
    "mlx": MlxExporter,
}


@cache
def source(arch, **given):
    """A random checkpoint."""
    return open_checkpoint(str(make_checkpoint(new_folder("hf") / arch, arch, **given)))


def plan(dialect, checkpoint, carrier=None, **options):
    """(exporter, model, plan)."""
    exporter, desc = EXPORTERS[dialect](HfOptions(**options)), bind(checkpoint)
    return exporter, desc, exporter.plan(desc, carrier)


def write(folder, dialect, arch, carrier=None, *, shift=0.3, of=None, **options):
    """Plan, round to nearest, write into a new folder: (exporter, plan, model, package)."""
    checkpoint = of or source(arch)
    exporter, desc, planned = plan(dialect, checkpoint, carrier, **options)
    assert not planned.refusals, planned.refusals
    model = quantized(desc, planned, shift=shift)
    folder.mkdir()
    return exporter, planned, model, exporter.write(model, checkpoint, planned, folder, silent)
