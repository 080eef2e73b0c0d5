"""report.json: its layout, and how it is read and written.

The file is JSON of one `Report`, keys in the order of the fields, indented by one space. `digest` is the SHA-256 of the
same bytes with an empty digest, so a changed byte anywhere in the file shows. Numbers are as measured, never rounded.
Errors are relative and squared; divergences are in nats per token; sizes are in bytes, times in seconds. A measured
number that is not finite, such as the perplexity of a model that is broken, is null: JSON has no word for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from d2qconv.errors import InputError

#: 2: `held_out_sha256`, `resumed_blocks`, bytes of all tensors by package; measured numbers may be null.
VERSION = 2
#: A report of thousands of tensors is a few megabytes; what is larger is none.
_MOST_BYTES = 64 << 20
#: No size or count of a run is larger, and options are not nested deeper.
_MOST, _DEEPEST = 1 << 60, 6
#: What is measured and larger is no measurement any more, and null like what is not finite.
LARGEST = 1e100

#: A measured number, None where it is not finite or beyond LARGEST.
Measured: TypeAlias = float | None


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
    """One package. format: the exporter's name. name: of its file or folder. provenance: as its own metadata say it.

    n_bytes: of all files. tensor_bytes: of all tensors as predicted; written: as an independent reader found them in
    the package, None where it does not tell.
    """

    format: str
    name: str
    is_folder: bool
    layout: str
    n_bytes: int
    tensor_bytes: int
    written: int | None
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

    quantiles: dict[str, Measured]
    edges: list[float]
    counts: list[int]


class Quality(msgspec.Struct, frozen=True):
    """On the held-out tokens, by the float reference. kld_unrefined: before a last pass over the whole model.

    held_out_sha256: of these tokens alone, so that runs are told to be comparable.
    """

    kld: Measured
    kld_unrefined: float | None
    perplexity_source: Measured
    perplexity: Measured
    same_top: float
    n_tokens: int
    held_out_sha256: str
    spread: Spread


class Contribution(msgspec.Struct, frozen=True):
    """Where the divergence comes from, `d2qconv.walk.attribution`. blocks: in order; all add up to `total`."""

    embedding: Measured
    blocks: list[Measured]
    output: Measured
    last_pass: float | None
    total: Measured
    n_tokens: int


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of the package.

    n_bytes: as predicted; written: as an independent reader found them, None where it does not tell. weight_error,
    output_error: None where nothing was quantized too. kld: predicted, where types were chosen by measurement.
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
    trained_before: Measured
    trained_after: Measured
    reserved_before: Measured
    reserved_after: Measured


class BlockEntry(msgspec.Struct, frozen=True):
    """One block. error: of the activations behind it. n_bytes: of its tensors; bits_per_weight: of its matrices.

    seconds: 0 where a run that was cut off had quantized it.
    """

    index: int
    error: Measured
    seconds: float
    n_bytes: int
    bits_per_weight: float
    last_pass: LastPassEntry | None


class FoldEntry(msgspec.Struct, frozen=True):
    """Which carrier a correction took in a block, and what it left; see `d2qconv.fold.corrections.FoldRecord`."""

    name: str
    block: int
    carrier: str
    residual: Measured
    meaning: str
    explained: float | None


class AllocationEntry(msgspec.Struct, frozen=True):
    """A choice of types: what was asked for, and the divergence that it was predicted to give.

    curve: what there was to choose from, bytes of all tensors and predicted divergence from the smallest choice up.
    """

    asked: str
    budget_bytes: int
    kld: float
    n_tokens: int
    curve: list[tuple[int, float]]


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
    """A whole run. options: every option that is in force. command: the words that ask for the same again.

    tokens_sha256: of all tokens, those that were sampled for a last pass too. seconds, stages and measured memory: of
    the process that ended the run; resumed_blocks: how many of the blocks an earlier one, cut off, had done.
    """

    report: int
    digest: str
    package: PackageEntry
    also: list[PackageEntry]
    source: SourceEntry
    bits_per_weight: float
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
    resumed_blocks: int
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


class _Head(msgspec.Struct, frozen=True):
    """What a report of any version has."""

    report: int


def encode(report: Report) -> bytes:
    """The bytes of report.json, the digest put in."""
    blank = _plain(msgspec.structs.replace(report, digest=""))
    return _plain(msgspec.structs.replace(report, digest=hashlib.sha256(blank).hexdigest()))


def decode(data: bytes, where: str) -> Report:
    """Inverse of `encode`; raises InputError for what is no report, or one of another version."""
    try:
        # The library does not look at the characters of what it leaves out.
        text = data.decode()
        version = msgspec.json.decode(text, type=_Head).report
        if version == VERSION:
            found = msgspec.json.decode(text, type=Report)
            fault = _fault(found)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"not a report of d2qconv: {error}", where=where, todo="name a PACKAGE.report.json"
        ) from error
    if version != VERSION:
        raise InputError(
            f"a report of version {version}, and this d2qconv reads version {VERSION}",
            where=where,
            todo="use the d2qconv that wrote it, which its `environment` names, or convert again",
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
    drawn = msgspec.structs.replace(report, options={})
    if not all(abs(number) <= (_MOST if isinstance(number, int) else LARGEST) for number in _numbers(drawn)):
        yield "a number is out of all range"
    if _depth(report.options) > _DEEPEST:
        yield "options within options"
    # A seed may be anything that JSON's readers agree on.
    if not all(isinstance(n, float) or -(1 << 63) <= n < 1 << 64 for n in _numbers(report.options)):
        yield "a number among the options is out of all range"
    packages = [report.package, *report.also]
    if not all(map(_is_name, (name for p in packages for name in (p.name, *(f.name for f in p.files))))):
        yield "the name of a package or of its file is none"
    if not all(p.files for p in packages):
        yield "a package without a file"
    spread = report.quality.spread
    if not spread.counts or len(spread.edges) != len(spread.counts) + 1 or min(spread.counts) < 0:
        yield "the bins of the divergence"
    if spread.edges[0] <= 0 or any(a >= b for a, b in pairwise(spread.edges)):
        yield "the edges of the bins do not rise"
    if report.contribution is not None and len(report.contribution.blocks) != len(report.blocks):
        yield "contributions of other blocks than there are"
    if [b.index for b in report.blocks] != list(range(len(report.blocks))):
        yield "the numbers of the blocks"
    if not 0 <= report.resumed_blocks <= len(report.blocks):
        yield "more blocks were done before than there are"
    sizes = [t.n_bytes for t in report.tensors] + [m.measured for m in report.memory]
    sizes += [n for p in packages for n in (p.n_bytes, p.tensor_bytes)]
    if min(sizes, default=0) < 0:
        yield "a size is negative"


def _is_name(name: str) -> bool:
    """Whether a file or folder of a folder may be called so."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


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
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
