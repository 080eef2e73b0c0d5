"""Random models written as ONNX packages."""

from __future__ import annotations

from random_models import quantized, small_source

from d2qconv.exporters.base import silent
from d2qconv_onnx import OnnxOptions
from d2qconv_onnx.exporter import OnnxExporter


def write(folder, desc, carrier=None, *, shift=0.3, **options):
    """Plan, round to nearest, write into a new folder: (package, plan, model)."""
    exporter = OnnxExporter(OnnxOptions(**options))
    plan = exporter.plan(desc, carrier)
    assert not plan.refusals, plan.refusals
    model = quantized(desc, plan, shift=shift)
    folder.mkdir()
    return exporter.write(model, small_source(), plan, folder, silent), plan, model
