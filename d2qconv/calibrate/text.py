"""The tokenizer that lies in a folder: a checkpoint's, or a package's copy of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from d2qconv.calibrate.tokens import encoder, text_start
from d2qconv.checkpoint.folder import find, read_json
from d2qconv.checkpoint.open import Checkpoint


@dataclass(frozen=True)
class FolderTokenizer:
    """By tokenizer.json or tokenizer.model, see `d2qconv.calibrate.tokens`; a `Tokenizer` of `exporters.runtime`.

    n_vocab: of the model. bos_ids: what the model's config names, for a checkpoint without a tokenizer.
    """

    checkpoint: Checkpoint
    n_vocab: int
    bos_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, folder: Path, n_vocab: int) -> FolderTokenizer:
        """Of a package. Its config.json, where it has one, names special tokens."""
        path = find(folder, "config.json")
        config = {} if path is None else read_json(path)
        return cls(Checkpoint(folder, str(folder), "", config, {}, ""), n_vocab)

    @cached_property
    def bos(self) -> int | None:
        """The token that is put before every text; None if none is. Raises InputError."""
        return text_start(self.checkpoint, n_vocab=self.n_vocab, bos_ids=self.bos_ids)

    @cached_property
    def encode(self) -> Callable[[str], list[int]]:
        """Text → tokens, none put around it nor read out of its letters; InputError if the folder has no tokenizer."""
        return encoder(self.checkpoint, is_plain=True)


class Tokenized:
    """Base of what reads texts by a folder's tokenizer: its half of `d2qconv.exporters.runtime.LoadedPackage`."""

    _tokenizer: FolderTokenizer

    @property
    def bos(self) -> int | None:
        """The token that is put before every text."""
        return self._tokenizer.bos

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self._tokenizer.encode(text)
