"""Reads genai_config.json again: the sizes that ONNX Runtime GenAI makes its caches by must be the graph's.

GenAI does what this file says, and some of that is code: `custom_ops_library` in the session's options is a shared
library that it loads, a provider's options name others. So keys that d2qconv does not write are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from d2qconv.arch.spec import Dims
from d2qconv.checkpoint.folder import is_regular
from d2qconv.errors import VerifyError
from d2qconv_onnx.genai import CONFIG, MODEL

_MOST_BYTES = 1 << 20


class _Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    log_id: str
    provider_options: Annotated[list[str], msgspec.Meta(max_length=0)]


class _Decoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    session_options: _Session
    inputs: dict[str, str]
    outputs: dict[str, str]
    filename: str
    head_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int


class _Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    vocab_size: int
    context_length: int
    decoder: _Decoder
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: _Model
    search: dict[str, bool | int | float | None]


class GenaiConfig(msgspec.Struct, frozen=True):
    """What is read of the config. path: the file."""

    path: Path
    model: _Model

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The token that begins a text, if there is one."""
        return () if self.model.bos_token_id is None else (self.model.bos_token_id,)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        found = self.model.eos_token_id
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    def check(self, model_type: str, dims: Dims, max_positions: int) -> None:
        """Raise VerifyError unless every size is the graph's."""
        decoder = self.model.decoder
        pairs = {
            "type": (self.model.type, model_type),
            "vocab_size": (self.model.vocab_size, dims.vocab),
            "context_length": (self.model.context_length, max_positions),
            "filename": (decoder.filename, MODEL),
            "head_size": (decoder.head_size, dims.head),
            "hidden_size": (decoder.hidden_size, dims.hidden),
            "num_attention_heads": (decoder.num_attention_heads, dims.n_heads),
            "num_key_value_heads": (decoder.num_key_value_heads, dims.n_kv_heads),
            "num_hidden_layers": (decoder.num_hidden_layers, dims.n_layers),
        }
        wrong = [f"{key} {a!r:.80} instead of {b!r}" for key, (a, b) in pairs.items() if a != b]
        if wrong:
            raise VerifyError(f"is not the graph's: {'; '.join(wrong)}", where=str(self.path))


def read_config(folder: Path) -> GenaiConfig:
    """The config of a package; raises VerifyError if there is none, or not such a one."""
    path = folder / CONFIG
    try:
        if not is_regular(path):
            raise VerifyError("is not there, or no regular file", where=str(path))
        if path.stat().st_size > _MOST_BYTES:
            raise VerifyError("is too large for a config", where=str(path))
        return GenaiConfig(path, msgspec.json.decode(path.read_bytes(), type=_File).model)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise VerifyError(
            f"is not a config of ONNX Runtime GenAI: {error}",
            where=str(path),
            todo="only folders that d2qconv wrote can be verified",
        ) from error
