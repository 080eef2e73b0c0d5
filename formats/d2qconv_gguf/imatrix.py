"""The run's statistics as an importance matrix, the file that llama-quantize takes with `--imatrix`.

Layout, by llama.cpp's tools/imatrix/imatrix.cpp: a GGUF with `general.type` = imatrix, `imatrix.datasets`,
`imatrix.chunk_count` and `imatrix.chunk_size`, and for every linear two f32 tensors: `NAME.in_sum2` [1, n_in], the sum
of the squared inputs over tokens, and `NAME.counts` [1, 1], the number of tokens. llama-quantize uses the quotient.

The inputs are those of the source model where it was run along, as llama-imatrix measures them, and those that the
quantized blocks make where it was not (no asymmetry and no last pass); the key `d2qconv.imatrix.inputs` says which.
The file belongs to a GGUF of the same source in its own basis: f16 from llama.cpp's converter, for one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from d2qconv.arch.spec import ModelDesc
from d2qconv.errors import ExportError, InputError, Refusal, VerifyError
from d2qconv.exporters.package import atomic_output, check_output
from d2qconv.ir.model import QuantizedModel
from d2qconv.names import TensorId
from d2qconv_gguf.container import read
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.names import gguf_name
from d2qconv_gguf.writer import Told

INPUTS = "d2qconv.imatrix.inputs"


def refusals(path: Path, model: ModelDesc) -> list[Refusal]:
    """Why no importance matrix of this run can be written there; raises InputError for a path that cannot be written.

    An importance matrix that we wrote is replaced, since a run may have to be started again; nothing else is.
    """
    found = []
    if model.rotation:
        why = "it would be of turned channels, and fit no GGUF of the source"
        found.append(Refusal("imatrix with a rotation", why, "leave out --imatrix or the rotation"))
    check_output(path, True)
    if path.exists() and not _is_ours(path):
        why = "exists, and is no importance matrix that d2qconv wrote"
        found.append(Refusal(str(path), why, "name another file with --imatrix"))
    return found


def _is_ours(path: Path) -> bool:
    try:
        keys = read(path).keys
    except (InputError, VerifyError):
        return False
    return keys.get("general.type") == "imatrix" and INPUTS in keys


def _n_in(desc: ModelDesc, tensor: TensorId) -> int:
    """Columns that this linear has in the source: what a padding added is left out."""
    site = desc.arch.site(tensor.role)
    assert site is not None, "a linear has a site"
    assert site.n_in is not None, "and an input"
    return (desc.unpadded or desc.dims).size(site.n_in)


def write(path: Path, model: QuantizedModel) -> None:
    """Write the file, whole or not at all. Raises ExportError, also where a linear was never measured."""
    if not model.importance:
        raise ExportError(
            "no statistics of the inputs are there",
            where=f"--imatrix {path}",
            todo="the blocks are of an older d2qconv: remove the work directory and start again",
        )
    some = next(iter(model.importance.values()))
    inputs = "source" if all(i.is_source for i in model.importance.values()) else "quantized"
    keys = [
        KV.text("general.type", "imatrix"),
        KV.texts("imatrix.datasets", [model.provenance.calibration]),
        KV.count("imatrix.chunk_count", some.n_tokens // some.length),
        KV.count("imatrix.chunk_size", some.length),
        KV.text(INPUTS, inputs),
        KV.text("d2qconv.source", model.provenance.source),
        KV.text("d2qconv.fingerprint", model.provenance.fingerprint),
    ]
    with atomic_output(path, overwrite=True) as partial:
        writer = GGUFWriter(partial, "")
        writer.kv_data[0].clear()
        for kv in keys:
            writer.add_key_value(kv.key, kv.value, GGUFValueType(kv.type), kv.sub_type)
        for tensor, importance in model.importance.items():
            name, n = gguf_name(tensor), importance.n_tokens
            n_in = _n_in(model.desc, tensor)
            sums = importance.mean_squares()[:n_in].astype(np.float64) * n
            writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32).reshape(1, -1).view(Told))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), n, dtype=np.float32).view(Told))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
