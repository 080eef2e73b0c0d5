"""What exporters have in common: which tensors a package has, and that a quantized model is what was planned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from d2qconv import __version__
from d2qconv.errors import ExportError, Refusal
from d2qconv.exporters.base import Carrier, FloatType, Package, TargetPlan, TensorPlan, once_a_role
from d2qconv.exporters.manifest import Manifest, file_records, write_manifest
from d2qconv.ir.coded import Coded
from d2qconv.names import Part, Role, TensorId

if TYPE_CHECKING:
    from d2qconv.arch.spec import ModelDesc
    from d2qconv.ir.model import QuantizedModel, Stored

#: What a folder carries of a checkpoint byte for byte, where it is there.
SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
#: Linears of a block, in the order of their use.
LINEARS = (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN)


def shapes_with_biases(
    model: ModelDesc, carrier: Carrier, may_have_biases: Collection[Role] = LINEARS
) -> dict[TensorId, tuple[int, ...]]:
    """Every tensor of a package in the order of its use: those of the checkpoint, and biases that carry means.

    may_have_biases: the linears that get one with `Carrier.BIASES`.
    """
    shapes = {tensor: dense.shape for tensor, dense in model.tensors.items()}
    coupling = model.arch.coupling("shift", Role.FFN_NORM)
    roles: Collection[Role] = ()
    if carrier is Carrier.BIAS and coupling is not None:
        roles = coupling.absorbs
    elif carrier is Carrier.BIASES:
        roles = may_have_biases
    for block in range(model.dims.n_layers):
        for role in roles:
            shapes.setdefault(TensorId(role, block, Part.BIAS), (shapes[TensorId(role, block)][0],))
    return in_order(shapes)


def adopted_shapes(model: ModelDesc, tensors: Iterable[TensorId]) -> dict[TensorId, tuple[int, ...]]:
    """The shapes of what another format's package holds: the checkpoint's tensors, and biases that were added."""
    shapes = {tensor: dense.shape for tensor, dense in model.tensors.items()}
    shapes |= {t: (shapes[TensorId(t.role, t.block)][0],) for t in tensors if t not in shapes}
    return in_order(shapes)


def in_order(shapes: Mapping[TensorId, tuple[int, ...]]) -> dict[TensorId, tuple[int, ...]]:
    """Embedding, blocks as they run, final norm, head."""
    order = list(Role)

    def place(tensor: TensorId) -> tuple[bool, int, int, bool]:
        block = -1 if tensor.block is None else tensor.block
        is_last = tensor.role in (Role.FINAL_NORM, Role.HEAD)
        return is_last, block, order.index(tensor.role), tensor.part is Part.BIAS

    return {tensor: shapes[tensor] for tensor in sorted(shapes, key=place)}


def planned_or_refused(
    shapes: Mapping[TensorId, tuple[int, ...]],
    choose: Callable[[TensorId, tuple[int, ...]], TensorPlan | Refusal],
) -> tuple[list[TensorPlan], list[Refusal]]:
    """The plan of every tensor by `choose`, and its refusals, one for all blocks that they concern alike."""
    tensors: list[TensorPlan] = []
    unfit: dict[tuple[Role, str, str], list[TensorId]] = {}
    for tensor, shape in shapes.items():
        planned = choose(tensor, shape)
        if isinstance(planned, Refusal):
            unfit.setdefault((tensor.role, planned.why, planned.todo), []).append(tensor)
        else:
            tensors.append(planned)
    return tensors, once_a_role(unfit)


def check_complete(model: QuantizedModel, plan: TargetPlan) -> None:
    """Raise ExportError unless the model holds just the planned tensors."""
    missing = [str(t.id) for t in plan.tensors if t.id not in model.tensors]
    extra = [str(i) for i in model.tensors if i not in plan.by_id]
    if missing or extra:
        raise ExportError(
            f"the quantized model is not what was planned: missing {missing or 'none'}, unplanned {extra or 'none'}"
        )


def check_stored(plan: TensorPlan, stored: Stored) -> None:
    """Raise ExportError unless a tensor has the planned storage and shape."""
    is_coded = isinstance(stored, Coded)
    kind = stored.grid.id if isinstance(stored, Coded) else "floats"
    wanted = "floats" if isinstance(plan.storage, FloatType) else plan.storage.id
    if tuple(stored.shape) != plan.shape or kind != wanted or is_coded == isinstance(plan.storage, FloatType):
        raise ExportError(
            f"is {kind} of shape {list(stored.shape)}, and was planned as {wanted} of {list(plan.shape)}",
            where=plan.stored_as,
            todo="remove the work directory and run again",
        )


def digest(pieces: Iterable[np.ndarray]) -> str:
    """SHA-256 of f32 values, little endian, row by row."""
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(np.ascontiguousarray(piece, dtype="<f4").data)
    return sha.hexdigest()


def provenance_facts(model: QuantizedModel) -> dict[str, str]:
    """Where a package comes from, as its manifest says it."""
    found = model.provenance.facts()
    # The manifest has a place of its own for it.
    del found["version"]
    return found


def finish_folder(
    folder: Path,
    model: QuantizedModel,
    plan: TargetPlan,
    *,
    format: str,
    digests: Mapping[str, str],
    requires: Mapping[str, str],
    facts: Mapping[str, str],
) -> Package:
    """Write the manifest of a folder whose other files are all there. facts: besides those of the tensors."""
    files = file_records(folder)
    manifest = Manifest(
        format=format,
        version=__version__,
        files=files,
        decoded_sha256=dict(digests),
        provenance=provenance_facts(model),
        requires=dict(requires),
        facts=tensor_facts(model.desc, plan) | dict(facts),
    )
    write_manifest(folder, manifest)
    return Package(folder, sum(record.n_bytes for record in files.values()), digests)


def tensor_facts(desc: ModelDesc, plan: TargetPlan) -> dict[str, str | int | float]:
    """What a person wants to know of a package, for its manifest."""
    counts: dict[str, int] = {}
    for planned in plan.tensors:
        counts[planned.type_name] = counts.get(planned.type_name, 0) + 1
    weights = sum(int(np.prod(t.shape)) for t in plan.tensors)
    return {
        "architecture": desc.arch.id,
        "blocks": desc.dims.n_layers,
        "context_length": desc.max_positions,
        "hidden": desc.dims.hidden,
        "vocab": desc.dims.vocab,
        "tensors": ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
        "bits_per_weight": round(8 * sum(t.n_bytes for t in plan.tensors) / weights, 4),
    }
