"""The runtimes that a package is checked in: transformers with the dialect's library, and mlx-lm. On a CPU, in f32."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from d2qconv.calibrate.text import FolderTokenizer, Tokenized
from d2qconv.checkpoint.folder import read_json
from d2qconv.errors import PluginError, VerifyError

#: Distributions that must be there to load a dialect.
NEEDS = {
    "safetensors": ("transformers", "compressed-tensors"),
    "auto-round": ("transformers", "auto-round"),
    "gptq": ("transformers", "optimum", "gptqmodel"),
    "mlx": ("mlx-lm",),
}
#: How to install that, by dialect; '' for all others.
_PIP = {"": "pip install 'd2qconv[verify-safetensors]'", "gptq": "pip install transformers optimum gptqmodel"}


def missing(dialect: str) -> str:
    """`compressed-tensors is not installed`; empty if everything is there."""
    absent = [name for name in NEEDS[dialect] if not _is_installed(name)]
    return f"{', '.join(absent)} not installed" if absent else ""


def versions(dialect: str) -> str:
    """`transformers 5.23.0, compressed-tensors 0.20.0`."""
    return ", ".join(f"{name} {version(name)}" for name in NEEDS[dialect])


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def logits(dialect: str, path: Path, tokens: np.ndarray) -> np.ndarray:
    """f32[n_seq, length, vocab] of i64[n_seq, length] in the dialect's runtime; raises VerifyError."""
    with _as_verify_error(path):
        return _load(dialect, path)(tokens)


class Measured(Tokenized):
    """A folder in its dialect's runtime for `evaluate`; see `d2qconv.exporters.runtime.LoadedPackage`.

    Raises PluginError if a library is missing, VerifyError for what the libraries raise.
    """

    settings = "on the CPU, in f32"

    def __init__(self, dialect: str, path: Path) -> None:
        absent = missing(dialect)
        if absent:
            raise PluginError(absent, where=str(path), todo=_PIP.get(dialect, _PIP[""]))
        config = path / "config.json"
        self.name = "mlx-lm" if dialect == "mlx" else "transformers"
        self.version = versions(dialect)
        self.n_vocab = _count(config, "vocab_size")
        self.max_length = _count(config, "max_position_embeddings")
        self._path = path
        self._tokenizer = FolderTokenizer.of(path, self.n_vocab)
        with _as_verify_error(path):
            self._run: Callable[[np.ndarray], np.ndarray] = _load(dialect, path)

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """See `LoadedPackage`."""
        with _as_verify_error(self._path):
            return self._run(tokens)[:, first:]

    def __enter__(self) -> Measured:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._run


def _count(config: Path, key: str) -> int:
    """A number above 0 of a config.json; raises VerifyError."""
    found = read_json(config).get(key)
    if not isinstance(found, int) or found < 1:
        raise VerifyError(f"{key} is {found!r}, not a number above 0", where=str(config))
    return found


@contextmanager
def _as_verify_error(path: Path) -> Iterator[None]:
    """What these libraries raise, which is whatever their parts throw; their own output is kept back."""
    try:
        with _quiet():
            yield
    except Exception as error:
        said = " ".join(str(error).split())[-300:]
        raise VerifyError(f"{type(error).__name__}: {said}", where=str(path)) from error


def _load(dialect: str, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Load a package; gives what makes f32[n_seq, length, vocab] of i64[n_seq, length].

    Nothing that comes with a package is executed.
    """
    return _mlx(path) if dialect == "mlx" else _transformers(path)


def _transformers(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        device_map="cpu",
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    bad = {
        key: sorted(info[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    }
    if bad:
        raise VerifyError(f"transformers did not take every tensor: {bad}")
    model.eval()

    def run(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(tokens)).logits.float().numpy(), dtype=np.float32)

    return run


def _mlx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path, lazy=False, strict=True)
    model.set_dtype(mx.float32)
    return lambda tokens: np.array(model(mx.array(tokens)).astype(mx.float32))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and progress bars of the libraries."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _no_bars()
            # compressed-tensors draws bars of its own.
            with redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def _no_bars() -> None:
    try:
        from transformers.utils import logging as theirs
    except ImportError:
        return
    bars: Any = theirs
    bars.disable_progress_bar()
