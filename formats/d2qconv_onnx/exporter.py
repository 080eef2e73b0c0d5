"""The ONNX exporter: plan, write, verify. See `d2qconv.exporters.base.Exporter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from d2qconv import __version__
from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.decoder.rope import cos_sin
from d2qconv.errors import ExportError, Refusal
from d2qconv.exporters.adopted import idle_ends, idle_options, idle_rules
from d2qconv.exporters.base import (
    Carrier,
    Check,
    FloatType,
    Package,
    Progress,
    SourceFindings,
    TargetPlan,
    TensorPlan,
)
from d2qconv.exporters.diagnosis import Finding
from d2qconv.exporters.manifest import inspected
from d2qconv.exporters.overrides import OverrideOption, last_that_holds
from d2qconv.exporters.planned import (
    SIDE_FILES,
    adopted_shapes,
    check_complete,
    finish_folder,
    planned_or_refused,
    shapes_with_biases,
)
from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Grid
from d2qconv.grids.exact import holds
from d2qconv.ir.model import QuantizedModel
from d2qconv.names import Role, TensorId
from d2qconv_onnx import OnnxOptions, genai, types
from d2qconv_onnx.container import open_model
from d2qconv_onnx.data import DATA, write_data
from d2qconv_onnx.diagnose import diagnose_folder
from d2qconv_onnx.graph import Settings, build
from d2qconv_onnx.names import ROPE_COS, ROPE_SIN, stored_name
from d2qconv_onnx.runtime import Measured, genai_sample, lacks
from d2qconv_onnx.verify import verify_folder

RULES = OverrideOption("tensor-type", tuple(types.BITS), "int4")
_NOTES = {
    Carrier.BIAS: "bias inputs of gate and up, exact",
    Carrier.BIASES: "a bias input of every linear in the blocks",
    Carrier.RANK1: "rank-1 change of gate and up before quantization, no extra tensor",
    Carrier.NONE: "not carried",
}
#: Tokens that `sample` adds to a prompt.
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class OnnxExporter:
    """Writes a folder for ONNX Runtime. options: see `OnnxOptions`."""

    options: OnnxOptions

    def plan(self, model: ModelDesc, carrier: Carrier | None) -> TargetPlan:
        """Every tensor's storage; see `Exporter`."""
        chosen = carrier or Carrier.BIAS
        refusals = self._option_refusals(model)
        shapes = {} if refusals else shapes_with_biases(model, chosen)
        return self._target(model, chosen, shapes, self._tensor, refusals)

    def _target(
        self,
        model: ModelDesc,
        carrier: Carrier,
        shapes: Mapping[TensorId, tuple[int, ...]],
        choose: Callable[[TensorId, tuple[int, ...]], TensorPlan | Refusal],
        refusals: Sequence[Refusal] = (),
    ) -> TargetPlan:
        tensors, unfit = planned_or_refused(shapes, choose)
        return TargetPlan(
            layout=model.arch.id,
            tensors=tuple(tensors),
            carrier=carrier,
            carrier_note=_NOTES[carrier],
            loads_in=_loads_in(tensors),
            n_extra_bytes=2 * 4 * model.max_positions * (model.dims.head // 2),
            refusals=(*refusals, *unfit),
            warnings=self._warnings(tensors),
        )

    def plan_adopted(
        self, model: ModelDesc, carrier: Carrier, storages: Mapping[TensorId, Grid | FloatType]
    ) -> TargetPlan:
        """Blocks as large as ONNX Runtime is fast with and the given groups allow; see `Adopting`."""
        shapes = adopted_shapes(model, storages)

        def choose(tensor: TensorId, shape: tuple[int, ...]) -> TensorPlan | Refusal:
            given = storages.get(tensor)
            return self._nearest(tensor, shape) if given is None else _adopted(tensor, shape, given)

        # Floats are split into blocks as they come, so no block size is asked for either.
        idle = idle_options(self.options, ("type", "block_size"))
        idle += idle_ends(self.options, {"embedding": Role.EMBED, "head": Role.HEAD}, storages)
        idle += idle_rules(RULES, self.options.tensor_type, storages)
        return self._target(model, carrier, shapes, choose, [*self._option_refusals(model), *idle])

    def check_source(self, checkpoint: Checkpoint) -> SourceFindings:
        """Whether ONNX Runtime GenAI finds a tokenizer, and takes its special tokens; see `Exporter`."""
        return SourceFindings(tuple(genai.source_refusals(checkpoint)))

    def write(
        self, model: QuantizedModel, checkpoint: Checkpoint, plan: TargetPlan, path: Path, progress: Progress
    ) -> Package:
        """Write the folder's files into `path`, which is there and empty; see `Exporter`."""
        if plan.refusals:
            raise ExportError("this plan was refused", where=str(path))
        check_complete(model, plan)
        data = write_data(path / DATA, model, plan.tensors, _rope_tables(model.desc), progress)
        graph = build(model.desc, plan, data.places, Settings(__version__, self.options.exact))
        ir.save(graph, path / genai.MODEL)
        genai.write_config(model.desc, checkpoint, path / genai.CONFIG)
        checkpoint.copy_files(SIDE_FILES, path)
        return finish_folder(
            path,
            model,
            plan,
            format="onnx",
            digests=data.decoded_sha256,
            requires=_requires(plan.tensors),
            facts={},
        )

    def verify(self, path: Path, progress: Progress) -> Sequence[Check]:
        """Decode with a reader of its own, then run in ONNX Runtime and GenAI; see `Exporter`."""
        return verify_folder(path, progress)

    def runtime(self, path: Path, length: int) -> Measured:  # noqa: ARG002 a session takes any length
        """The package in ONNX Runtime; see `Evaluating`."""
        return Measured(path)

    def diagnose(self, path: Path) -> Sequence[Finding]:
        """What graph, config and places of the tensors say is wrong; see `Diagnosing`."""
        return diagnose_folder(path)

    def sample(self, path: Path, prompt: str) -> str:
        """Continue a prompt with the package, in ONNX Runtime GenAI; see `Sampler`."""
        return genai_sample(path, prompt, SAMPLE_TOKENS)

    def inspect(self, path: Path) -> Mapping[str, Any]:
        """The manifest's facts; see `Exporter`."""
        return inspected(path)

    def tensor_bytes(self, path: Path) -> Mapping[str, int]:
        """What the headers say; see `Sizing`. A matrix is stored in several arrays."""
        found: dict[str, int] = {}
        for name, span in open_model(path).spans.items():
            stem, _, last = name.rpartition(".")
            stored_as = stem if last in ("codes", "scales", "zeros") else name
            found[stored_as] = found.get(stored_as, 0) + span.n_bytes
        return found

    def _option_refusals(self, model: ModelDesc) -> list[Refusal]:
        """What of the options cannot be meant."""
        named = {name: getattr(self.options, name) for name in ("type", "embedding", "head")}
        found = [
            Refusal(
                f"option {name}", f"{value!r} is not a storage type", f"use one of {', '.join(types.BITS)}"
            )
            for name, value in named.items()
            if value not in types.BITS
        ]
        if self.options.block_size not in types.BLOCKS:
            why = f"ONNX Runtime has no fast kernel for blocks of {self.options.block_size} columns"
            found.append(Refusal("option block-size", why, f"use one of {', '.join(types.BLOCKS)}"))
        return found + RULES.refusals(self.options.tensor_type, model)

    @cached_property
    def _overrides(self) -> tuple[Any, ...]:
        return RULES.overrides(self.options.tensor_type)

    def _kind(self, tensor: TensorId) -> str:
        """The type of a matrix, as the options have it."""
        rule = last_that_holds(self._overrides, tensor)
        ends = {Role.EMBED: self.options.embedding, Role.HEAD: self.options.head}
        return rule.type if rule is not None else ends.get(tensor.role, self.options.type)

    def _grid(self, tensor: TensorId) -> AffineGrid:
        """The grid of a matrix, as the options have it."""
        return types.grid(self._kind(tensor), int(self.options.block_size))

    def _tensor(self, tensor: TensorId, shape: tuple[int, ...]) -> TensorPlan | Refusal:
        name = stored_name(tensor)
        if len(shape) == 1:
            return TensorPlan(tensor, name, shape, FloatType.F32, 4 * shape[0])
        grid = self._grid(tensor)
        refusal = grid.accepts(shape)
        if refusal is not None:
            return Refusal(refusal.where, refusal.why, _way_out(shape[1]))
        note = "3-bit codes in a 4-bit container" if types.container(grid) != grid.bits else ""
        return TensorPlan(tensor, name, shape, grid, types.n_bytes(grid, shape), note)

    def _nearest(self, tensor: TensorId, shape: tuple[int, ...]) -> TensorPlan | Refusal:
        """A tensor of floats: matrices in 8 bits, unless an option names them, since all matrices here are codes."""
        name = stored_name(tensor)
        if len(shape) == 1:
            return TensorPlan(tensor, name, shape, FloatType.F32, 4 * shape[0])
        kind, blocks = "int8", [*map(int, types.BLOCKS)]
        if tensor.block is None or last_that_holds(self._overrides, tensor) is not None:
            kind, blocks = self._kind(tensor), [int(self.options.block_size), *blocks]
        for block in blocks:
            grid = types.grid(kind, block)
            if grid.accepts(shape) is None:
                return TensorPlan(tensor, name, shape, grid, types.n_bytes(grid, shape))
        why = f"is of floats, which ONNX Runtime stores in blocks, and {shape[1]} columns are none"
        return Refusal(str(tensor), why, "export it to another format")

    def _warnings(self, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
        grids = [t.storage for t in tensors if isinstance(t.storage, AffineGrid)]
        found = []
        if any(grid.bits == 3 for grid in grids):
            found.append("ONNX Runtime has no 3-bit node: 3-bit codes take 4 bits in the file, as int4 does")
        if self.options.exact and any(types.container(grid) != 4 for grid in grids):
            found.append(
                "--exact: on a CPU, matrices of 2 and 8 bits are decoded anew at every call, 50 to 100 times slower"
            )
        old = lacks(_requires(tensors)) if grids else ""
        found += [f"{old}: the package would not be run here"] if "older" in old else []
        return tuple(found)


def _adopted(tensor: TensorId, shape: tuple[int, ...], given: Grid | FloatType) -> TensorPlan | Refusal:
    """A tensor on the grid that holds `given`'s values, in the largest blocks."""
    name = stored_name(tensor)
    if len(shape) == 1:
        return TensorPlan(tensor, name, shape, FloatType.F32, 4 * shape[0])
    if isinstance(given, FloatType):
        return Refusal(str(tensor), f"{given} matrices are not written", "store it as q8_0, which int8 holds")
    for block in sorted(map(int, types.BLOCKS), reverse=True):
        for kind in types.BITS:
            grid = types.grid(kind, block)
            if holds(grid, given) and grid.accepts(shape) is None:
                return TensorPlan(tensor, name, shape, grid, types.n_bytes(grid, shape), f"holds {given.id}")
    why = f"no node of ONNX Runtime holds the values of {given.id} exactly"
    return Refusal(str(tensor), why, "use q4_0, q8_0, q2_0 or tq2_0, or quantize for ONNX by itself")


def _way_out(n_in: int) -> str:
    fits = [size for size in types.BLOCKS if n_in % int(size) == 0]
    return (
        f"use --block-size {' or '.join(fits)}"
        if fits
        else "no block size that ONNX Runtime is fast with fits"
    )


def _requires(tensors: Sequence[TensorPlan]) -> dict[str, str]:
    """The first versions that load the package."""
    containers = {types.container(t.storage) for t in tensors if isinstance(t.storage, AffineGrid)}
    newest = max((types.RUNTIME[bits] for bits in containers), key=_version)
    return {"onnxruntime": newest, "onnxruntime-genai": types.GENAI}


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _loads_in(tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    if not tensors:
        return ()
    needs = _requires(tensors)
    return tuple(f"{name} {version} or newer" for name, version in needs.items())


def _rope_tables(desc: ModelDesc) -> dict[str, np.ndarray]:
    """Cos and sin of all positions, f32[max_positions, head/2] each, as the float reference computes them."""
    half = desc.dims.head // 2
    cos, sin = cos_sin(desc.rope, desc.dims.head, range(desc.max_positions), "cpu")
    return {ROPE_COS: cos[:, :half].contiguous().numpy(), ROPE_SIN: sin[:, :half].contiguous().numpy()}
