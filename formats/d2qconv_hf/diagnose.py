"""What is wrong with a Hugging Face folder by its headers, and which runtimes load what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from d2qconv.errors import D2qError, VerifyError
from d2qconv.exporters.diagnosis import Finding
from d2qconv.exporters.manifest import read_manifest
from d2qconv_hf.compatibility import Asked, Verdict, lines
from d2qconv_hf.container import open_folder
from d2qconv_hf.reader import Model, read_model

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BIASES = (".gate_proj.bias", ".up_proj.bias")


def diagnose_folder(path: Path, dialect: str) -> list[Finding]:
    """Findings in the order in which they matter; see `Diagnosing`. dialect: the exporter's name."""
    found = []
    try:
        folder = open_folder(path)
        n_files = len({span.path for span in folder.spans.values()})
        found.append(
            Finding("weights", f"{len(folder.spans)} arrays in {n_files} files, all whole by their headers")
        )
        model = read_model(folder, str(read_manifest(path).facts.get("architecture")))
        found.append(Finding("config.json", f"{model.desc.arch.id}, fits the arrays"))
        found += _runtime_findings(model, dialect)
    except D2qError as error:
        found.append(Finding.of("weights", error))
    if not any((path / name).is_file() for name in _TOKENIZERS):
        todo = "copy it from the source model, if that has one"
        found.append(Finding("tokenizer", "there is none", VerifyError, todo))
    return found


def _runtime_findings(model: Model, dialect: str) -> Iterator[Finding]:
    """What becomes of it in every runtime of the table; wrong in none, since another may be meant."""
    schemes = {matrix.scheme for matrix in model.matrices.values()}
    asked = Asked(
        dialect,
        frozenset(scheme.bits for scheme in schemes),
        frozenset("integer" if scheme.has_zero else "none" for scheme in schemes),
        len(schemes) > 1,
        any(name.endswith(_BIASES) for name in model.folder.spans),
        str(model.folder.config.get("model_type")),
    )
    for row in lines(asked):
        how = f": {row.how}" if row.how and row.verdict is not Verdict.NEEDS else f" {row.how}".rstrip()
        read_only = "" if row.evidence == "run" else " (by its code, not run)"
        todo = (
            ""
            if row.verdict in (Verdict.LOADS, Verdict.NEEDS)
            else "use another runtime, or another format for it"
        )
        yield Finding(f"{row.runtime} {row.version}", f"{row.verdict}{how}{read_only}", None, todo)
