"""How a package is run: what an exporter gives to whom measures it. See `d2qconv.evaluation`.

Modules here import no runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What turns a text into tokens."""

    @property
    def bos(self) -> int | None:
        """The token that is put before every text; None if none is."""

    def encode(self, text: str) -> Sequence[int]:
        """Tokens of a text, none put around it, no special token read out of its letters; raises InputError."""


class LoadedPackage(Tokenizer, Protocol):
    """A package, loaded in the program that it was written for. A context manager; used by one thread."""

    @property
    def name(self) -> str:
        """Of the program."""

    @property
    def version(self) -> str:
        """Of the program and the libraries it needs."""

    @property
    def settings(self) -> str:
        """What else decides what it computes."""

    @property
    def n_vocab(self) -> int:
        """Length of a row of logits."""

    @property
    def max_length(self) -> int:
        """Of a sequence, in tokens, as the package says it."""

    def logits(self, tokens: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        """f32[n, length - first, vocab]: after each token of n sequences, from position `first` on.

        tokens: i64[n, length], from empty caches. Raises VerifyError if the program cannot run the package.
        """

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Evaluating(Protocol):
    """An exporter whose packages can be measured in their own runtime. Optional: `evaluate` needs it."""

    def runtime(self, path: Path, length: int) -> LoadedPackage:
        """Load the package for sequences of `length` tokens.

        Raises PluginError with the pip command if the runtime is not installed, VerifyError if it refuses the package.
        """
