"""What an export format is: the one door through which every exporter, ours or not, is used.

An exporter is asked three times. `plan` before any work: which grid every weight will have, how the mean shift can
be carried, what is refused. `write` after quantization. `verify` on the written package, with readers of its own. One
whose options may leave the types open to measurement is asked for candidates too (`Allocating`).
Modules here import neither torch nor any runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from d2qconv.errors import Refusal
from d2qconv.exporters.info import ExporterInfo as ExporterInfo  # noqa: PLC0414 this is the door for exporters
from d2qconv.exporters.info import Runtime as Runtime  # noqa: PLC0414
from d2qconv.grids.base import Grid
from d2qconv.names import Role, TensorId

if TYPE_CHECKING:
    import torch

    from d2qconv.arch.spec import ModelDesc, Padding
    from d2qconv.checkpoint.open import Checkpoint
    from d2qconv.ir.model import QuantizedModel


class Carrier(StrEnum):
    """How a package carries DAC's mean shift.

    BIASES is more than that: every linear that may have a bias gets one that makes its mean output the source's, and
    is quantized for the deviation from the mean alone.
    """

    BIAS = "bias"
    BIASES = "biases"
    RANK1 = "rank1"
    NONE = "none"


class FloatType(StrEnum):
    """Storage of a tensor that is not quantized."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch has it."""
        import torch

        return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[self.value]

    @classmethod
    def of(cls, dtype: torch.dtype) -> FloatType:
        """The one of that type; raises StopIteration for another."""
        return next(kind for kind in cls if kind.dtype == dtype)


def type_name(storage: Grid | FloatType) -> str:
    """What a storage is called: `q2_k`, `f32`, …"""
    return storage.value if isinstance(storage, FloatType) else storage.id


def once_a_role(found: Mapping[tuple[Role, str, str], Sequence[TensorId]]) -> list[Refusal]:
    """One refusal for all blocks that it concerns alike. found: tensors by role, reason and way out."""

    def place(role: Role, where: Sequence[TensorId]) -> str:
        return str(where[0]) if len(where) == 1 else f"{role} of {len(where)} blocks"

    return [Refusal(place(role, where), why, todo) for (role, why, todo), where in found.items()]


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor will be stored.

    stored_as: its name in the package. storage: a grid, or a float type. n_bytes: predicted size in the package,
    exact. note: why this storage, where that is not plain from the options.
    """

    id: TensorId
    stored_as: str
    shape: tuple[int, ...]
    storage: Grid | FloatType
    n_bytes: int
    note: str = ""

    @property
    def type_name(self) -> str:
        """`q2_k`, `f32`, …"""
        return type_name(self.storage)


@dataclass(frozen=True)
class TargetPlan:
    """What the exporter will write, and what it will not.

    carrier: how the mean shift will be carried, and `carrier_note` by which means (`ffn_gate.bias and
    ffn_up.bias`, `… relabelled as llama`). layout: the package's own architecture label. n_extra_bytes: of what the
    package holds besides the model's own tensors (RoPE tables). is_split: it may be a set of files, see `file_set`.
    widths: what was done about rows that do not fit the storage (`PaddingChoice.note`).
    """

    layout: str
    tensors: tuple[TensorPlan, ...]
    carrier: Carrier
    carrier_note: str
    loads_in: tuple[str, ...]
    n_extra_bytes: int = 0
    refusals: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    is_split: bool = False
    widths: str = ""

    def storage(self, tensor: TensorId) -> Grid | FloatType:
        """Planned storage of one tensor; raises KeyError."""
        return self.by_id[tensor].storage

    @cached_property
    def by_id(self) -> Mapping[TensorId, TensorPlan]:
        """The tensors by id."""
        return {t.id: t for t in self.tensors}

    @property
    def n_bytes(self) -> int:
        """Predicted bytes of all tensors, without metadata."""
        return sum(t.n_bytes for t in self.tensors) + self.n_extra_bytes


@dataclass(frozen=True)
class Option:
    """One way to store a tensor, and its bytes in the package."""

    storage: Grid | FloatType
    n_bytes: int


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from where the user gave a size and no types.

    asked: in the user's words (`--size 3.2GiB`). n_bytes: what `TargetPlan.n_bytes` may be at most. fixed_bytes: of
    that, what all tensors take that are not in `options`. options: per matrix at least one; a matrix whose type was
    given has just that one.
    """

    asked: str
    n_bytes: int
    fixed_bytes: int
    options: Mapping[TensorId, tuple[Option, ...]]


@dataclass(frozen=True)
class PaddingChoice:
    """Whether a model is widened with zeros before it is planned: to which widths, None for not at all.

    note: what was chosen and what else there was, with the sizes of both; empty where there was nothing to choose.
    """

    padding: Padding | None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One thing that `verify` established. detail: with the number that shows it.

    is_skipped: it could not be looked at here, and `detail` says why; then `is_passed` means nothing was found.
    """

    name: str
    detail: str
    is_passed: bool
    is_skipped: bool = False


@dataclass(frozen=True)
class SourceFindings:
    """What an exporter says of a checkpoint's side files before any work."""

    refusals: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Package:
    """What was written.

    path: the first file, if there are several. n_bytes: of all of them. decoded_sha256: per stored name, the digest of
    the tensor's decoded f32 values.
    """

    path: Path
    n_bytes: int
    decoded_sha256: Mapping[str, str]


#: Called with (done, total, what) as work goes on.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


class Exporter(Protocol):
    """One export format, made with its options (the dataclass that its ExporterInfo names)."""

    def plan(self, model: ModelDesc, carrier: Carrier | None) -> TargetPlan:
        """Decide every tensor's storage. carrier: the user's wish, None for the best that the format can do.

        Needs no weight values, unless an option asks for a comparison. Returns refusals instead of raising them.
        """

    def check_source(self, checkpoint: Checkpoint) -> SourceFindings:
        """What of this checkpoint's side files (tokenizer, templates) cannot be written, or not faithfully."""

    def write(
        self, model: QuantizedModel, checkpoint: Checkpoint, plan: TargetPlan, path: Path, progress: Progress
    ) -> Package:
        """Write the package to `path`, which the caller has made a temporary name; raises ExportError.

        A folder is there already, and empty; the manifest is written last.

        Where the plan says `is_split` it may write the `file_set.member`s of `path` instead, and gives the first one's
        path back.
        """

    def verify(self, path: Path, progress: Progress) -> Sequence[Check]:
        """Read a package with an independent reader and compare every tensor bit for bit with its record.

        Then, where the runtime is installed, load it there and compare logits with the float reference built from
        the decoded weights. Raises VerifyError if `path` is not such a package at all.
        """

    def inspect(self, path: Path) -> Mapping[str, Any]:
        """Facts of a package for a person: layout, sizes per type, provenance. Reads no weights."""


@runtime_checkable
class Allocating(Protocol):
    """An exporter that lets the types be chosen by measurement, if its options ask for that. Optional.

    It is then asked in this order: `plan` without a choice, for all refusals, with the smallest type everywhere;
    `candidates`; once the choice is made, `plan_chosen`.
    """

    def candidates(
        self, model: ModelDesc, checkpoint: Checkpoint, carrier: Carrier | None
    ) -> Candidates | None:
        """What may be chosen from; None if the options ask for no choice. Asked only if `plan` refused nothing."""

    def plan_chosen(
        self, model: ModelDesc, carrier: Carrier | None, chosen: Mapping[TensorId, Grid | FloatType]
    ) -> TargetPlan:
        """As `plan`, with these storages."""


@runtime_checkable
class Sizing(Protocol):
    """An exporter that can tell what each tensor takes in a package. Optional: the report asks it."""

    def tensor_bytes(self, path: Path) -> Mapping[str, int]:
        """Bytes by stored name (`TensorPlan.stored_as`), as the package's own headers say. Reads no weights."""


@runtime_checkable
class Adopting(Protocol):
    """An exporter that can write what was quantized for another one, where its own storage holds it. Optional."""

    def plan_adopted(
        self, model: ModelDesc, carrier: Carrier, storages: Mapping[TensorId, Grid | FloatType]
    ) -> TargetPlan:
        """As `plan`: for each of these tensors a storage of its own that holds all values of the given one exactly.

        What no storage holds is refused. Of tensors that are not among them the exporter decides by its options, with
        what is nearest to the source where these say nothing.
        """


@runtime_checkable
class Padder(Protocol):
    """An exporter whose storage may need a wider model. Optional: the pipeline asks it before `plan`."""

    def choose_padding(self, model: ModelDesc) -> PaddingChoice:
        """Decide by the options, reading no weight; `plan` is then given the widened model."""
