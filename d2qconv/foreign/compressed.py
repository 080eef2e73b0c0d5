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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, order=True)
class _Scheme:
    """How a group of the config stores its weights. group: columns, -1 for a row. has_index: columns were ordered."""

    bits: int
    is_symmetric: bool
    group: int
    has_index: bool

    def __str__(self) -> str:
        zeros = "without" if self.is_symmetric else "with"
        groups = "one group a row" if self.group == -1 else f"groups of {self.group}"
        return f"{self.bits} bits {zeros} zero points in {groups}"


def read_compressed(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[ForeignLinear]:
    """The linears of `quant_method: compressed-tensors`; raises InputError and PlanError."""
    schemes = _schemes(config)
    for name in checkpoint.tensors:
        if name.endswith(SUFFIX):
            yield _linear(checkpoint, name.removesuffix(SUFFIX), schemes)


def _schemes(config: Mapping[str, Any]) -> list[_Scheme]:
    """Those of every group of the config; raises PlanError for what is more than packed weights."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        refuse([Refusal("config.json", "quantization_config has no config_groups")])
    found: set[_Scheme] = set()
    refusals: list[Refusal] = []
    for name, group in groups.items():  # type: ignore[union-attr]
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            why = f"config_groups.{name:.80} does not say how weights are stored"
            refusals.append(Refusal("config.json", why))
            continue
        one_of("format", group.get("format") or config.get("format"), ("pack-quantized",))
        scheme = _scheme(group["weights"])
        if isinstance(scheme, str):
            refusals.append(Refusal("config.json", f"config_groups.{name:.80} {scheme}"))
            continue
        found.add(scheme)
        refusals += [
            Refusal("config.json", f"config_groups.{name:.80} quantizes {key.split('_')[0]} activations too")
            for key in ("input_activations", "output_activations")
            if group.get(key) is not None
        ]
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
    return sorted(found)


def _scheme(weights: Mapping[str, Any]) -> _Scheme | str:
    """One scheme, or what of it is not read.

    Without a strategy the group size says it, as in compressed_tensors' QuantizationArgs.
    """
    bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    if type(bits) is not int or bits not in BITS:
        return f"has {bits!r:.20} bits"
    if weights.get("type", "int") != "int":
        return f"has weights of type {weights.get('type')!r:.40}, not int"
    if strategy is None:
        strategy = "channel" if size == -1 else "tensor" if size is None else "group"
    if strategy not in ("group", "channel"):
        return f"has the strategy {strategy!r:.40}; only group, channel is read"
    if strategy == "channel":
        size = -1
    elif type(size) is not int or size < 1:
        return f"has the strategy group and a group_size of {size!r:.20}"
    # compressed_tensors' ActivationOrdering: `dynamic` is another name of `group`, `static` of `weight`.
    has_index = str(weights.get("actorder")).lower() in ("group", "dynamic", "true")
    return _Scheme(bits, weights.get("symmetric", True) is True, size, has_index)


def _linear(checkpoint: Checkpoint, module: str, schemes: Sequence[_Scheme]) -> ForeignLinear:
    arrays = Arrays(checkpoint, module)
    packed, scales = arrays.words("weight_packed"), arrays.scales("weight_scale")
    said = arrays.optional("weight_shape")
    if said is None or said.shape != (2,) or said.dtype.is_floating_point:
        raise arrays.error("weight_shape is not there, or no pair of sizes")
    n_out, n_in = (int(n) for n in said.load())
    if n_in < 1 or packed.shape[0] != n_out or scales.shape[0] != n_out:
        raise arrays.error(f"weight_shape says {[n_out, n_in]}, weight_packed has {list(packed.shape)}")
    zeros = arrays.optional("weight_zero_point")
    n_groups = scales.shape[1]
    index = arrays.index("weight_g_idx", n_in, n_groups)
    ordered = [s for s in schemes if s.has_index == (index is not None)]
    if not ordered:
        raise arrays.error(
            f"config.json says that actorder is {'' if index is None else 'not '}group, and there is "
            f"{'no' if index is None else 'a'} weight_g_idx"
        )
    scheme, is_dense = _fitting(arrays, ordered, n_in, n_groups, packed.shape[1], has_zeros=zeros is not None)
    bits = scheme.bits
    unpack = unpack_dense if is_dense else unpack_whole
    if index is None:
        arrays.whole_groups(n_in, n_groups, "weight_g_idx")
    words = dense_words(n_out, bits) if is_dense else whole_words(n_out, bits)
    is_packed = zeros is not None and zeros.shape == (words, n_groups) and zeros.dtype == torch.int32
    is_signed = zeros is not None and zeros.shape == (n_out, n_groups) and zeros.dtype == torch.int8
    if zeros is not None and not (is_packed or is_signed):
        raise arrays.error(f"weight_zero_point has shape {list(zeros.shape)} of {zeros.dtype}")

    def read_zeros(stored: Dense) -> Tensor:
        if is_signed:
            found = stored.load().to(torch.int16) + (1 << (bits - 1))
            if found.min() < 0 or found.max() >= 1 << bits:
                raise arrays.error(f"weight_zero_point has values that {bits} bits do not have")
            return found
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


def _fitting(
    arrays: Arrays, schemes: Sequence[_Scheme], n_in: int, n_groups: int, n_words: int, *, has_zeros: bool
) -> tuple[_Scheme, bool]:
    """The one scheme of the config that these shapes are of, and whether its codes are a bit stream."""
    alike = [s for s in schemes if s.is_symmetric != has_zeros]
    alike = [s for s in alike if (1 if s.group == -1 else -(-n_in // s.group)) == n_groups]
    found = {
        (s.bits, is_dense or 32 % s.bits == 0): s
        for s in alike
        for is_dense, words in ((True, dense_words), (False, whole_words))
        if words(n_in, s.bits) == n_words
    }
    kind = "with" if has_zeros else "without"
    said = f"{n_words} words and {n_groups} groups for {n_in} columns, {kind} zero points,"
    if not found:
        raise arrays.error(f"{said} are none of config.json's schemes: {'; '.join(map(str, schemes))}")
    if len(found) > 1:
        ways = " or ".join(
            f"{bits} bits, {'dense' if dense else 'by words'}" for bits, dense in sorted(found)
        )
        raise arrays.error(f"{said} may be {ways}")
    [((_, is_dense), scheme)] = found.items()
    return scheme, is_dense
