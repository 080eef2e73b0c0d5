"""The runtimes that a package is checked in: transformers with the dialect's library, and mlx-lm. On a CPU, in f32."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from d2qconv.errors import VerifyError

#: Distributions that must be there to load a dialect.
NEEDS = {
    "safetensors": ("transformers", "compressed-tensors"),
    "auto-round": ("transformers", "auto-round"),
    "gptq": ("transformers", "optimum", "gptqmodel"),
    "mlx": ("mlx-lm",),
}


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
    """f32[n_seq, length, vocab] of i64[n_seq, length] in the dialect's runtime; raises VerifyError.

    Nothing that comes with a package is executed.
    """
    try:
        with _quiet():
            return _mlx(path, tokens) if dialect == "mlx" else _transformers(path, tokens)
    # These libraries raise whatever their parts throw.
    except Exception as error:
        said = " ".join(str(error).split())[-300:]
        raise VerifyError(f"{type(error).__name__}: {said}", where=str(path)) from error


def _transformers(path: Path, tokens: np.ndarray) -> np.ndarray:
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
    with torch.inference_mode():
        found = model.eval()(torch.from_numpy(tokens)).logits
    return np.asarray(found.float().numpy(), dtype=np.float32)


def _mlx(path: Path, tokens: np.ndarray) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path, lazy=False, strict=True)
    model.set_dtype(mx.float32)
    found = model(mx.array(tokens)).astype(mx.float32)
    return np.array(found)


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
