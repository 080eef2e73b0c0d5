"""report.json: its layout, and how it is read and written.

The file is JSON of one `Report`, keys in the order of the fields, indented by one space. `digest` is the SHA-256 of the
same bytes with an empty digest, so a changed byte anywhere in the file shows. Numbers are as measured, never rounded.
Errors are relative and squared; divergences are in nats per token; sizes are in bytes, times in seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from d2qconv.errors import InputError

VERSION = 1
#: A report of thousands of tensors is a few megabytes; what is larger is none.
_MOST_BYTES = 64 << 20
#: No size, time or divergence of a run is larger, and options are not nested deeper.
_LARGEST, _DEEPEST = 1e18, 6


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a package. name: within the folder, if the package is one."""

    name: str
    n_bytes: int
    sha256: str


class CheckEntry(msgspec.Struct, frozen=True):
    """What `verify` established; see `d2qconv.exporters.base.Check`."""

    name: str
    detail: str
    is_passed: bool
    is_skipped: bool


class PackageEntry(msgspec.Struct, frozen=True):
    """One package. format: the exporter's name. name: of its file or folder. provenance: as its own metadata say it."""

    format: str
    name: str
    is_folder: bool
    layout: str
    n_bytes: int
    files: list[FileEntry]
    loads_in: list[str]
    checks: list[CheckEntry]
    provenance: dict[str, str]


class SourceEntry(msgspec.Struct, frozen=True):
    """The model that was quantized. sha256: over config and every weight, see `checkpoint.digest.content_digest`."""

    name: str
    revision: str
    license: str
    architecture: str
    n_weights: int
    sha256: str


class Spread(msgspec.Struct, frozen=True):
    """How the divergence is spread over the held-out tokens.

    quantiles: by percentage ("50" is the median). edges: of the bins, one more than counts; the first bin also has
    what is below it, the last what is above.
    """

    quantiles: dict[str, float]
    edges: list[float]
    counts: list[int]


class Quality(msgspec.Struct, frozen=True):
    """On the held-out tokens, by the float reference. kld_unrefined: before a last pass over the whole model."""

    kld: float
    kld_unrefined: float | None
    perplexity_source: float
    perplexity: float
    same_top: float
    n_tokens: int
    spread: Spread


class Contribution(msgspec.Struct, frozen=True):
    """Where the divergence comes from, `d2qconv.walk.attribution`. blocks: in order; all add up to `total`."""

    embedding: float
    blocks: list[float]
    output: float
    last_pass: float | None
    total: float
    n_tokens: int


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of the package.

    n_bytes: as predicted; written: as an independent reader found them, None where it does not tell. weight_error,
    output_error: None where nothing was quantized. kld: predicted, where types were chosen by measurement.
    """

    id: str
    role: str
    part: str
    block: int | None
    stored_as: str
    shape: list[int]
    type: str
    n_bytes: int
    written: int | None
    bits_per_weight: float
    weight_error: float | None
    output_error: float | None
    kld: float | None
    note: str


class LastPassEntry(msgspec.Struct, frozen=True):
    """What a last pass did; see `d2qconv.refine.settings.RefineNotes`."""

    steps: int
    kept: bool
    why: str
    trained_before: float
    trained_after: float
    reserved_before: float
    reserved_after: float


class BlockEntry(msgspec.Struct, frozen=True):
    """One block. error: of the activations behind it. n_bytes: of its tensors; bits_per_weight: of its matrices.

    seconds: 0 where a run that was cut off had quantized it.
    """

    index: int
    error: float
    seconds: float
    n_bytes: int
    bits_per_weight: float
    last_pass: LastPassEntry | None


class FoldEntry(msgspec.Struct, frozen=True):
    """Which carrier a correction took in a block, and what it left; see `d2qconv.fold.corrections.FoldRecord`."""

    name: str
    block: int
    carrier: str
    residual: float
    meaning: str
    explained: float | None


class AllocationEntry(msgspec.Struct, frozen=True):
    """A choice of types: what was asked for, and the divergence that it was predicted to give."""

    asked: str
    budget_bytes: int
    kld: float
    n_tokens: int


class MemoryEntry(msgspec.Struct, frozen=True):
    """One kind of memory: the predicted peak, by part in the phase that needs most, and the measured one."""

    kind: str
    predicted: int
    phase: str
    parts: dict[str, int]
    measured: int
    budget: int | None


class Environment(msgspec.Struct, frozen=True):
    """What the run ran on. versions: of the interpreter and of every library that took part."""

    versions: dict[str, str]
    system: str
    device: str
    threads: int
    processes: int


class Report(msgspec.Struct, frozen=True):
    """A whole run. options: every option that is in force. command: the words that ask for the same again."""

    report: int
    digest: str
    package: PackageEntry
    also: list[PackageEntry]
    source: SourceEntry
    bits_per_weight: float
    tensor_bytes: int
    carrier: str
    carrier_note: str
    warnings: list[str]
    quality: Quality
    contribution: Contribution | None
    blocks: list[BlockEntry]
    tensors: list[TensorEntry]
    folds: list[FoldEntry]
    allocation: AllocationEntry | None
    last_pass: str
    last_pass_notes: LastPassEntry | None
    calibration: str
    tokens_sha256: str
    recipe: str
    options: dict[str, Any]
    command: list[str]
    fingerprint: str
    memory: list[MemoryEntry]
    activations: str
    stages: dict[str, float]
    seconds: float
    environment: Environment

    @property
    def kind(self) -> str:
        """The type of most of the bytes in the blocks: `q2_k`, or `q2_k and others`."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.block is not None and len(tensor.shape) > 1:
                sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.n_bytes
        if not sizes:
            return "float"
        largest = max(sizes, key=lambda name: sizes[name])
        return largest if len(sizes) == 1 else f"{largest} and others"


def encode(report: Report) -> bytes:
    """The bytes of report.json, the digest put in."""
    blank = _plain(msgspec.structs.replace(report, digest=""))
    return _plain(msgspec.structs.replace(report, digest=hashlib.sha256(blank).hexdigest()))


def decode(data: bytes, where: str) -> Report:
    """Inverse of `encode`; raises InputError for what is no report, or one of another version."""
    try:
        found = msgspec.json.decode(data, type=Report)
        fault = _fault(found) if found.report == VERSION else ""
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"not a report of d2qconv: {error}", where=where, todo="name a PACKAGE.report.json"
        ) from error
    if found.report != VERSION:
        raise InputError(
            f"a report of version {found.report}, and this d2qconv reads version {VERSION}", where=where
        )
    if fault:
        raise InputError(f"the report contradicts itself: {fault}", where=where)
    return found


def read_report(path: Path) -> Report:
    """A report from its file, changed or not; raises InputError."""
    return decode(read_bytes(path), str(path))


def read_intact(path: Path) -> tuple[Report, bytes]:
    """A report and the bytes of its file; raises InputError, for one that was changed too."""
    data = read_bytes(path)
    report = decode(data, str(path))
    if not is_intact(data, report):
        raise InputError(
            "the report was changed: its bytes do not have the digest that stands in it",
            where=str(path),
            todo="draw it from the original",
        )
    return report, data


def read_bytes(path: Path) -> bytes:
    """The bytes of a report or a page; raises InputError for what is no readable file, or too large for one."""
    try:
        if not path.is_file():
            raise InputError("there is no such report", where=str(path))
        if path.stat().st_size > _MOST_BYTES:
            raise InputError("is too large for a report", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def is_intact(data: bytes, report: Report) -> bool:
    """Whether these bytes are what `encode` wrote of this report, to the last one."""
    return encode(report) == data


def _fault(report: Report) -> str:
    """What no run can have written, or an empty string: whoever draws a report may rely on it."""
    return next(_faults(report), "")


def _faults(report: Report) -> Iterator[str]:
    """Each looks at what those before it have let pass."""
    if not all(abs(number) <= _LARGEST for number in _numbers(report)):
        yield "a number is out of all range"
    if _depth(report.options) > _DEEPEST:
        yield "options within options"
    spread = report.quality.spread
    if len(spread.edges) != len(spread.counts) + 1 or min(spread.counts, default=0) < 0:
        yield "the bins of the divergence"
    if spread.edges[0] <= 0 or any(a >= b for a, b in pairwise(spread.edges)):
        yield "the edges of the bins do not rise"
    if report.contribution is not None and len(report.contribution.blocks) != len(report.blocks):
        yield "contributions of other blocks than there are"
    if [b.index for b in report.blocks] != list(range(len(report.blocks))):
        yield "the numbers of the blocks"
    sizes = [t.n_bytes for t in report.tensors] + [m.measured for m in report.memory]
    if min(sizes, default=0) < 0:
        yield "a size is negative"


def _plain(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def _numbers(value: object) -> Iterator[float]:
    """Every number in it."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _numbers(getattr(value, name))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
