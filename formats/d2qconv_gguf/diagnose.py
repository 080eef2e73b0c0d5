"""What a GGUF needs to be loaded, and what is wrong with it by its header alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from d2qconv.errors import D2qError, VerifyError
from d2qconv.exporters.base import Check
from d2qconv.exporters.diagnosis import Finding
from d2qconv_gguf.container import GgufFile, read
from d2qconv_gguf.ggml_types import NEEDS, NewerType
from d2qconv_gguf.reader import layout_of, model_of
from d2qconv_gguf.types import CAVEATS
from d2qconv_gguf.verify import RECORD, metadata_check, structure_check

_AGAIN = "copy or download the file again; if it was written like this, convert again"


def diagnose_file(path: Path) -> list[Finding]:
    """Findings in the order in which they matter; see `Diagnosing`."""
    try:
        file = read(path)
    except D2qError as error:
        return [Finding.of("file", error)]
    whole = Finding("file", f"{file.n_bytes:,} bytes, {len(file.tensors)} tensors, whole by its header")
    return [whole, *_model_findings(file), _record_finding(file), *_type_findings(file)]


def _model_findings(file: GgufFile) -> Iterator[Finding]:
    """Whether tensors, sizes and vocabulary fit each other."""
    if not isinstance(file.keys.get("tokenizer.ggml.tokens"), list):
        yield Finding(
            "tokenizer", "there is none in the file", VerifyError, "convert again, with a tokenizer"
        )
    try:
        layout_of(file)
        yield _of_check(structure_check(file, model_of(file)))
    except D2qError as error:
        yield Finding.of("structure", error)


def _record_finding(file: GgufFile) -> Finding:
    """Whether `verify` has something to compare with, and the metadata are those that were written."""
    if not all(isinstance(file.keys.get(key), list) for key in RECORD):
        todo = "only files that d2qconv wrote can be verified"
        return Finding("record", "there is no record of d2qconv in the file", VerifyError, todo)
    return _of_check(metadata_check(file))


def _type_findings(file: GgufFile) -> Iterator[Finding]:
    """Which llama.cpp knows the types. All that gguf-py has a name for are older than any wheel that we ask for."""
    counts = Counter(tensor.type for tensor in file.tensors.values())
    newer = [kind for kind in counts if isinstance(kind, NewerType)]
    named = ", ".join(f"{kind.name.lower()} ({n})" for kind, n in counts.most_common())
    needs = "; ".join(f"{kind.name.lower()} needs {NEEDS[kind]}" for kind in newer)
    todo = (
        "whether the llama.cpp here is new enough, `d2qconv verify` finds out by loading it" if newer else ""
    )
    yield Finding("types", f"{named}; {needs or 'every llama.cpp of the last years knows them'}", None, todo)
    for kind in counts:
        if kind.name.lower() in CAVEATS:
            yield Finding("speed", CAVEATS[kind.name.lower()])


def _of_check(check: Check) -> Finding:
    error = None if check.is_passed else VerifyError
    return Finding(check.name, check.detail, error, "" if check.is_passed else _AGAIN)


def llama_cpp_facts() -> dict[str, str]:
    """What the installed wheel says of its llama.cpp; called by `doctor` in a process of its own."""
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    llama_cpp.ggml_backend_load_all()
    devices = [str(device["name"]) for device in llama_cpp.ggml_backend_dev_info()]
    return {
        "ggml": f"{llama_cpp.ggml_version()} ({llama_cpp.ggml_commit()})",
        "devices": " ".join(devices) or "none",
    }
