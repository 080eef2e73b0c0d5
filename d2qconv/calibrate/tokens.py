"""Calibration tokens: sampled, from a file, or from a hub data set."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.typing import NDArray
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.sample import sample_sequences
from d2qconv.checkpoint.folder import is_text
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.checkpoint.special import added_tokens, ends, special_ids
from d2qconv.errors import InputError, PluginError
from d2qconv.run import CalibrationSpec

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

#: One held-out sequence, for the closing KL divergence, to this many calibration sequences.
HELD_OUT_SHARE = 10


#: Characters of a text file that is read as a whole, however few tokens are needed of it.
LONG_TEXT = 1 << 23
#: Tokens before a cut that are not relied on.
_BEFORE_CUT = 64


@dataclass(frozen=True)
class CalibrationTokens:
    """i64[n, length] each. description: for people.

    own: sampled from the model for the last pass alone, besides `calibration`; no statistics are taken of them.
    """

    calibration: Tensor
    held_out: Tensor
    description: str
    warnings: tuple[str, ...] = ()
    own: Tensor | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over all arrays, little-endian i64, hex."""
        arrays = [self.calibration, self.held_out, *([] if self.own is None else [self.own])]
        return _digest(torch.cat(arrays))

    @property
    def held_out_digest(self) -> str:
        """The same of the held-out sequences alone: runs that are measured on the same tokens agree in it."""
        return _digest(self.held_out)


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def load_tokens(
    spec: CalibrationSpec,
    checkpoint: Checkpoint,
    model: ModelDesc,
    *,
    device: torch.device | str,
    on_step: Callable[[int], None],
) -> CalibrationTokens:
    """Make the sequences that `spec` asks for; raises InputError.

    A text is tokenized as one stream and cut into sequences of equal length; if it has more than asked for, a
    seeded choice of them is taken. The held-out sequences are the last of the choice.
    """
    check_spec(spec, model)
    n_held_out = max(spec.sequences // HELD_OUT_SHARE, 1)
    wanted = spec.sequences + n_held_out
    if spec.source == "self":
        bos = bos_token(checkpoint, model)
        rows = sample_sequences(
            model, wanted, spec.length, bos=bos, seed=spec.seed, device=device, on_token=on_step
        )
    else:
        # A text is read only as far as it may be needed.
        stream = read_stream(spec.source, lambda: encoder(checkpoint), most=4 * wanted * spec.length)
        rows = _cut(stream, spec, wanted, bos_token(checkpoint, model))
    check_vocabulary(rows, model.dims.vocab, spec.source)
    warnings: tuple[str, ...] = ()
    if len(rows) < wanted:
        n_held_out = max(len(rows) // (HELD_OUT_SHARE + 1), 1)
        warnings = (
            f"{spec.source} gives {len(rows)} sequences of {spec.length} tokens; "
            f"{wanted} were asked for, {n_held_out} of them to measure with",
        )
    if len(rows) < 2:
        raise InputError(
            f"calibration needs at least two sequences of {spec.length} tokens, one of them to measure with; "
            f"this gives {len(rows)}",
            where=spec.source,
            todo="give a longer text or a smaller --length",
        )
    calibration, held_out = rows[:-n_held_out], rows[-n_held_out:]
    return CalibrationTokens(calibration, held_out, describe_tokens(spec, calibration), warnings)


def describe_tokens(spec: CalibrationSpec, calibration: Tensor) -> str:
    """The calibration in one line, for people; of a file its name alone."""
    source = Path(spec.source).name if Path(spec.source).exists() else spec.source
    return f"{source}, {len(calibration)} × {spec.length} tokens, seed {spec.seed}"


def check_spec(spec: CalibrationSpec, model: ModelDesc) -> None:
    """Raise InputError for a calibration that cannot be had, before any work."""
    if spec.sequences < 1 or spec.length < 2:
        raise InputError("calibration needs at least 1 sequence of 2 tokens", where="--sequences, --length")
    if not 0 <= spec.seed < 1 << 63:
        raise InputError(f"a seed is between 0 and 2^63, not {spec.seed}", where="--seed")
    if spec.length > model.max_positions:
        raise InputError(
            f"sequences of {spec.length} tokens are longer than the model's context of {model.max_positions}",
            where="--length",
            todo=f"use --length {model.max_positions} or less",
        )
    if not is_text(spec.source):
        raise InputError("is a name that is not UTF-8", where=f"--calibration {spec.source!a}")
    is_file = Path(spec.source).exists()
    if spec.source != "self" and not is_file and not is_hub_name(spec.source):
        raise InputError(
            "no such file, and not the name of a hub data set (org/name[:split])",
            where=f"--calibration {spec.source}",
        )


def check_vocabulary(tokens: Tensor, n_vocab: int, where: str) -> None:
    """Raise InputError for i64 tokens that a model of n_vocab ones does not have."""
    strange = tokens[(tokens < 0) | (tokens >= n_vocab)]
    if len(strange):
        raise InputError(f"token {int(strange[0])} is outside the vocabulary of {n_vocab:,}", where=where)


def bos_token(checkpoint: Checkpoint, model: ModelDesc) -> int | None:
    """The BOS token if the tokenizer puts one in front of a text, else None; see `text_start`."""
    return text_start(checkpoint, n_vocab=model.dims.vocab, bos_ids=model.bos_ids)


def text_start(checkpoint: Checkpoint, *, n_vocab: int, bos_ids: Sequence[int]) -> int | None:
    """The BOS token if the tokenizer puts one in front of a text, else None; see `d2qconv.checkpoint.special`.

    Its id is the one that the tokenizer's files name; a checkpoint without a tokenizer has that of config.json,
    `bos_ids`. Raises InputError if the model, of `n_vocab` tokens, has no embedding for it.
    """
    path, parsed = checkpoint.file("tokenizer.json"), checkpoint.json("tokenizer.json")
    model_path = checkpoint.file("tokenizer.model")
    if path is not None:
        ids = special_ids(checkpoint, _tokenizer(path).get_vocab(with_added_tokens=True))
    elif model_path is not None:
        by_text = _pieces(model_path)
        by_text |= {token.text: token.id for token in added_tokens(checkpoint, None)}
        ids = special_ids(checkpoint, by_text)
    else:
        ids = {"bos": bos_ids[0]} if bos_ids else {}
    if not ends(checkpoint, parsed, ids).bos:
        return None
    if ids["bos"] >= n_vocab:
        raise InputError(
            f"its BOS is token {ids['bos']}, and the model has {n_vocab} embedding rows",
            where=checkpoint.source,
            todo="use the tokenizer that belongs to this checkpoint",
        )
    return ids["bos"]


def is_hub_name(source: str) -> bool:
    """Whether it may be a data set of the hub, `org/name[:split]`."""
    name = source.partition(":")[0]
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))


def read_stream(
    source: str, encoder: Callable[[], Callable[[str], Sequence[int]]], *, most: int | None = None
) -> Tensor:
    """All tokens of a text, JSONL or token file, or of a hub data set, as one i64[n]; raises InputError, PluginError.

    A text file is tokenized as a whole, of a long one the beginning, in which there are `most` tokens; the texts of the
    others one by one, each with an empty line behind it, until there are as many. None: all of it. encoder: makes what
    turns a text into tokens; not called for a token file.
    """
    path = Path(source)
    if path.suffix in (".npy", ".safetensors"):
        return _read_token_file(path)
    encode = encoder()
    if not path.exists():
        texts = _hub_texts(source)
    elif path.suffix == ".jsonl":
        texts = _jsonl_texts(path)
    else:
        return torch.tensor(_encode_beginning(_read_text(path), encode, most), dtype=torch.int64)
    ids: list[int] = []
    for text in texts:
        ids += encode(text + "\n\n")
        if most is not None and len(ids) >= most:
            break
    return torch.tensor(ids, dtype=torch.int64)


def _encode_beginning(text: str, encode: Callable[[str], Sequence[int]], most: int | None) -> Sequence[int]:
    """Tokens of a text; of one beyond LONG_TEXT at least `most` of its first ones, None for all.

    A tokenizer takes some 200 bytes of memory a character. The tokens just before a cut may be others than in the whole
    text; they are left out.
    """
    n = len(text) if most is None else max(LONG_TEXT, 8 * most)
    while n < len(text):
        ids = encode(text[:n])
        if most is not None and len(ids) >= most + _BEFORE_CUT:
            return ids[:-_BEFORE_CUT]
        n *= 2
    return encode(text)


def _cut(stream: Tensor, spec: CalibrationSpec, wanted: int, bos: int | None) -> Tensor:
    """i64[n] → i64[≤ wanted, length], a seeded choice; BOS replaces each sequence's first token."""
    n = len(stream) // spec.length
    if n == 0:
        raise InputError(
            f"the calibration text has {len(stream)} tokens, less than one sequence of {spec.length}",
            where=spec.source,
            todo="give a longer text or a smaller --length",
        )
    rows = stream[: n * spec.length].view(n, spec.length)
    choice = torch.randperm(n, generator=torch.Generator().manual_seed(spec.seed))[:wanted]
    rows = rows[choice].clone()
    if bos is not None:
        rows[:, 0] = bos
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the text cannot be read: {error}", where=str(path)) from error


def _jsonl_texts(path: Path) -> Iterator[str]:
    """The `text` of every line, read as it is asked for. Only a line feed ends a line: a string may hold U+2028."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError("not a JSON object with a `text`", where=f"{path}, line {number}") from error
        if not isinstance(text, str):
            raise InputError("`text` is not a string", where=f"{path}, line {number}")
        yield text


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as stream:
            yield from stream
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the text cannot be read: {error}", where=str(path)) from error


def _array(path: Path) -> NDArray[Any]:
    """The array of a .npy file; raises ValueError, OSError.

    numpy's own loader allocates what the header announces before it looks for the values, and takes a .npz as well.
    """
    headers = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
    with path.open("rb") as stream:
        version = read_magic(stream)
        if version not in headers:
            raise ValueError(f"version {version}")
        try:
            shape, is_fortran, dtype = headers[version](stream)
        # The header is Python text, and numpy lets out what Python's tokenizer raises.
        except Exception as error:
            raise ValueError(f"a header that is none: {error}") from error
        there = os.fstat(stream.fileno()).st_size - stream.tell()
        if dtype.hasobject or min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != there:
            raise ValueError(f"{there} bytes are no {shape} of {dtype}")
        array = np.fromfile(stream, dtype, math.prod(shape))
    return array.reshape(shape, order="F" if is_fortran else "C")


def _only_tensor(path: Path) -> NDArray[Any]:
    """The tensor of a .safetensors that holds one; raises ValueError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        (array,) = load_file(path).values()
    # The library has no error of its own for a dtype that numpy lacks.
    except (SafetensorError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error
    return array


def _read_token_file(path: Path) -> Tensor:
    """A .npy of integers, or a .safetensors whose only tensor is one; any shape, read in order."""
    try:
        array = _array(path) if path.suffix == ".npy" else _only_tensor(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"not a token file: {error}",
            where=str(path),
            todo="give a .npy of integers, or a .safetensors with one such tensor",
        ) from error
    if array.dtype.kind not in "iu":
        raise InputError(f"tokens must be integers, not {array.dtype}", where=str(path))
    return torch.from_numpy(array.astype(np.int64)).reshape(-1)


def _hub_texts(source: str) -> Iterator[str]:
    """The `text` column of a hub data set, streamed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PluginError(
            "a hub data set needs the library `datasets`", todo="pip install 'd2qconv[datasets]'"
        ) from error
    name, _, split = source.partition(":")
    try:
        for row in load_dataset(name, split=split or "train", streaming=True):
            yield str(row["text"])
    except Exception as error:
        raise InputError(f"the data set cannot be read: {error}", where=source) from error


def encoder(checkpoint: Checkpoint, *, is_plain: bool = False) -> Callable[[str], list[int]]:
    """Text → token ids, none put around it, by the checkpoint's own tokenizer; raises InputError.

    is_plain: letters that spell a special token (`<|im_end|>`) are letters, as llama.cpp's `parse_special` = false has
    them; otherwise they are that token, as in a chat that is used for calibration. SentencePiece has letters always.
    """
    path = checkpoint.file("tokenizer.json")
    if path is not None:
        tokenizer = _tokenizer(path)
        tokenizer.encode_special_tokens = is_plain
        return _guarded(path, lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids))
    path = checkpoint.file("tokenizer.model")
    if path is not None:
        processor = _sentencepiece(path)
        return _guarded(path, lambda text: list(processor.encode(text)))
    raise InputError(
        "the checkpoint has no tokenizer.json or tokenizer.model, so a text cannot be tokenized",
        where=checkpoint.source,
        todo="use a token file (.npy), or to calibrate --calibration self",
    )


def _guarded(path: Path, encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """A tokenizer that was read may still stop at a text, with an error of its library's."""

    def guarded(text: str) -> list[int]:
        try:
            return encode(text)
        except Exception as error:
            raise InputError(
                f"the tokenizer cannot encode a text: {error}", where=str(path), todo="fetch the file again"
            ) from error

    return guarded


def _tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, which may say that a text is cut or padded to a length: here it is not."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise _unreadable(path, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _sentencepiece(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _pieces(path: Path) -> dict[str, int]:
    """Every piece of a SentencePiece model and its id."""
    processor = _sentencepiece(path)
    try:
        return {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    # The library does not look at the texts before they are asked for.
    except (UnicodeDecodeError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"the tokenizer cannot be read: {error}", where=str(path), todo="fetch the file again")
