"""What is wrong with an ONNX package by its graph, its config and the places of its tensors."""

from __future__ import annotations

from pathlib import Path

from d2qconv.errors import D2qError, VerifyError
from d2qconv.exporters.diagnosis import Finding
from d2qconv_onnx.container import open_model
from d2qconv_onnx.genai import CONFIG, MODEL
from d2qconv_onnx.reader import desc_of, read_model

#: One of these ONNX Runtime GenAI must find to read and write text.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def diagnose_folder(path: Path) -> list[Finding]:
    """Findings in the order in which they matter; see `Diagnosing`."""
    found = []
    try:
        model = read_model(open_model(path))
    except D2qError as error:
        found.append(Finding.of(MODEL, error))
    else:
        n_bytes = sum(span.n_bytes for span in model.container.spans.values())
        detail = f"{len(model.nodes)} nodes, {n_bytes:,} bytes of tensors, all inside their files"
        found.append(Finding(MODEL, detail))
        try:
            desc = desc_of(model)
            found.append(
                Finding(CONFIG, f"{desc.arch.id}, {desc.dims.n_layers} blocks, as the graph has them")
            )
        except D2qError as error:
            found.append(Finding.of(CONFIG, error))
    if not any((path / name).is_file() for name in TOKENIZERS):
        todo = "copy it from the source model; ONNX Runtime GenAI cannot read text without"
        found.append(Finding("tokenizer", "there is none", VerifyError, todo))
    return found


def onnxruntime_facts() -> dict[str, str]:
    """Where the installed ONNX Runtime can compute; called by `doctor` in a process of its own."""
    import onnxruntime

    return {"providers": " ".join(onnxruntime.get_available_providers())}
