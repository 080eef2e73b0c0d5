"""ONNX Runtime and ONNX Runtime GenAI on the CPU, as judges of written packages.

Accuracy level 1 computes in f32, 4 rounds activations to int8 in blocks; the level is an attribute of every node. To
run a package at another level its graph is changed in memory, and its data file stays where it is (session option
`session.model_external_initializers_file_folder_path`, onnxruntime_session_options_config_keys.h).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx

from d2qconv.calibrate.text import FolderTokenizer, Tokenized
from d2qconv.errors import PluginError, VerifyError
from d2qconv.threads import n_cores
from d2qconv_onnx.container import Container, open_model
from d2qconv_onnx.genai_reader import read_config

_FOLDER = "session.model_external_initializers_file_folder_path"
#: The runtime's own messages go to the standard error from this severity on: 4 is fatal.
_SEVERITY = 4
_LEVEL = "accuracy_level"
_PIP = "pip install 'd2qconv[verify-onnx]'"


def lacks(requires: Mapping[str, str]) -> str:
    """Which of the libraries (name: first version) is absent or too old here, as a sentence; empty if none is."""
    for name, least in requires.items():
        found = installed(name)
        if found is None:
            return f"{name} is not installed ({_PIP})"
        if _numbers(found) < _numbers(least):
            return f"{name} {found} is older than {least}, which this package needs"
    return ""


def installed(name: str) -> str | None:
    """The library's version, None if it cannot be imported.

    Asked of the module, since the same one comes in wheels of several names (onnxruntime, onnxruntime-gpu).
    """
    try:
        return str(import_module(name.replace("-", "_")).__version__)
    except (ImportError, AttributeError):
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())


class OrtModel:
    """A package in ONNX Runtime.

    accuracy_level: of all MatMulNBits nodes, None for what the package says. n_threads: 0 for all cores that this
    process may use. Raises VerifyError if ONNX Runtime refuses the model, with its own words, and PluginError if it is
    not installed.
    """

    def __init__(self, folder: Path, *, accuracy_level: int | None = None, n_threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise PluginError("onnxruntime is not installed", todo=_PIP) from error
        container = open_model(folder)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SEVERITY
        options.intra_op_num_threads = n_threads or n_cores()
        options.add_session_config_entry(_FOLDER, str(folder))
        try:
            self._session = onnxruntime.InferenceSession(
                _at_level(container, accuracy_level), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise VerifyError(
                f"ONNX Runtime does not load it: {_said(error)}", where=str(container.path)
            ) from error
        self._path = container.path

    @cached_property
    def _pasts(self) -> dict[str, tuple[int, int]]:
        """(heads, head size) of every cache input."""
        inputs = self._session.get_inputs()
        return {i.name: (i.shape[1], i.shape[3]) for i in inputs if i.name.startswith("past_key_values.")}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Of every position: tokens i64[n, length] → f32[n, length, vocab]."""
        return self._run(tokens, tokens.shape[1], self._empty(len(tokens)))[0]

    def greedy(self, prompt: Sequence[int], n_new: int, *, never: Sequence[int] = ()) -> list[int]:
        """The likeliest continuation by `n_new` tokens that are not in `never`, one by one with the cache."""
        pasts, step, total, found = self._empty(1), list(prompt), len(prompt), []
        for _ in range(n_new):
            logits, *presents = self._run(np.array([step], np.int64), total, pasts)
            last = logits[0, -1]
            last[[token for token in never if 0 <= token < len(last)]] = -np.inf
            found.append(int(last.argmax()))
            pasts = dict(zip(self._pasts, presents, strict=True))
            step, total = found[-1:], total + 1
        return found

    def _empty(self, n: int) -> dict[str, np.ndarray]:
        return {
            name: np.zeros((n, heads, 0, head), np.float32) for name, (heads, head) in self._pasts.items()
        }

    def _run(self, tokens: np.ndarray, total: int, pasts: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Logits, then keys and values in the order of the inputs."""
        feed = {"input_ids": tokens, "attention_mask": np.ones((len(tokens), total), np.int64), **pasts}
        wanted = ["logits", *(name.replace("past_key_values", "present") for name in self._pasts)]
        try:
            found: list[np.ndarray] = self._session.run(wanted, feed)
        except Exception as error:
            raise VerifyError(
                f"ONNX Runtime does not run it: {_said(error)}", where=str(self._path)
            ) from error
        return found


class Measured(Tokenized):
    """A package in ONNX Runtime for `evaluate`; see `d2qconv.exporters.runtime.LoadedPackage`. Raises as `OrtModel`."""

    name = "ONNX Runtime"
    settings = "on the CPU, at the package's accuracy level"

    def __init__(self, folder: Path) -> None:
        self._model = OrtModel(folder)
        self.version = f"onnxruntime {installed('onnxruntime')}"
        about = read_config(folder).model
        self.n_vocab, self.max_length = about.vocab_size, about.context_length
        self._tokenizer = FolderTokenizer.of(folder, self.n_vocab)

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """See `LoadedPackage`."""
        return self._model.logits(tokens)[:, first:]

    def __enter__(self) -> Measured:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._model


def genai_greedy(folder: Path, prompt: Sequence[int], n_new: int) -> list[int]:
    """The likeliest continuation without end tokens by ONNX Runtime GenAI, `n_new` tokens; raises as OrtModel does.

    Whatever penalties the package's config has, they are left out.
    """
    return _generate(folder, lambda _: list(prompt), n_new, is_plain=True)[1]


def genai_sample(folder: Path, prompt: str, n_new: int) -> str:
    """The likeliest continuation of a text, with the package's tokenizer; raises as OrtModel does."""

    def encode(model: Any) -> list[int]:
        return [int(token) for token in _genai().Tokenizer(model).encode(prompt)]

    model, tokens = _generate(folder, encode, n_new)
    return str(_genai().Tokenizer(model).decode(tokens))


def _generate(folder: Path, encode: Any, n_new: int, *, is_plain: bool = False) -> tuple[Any, list[int]]:
    """(the loaded model, new tokens); ends early at an end token.

    is_plain: no penalties and no end. Before `min_length` GenAI takes the likeliest token that is no end token
    (src/search.cpp, ApplyMinLength).
    """
    og = _genai()
    try:
        model = og.Model(str(folder))
        prompt = encode(model)
        length = len(prompt) + n_new
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length, batch_size=1)
        if is_plain:
            params.set_search_options(min_length=length, repetition_penalty=1.0)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        return model, [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    except Exception as error:
        raise VerifyError(f"ONNX Runtime GenAI does not run it: {_said(error)}", where=str(folder)) from error


def _genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise PluginError("onnxruntime-genai is not installed", todo=_PIP) from error
    return onnxruntime_genai


def _at_level(container: Container, level: int | None) -> bytes:
    """The graph as bytes, every MatMulNBits at that level."""
    proto = onnx.ModelProto()
    proto.CopyFrom(container.proto)
    for node in proto.graph.node:
        if level is not None and node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != _LEVEL]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(_LEVEL, level)])
    changed: bytes = proto.SerializeToString()
    return changed


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[-600:]
