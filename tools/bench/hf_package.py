"""What a Hugging Face folder with packed linears holds: its weights decoded to floats, its bits and its bytes.

Ours (compressed-tensors) go through the reader that `d2qconv verify` uses. GPTQ's layout, which GPTQModel and
AutoRound write, is decoded here::

    qweight  [words(n_in), n_out]      codes of `bits` bits, one after another from the lowest bit on, in i32
    qzeros   [n_groups, words(n_out)]  zero points likewise; version 1 and `auto_gptq` hold zero - 1
    scales   [n_groups, n_out]         w = scale · (code - zero)

Sources: gptqmodel/nn_modules/qlinear, auto_round_extension/torch.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.dense import Dense
from d2qconv.names import Part, Role, TensorId
from d2qconv_hf.container import Folder, Span, open_folder
from d2qconv_hf.reader import read_model

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

_ITEM = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "U32": 4, "I64": 8}
#: What is added to a stored zero point, by what config.json says of the layout.
_OFFSETS = {"gptq_v2": 0, "auto_round": 0, "gptq": 1, "auto_round:auto_gptq": 1}


@dataclass(frozen=True)
class Facts:
    """One package.

    bits, group: of most weights of the quantized linears. linear_bytes: all their arrays, scales, zero points and
    indices included. total_bytes: all safetensors. ends: types of embedding and head, for people.
    """

    bits: int
    group: int
    linear_bytes: int
    linear_weights: int
    total_bytes: int
    ends: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.linear_bytes / self.linear_weights


@dataclass(frozen=True)
class Package:
    """The model with every weight decoded, f32, in memory."""

    desc: ModelDesc
    facts: Facts


def unpack(words: npt.NDArray[np.uint32], n: int, bits: int) -> I64:
    """u32[rows, n_words] → i64[rows, n]: value k lies in bits k·bits … of its row, lowest first."""
    at = np.arange(n) * bits
    low, shift = at // 32, (at % 32).astype(np.uint64)
    wide = np.pad(words, ((0, 0), (0, 1))).astype(np.uint64)
    pair = wide[:, low] | (wide[:, low + 1] << np.uint64(32))
    return ((pair >> shift) & np.uint64((1 << bits) - 1)).astype(np.int64)


def decode(arrays: Mapping[str, Span], module: str, bits: int, offset: int) -> F32:
    """f32[n_out, n_in] of one linear in GPTQ's layout. Raises ValueError if its columns are in another order."""
    scales = arrays[f"{module}.scales"].floats().T
    n_out, n_groups = scales.shape
    packed = arrays[f"{module}.qweight"].raw().view(np.uint32)
    n_in = packed.shape[0] * 32 // bits
    if f"{module}.g_idx" in arrays:
        index = arrays[f"{module}.g_idx"].raw()
        if not np.array_equal(index, np.arange(n_in) // (n_in // n_groups)):
            raise ValueError(f"{module}: groups are not runs of columns (desc_act), which is not read here")
    codes = unpack(packed.T, n_in, bits).reshape(n_out, n_groups, n_in // n_groups)
    zeros = unpack(arrays[f"{module}.qzeros"].raw().view(np.uint32), n_out, bits).T + offset
    values = (codes - zeros[:, :, None]).astype(np.float32) * scales[:, :, None]
    return np.ascontiguousarray(values.reshape(n_out, n_in))


def read(path: Path, source: ModelDesc) -> Package:
    """A package of the model `source`. Raises D2qError, ValueError and KeyError for one that cannot be read."""
    folder = open_folder(path)
    given = folder.config.get("quantization_config")
    if not isinstance(given, dict):
        raise ValueError(f"{path}: its config.json has no quantization_config")
    if given.get("quant_method") == "compressed-tensors":
        model = read_model(folder, source.arch.id)
        kinds: Counter[tuple[int, int]] = Counter()
        for matrix in model.matrices.values():
            kinds[matrix.scheme.bits, matrix.scheme.group] += math.prod(matrix.shape)
        held = {tensor: Dense.of(dense.load().float()) for tensor, dense in model.desc.tensors.items()}
        modules = {matrix.module for matrix in model.matrices.values()}
    else:
        held, modules, kinds = _gptq(folder, source, given)
    desc = replace(source, tensors=held)
    return Package(desc, _facts(folder, source, modules, kinds))


def _gptq(
    folder: Folder, source: ModelDesc, given: Mapping[str, Any]
) -> tuple[dict[TensorId, Dense], set[str], Counter[tuple[int, int]]]:
    """All tensors, the modules that are packed, and weights by (bits, group)."""
    layout = str(given.get("packing_format") or given.get("checkpoint_format"))
    if layout not in _OFFSETS:
        raise ValueError(f"{folder.path}: packed as {layout!r}, not one of {', '.join(_OFFSETS)}")
    own = given.get("extra_config") or {}
    held: dict[TensorId, Dense] = {}
    modules: set[str] = set()
    kinds: Counter[tuple[int, int]] = Counter()
    for tensor in source.tensors:
        module = _module(source, tensor.role).format(i=tensor.block)
        if tensor.part is Part.WEIGHT and f"{module}.qweight" in folder.spans:
            scheme = {**given, **own.get(module, {})}
            values = decode(folder.spans, module, scheme["bits"], _OFFSETS[layout])
            modules.add(module)
            kinds[scheme["bits"], scheme["group_size"]] += values.size
        else:
            values = folder.span(f"{module}.{tensor.part}").floats()
        if values.shape != source.tensors[tensor].shape:
            raise ValueError(f"{folder.path}: {module} has shape {values.shape}")
        held[tensor] = Dense.of(torch.from_numpy(values))
    return held, modules, kinds


def _facts(folder: Folder, source: ModelDesc, modules: set[str], kinds: Counter[tuple[int, int]]) -> Facts:
    if not modules:
        raise ValueError(f"{folder.path}: no linear is packed")
    (bits, group), _ = kinds.most_common(1)[0]
    stored = sum(
        _ITEM[span.kind] * math.prod(span.shape)
        for name, span in folder.spans.items()
        if name.rpartition(".")[0] in modules
    )
    names = [f"{_module(source, role)}.weight" for role in (Role.EMBED, Role.HEAD)]
    ends = [folder.spans[name].kind.lower() for name in names if name in folder.spans]
    total = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    said = " / ".join(ends) if len(ends) > 1 else f"{ends[0]}, shared"
    return Facts(bits, group, stored, kinds.total(), total, said)


def _module(source: ModelDesc, role: Role) -> str:
    site = source.arch.site(role)
    assert site is not None, "a model's tensors are its architecture's"
    return site.module
