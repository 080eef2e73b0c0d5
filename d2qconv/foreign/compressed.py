"""compressed-tensors' `pack-quantized` arrays (compressed_tensors/compressors/pack_quantized).

Per linear (n_out, n_in, n_groups):

- `weight_packed` i32[n_out, n_words]: codes along the columns; since version 0.18 a bit stream, before that 32 // bits
  codes a word, which differs at 3 bits;
- `weight_scale` [n_out, n_groups], one group a row for the strategy `channel`;
- `weight_zero_point`: i32 packed like codes, down the rows, [n_words, n_groups], or i8[n_out, n_groups] of signed
  zero points; absent if symmetric;
- `weight_shape` i64[2]; `weight_g_idx` i32[n_in], the group of every column, where columns were ordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import Refusal, refuse
from d2qconv.foreign.arrays import Arrays, one_of
from d2qconv.foreign.linear import BITS, ForeignLinear
from d2qconv.foreign.words import dense_words, unpack_dense, unpack_whole, whole_words

SUFFIX = ".weight_packed"
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def read_compressed(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[ForeignLinear]:
    """The linears of `quant_method: compressed-tensors`; raises InputError and PlanError."""
    schemes = _schemes(config)
    for name in checkpoint.tensors:
        if name.endswith(SUFFIX):
            yield _linear(checkpoint, name.removesuffix(SUFFIX), schemes)


def _schemes(config: Mapping[str, Any]) -> set[tuple[int, bool]]:
    """(bits, symmetric) of every group of the config; raises PlanError for what is more than packed weights."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        refuse([Refusal("config.json", "quantization_config has no config_groups")])
    found: set[tuple[int, bool]] = set()
    refusals: list[Refusal] = []
    for name, group in groups.items():  # type: ignore[union-attr]
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            refusals.append(
                Refusal("config.json", f"config_groups.{name:.80} does not say how weights are stored")
            )
            continue
        one_of("format", group.get("format") or config.get("format"), ("pack-quantized",))
        bits = weights.get("num_bits")
        if type(bits) is not int or bits not in BITS:
            refusals.append(Refusal("config.json", f"config_groups.{name:.80} has {bits!r:.20} bits"))
            continue
        found.add((bits, weights.get("symmetric", True) is True))
        refusals += [
            Refusal("config.json", f"config_groups.{name:.80} quantizes {key.split('_')[0]} activations too")
            for key in ("input_activations", "output_activations")
            if group.get(key) is not None
        ]
        if weights.get("type", "int") != "int":
            refusals.append(
                Refusal("config.json", f"weights are of type {weights.get('type')!r:.40}, not int")
            )
    refusals += [
        Refusal("config.json", f"{key} is set: the function is another one")
        for key in ("kv_cache_scheme", "transform_config")
        if config.get(key)
    ]
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        refusals.append(
            Refusal("config.json", f"sparsity_config: {sparsity.get('format')!r:.40} is not read")
        )
    refuse(refusals)
    return found


def _linear(checkpoint: Checkpoint, module: str, schemes: set[tuple[int, bool]]) -> ForeignLinear:
    arrays = Arrays(checkpoint, module)
    packed, scales = arrays.words("weight_packed"), arrays.scales("weight_scale")
    said = arrays.optional("weight_shape")
    if said is None or said.shape != (2,) or said.dtype.is_floating_point:
        raise arrays.error("weight_shape is not there, or no pair of sizes")
    n_out, n_in = (int(n) for n in said.load())
    if n_in < 1 or packed.shape[0] != n_out or scales.shape[0] != n_out:
        raise arrays.error(f"weight_shape says {[n_out, n_in]}, weight_packed has {list(packed.shape)}")
    zeros = arrays.optional("weight_zero_point")
    fitting = [
        (bits, is_dense)
        for bits, is_symmetric in sorted(schemes)
        for is_dense, words in ((True, dense_words), (False, whole_words))
        if is_symmetric == (zeros is None) and words(n_in, bits) == packed.shape[1]
    ]
    if not fitting:
        kind = "without zero points" if zeros is None else "with zero points"
        raise arrays.error(
            f"{packed.shape[1]} words for {n_in} columns, {kind}, are none of config.json's schemes {sorted(schemes)}"
        )
    bits, is_dense = fitting[0]
    unpack = unpack_dense if is_dense else unpack_whole
    n_groups = scales.shape[1]
    index = arrays.index("weight_g_idx", n_in, n_groups)
    if index is None:
        arrays.whole(n_in, n_groups, "weight_packed", "weight_scale")
    words = dense_words(n_out, bits) if is_dense else whole_words(n_out, bits)
    is_packed = zeros is not None and zeros.shape == (words, n_groups) and zeros.dtype == torch.int32
    is_signed = zeros is not None and zeros.shape == (n_out, n_groups) and zeros.dtype == torch.int8
    if zeros is not None and not (is_packed or is_signed):
        raise arrays.error(f"weight_zero_point has shape {list(zeros.shape)} of {zeros.dtype}")

    def read_zeros(stored: Dense) -> Tensor:
        if is_signed:
            return stored.load().to(torch.int16) + (1 << (bits - 1))
        return unpack(stored.load().T, bits, n_out).T.to(torch.int16)

    return ForeignLinear(
        module=module,
        shape=(n_out, n_in),
        bits=bits,
        n_groups=n_groups,
        arrays=arrays.names(_PARTS),
        codes=lambda: unpack(packed.load(), bits, n_in),
        steps=scales.load,
        zeros=None if zeros is None else lambda: read_zeros(zeros),
        index=index,
    )
