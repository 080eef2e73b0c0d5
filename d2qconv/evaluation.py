"""How good is a package? Perplexity, and KL divergence from its source, in the runtime that it was written for.

The package's own runtime gives its logits (`d2qconv.exporters.runtime`), the float reference the source's
(`d2qconv.measure.streamed`), chunk by chunk of a text that is cut as llama-perplexity cuts it
(`d2qconv.measure.chunks`), and `d2qconv.scoring` brings both together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch

from d2qconv import __version__
from d2qconv.arch.bind import bind
from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.sample import sample_sequences
from d2qconv.calibrate.text import FolderTokenizer
from d2qconv.calibrate.tokens import check_vocabulary, is_hub_name, read_stream
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import InputError, PluginError, RunError, VerifyError
from d2qconv.exporters.base import ExporterInfo
from d2qconv.exporters.beside import named
from d2qconv.exporters.contents import contents
from d2qconv.exporters.manifest import file_record, provenance_of
from d2qconv.exporters.package import atomic_output
from d2qconv.exporters.runtime import Evaluating, LoadedPackage, Tokenizer
from d2qconv.foreign.read import open_float_source
from d2qconv.gather import Source, read_weights
from d2qconv.harness import WINDOW, TaskRun, check_installed, harness_version, run_tasks
from d2qconv.measure.chunks import Chunks, check_context, cut
from d2qconv.measure.metrics import Divergence, Likelihood, paired, paired_log_ratio
from d2qconv.measure.result import Evaluated, Judged, PackageFacts, SourceFacts, Tasked, TextFacts
from d2qconv.measure.statistics import Estimate
from d2qconv.measure.streamed import Streamed
from d2qconv.pipeline import choose_device
from d2qconv.progress import Watch
from d2qconv.scoring import score_against, score_alone

#: Tokens of a chunk, as llama-perplexity has them.
CONTEXT = 512
#: Chunks that are sampled from the source where there is no text and no number is given.
SAMPLED_CHUNKS = 20
#: Added to the seed, so that the tokens are none that a conversion has measured on.
JUDGED_SEED = 1 << 33


@dataclass(frozen=True)
class Target:
    """A package, and the exporter that wrote it."""

    path: Path
    exporter: ExporterInfo


@dataclass(frozen=True)
class Evaluation:
    """What is asked for.

    source: folder or hub id; None to measure the package alone. text: a text, JSONL or token file, or a hub data set
    `org/name[:split]`; None for tokens sampled from the source. n_chunks: of the text, its first ones; None for all,
    or SAMPLED_CHUNKS. context: tokens of a chunk. device: of the source. seed: of the sampling.
    baseline: another package, measured at the same tokens.
    """

    package: Target
    source: str | None = None
    revision: str | None = None
    text: str | None = None
    n_chunks: int | None = None
    context: int = CONTEXT
    device: str | None = None
    seed: int = 0
    baseline: Target | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """The packages."""
        return (self.package,) if self.baseline is None else (self.package, self.baseline)


@dataclass(frozen=True)
class _Opened:
    """The source, and where it is computed."""

    checkpoint: Checkpoint
    model: ModelDesc
    device: torch.device


def evaluate(asked: Evaluation, watch: Watch) -> Evaluated:
    """Measure it. Raises InputError, PluginError, VerifyError (a runtime refuses its package), RunError."""
    began, started = datetime.now(UTC), time.monotonic()
    opened = _open_source(asked)
    records = [_record(target) for target in asked.targets]
    for target, record in zip(asked.targets, records, strict=True):
        # Before a runtime makes room for it.
        check_context(asked.context, record.longest or asked.context, str(target.path))
    with ExitStack() as stack, _memory_as_run_error():
        runtimes = [stack.enter_context(_runtime(target, asked.context)) for target in asked.targets]
        _check_runtimes(asked, runtimes, opened)
        chunks, text = _chunks(asked, runtimes[0], opened, watch)
        source = None if opened is None else _source_facts(opened, watch)
        if opened is None:
            scores: Sequence[Divergence | Likelihood] = score_alone(runtimes, chunks, watch)
        else:
            scores = score_against(Streamed.of(opened.model, opened.device), runtimes, chunks, watch)
        judged = [
            _judged(_package_facts(target, record, runtime), score)
            for target, record, runtime, score in zip(asked.targets, records, runtimes, scores, strict=True)
        ]
    return Evaluated(
        judged=judged[0],
        text=text,
        source=source,
        baseline=judged[1] if len(judged) > 1 else None,
        difference=_difference(scores),
        log_ratio=paired_log_ratio(*scores) if len(scores) == 2 else None,
        warnings=[] if source is None else [*_strangers(source, judged)],
        version=__version__,
        torch=str(torch.__version__),
        began=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )


def evaluate_tasks(target: Target, asked: TaskRun, watch: Watch, *, window: int | None = None) -> Tasked:
    """Give a package tasks. window: tokens of the longest prompt, None for WINDOW; less if the package takes less.

    Raises InputError, PluginError (the harness or the runtime is not installed), VerifyError, RunError.
    """
    began, started = datetime.now(UTC), time.monotonic()
    check_installed()
    record = _record(target)
    window = WINDOW if window is None else window
    window = min(window, record.longest or window)
    with _memory_as_run_error(), _runtime(target, window) as runtime:
        scores = run_tasks(asked, runtime, window, watch)
        package = _package_facts(target, record, runtime)
        window = min(window, runtime.max_length)
    return Tasked(
        package=package,
        scores=tuple(scores),
        harness=harness_version(),
        window=window,
        version=__version__,
        began=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
    )


# ---- what is asked for, and whether it can be had ----


def _open_source(asked: Evaluation) -> _Opened | None:
    """Raises InputError for options that do not fit each other, before anything is loaded."""
    if asked.source is None:
        if asked.text is None:
            raise InputError(
                "there is nothing to read",
                where="--text",
                todo="give a text with --text, or the source with --source: the tokens are then sampled from it",
            )
        if asked.revision is not None:
            raise InputError("belongs to a source", where="--revision", todo="give --source")
    if asked.text is not None and not Path(asked.text).exists() and not is_hub_name(asked.text):
        what = "no such file, and not the name of a hub data set (org/name[:split])"
        raise InputError(what, where=f"--text {asked.text}")
    if not 0 <= asked.seed < JUDGED_SEED:
        raise InputError(f"a seed is between 0 and 2^33, not {asked.seed}", where="--seed")
    if asked.source is None:
        return None
    # What another tool has quantized is the source of a package that holds its values.
    checkpoint = open_float_source(asked.source, asked.revision)
    model = bind(checkpoint)
    check_context(asked.context, model.max_positions, "the source")
    return _Opened(checkpoint, model, choose_device(asked.device))


@dataclass(frozen=True)
class _Record:
    """What a package's own metadata say. longest: sequence that it takes, in tokens; 0 and '' if they do not say it."""

    longest: int
    source_sha256: str


def _record(target: Target) -> _Record:
    exporter = target.exporter.load(target.exporter.default_options())
    try:
        facts = exporter.inspect(target.path)
    except VerifyError:
        # Its runtime may take it all the same, or says why not.
        return _Record(0, "")
    longest = facts.get("context_length")
    return _Record(longest if isinstance(longest, int) else 0, provenance_of(facts).get("source_sha256", ""))


def _runtime(target: Target, length: int) -> LoadedPackage:
    check_context(length, length, "")
    info = target.exporter
    exporter = info.load(info.default_options())
    if not isinstance(exporter, Evaluating):
        raise PluginError(
            f"the exporter {info.name} cannot run its packages, so they cannot be measured",
            where=str(target.path),
        )
    return exporter.runtime(target.path, length)


def _check_runtimes(asked: Evaluation, runtimes: Sequence[LoadedPackage], opened: _Opened | None) -> None:
    """Raise InputError for packages that are not of this model, or not of one model."""
    wanted = runtimes[0].n_vocab if opened is None else opened.model.dims.vocab
    whose = str(asked.package.path) if opened is None else opened.checkpoint.source
    for target, runtime in zip(asked.targets, runtimes, strict=True):
        check_context(asked.context, runtime.max_length, str(target.path))
        if runtime.n_vocab != wanted:
            raise InputError(
                f"has {runtime.n_vocab:,} tokens in its vocabulary, and {whose} has {wanted:,}",
                where=str(target.path),
                todo="give the model that the package was made from",
            )


# ---- what is read ----


def _chunks(
    asked: Evaluation, runtime: LoadedPackage, opened: _Opened | None, watch: Watch
) -> tuple[Chunks, TextFacts]:
    """The chunks, and where they come from. The source's tokenizer counts before the package's."""
    tokenizer: Tokenizer = runtime
    if opened is not None:
        model = opened.model
        tokenizer = FolderTokenizer(opened.checkpoint, model.dims.vocab, tuple(model.bos_ids))
    bos, context, n_chunks = tokenizer.bos, asked.context, asked.n_chunks
    sha256 = ""
    if asked.text is None:
        assert opened is not None, "refused above"
        n_chunks = SAMPLED_CHUNKS if n_chunks is None else n_chunks
        chunks = _sampled(opened, n_chunks, asked, bos, watch)
    else:
        path = Path(asked.text)
        watch.stage("tokenize", 0)
        most = None if n_chunks is None else n_chunks * context
        stream = read_stream(asked.text, lambda: tokenizer.encode, most=most)
        chunks = cut(stream, context, n_chunks=n_chunks, bos=bos, where=asked.text)
        sha256 = file_record(path).sha256 if path.is_file() else ""
    check_vocabulary(chunks.tokens, runtime.n_vocab, asked.text or "self")
    facts = TextFacts(
        name="self" if asked.text is None else _public_name(asked.text),
        sha256=sha256,
        tokenizer=runtime.name if opened is None else "source",
        n_chunks=len(chunks.tokens),
        context=context,
        n_judged=chunks.n_judged,
        bos=bos,
        tokens_sha256=chunks.digest,
        seed=asked.seed if asked.text is None else None,
    )
    return chunks, facts


def _sampled(opened: _Opened, n_chunks: int, asked: Evaluation, bos: int | None, watch: Watch) -> Chunks:
    if n_chunks < 1:
        raise InputError(f"at least one chunk is needed, not {n_chunks}", where="--chunks")
    watch.stage("sample", asked.context)
    tokens = sample_sequences(
        opened.model,
        n_chunks,
        asked.context,
        bos=bos,
        seed=asked.seed + JUDGED_SEED,
        device=opened.device,
        on_token=lambda done: watch.step(done, f"sampling from {opened.checkpoint.name}"),
    )
    return Chunks(tokens)


def _public_name(text: str) -> str:
    """A file's name without its place, a data set's as it is."""
    return Path(text).name if Path(text).exists() else text


def _source_facts(opened: _Opened, watch: Watch) -> SourceFacts:
    checkpoint = opened.checkpoint
    about = Source(checkpoint, opened.model, opened.device, Path())
    digest = read_weights(about, watch)
    return SourceFacts(checkpoint.name, checkpoint.revision, digest, str(opened.device))


# ---- what was found ----


def _judged(package: PackageFacts, score: Divergence | Likelihood) -> Judged:
    return Judged(package, score.perplexity, None if isinstance(score, Likelihood) else score.statistics())


def _package_facts(target: Target, record: _Record, runtime: LoadedPackage) -> PackageFacts:
    found = contents(target.path)
    return PackageFacts(
        name=named(target.path).name,
        format=target.exporter.name,
        n_bytes=found.n_bytes,
        sha256=found.sha256,
        runtime=runtime.name,
        runtime_version=runtime.version,
        runtime_settings=runtime.settings,
        source_sha256=record.source_sha256,
    )


def _strangers(source: SourceFacts, judged: Sequence[Judged]) -> Iterator[str]:
    """A package that was not made from this source, by its own word."""
    for one in judged:
        if one.package.source_sha256 not in ("", source.digest):
            yield (
                f"{one.package.name} says that it was made from another model than {source.name}: its divergence is "
                "not what quantization did"
            )


def _difference(scores: Sequence[Divergence | Likelihood]) -> Estimate | None:
    """Of the two packages' mean KL divergences; None if there is no second one, or no source."""
    found = [score for score in scores if isinstance(score, Divergence)]
    return paired(*found) if len(found) == 2 else None


@contextmanager
def _memory_as_run_error() -> Iterator[None]:
    """Running out of memory is the user's to mend, not a bug."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RunError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'host memory'}",
            todo="use a smaller --context, or another --device",
        ) from error


def write_json(path: Path, facts: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write what was found, whole or not at all; raises InputError or ExportError as `atomic_output` does."""
    with atomic_output(path, overwrite=overwrite) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
