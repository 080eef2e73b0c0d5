"""The GGUF exporter: plan, write, verify, inspect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import parse_size
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import ExportError, Refusal
from d2qconv.exporters.adopted import idle_ends, idle_options, idle_rules
from d2qconv.exporters.base import (
    Candidates,
    Carrier,
    Check,
    FloatType,
    Option,
    Package,
    PaddingChoice,
    Progress,
    SourceFindings,
    TargetPlan,
    TensorPlan,
    once_a_role,
    type_name,
)
from d2qconv.exporters.diagnosis import Finding
from d2qconv.exporters.file_set import member
from d2qconv.exporters.planned import shapes_with_biases
from d2qconv.grids.exact import holds
from d2qconv.ir.model import QuantizedModel
from d2qconv.names import Part, Role, TensorId
from d2qconv_gguf import GgufOptions, base_gguf, candidates, imatrix, shards, types, widths, writer
from d2qconv_gguf.container import GgufFile, bits_per_weight, read
from d2qconv_gguf.diagnose import diagnose_file
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.metadata import (
    KV,
    METADATA_SHA256,
    metadata_digest,
    metadata_refusals,
    model_metadata,
    provenance_metadata,
    rope_freqs,
)
from d2qconv_gguf.names import (
    LAYOUTS,
    MODULES,
    NO_CARRIER,
    RELABEL_NOTE,
    ROPE_FREQS,
    WAYS,
    Layout,
    gguf_name,
    layout_refusals,
    loadable,
)
from d2qconv_gguf.runtime import LlamaCpp, Measured
from d2qconv_gguf.tokenizer import tokenizer_metadata, tokenizer_refusals, tokenizer_warnings
from d2qconv_gguf.type_map import RULES, TypeMap
from d2qconv_gguf.verify import require_same_function, verify_file
from d2qconv_gguf.zeros import padding_keys

if TYPE_CHECKING:
    from d2qconv.checkpoint.open import Checkpoint

_NORMS = (Role.ATTN_NORM, Role.Q_NORM, Role.K_NORM, Role.FFN_NORM, Role.FINAL_NORM)
#: Tokens that `sample` makes.
SAMPLE_TOKENS = 48
LOADS_IN = ("llama.cpp", "and what is built on it: ollama, LM Studio, llama-cpp-python, …")


class GgufExporter:
    """Writes one GGUF file for stock llama.cpp."""

    def __init__(self, options: GgufOptions) -> None:
        self.options = options

    def plan(self, model: ModelDesc, carrier: Carrier | None) -> TargetPlan:
        """Decide storage, layout and carrier; see `Exporter`. With a size to keep: the smallest there is.

        With `base_gguf` the checkpoint's weights are read and compared with those of that file.
        """
        return self._plan(model, carrier, None)

    def plan_chosen(
        self, model: ModelDesc, carrier: Carrier | None, chosen: Mapping[TensorId, types.Storage]
    ) -> TargetPlan:
        """The same with the storages that a measurement chose; see `Allocating`."""
        return self._plan(model, carrier, chosen)

    def plan_adopted(
        self, model: ModelDesc, carrier: Carrier, storages: Mapping[TensorId, types.Storage]
    ) -> TargetPlan:
        """The type of fewest bytes that holds every value; see `Adopting`."""
        plan = self._plan(model, carrier, None, adopted=storages)
        asked = self.options
        found = idle_options(asked, ("type", "mix", "size", "bpw", "candidates", "imatrix", "pad"))
        found += idle_ends(asked, {"embedding": Role.EMBED, "head": Role.HEAD}, storages)
        found += idle_rules(RULES, asked.tensor_type, storages)
        return replace(plan, refusals=(*plan.refusals, *found))

    def candidates(
        self, model: ModelDesc, checkpoint: Checkpoint, carrier: Carrier | None
    ) -> Candidates | None:
        """What `size` and `bpw` choose from; see `Allocating`."""
        if not candidates.is_asked(self.options):
            return None
        smallest = self.plan(model, carrier)
        layout = LAYOUTS[smallest.layout]
        choices = _choices(TypeMap(self.options, model, layout.name))
        header = candidates.header_bytes(self._keys(model, checkpoint, layout, 0), smallest.tensors)
        return candidates.candidates(
            self.options, smallest.tensors, choices, model.n_weights, smallest.n_extra_bytes, header
        )

    def _plan(
        self,
        model: ModelDesc,
        carrier: Carrier | None,
        wanted: Mapping[TensorId, types.Storage] | None,
        adopted: Mapping[TensorId, types.Storage] | None = None,
    ) -> TargetPlan:
        """wanted: storages that were chosen, None if nothing was. adopted: those of another format, likewise."""
        refusals = [*candidates.refusals(self.options)]
        ways = WAYS.get(model.arch.id)
        if ways is None:
            why = f"no GGUF layout for architecture {model.arch.id}; there are ones for {', '.join(WAYS)}"
            return TargetPlan("", (), Carrier.NONE, "", (), refusals=(Refusal("architecture", why),))
        chosen = carrier or next(iter(ways))
        if chosen not in ways:
            why = f"not for {model.arch.id}: {NO_CARRIER[model.arch.id]}"
            refusals.append(Refusal(f"carrier {chosen}", why, f"use {' or '.join(ways)}"))
            chosen = next(iter(ways))
        layout = loadable(ways[chosen], model.dims)
        type_map = TypeMap(self.options, model, layout.name)
        refusals += type_map.refusals()
        if wanted is None and candidates.is_asked(self.options):
            wanted = {tensor: options[0].storage for tensor, options in _choices(type_map).items() if options}
        if wanted is not None:
            type_map = replace(type_map, chosen=wanted)
        shapes = shapes_with_biases(model, chosen, layout.biases)
        refusals += layout_refusals(layout, shapes, model.dims)
        refusals += metadata_refusals(model, layout.name)
        tensors: list[TensorPlan] = []
        unfit: dict[tuple[Role, str, str], list[TensorId]] = {}
        asked = partial(_storage, type_map=type_map)
        instead = widths.substitutes(model, asked, self.options.pad) if adopted is None else {}
        for tensor in shapes:
            if adopted is None:
                planned = _tensor(tensor, shapes[tensor], asked, instead)
            else:
                planned = _adopted(tensor, shapes[tensor], type_map, adopted.get(tensor))
            tensors += [planned] if isinstance(planned, TensorPlan) else []
            if isinstance(planned, Refusal):
                unfit.setdefault((tensor.role, planned.why, planned.todo), []).append(tensor)
        may_pad = adopted is None and self.options.pad == "never"
        cost = f"; {widths.cost(model, asked)}" if unfit and may_pad else ""
        refusals += once_a_role(
            {(role, why, todo + cost): where for (role, why, todo), where in unfit.items()}
        )
        refusals += widths.zero_refusals(model, {t.id: t for t in tensors})
        if self.options.base_gguf is not None:
            refusals += base_gguf.refusals(self.options.base_gguf, model, layout)
        if self.options.imatrix is not None:
            refusals += imatrix.refusals(self.options.imatrix, model)
        return TargetPlan(
            layout=layout.name,
            tensors=tuple(tensors),
            carrier=chosen,
            carrier_note=_carrier_note(model, layout, chosen),
            loads_in=LOADS_IN,
            n_extra_bytes=sum(e.n_bytes for e in _rope_entry(model)),
            refusals=tuple(refusals),
            warnings=(*_warnings(model, layout, tensors), *self._shard_warnings(tensors)),
            is_split=self.options.max_shard_size is not None,
        )

    def choose_padding(self, model: ModelDesc) -> PaddingChoice:
        """Whether this model is to be widened before it is planned; see `Padder`."""
        type_map = TypeMap(self.options, model, model.arch.id)
        decision = widths.decide(model, partial(_storage, type_map=type_map), self.options.pad)
        return PaddingChoice(decision.padding, decision.note)

    def check_source(self, checkpoint: Checkpoint) -> SourceFindings:
        """What of this checkpoint's tokenizer cannot be written; nothing if it comes from `base_gguf`."""
        if self.options.base_gguf is not None:
            return SourceFindings()
        return SourceFindings(tuple(tokenizer_refusals(checkpoint)), tuple(tokenizer_warnings(checkpoint)))

    def write(
        self, model: QuantizedModel, checkpoint: Checkpoint, plan: TargetPlan, path: Path, progress: Progress
    ) -> Package:
        """Write the file; see `Exporter`. Raises VerifyError if it would compute something else than the source."""
        if plan.refusals or plan.layout not in LAYOUTS:
            raise ExportError("this plan was refused", where=str(path))
        layout = LAYOUTS[plan.layout]
        made = [*writer.entries(model, plan, layout), *_rope_entry(model.desc)]
        file_type = TypeMap(self.options, model.desc, layout.name).file_type(plan.tensors)
        keys = self._keys(model.desc, checkpoint, layout, file_type)
        digests = writer.digest_all(made, progress)
        keys += provenance_metadata(model.provenance, digests)
        path, size = self._write_files(path, layout.name, keys, made, progress)
        require_same_function(path, model.desc)
        if self.options.imatrix is not None:
            imatrix.write(self.options.imatrix, model)
        return Package(path, size, digests)

    def _write_files(
        self, path: Path, architecture: str, keys: list[KV], made: Sequence[writer.Entry], progress: Progress
    ) -> tuple[Path, int]:
        """One file, or several if `max_shard_size` asks for it; the first one, and the bytes of all."""
        # As long as the digest that will stand there.
        counted = [*keys, KV.text(METADATA_SHA256, "0" * 64)]
        parts = shards.groups(counted, made, self._shard_limit())
        keys += shards.split_keys(0, len(parts), len(made))
        values = {kv.key: kv.value for kv in keys} | {"general.architecture": architecture}
        keys.append(KV.text(METADATA_SHA256, metadata_digest(values)))
        size, done = 0, 0
        for number, part in enumerate(parts):
            size += writer.write_file(
                member(path, number + 1, len(parts)),
                "" if number else architecture,
                shards.split_keys(number, len(parts), len(made)) if number else keys,
                part,
                progress,
                (done, len(made)),
            )
            done += len(part)
        return member(path, 1, len(parts)), size

    def _shard_limit(self) -> int | None:
        """Bytes of a file at most; raises InputError for a text that is no size."""
        asked = self.options.max_shard_size
        return None if asked is None else parse_size(asked, "--max-shard-size")

    def _shard_warnings(self, tensors: Sequence[TensorPlan]) -> list[str]:
        """Tensors that are larger than a file should be."""
        limit = self._shard_limit()
        large = [t for t in tensors if limit is not None and t.n_bytes > limit]
        return [
            f"{t.stored_as} takes {t.n_bytes:,} bytes, more than --max-shard-size; it gets a file of its own"
            for t in large
        ]

    def verify(self, path: Path, progress: Progress) -> Sequence[Check]:
        """Check a written file with gguf-py and llama.cpp; see `Exporter`."""
        return verify_file(path, progress)

    def runtime(self, path: Path, length: int) -> Measured:
        """The package in llama.cpp; see `Evaluating`."""
        return Measured(path, length)

    def diagnose(self, path: Path) -> Sequence[Finding]:
        """What its header says is wrong, and which llama.cpp its types need; see `Diagnosing`."""
        return diagnose_file(path)

    def sample(self, path: Path, prompt: str) -> str:
        """Continue a prompt with the file, in llama.cpp; see `Sampler`."""
        with LlamaCpp(path) as runtime:
            return runtime.generate(prompt, SAMPLE_TOKENS, seed=0)

    def inspect(self, path: Path) -> Mapping[str, Any]:
        """Facts of a GGUF; see `Exporter`. Reads no weights. Raises VerifyError if it is none."""
        return _facts(read(path))

    def tensor_bytes(self, path: Path) -> Mapping[str, int]:
        """What the headers say; see `Sizing`."""
        return {name: tensor.n_bytes for name, tensor in read(path).tensors.items()}

    def _keys(self, desc: ModelDesc, checkpoint: Checkpoint, layout: Layout, file_type: int) -> list[KV]:
        ours = model_metadata(
            desc,
            layout=layout.name,
            file_type=file_type,
            name=checkpoint.name.rsplit("/", 1)[-1],
            license_id=checkpoint.license,
        )
        if self.options.base_gguf is not None:
            return base_gguf.keys(self.options.base_gguf, layout, ours)
        return [*ours, *padding_keys(desc), *tokenizer_metadata(checkpoint, desc.dims.vocab)]


def _choices(type_map: TypeMap) -> dict[TensorId, tuple[Option, ...]]:
    """Every way to store every matrix, fewest bytes first."""
    matrices = {t: dense.shape for t, dense in type_map.model.tensors.items() if len(dense.shape) == 2}
    return {tensor: candidates.options_of(type_map, tensor, shape) for tensor, shape in matrices.items()}


def _tensor(
    tensor: TensorId, shape: tuple[int, ...], asked: widths.Asked, instead: Mapping[TensorId, types.Storage]
) -> TensorPlan | Refusal | None:
    """Plan of one tensor, or why it cannot be stored; None where the option itself was refused already.

    instead: storages of tensors that what was asked for does not fit.
    """
    wanted = asked(tensor)
    stored = instead.get(tensor, wanted)
    if stored is None or wanted is None:
        return None
    note = f"{type_name(wanted)} does not fit" if stored is not wanted else ""
    refusal = types.shape_refusal(str(tensor), stored, shape)
    if refusal is not None:
        return refusal
    return TensorPlan(tensor, gguf_name(tensor), shape, stored, types.n_bytes(stored, shape), note)


def _adopted(
    tensor: TensorId, shape: tuple[int, ...], type_map: TypeMap, given: types.Storage | None
) -> TensorPlan | Refusal:
    """A tensor in the type of fewest bytes that holds what it is given in.

    given: None where that is for the options to say; if they do not, it stays what the checkpoint has.
    """
    name = gguf_name(tensor)
    if tensor.part is Part.BIAS or tensor.role in _NORMS:
        return TensorPlan(tensor, name, shape, FloatType.F32, types.n_bytes(FloatType.F32, shape))
    if given is None:
        asked = type_map.asked(tensor)
        given = FloatType.of(type_map.model.tensors[tensor].dtype) if asked is None else types.storage(asked)
        assert given is not None, "what the options name is refused if there is no such type"
        fault = types.shape_refusal(str(tensor), given, shape)
        return fault or TensorPlan(tensor, name, shape, given, types.n_bytes(given, shape))
    if isinstance(given, FloatType):
        return TensorPlan(tensor, name, shape, given, types.n_bytes(given, shape))
    fitting = [grid for grid in GRIDS.values() if grid is given or holds(grid, given)]
    fitting = [grid for grid in fitting if grid.accepts(shape) is None]
    if not fitting:
        why = f"no type of llama.cpp holds the values of {given.id} exactly"
        return Refusal(str(tensor), why, "quantize for GGUF by itself")
    best = min(fitting, key=lambda grid: types.n_bytes(grid, shape))
    return TensorPlan(tensor, name, shape, best, types.n_bytes(best, shape), f"holds {given.id}")


def _storage(tensor: TensorId, type_map: TypeMap) -> types.Storage | None:
    """Vectors are f32, since llama.cpp's kernels for norms and biases take nothing else."""
    if tensor.part is Part.BIAS or tensor.role in _NORMS:
        return FloatType.F32
    return types.storage(type_map.type_of(tensor))


def _carrier_note(model: ModelDesc, layout: Layout, carrier: Carrier) -> str:
    notes = {
        Carrier.BIAS: "ffn_gate.bias and ffn_up.bias, exact",
        Carrier.BIASES: "a bias of every linear that may have one: "
        + ", ".join(f"{MODULES[role]}" for role in Role if role in layout.biases),
        Carrier.RANK1: "rank-1 change of ffn_gate and ffn_up before quantization, no extra tensor",
        Carrier.NONE: "not carried",
    }
    relabelled = f"; {RELABEL_NOTE}" if _is_relabelled(model, layout) else ""
    return notes[carrier] + relabelled


def _is_relabelled(model: ModelDesc, layout: Layout) -> bool:
    """Whether llama.cpp has a layout of the model's own and this is another."""
    return model.arch.id in LAYOUTS and model.arch.id != layout.name


def _warnings(model: ModelDesc, layout: Layout, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    found = [f"{model.arch.id} is {RELABEL_NOTE}"] if _is_relabelled(model, layout) else []
    found += [types.CAVEATS[name] for name in sorted({t.type_name for t in tensors} & set(types.CAVEATS))]
    if model.is_untied:
        found += [
            f"the rotation unties the head: {t.stored_as} takes {t.n_bytes:,} bytes ({t.type_name}) that the "
            "checkpoint's tied head does not take"
            for t in tensors
            if t.id == TensorId(Role.HEAD)
        ]
    return tuple(found)


def _rope_entry(desc: ModelDesc) -> list[writer.Entry]:
    """Llama 3's RoPE factors, a tensor of the file that no checkpoint holds."""
    factors = rope_freqs(desc)
    if factors is None:
        return []
    shape = tuple(factors.shape)
    return [
        writer.Entry(
            ROPE_FREQS, shape, "f32", types.n_bytes(FloatType.F32, shape), Dense.of(torch.from_numpy(factors))
        )
    ]


def _facts(file: GgufFile) -> dict[str, Any]:
    """What a person wants to know of a GGUF."""
    arch = file.architecture
    matrices = [t for t in file.tensors.values() if len(t.shape) > 1]
    linears = [t for t in matrices if t.name.startswith("blk.")]
    counts = Counter(t.type.name.lower() for t in file.tensors.values())
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.type.name.lower()] += tensor.n_bytes
    own = {k: v for k, v in file.keys.items() if k.startswith("d2qconv.") and not isinstance(v, list)}
    shift = [n for n in file.tensors if n.endswith(("ffn_gate.bias", "ffn_up.bias"))]
    return {
        "layout": arch,
        "name": file.keys.get("general.name", ""),
        "blocks": file.keys.get(f"{arch}.block_count"),
        "context_length": file.keys.get(f"{arch}.context_length"),
        "embedding_length": file.keys.get(f"{arch}.embedding_length"),
        "tokenizer": f"{file.keys.get('tokenizer.ggml.model', '')} {file.keys.get('tokenizer.ggml.pre', '')}".strip(),
        "files": len(file.files),
        "file_bytes": file.n_bytes,
        "tensors": dict(counts),
        "bytes": dict(sizes),
        "bits_per_weight": round(bits_per_weight(list(file.tensors.values())), 4),
        "bits_per_weight_in_blocks": round(bits_per_weight(linears), 4),
        "ffn_biases": len(shift),
        "provenance": own,
    }
