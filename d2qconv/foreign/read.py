"""Which dialect a checkpoint is in, its linears, and the same model as a checkpoint of floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from d2qconv.arch.bind import checkpoint_names
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import QUANTIZED_KEYS, Checkpoint, is_quantized, open_checkpoint
from d2qconv.errors import InputError, Refusal, refuse
from d2qconv.foreign.compressed import read_compressed
from d2qconv.foreign.gptq import read_auto_round, read_awq, read_gptq
from d2qconv.foreign.linear import ForeignLinear

Reader: TypeAlias = Callable[[Checkpoint, Mapping[str, Any]], Iterator[ForeignLinear]]

#: `quant_method` in config.json → what reads it.
READERS: Mapping[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "auto-round": read_auto_round,
    "intel/auto-round": read_auto_round,
}


@dataclass(frozen=True)
class Foreign:
    """A checkpoint that another tool quantized.

    dialect: in words (`gptq, checkpoint_format gptq_v2`). checkpoint: the same model in floats; a quantized matrix is
    decoded when it is loaded. linears: the quantized matrices by the names that their weights have there.
    """

    dialect: str
    checkpoint: Checkpoint
    linears: Mapping[str, ForeignLinear]


def read_foreign(checkpoint: Checkpoint) -> Foreign | None:
    """What another tool quantized; None if the checkpoint is one of floats. Reads headers, and a few small arrays.

    Raises PlanError for a dialect, or a kind of it, that is not read, and InputError where config.json and arrays
    contradict each other.
    """
    if not is_quantized(checkpoint.config):
        return None
    config, *others = (
        checkpoint.config[key] for key in QUANTIZED_KEYS if checkpoint.config.get(key) is not None
    )
    if any(other != config for other in others):
        raise InputError(f"{' and '.join(QUANTIZED_KEYS)} say different things", where=str(checkpoint.path))
    if not isinstance(config, Mapping):
        raise InputError("quantization_config is no object", where=str(checkpoint.path))
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        known = ", ".join(READERS)
        refuse([Refusal("config.json", f"quant_method is {method!r:.80}; what is read is {known}")])
    linears = {f"{found.module}.weight": found for found in READERS[str(method)](checkpoint, config)}
    if not linears:
        raise InputError(
            f"config.json says {method}, and there are no arrays of it", where=str(checkpoint.path)
        )
    return Foreign(_dialect(str(method), config), _floats(checkpoint, linears), linears)


def open_float_source(name: str, revision: str | None = None) -> Checkpoint:
    """The source of a package as the run saw it: a folder or hub id, decoded where another tool has quantized it.

    Raises InputError, PlanError.
    """
    checkpoint = open_checkpoint(name, revision=revision)
    foreign = read_foreign(checkpoint)
    return checkpoint if foreign is None else foreign.checkpoint


def _dialect(method: str, config: Mapping[str, Any]) -> str:
    kind = {
        "gptq": f", checkpoint_format {config.get('checkpoint_format', config.get('format', 'gptq'))}",
        "auto-round": f", {config.get('packing_format', 'auto_round')}",
        "intel/auto-round": f", {config.get('packing_format', 'auto_round')}",
        "compressed-tensors": ", pack-quantized",
    }
    return method + kind.get(method, "")


def _floats(checkpoint: Checkpoint, linears: Mapping[str, ForeignLinear]) -> Checkpoint:
    """The checkpoint with a float matrix for the arrays of each linear."""
    config = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZED_KEYS}
    expected = set(checkpoint_names(config).values())
    tensors = dict(checkpoint.tensors)
    for name, linear in linears.items():
        for array in linear.arrays:
            del tensors[array]
        if name in tensors:
            raise InputError(f"holds {name!r:.120} and arrays of its codes", where=str(checkpoint.path))
        tensors[name] = Dense(linear.shape, torch.float32, linear.decode)
        bias = f"{linear.module}.bias"
        if bias in tensors and bias not in expected and _is_zero(tensors[bias]):
            # AutoGPTQ gave every linear a bias, of zeros where the model has none.
            del tensors[bias]
    return replace(checkpoint, config=config, tensors=tensors)


def _is_zero(bias: Dense) -> bool:
    return not bool(bias.load().any())
