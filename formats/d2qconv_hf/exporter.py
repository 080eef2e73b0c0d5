"""The exporters of Hugging Face folders: plan, write, verify. See `d2qconv.exporters.base.Exporter`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import parse_size
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import ExportError, InputError, Refusal
from d2qconv.exporters.adopted import idle_options
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
from d2qconv.exporters.overrides import Override, OverrideOption, last_that_holds
from d2qconv.exporters.planned import (
    LINEARS,
    SIDE_FILES,
    adopted_shapes,
    check_complete,
    finish_folder,
    planned_or_refused,
    shapes_with_biases,
)
from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Grid
from d2qconv.ir.model import QuantizedModel
from d2qconv.names import Part, Role, TensorId
from d2qconv_hf import HfOptions, compatibility, types
from d2qconv_hf.config import LABELS, LICENSES, Labelled, labelled, package_config
from d2qconv_hf.container import open_folder
from d2qconv_hf.diagnose import diagnose_folder
from d2qconv_hf.dialects.base import Content, Dialect, Scheme
from d2qconv_hf.dialects.compressed_tensors import CompressedTensors
from d2qconv_hf.dialects.gptq import AutoRound, Gptq
from d2qconv_hf.dialects.mlx import Mlx
from d2qconv_hf.runtime import Measured
from d2qconv_hf.verify import EXACT, PRODUCTS, verify_folder
from d2qconv_hf.weights import Weights, module_name, stored_name

RULES = OverrideOption("tensor-type", (*types.BITS, types.FLOAT), "int4")


@dataclass(frozen=True)
class HfExporter:
    """Writes a folder in one dialect. options: see `HfOptions`."""

    dialect: ClassVar[Dialect]
    options: HfOptions

    def plan(self, model: ModelDesc, carrier: Carrier | None) -> TargetPlan:
        """Every tensor's storage; see `Exporter`."""
        chosen = carrier or (Carrier.BIAS if self._has_place(model) else Carrier.RANK1)
        refusals = self._option_refusals(model) + self._carrier_refusals(model, chosen)
        shapes = {} if refusals else shapes_with_biases(model, chosen)
        zero = self._zero(model)
        return self._target(
            model, chosen, shapes, lambda t, shape: self._tensor(model, t, shape, zero), refusals
        )

    def plan_adopted(
        self, model: ModelDesc, carrier: Carrier, storages: Mapping[TensorId, Grid | FloatType]
    ) -> TargetPlan:
        """The groups of the other format, with zero points where it has them; see `Adopting`."""
        refusals = self._carrier_refusals(model, carrier)
        refusals += self._option_refusals(model)
        # Floats stay floats here, so that no rule about single matrices can act either.
        refusals += idle_options(self.options, ("type", "group_size", "zero", "tensor_type"))
        shapes = {} if refusals else adopted_shapes(model, storages)
        floats = types.FLOATS[self.options.dtype or types.dtype_of_steps(storages.values())]

        def storage(tensor: TensorId, shape: tuple[int, ...]) -> TensorPlan | Refusal:
            return self._adopted(model, tensor, shape, storages.get(tensor), floats)

        plan = self._target(model, carrier, shapes, storage, refusals)
        dtype = self._dtype(plan.tensors)
        return replace(
            plan,
            refusals=(*plan.refusals, *types.step_refusals(dtype, plan.tensors)),
            warnings=(*plan.warnings, *types.cast_warnings(dtype, plan.tensors)),
        )

    def check_source(self, checkpoint: Checkpoint) -> SourceFindings:
        """Whether a tokenizer comes with the checkpoint; see `Exporter`."""
        if any(checkpoint.file(name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return SourceFindings()
        return SourceFindings(warnings=("the checkpoint has no tokenizer, and the package will have none",))

    def write(
        self, model: QuantizedModel, checkpoint: Checkpoint, plan: TargetPlan, path: Path, progress: Progress
    ) -> Package:
        """Write the folder's files into `path`, which is there and empty; see `Exporter`."""
        if plan.refusals:
            raise ExportError("this plan was refused", where=str(path))
        check_complete(model, plan)
        label = _label_of(model.desc, plan.tensors)
        most = parse_size(self.options.max_shard_size, "option max-shard-size")
        dtype = self._dtype(plan.tensors)
        weights = Weights(self.dialect, plan.tensors, label.zeros, types.FLOATS[dtype].dtype)
        digests = weights.write(model, path, most, progress)
        config = package_config(
            model.desc,
            checkpoint.config,
            label.label,
            self.dialect.config(self._content(model.desc, plan.tensors)),
            dtype,
        )
        _write_json(path / "config.json", config)
        checkpoint.copy_files((*SIDE_FILES, *LICENSES), path)
        return finish_folder(
            path,
            model,
            plan,
            format=self.dialect.facts.name,
            digests=digests,
            requires=self._requires(label),
            facts={"dtype": dtype, PRODUCTS: _products(plan.tensors, dtype)},
        )

    def verify(self, path: Path, progress: Progress) -> Sequence[Check]:
        """Decode with a reader of its own, then compare with the dialect's runtime; see `Exporter`."""
        return verify_folder(path, self.dialect.facts, progress)

    def runtime(self, path: Path, length: int) -> Measured:  # noqa: ARG002 these take any length
        """The package in its dialect's runtime; see `Evaluating`."""
        return Measured(self.dialect.facts.name, path)

    def diagnose(self, path: Path) -> Sequence[Finding]:
        """What its headers say is wrong, and which runtimes load it; see `Diagnosing`."""
        return diagnose_folder(path, self.dialect.facts.name)

    def inspect(self, path: Path) -> Mapping[str, Any]:
        """The manifest's facts; see `Exporter`."""
        return inspected(path)

    def tensor_bytes(self, path: Path) -> Mapping[str, int]:
        """What the headers say; see `Sizing`. A matrix is stored in several arrays, all under its module's name."""
        found: dict[str, int] = {}
        for name, span in open_folder(path).spans.items():
            module, _, last = name.rpartition(".")
            stored_as = name if last == "bias" else f"{module}.weight"
            found[stored_as] = found.get(stored_as, 0) + span.n_bytes
        return found

    def _target(
        self,
        model: ModelDesc,
        carrier: Carrier,
        shapes: Mapping[TensorId, tuple[int, ...]],
        choose: Callable[[TensorId, tuple[int, ...]], TensorPlan | Refusal],
        refusals: Sequence[Refusal],
    ) -> TargetPlan:
        tensors, unfit = planned_or_refused(shapes, choose)
        label = _label_of(model, tensors)
        content = self._content(model, tensors)
        together = [] if refusals or unfit else self._refuse_all(content)
        size = types.FLOATS[self._dtype(tensors)].dtype.itemsize
        asked = compatibility.Asked.of(self.dialect.facts.name, content, label)
        return TargetPlan(
            layout=label.model_type,
            tensors=tuple(tensors),
            carrier=carrier,
            carrier_note=_carrier_note(model, carrier, label),
            loads_in=compatibility.loads_in(asked) if tensors else (),
            n_extra_bytes=size * sum(label.zeros.values()),
            refusals=(*refusals, *unfit, *together),
            warnings=compatibility.warnings(asked) if tensors else (),
        )

    def _refuse_all(self, content: Content) -> list[Refusal]:
        if not content.schemes:
            why = "no matrix would be quantized"
            return [Refusal("option tensor-type", why, "give some matrices another type than float")]
        return self.dialect.refuse_all(content)

    def _option_refusals(self, model: ModelDesc) -> list[Refusal]:
        """What of the options cannot be meant."""
        o = self.options
        allowed = {
            "type": tuple(types.BITS),
            "group_size": (*types.GROUPS, types.CHANNEL),
            "zero": ("auto", "integer", "none"),
            "dtype": tuple(types.FLOATS),
        }
        given = {name: getattr(o, name) for name in allowed}
        if o.dtype is None:
            del given["dtype"]
        found = [
            Refusal(
                f"option {name.replace('_', '-')}",
                f"{value!r} is not a choice",
                f"use one of {', '.join(allowed[name])}",
            )
            for name, value in given.items()
            if value not in allowed[name]
        ]
        try:
            parse_size(o.max_shard_size, "option max-shard-size")
        except InputError as error:
            found.append(Refusal(error.where, error.what, error.todo))
        return found + RULES.refusals(o.tensor_type, model)

    def _dtype(self, tensors: Sequence[TensorPlan]) -> str:
        """What config.json says that the runtime computes in."""
        return self.options.dtype or types.dtype_of(tensors)

    def _has_place(self, model: ModelDesc) -> bool:
        """Whether the dialect's runtime has a class for this architecture with biases of gate and up."""
        label = LABELS.get(model.arch.model_type)
        return label is not None and label.model_type in self.dialect.facts.biases

    def _carrier_refusals(self, model: ModelDesc, carrier: Carrier) -> list[Refusal]:
        """Biases that the runtime would drop."""
        if carrier is Carrier.BIASES:
            why = "transformers has no class of this model with a bias at every linear"
            return [Refusal("option carrier", why, "use bias, rank1 or none")]
        if carrier is Carrier.BIAS and not self._has_place(model):
            runtime = self.dialect.facts.runtime
            why = f"{runtime} has no class of {model.arch.id} with biases of gate and up, and would drop them"
            return [Refusal("option carrier", why, "use rank1")]
        return []

    @cached_property
    def _overrides(self) -> tuple[Override, ...]:
        return RULES.overrides(self.options.tensor_type)

    def _type_of(self, tensor: TensorId) -> str:
        rule = last_that_holds(self._overrides, tensor)
        if rule is not None:
            return rule.type
        return self.options.type if tensor.role in LINEARS else types.FLOAT

    def _zero(self, model: ModelDesc) -> types.Kind:
        """The kind of zero points that `auto` means."""
        if self.options.zero != "auto":
            return self.options.zero
        names = {self._type_of(t) for t in model.tensors if t.role in LINEARS and t.part is Part.WEIGHT}
        names -= {types.FLOAT}
        is_taken = len(names) < 2 or self.dialect.facts.mixes_zeros
        return "integer" if names <= {"int2", "int3"} and is_taken else "none"

    def _tensor(
        self, model: ModelDesc, tensor: TensorId, shape: tuple[int, ...], zero: types.Kind
    ) -> TensorPlan | Refusal:
        name = self._type_of(tensor)
        if len(shape) == 1 or name == types.FLOAT:
            return self._float(model, tensor, shape)
        if tensor.role not in LINEARS:
            return Refusal(
                str(tensor), "embedding and head stay float in these folders", "leave the rule out"
            )
        grid = types.grid(name, self.options.group_size, shape[1], zero, self.options.dtype or types.DTYPE)
        return self._coded(model, tensor, shape, grid)

    def _coded(
        self, model: ModelDesc, tensor: TensorId, shape: tuple[int, ...], grid: AffineGrid, note: str = ""
    ) -> TensorPlan | Refusal:
        refusal = grid.accepts(shape) or self.dialect.refuse(grid, shape)
        if refusal is not None:
            return Refusal(
                refusal.where, refusal.why, refusal.todo.replace("use groups of", "use --group-size")
            )
        module = module_name(model, tensor)
        n_bytes = sum(a.n_bytes for a in self.dialect.layout(module, grid, (shape[0], shape[1])).values())
        return TensorPlan(tensor, f"{module}.weight", shape, grid, n_bytes, note)

    def _float(
        self,
        model: ModelDesc,
        tensor: TensorId,
        shape: tuple[int, ...],
        storage: FloatType | None = None,
        note: str = "",
    ) -> TensorPlan:
        storage = storage or types.FLOATS[self.options.dtype or types.DTYPE]
        n_bytes = storage.dtype.itemsize * math.prod(shape)
        return TensorPlan(tensor, stored_name(model, tensor), shape, storage, n_bytes, note)

    def _adopted(
        self,
        model: ModelDesc,
        tensor: TensorId,
        shape: tuple[int, ...],
        given: Grid | FloatType | None,
        floats: FloatType,
    ) -> TensorPlan | Refusal:
        """A tensor on the grid that holds `given`'s values; embedding and head as floats, and what is given in none.

        floats: what runtimes compute in. Floats beside another format's package have it, whatever theirs is there: MLX
        would go on in f32 behind an f32 norm. Of a checkpoint that is imported they keep its type, unless an option
        names one.
        """
        if isinstance(given, FloatType):
            return self._float(model, tensor, shape, floats)
        if given is None:
            own = None if self.options.dtype else FloatType.of(model.tensors[tensor].dtype)
            return self._float(model, tensor, shape, own)
        note = f"holds {given.id}"
        if tensor.role not in LINEARS:
            # Floats that hold every decoded value.
            return self._float(model, tensor, shape, FloatType.F32, note)
        refused, facts = None, self.dialect.facts
        if facts.has_offsets and types.overflows(given):
            why = f"{facts.name} stores -zero · step, which f16 does not hold for these steps"
            return Refusal(str(tensor), why, "quantize it again")
        for grid in types.holding(given):
            planned = self._coded(model, tensor, shape, grid, note)
            if isinstance(planned, TensorPlan):
                return planned
            refused = refused or planned
        why = f"no layout of {facts.name} holds the values of {given.id} exactly"
        return refused or Refusal(str(tensor), why, "use a type with f16 or bf16 steps, such as q4_0")

    def _content(self, model: ModelDesc, tensors: Sequence[TensorPlan]) -> Content:
        linears = {
            module_name(model, t.id): Scheme.of(t.storage) if isinstance(t.storage, AffineGrid) else None
            for t in tensors
            if t.id.role in LINEARS and t.id.part is Part.WEIGHT
        }
        head = next((t.stored_as for t in tensors if t.id.role is Role.HEAD), "")
        return Content(linears, head.removesuffix(".weight"))

    def _requires(self, label: Labelled) -> dict[str, str]:
        """First versions that load the package."""
        facts = self.dialect.facts
        found = {facts.runtime: facts.version}
        if label.label is not None and facts.runtime != "mlx-lm":
            found["transformers"] = label.label.transformers
        return found


class CompressedTensorsExporter(HfExporter):
    """`to-safetensors`."""

    dialect = CompressedTensors()


class AutoRoundExporter(HfExporter):
    """`to-auto-round`."""

    dialect = AutoRound()


class GptqExporter(HfExporter):
    """`to-gptq`."""

    dialect = Gptq()


class MlxExporter(HfExporter):
    """`to-mlx`."""

    dialect = Mlx()


def _label_of(model: ModelDesc, tensors: Sequence[TensorPlan]) -> Labelled:
    """The label that the planned biases need."""
    return labelled(model, any(t.id.part is Part.BIAS and t.id not in model.tensors for t in tensors))


def _products(tensors: Sequence[TensorPlan], dtype: str) -> str:
    """Whether step · (code - zero) is the same in the package's type as in f32."""
    grids = [t.storage for t in tensors if isinstance(t.storage, AffineGrid)]
    is_exact = dtype == "float16" and all(
        grid.significand > 0 and grid.bits < 8 and grid.zero != "float" for grid in grids
    )
    return EXACT if is_exact else f"rounded once where a runtime multiplies in {dtype}"


def _carrier_note(model: ModelDesc, carrier: Carrier, label: Labelled) -> str:
    if carrier is Carrier.RANK1:
        return "rank-1 change of gate and up before quantization, no extra tensor"
    if carrier is not Carrier.BIAS:
        return "not carried"
    same = label.model_type == model.arch.model_type
    return "mlp_bias, exact" if same else f"mlp_bias, exact; relabelled as {label.model_type}"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
