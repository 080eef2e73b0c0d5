"""Calibration tokens: sampled, from a file, or from a hub data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.sample import sample_sequences
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import InputError, PluginError
from d2qconv.run import CalibrationSpec

#: One held-out sequence, for the closing KL divergence, to this many calibration sequences.
HELD_OUT_SHARE = 10


@dataclass(frozen=True)
class CalibrationTokens:
    """i64[n, length] each. description: for people; digest: SHA-256 of both arrays, hex."""

    calibration: Tensor
    held_out: Tensor
    description: str
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over both arrays, little-endian i64."""
        both = torch.cat([self.calibration, self.held_out]).numpy()
        return hashlib.sha256(both.astype("<i8").tobytes()).hexdigest()


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
        rows = _cut(_read_stream(spec, checkpoint, wanted), spec, wanted, bos_token(checkpoint, model))
    if int(rows.max()) >= model.dims.vocab or int(rows.min()) < 0:
        raise InputError(
            f"token {int(rows.max())} is outside the vocabulary of {model.dims.vocab}", where=spec.source
        )
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
    description = f"{Path(spec.source).name}, {len(calibration)} × {spec.length} tokens, seed {spec.seed}"
    return CalibrationTokens(calibration, held_out, description, warnings)


def check_spec(spec: CalibrationSpec, model: ModelDesc) -> None:
    """Raise InputError for a calibration that cannot be had, before any work."""
    if spec.sequences < 1 or spec.length < 2:
        raise InputError("calibration needs at least 1 sequence of 2 tokens", where="--sequences, --length")
    if spec.length > model.max_positions:
        raise InputError(
            f"sequences of {spec.length} tokens are longer than the model's context of {model.max_positions}",
            where="--length",
        )
    is_file = Path(spec.source).exists()
    if spec.source != "self" and not is_file and not _is_hub_name(spec.source):
        raise InputError(
            "no such file, and not the name of a hub data set (org/name[:split])",
            where=f"--calibration {spec.source}",
        )


def bos_token(checkpoint: Checkpoint, model: ModelDesc) -> int | None:
    """The BOS token if the tokenizer puts one in front of a text, else None."""
    config = checkpoint.json("tokenizer_config.json") or {}
    tokenizer = checkpoint.file("tokenizer.json")
    if tokenizer is not None:
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(tokenizer)).encode("a").ids
        return ids[0] if ids and model.bos_ids and ids[0] == model.bos_ids[0] else None
    return model.bos_ids[0] if config.get("add_bos_token", True) and model.bos_ids else None


def _is_hub_name(source: str) -> bool:
    name = source.partition(":")[0]
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))


def _read_stream(spec: CalibrationSpec, checkpoint: Checkpoint, wanted: int) -> Tensor:
    """All tokens of the source as one i64[n]; a text is read only as far as it may be needed."""
    path = Path(spec.source)
    if path.suffix in (".npy", ".safetensors"):
        return _read_token_file(path)
    encode = _encoder(checkpoint)
    if not path.exists():
        texts = _hub_texts(spec.source)
    elif path.suffix == ".jsonl":
        texts = _jsonl_texts(path)
    else:
        return torch.tensor(encode(_read_text(path)), dtype=torch.int64)
    ids: list[int] = []
    enough = 4 * wanted * spec.length
    for text in texts:
        ids += encode(text + "\n\n")
        if len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.int64)


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
        raise InputError(f"the calibration text cannot be read: {error}", where=str(path)) from error


def _jsonl_texts(path: Path) -> Iterator[str]:
    """The `text` of every line."""
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("not a JSON object with a `text`", where=f"{path}, line {number}") from error
        if not isinstance(text, str):
            raise InputError("`text` is not a string", where=f"{path}, line {number}")
        yield text


def _read_token_file(path: Path) -> Tensor:
    """A .npy of integers, or a .safetensors whose only tensor is one; any shape, read in order."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            from safetensors.numpy import load_file

            (array,) = load_file(path).values()
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"not a token file: {error}", where=str(path)) from error
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


def _encoder(checkpoint: Checkpoint) -> Callable[[str], list[int]]:
    """Text → token ids without special tokens, by the checkpoint's own tokenizer."""
    path = checkpoint.file("tokenizer.json")
    if path is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
    path = checkpoint.file("tokenizer.model")
    if path is not None:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(path))
        return lambda text: list(processor.encode(text))
    raise InputError(
        "the checkpoint has no tokenizer.json or tokenizer.model, so a text cannot be tokenized",
        where=checkpoint.source,
        todo="calibrate with --calibration self or a token file (.npy)",
    )
