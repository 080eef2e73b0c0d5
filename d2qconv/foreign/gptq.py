"""GPTQ's arrays, versions 1 and 2, which AutoRound's own layout shares, and AutoAWQ's.

Per linear (n_out, n_in, n_groups; AutoGPTQ and GPTQModel, `QuantLinear`):

- `qweight` i32[n_in · bits / 32, n_out]: codes as a bit stream down the columns;
- `qzeros` i32[n_groups, n_out · bits / 32]: zero points along the rows. Version 1 stores zero - 1, version 2 the zero;
- `scales` [n_groups, n_out]; `g_idx` i32[n_in], the group of every column, optional.

AutoAWQ ("gemm"): `qweight` i32[n_in, n_out / 8] and `qzeros` i32[n_groups, n_out / 8], 4 bits, the codes of 8
neighbouring rows in a word in the order 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ, `WQLinear_GEMM`).

How many bits there are follows from the shapes; config.json must not say something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import Refusal, refuse
from d2qconv.foreign.arrays import Arrays, check_bits, one_of
from d2qconv.foreign.linear import ForeignLinear
from d2qconv.foreign.words import unpack_dense, unpack_whole

SUFFIX = ".qweight"
#: `checkpoint_format` → what is added to a stored zero point.
VERSIONS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 0}
#: AutoRound's `packing_format` → the same.
PACKINGS: Mapping[str, int] = {
    "auto_round": 0,
    "auto_round:gptqmodel": 0,
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
}
AWQ_PACKING = "auto_round:auto_awq"
#: Place of each of 8 neighbouring codes in an AWQ word.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def read_gptq(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[ForeignLinear]:
    """The linears of `quant_method: gptq`; raises InputError and PlanError."""
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    one_of("checkpoint_format", version, VERSIONS)
    if config.get("is_marlin_format"):
        one_of("checkpoint_format", "marlin", VERSIONS)
    needs_index = config.get("desc_act") is True
    is_mixed = _has_own(config.get("dynamic"))
    for module in _modules(checkpoint):
        yield _gptq(checkpoint, module, config, VERSIONS[version], needs_index=needs_index, is_mixed=is_mixed)


def read_auto_round(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[ForeignLinear]:
    """The linears of `quant_method: auto-round`; raises InputError and PlanError."""
    packing = config.get("packing_format", "auto_round")
    one_of("packing_format", packing, (*PACKINGS, AWQ_PACKING))
    if config.get("data_type", "int") != "int" or config.get("act_bits", 16) not in (None, 16, 32):
        one_of(
            "data_type",
            f"{config.get('data_type')} with activations of {config.get('act_bits')} bits",
            ("int",),
        )
    extra = config.get("extra_config")
    for module in _modules(checkpoint):
        own = extra.get(module) if isinstance(extra, Mapping) else None
        said = {**config, **own} if isinstance(own, Mapping) else config
        if packing == AWQ_PACKING:
            yield _awq(checkpoint, module, said)
        else:
            yield _gptq(checkpoint, module, said, PACKINGS[packing], needs_index=False, is_mixed=False)


def read_awq(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[ForeignLinear]:
    """The linears of `quant_method: awq`; raises InputError and PlanError."""
    version = config.get("version", "gemm")
    one_of("version", version.lower() if isinstance(version, str) else version, ("gemm",))
    for module in _modules(checkpoint):
        yield _awq(checkpoint, module, config)


def _modules(checkpoint: Checkpoint) -> list[str]:
    return [name.removesuffix(SUFFIX) for name in checkpoint.tensors if name.endswith(SUFFIX)]


def _gptq(
    checkpoint: Checkpoint,
    module: str,
    config: Mapping[str, Any],
    shift: int,
    *,
    needs_index: bool,
    is_mixed: bool,
) -> ForeignLinear:
    """One linear. shift: added to stored zero points."""
    arrays = Arrays(checkpoint, module)
    codes, zeros, scales = arrays.words("qweight"), arrays.words("qzeros"), arrays.scales("scales")
    n_groups, n_out = scales.shape
    bits = arrays.whole(zeros.shape[1] * 32, n_out, "qzeros", "scales")
    n_in = arrays.whole(codes.shape[0] * 32, bits, "qweight", "qzeros")
    arrays.expect("qweight", codes.shape[1], n_out)
    arrays.expect("qzeros", zeros.shape[0], n_groups)
    index = arrays.index("g_idx", n_in, n_groups)
    if index is None and needs_index:
        raise arrays.error(
            "config.json says desc_act, and there is no g_idx that says which column is in which group"
        )
    _check_config(arrays, config, bits, n_in, n_groups, is_mixed=is_mixed)
    if index is None:
        arrays.whole_groups(n_in, n_groups, "g_idx")
    is_symmetric = config.get("sym") is True and not is_mixed

    def read_zeros() -> Tensor:
        stored = unpack_dense(zeros.load(), bits, n_out)
        if shift and not is_symmetric and bool((stored == (1 << bits) - 1).any()):
            refuse([_ambiguous(module, bits, stored)])
        found = stored.T.to(torch.int16) + shift
        _check_symmetric(arrays, found, bits, is_symmetric=is_symmetric)
        return found

    return ForeignLinear(
        module=module,
        shape=(n_out, n_in),
        bits=bits,
        n_groups=n_groups,
        arrays=arrays.names(("qweight", "qzeros", "scales", "g_idx")),
        codes=lambda: unpack_dense(codes.load().T, bits, n_in),
        steps=lambda: _turned(scales.load()),
        zeros=read_zeros,
        index=index,
    )


def _awq(checkpoint: Checkpoint, module: str, config: Mapping[str, Any]) -> ForeignLinear:
    arrays = Arrays(checkpoint, module)
    codes, zeros, scales = arrays.words("qweight"), arrays.words("qzeros"), arrays.scales("scales")
    n_groups, n_out = scales.shape
    n_in = codes.shape[0]
    bits = arrays.whole(codes.shape[1] * 32, n_out, "qweight", "scales")
    arrays.expect("qzeros", zeros.shape[1], codes.shape[1])
    arrays.expect("qzeros", zeros.shape[0], n_groups)
    if bits != 4:
        raise arrays.error(f"has {bits} bits, and AWQ's words hold 8 codes of 4")
    _check_config(arrays, config, bits, n_in, n_groups, is_mixed=False)
    arrays.whole_groups(n_in, n_groups, "index")
    return ForeignLinear(
        module=module,
        shape=(n_out, n_in),
        bits=bits,
        n_groups=n_groups,
        arrays=arrays.names(("qweight", "qzeros", "scales")),
        codes=lambda: _turned(_awq_codes(codes.load())),
        steps=lambda: _turned(scales.load()),
        zeros=lambda: _awq_codes(zeros.load()).T.to(torch.int16),
    )


def _turned(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


def _awq_codes(words: Tensor) -> Tensor:
    """u8[rows, n_out] of i32[rows, n_out / 8]."""
    stored = unpack_whole(words, 4, 8 * words.shape[1]).view(len(words), -1, 8)
    return stored[:, :, list(_AWQ_PLACES)].reshape(len(words), -1)


def _check_config(
    arrays: Arrays, config: Mapping[str, Any], bits: int, n_in: int, n_groups: int, *, is_mixed: bool
) -> None:
    """What config.json says of a linear must be what its shapes say. is_mixed: it may say so in patterns not read."""
    check_bits(arrays, bits)
    if is_mixed:
        return
    said_bits = config.get("bits", config.get("w_bit"))
    if said_bits is not None and said_bits != bits:
        raise arrays.error(f"config.json says {said_bits!r:.20} bits, its shapes say {bits}")
    said = config.get("group_size", config.get("q_group_size"))
    if said is not None:
        arrays.check_group(said, n_in, n_groups)


def _check_symmetric(arrays: Arrays, zeros: Tensor, bits: int, *, is_symmetric: bool) -> None:
    """A symmetric checkpoint has the middle code everywhere; one off by one is of the other version."""
    middle = 1 << (bits - 1)
    if not is_symmetric or bool((zeros == middle).all()):
        return
    found = sorted(set(zeros.flatten().tolist()))
    other = (
        "; it seems to be of the other version (gptq, gptq_v2)"
        if found in ([middle - 1], [middle + 1])
        else ""
    )
    raise arrays.error(f"config.json says sym, and zero points are {found[:5]}, not {middle}{other}")


def _ambiguous(module: str, bits: int, stored: Tensor) -> Refusal:
    top = (1 << bits) - 1
    n = int((stored == top).sum())
    return Refusal(
        module,
        f"{n} zero points are stored as {top}, which in version 1 may mean 0 or {top + 1}: readers disagree",
        "save the checkpoint as gptq_v2 with the tool that made it",
    )


def _has_own(dynamic: object) -> bool:
    """Whether patterns give linears bits of their own. They are not run: patterns of strangers can take for ever."""
    return isinstance(dynamic, Mapping) and any(str(pattern).startswith("+:") for pattern in dynamic)
