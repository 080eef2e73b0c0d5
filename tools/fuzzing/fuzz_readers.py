"""What is fuzzed: one `Reader` an entry. A new one needs a function that makes its files and one that reads them.

`read` gets a folder made by `make`, one of whose files was changed, and returns what it read, or raises one of
d2qconv's errors. Where `is_exact`, what is accepted must be equal to what the unchanged folder gave.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from fuzz_seeds import (
    FINGERPRINT,
    MEASURED_KEY,
    TOKENS_KEY,
    Notes,
    base_ggufs,
    checkpoints,
    config_alone,
    foreign_checkpoints,
    ggufs,
    hf_folders,
    importances,
    onnx_folders,
    reports,
    small_model,
    small_source,
    token_files,
    tokenizers,
    work_folders,
)
from report_samples import sample as report_sample

from d2qconv.arch.bind import bind
from d2qconv.calibrate import tokens as calibration
from d2qconv.checkpoint.folder import find, read_json
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.errors import D2qError, PlanError, VerifyError
from d2qconv.exporters import discover
from d2qconv.exporters.base import Check, silent
from d2qconv.exporters.manifest import files_check, inspected, read_manifest
from d2qconv.exporters.planned import SIDE_FILES
from d2qconv.foreign.read import read_foreign
from d2qconv.ir.store import Store
from d2qconv.ir.workdir import read_measured, read_tokens
from d2qconv.report.compare import render_several
from d2qconv.report.page import render
from d2qconv.report.schema import decode, is_intact, read_bytes
from d2qconv.run import CalibrationSpec
from d2qconv_gguf import base_gguf, imatrix
from d2qconv_gguf import exporter as gguf_exporter
from d2qconv_gguf import tokenizer as gguf_tokenizer
from d2qconv_gguf import verify as gguf_verify
from d2qconv_gguf.container import read as read_gguf
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.metadata import model_metadata
from d2qconv_gguf.names import LAYOUTS
from d2qconv_hf import runtime as hf_runtime
from d2qconv_hf.exporter import (
    AutoRoundExporter,
    CompressedTensorsExporter,
    GptqExporter,
    HfExporter,
    MlxExporter,
)
from d2qconv_hf.verify import verify_folder as verify_hf
from d2qconv_onnx import genai
from d2qconv_onnx import verify as onnx_verify

FOUND = discover.discover()


class ImplausibleError(AssertionError):
    """Something was accepted that cannot be right."""


@dataclass(frozen=True)
class Reader:
    """name: for --reader. make: writes pristine folders into an empty one, each a variant. read: see the module.

    is_exact: an accepted result must equal the pristine one. may_link: the files are named by the user himself, and a
    symbolic link is as good. is_text: the file may be a pipe too. may_drop: what is not sound is made again, so that a
    link that leads out may be accepted, unread. per_byte: bytes of memory that a byte of its files may take, some 200
    for a tokenizer. weight: share of all cases.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    is_exact: bool = False
    may_link: bool = False
    is_text: bool = False
    may_drop: bool = False
    per_byte: int = 24
    weight: float = 1.0


def require(is_so: bool, what: str) -> None:
    """Raise ImplausibleError unless it is so."""
    if not is_so:
        raise ImplausibleError(what)


def all_of(*calls: Callable[[], object]) -> list[object]:
    """The results of all calls; each is made even if one before it refuses, whose error is then raised."""
    found: list[object] = []
    errors = []
    for call in calls:
        try:
            found.append(call())
        except D2qError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return found


def passed(checks: list[Check], path: Path) -> None:
    """What the command line makes of a check that failed."""
    failed = [f"{c.name}: {c.detail}" for c in checks if not c.is_passed]
    if failed:
        raise VerifyError("; ".join(failed), where=str(path))


def read_checkpoint(folder: Path) -> object:
    """Open, bind, load every tensor, copy what goes into packages."""
    cached = folder / "models--a--b" / "snapshots" / "0123abc"
    place = cached if (folder / "models--a--b").is_dir() else folder
    checkpoint = open_checkpoint(str(place))
    desc = bind(checkpoint)
    for tensor, dense in desc.tensors.items():
        values = dense.load()
        require(tuple(values.shape) == dense.shape, f"{tensor} has another shape than announced")
        require(bool(torch.isfinite(values).all()), f"{tensor} is not finite")
    require(len(checkpoint.license) <= 200, "a licence is a name")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        checkpoint.copy_files(SIDE_FILES, Path(made))
    return checkpoint.name


def read_foreign_checkpoint(folder: Path) -> object:
    """Open, find the dialect, bind, load every matrix both ways."""
    foreign = read_foreign(open_checkpoint(str(folder)))
    require(foreign is not None, "a quantized checkpoint passes as one of floats")
    assert foreign is not None, "looked at"
    bind(foreign.checkpoint)
    for name, linear in foreign.linears.items():
        values = linear.decode()
        require(tuple(values.shape) == linear.shape, f"{name} has another shape than announced")
        require(bool(torch.isfinite(values).all()), f"{name} is not finite")
        if linear.grid is not None:
            require(bool(torch.equal(linear.coded().decode(), values)), f"{name} is two matrices")
    return None


def read_tokenizer(folder: Path) -> object:
    """All that is made of a tokenizer's files: GGUF's keys, BOS, an encoder, GenAI's config."""
    path = find(folder, "config.json")
    checkpoint = config_alone(folder, {} if path is None else read_json(path))
    desc = small_model("llama")

    def keys() -> object:
        return gguf_tokenizer.tokenizer_metadata(checkpoint, 512)

    def encode() -> object:
        ids = calibration.encoder(checkpoint)("The keeper's 12 ships <s> \u2028 é")
        require(all(type(i) is int and i >= 0 for i in ids), f"{ids} are no tokens")
        return ids

    return all_of(
        lambda: gguf_tokenizer.tokenizer_refusals(checkpoint),
        lambda: gguf_tokenizer.tokenizer_warnings(checkpoint),
        keys,
        lambda: calibration.bos_token(checkpoint, desc),
        encode,
        lambda: list(genai.source_refusals(checkpoint)),
        lambda: genai._config(desc, checkpoint),
    )


def read_calibration(folder: Path) -> object:
    """The calibration tokens of a file."""
    files = sorted(folder.glob("c.*"))
    spec = CalibrationSpec(source=str(files[0] if files else folder / "c.txt"), sequences=4, length=8)
    desc = small_model("llama")
    found = calibration.load_tokens(spec, small_source(), desc, device="cpu", on_step=lambda _: None)
    for rows in (found.calibration, found.held_out):
        require(rows.shape[1] == spec.length and len(rows) > 0, f"sequences of {tuple(rows.shape)}")
        require(int(rows.min()) >= 0 and int(rows.max()) < desc.dims.vocab, "tokens beyond the vocabulary")
    return None


def _gguf_of(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    return files[0] if files else folder / "m.gguf"


def read_package_gguf(folder: Path) -> object:
    """verify and inspect, without the runtime, and the comparison with a source."""
    path = _gguf_of(folder)
    file = read_gguf(path)

    def verify() -> object:
        passed(gguf_verify.verify_file(path, silent), path)
        return gguf_verify.decoded_digests(file, silent), dict(file.keys)

    def same() -> None:
        with suppress(VerifyError):
            gguf_verify.require_same_function(path, small_model("llama"))

    return all_of(verify, lambda: gguf_exporter._facts(file), same)[0]


def read_base(folder: Path) -> object:
    """A base file's refusals, and its keys if it has none."""
    path, desc = _gguf_of(folder), small_model("llama")
    layout = LAYOUTS["llama"]
    refusals = base_gguf.refusals(path, desc, layout)
    keys = base_gguf.keys(path, layout, model_metadata(desc, layout="llama", file_type=0))
    if refusals:
        raise PlanError("; ".join(r.why for r in refusals))
    return len(keys) > 0


def read_importance(folder: Path) -> object:
    """Whether the file that would be replaced is ours."""
    refusals = imatrix.refusals(_gguf_of(folder), small_model("llama"))
    if refusals:
        raise PlanError("; ".join(r.why for r in refusals))
    return None


def read_onnx(folder: Path) -> object:
    """verify and inspect, without the runtimes."""

    def verify() -> object:
        passed(onnx_verify.verify_folder(folder, silent), folder)
        return read_manifest(folder).decoded_sha256

    return all_of(verify, lambda: inspected(folder) and None)[0]


def read_hf(exporter: type[HfExporter]) -> Callable[[Path], object]:
    """verify and inspect of one dialect, without its runtime."""

    def read(folder: Path) -> object:
        def verify() -> object:
            passed(verify_hf(folder, exporter.dialect.facts, silent), folder)
            return read_manifest(folder).decoded_sha256

        return all_of(verify, lambda: inspected(folder) and None)[0]

    return read


def read_folder_manifest(folder: Path) -> object:
    """A package's manifest, and what is done with it before its format is known."""
    found = read_manifest(folder)
    inspected(folder)
    discover.for_file(folder, FOUND)
    passed([files_check(folder, found)], folder)
    return None


def read_report_file(folder: Path) -> object:
    """The page of a report, changed or not, and its page beside another one."""
    files = sorted(folder.glob("*.json"))
    path = files[0] if files else folder / "m.report.json"
    data = read_bytes(path)
    report = decode(data, str(path))
    is_intact(data, report)
    for page in (render(report, data), render_several([report, report_sample("other", 10, 0.25)])):
        require(page.count(b"</script") == page.count(b"<script") <= 1, "a page has a script of its report's")
        require(page.count(b"<h1>") == 1, "a page has elements of its report's")
    return None


def read_work_folder(folder: Path) -> object:
    """Go on in a work directory: read all, write one more part, remove it. Nobody else's file may go with it."""
    before = {p.name for p in folder.iterdir()}
    tokens, measured = read_tokens(folder, TOKENS_KEY), read_measured(folder, MEASURED_KEY)
    with Store(folder, FINGERPRINT, GRIDS) as store:
        for part in store.parts():
            for tensor in store.tensor_ids(part):
                store.read_tensor(part, tensor)
                store.read_tensor(part, tensor, as_written=True)
            if part != "scales":
                store.notes(part, Notes)
        stored = store.tensors()
        for tensor in stored:
            stored[tensor]
        if "fresh" not in store.parts():
            store.write("fresh", {}, None)
        store.delete()
    left = {p.name for p in folder.iterdir()} if folder.exists() else set()
    require("stranger" not in before or "stranger" in left, "a stranger's file was removed")
    return tokens is not None, measured is not None


def _hf(name: str, exporter: type[HfExporter]) -> Reader:
    return Reader(f"hf-{name}", hf_folders(exporter), read_hf(exporter), is_exact=True)


def without_runtimes() -> None:
    """No package is loaded in its runtime: those are not ours to fuzz."""
    gguf_verify.is_installed = lambda: False
    onnx_verify.lacks = lambda _needs: "left out"
    hf_runtime.missing = lambda _dialect: "left out"


READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("checkpoint", checkpoints, read_checkpoint, weight=2),
        Reader("foreign", foreign_checkpoints, read_foreign_checkpoint, weight=2),
        Reader("tokenizer", tokenizers, read_tokenizer, weight=2),
        Reader("tokens", token_files, read_calibration, may_link=True, is_text=True, per_byte=256),
        Reader("gguf", ggufs, read_package_gguf, is_exact=True, may_link=True, weight=2),
        Reader("base-gguf", base_ggufs, read_base, may_link=True, is_exact=True),
        Reader("imatrix", importances, read_importance, may_link=True),
        Reader("onnx", onnx_folders, read_onnx, is_exact=True),
        _hf("safetensors", CompressedTensorsExporter),
        _hf("auto-round", AutoRoundExporter),
        _hf("gptq", GptqExporter),
        _hf("mlx", MlxExporter),
        Reader("manifest", hf_folders(MlxExporter), read_folder_manifest),
        Reader("report", reports, read_report_file, may_link=True),
        Reader("workdir", work_folders, read_work_folder, may_drop=True),
    )
}
