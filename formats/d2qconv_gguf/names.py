"""What GGUF calls each tensor, and which llama.cpp architecture each of ours is written as. All of it is data.

Sources: gguf-py's `TensorNameMap` for the names; llama.cpp's `src/models/{llama,qwen2,qwen3}.cpp` for the tensors that
a loader creates (any other tensor in the file is a load error) and `create_tensor_qkv` for the q, k and v biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.arch.spec import Dims
from d2qconv.errors import Refusal
from d2qconv.exporters.base import Carrier
from d2qconv.names import Part, Role, TensorId

#: role -> module name in a GGUF; `blk.{i}.` goes before those that lie in a block
MODULES: Mapping[Role, str] = {
    Role.EMBED: "token_embd",
    Role.ATTN_NORM: "attn_norm",
    Role.Q: "attn_q",
    Role.K: "attn_k",
    Role.V: "attn_v",
    Role.Q_NORM: "attn_q_norm",
    Role.K_NORM: "attn_k_norm",
    Role.O: "attn_output",
    Role.FFN_NORM: "ffn_norm",
    Role.GATE: "ffn_gate",
    Role.UP: "ffn_up",
    Role.DOWN: "ffn_down",
    Role.FINAL_NORM: "output_norm",
    Role.HEAD: "output",
}
_ROLES = {module: role for role, module in MODULES.items()}

#: Llama 3's RoPE factors per frequency; made from the config, no weight of the checkpoint
ROPE_FREQS = "rope_freqs.weight"

_GLOBAL = frozenset({Role.EMBED, Role.FINAL_NORM, Role.HEAD})


@dataclass(frozen=True)
class Layout:
    """One llama.cpp architecture, as far as our models use it.

    name: `general.architecture`. arch: our architecture that reads such a file. biases: sites whose bias the loader
    accepts and the graph applies. permuted: sites whose rows (and bias) are stored in adjacent-pair RoPE order.
    roles: the sites that the loader creates. is_square: the loader wants q's outputs as wide as the residual stream.
    """

    name: str
    arch: str
    biases: frozenset[Role]
    permuted: frozenset[Role]
    roles: frozenset[Role]
    is_square: bool = False


_DECODER = frozenset(MODULES) - {Role.Q_NORM, Role.K_NORM}
_QKV = frozenset({Role.Q, Role.K, Role.V})

#: llama.cpp:57,75-77 and create_tensor_qkv
LLAMA = Layout(
    "llama",
    "llama",
    _QKV | {Role.O, Role.GATE, Role.UP, Role.DOWN},
    frozenset({Role.Q, Role.K}),
    _DECODER,
)
#: qwen2.cpp makes attn_q and attn_output of n_embd × n_embd, whatever key_length and the number of heads say
QWEN2 = Layout("qwen2", "qwen2", _QKV, frozenset(), _DECODER, is_square=True)
QWEN3 = Layout("qwen3", "qwen3", _QKV, frozenset(), frozenset(MODULES))
LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (LLAMA, QWEN2, QWEN3)}

#: our architecture -> how each way to carry the mean shift is written, the best way first.
#: qwen2's own loader takes no FFN bias; the llama graph computes the same function once q and k are permuted.
WAYS: Mapping[str, Mapping[Carrier, Layout]] = {
    "llama": {Carrier.BIAS: LLAMA, Carrier.RANK1: LLAMA, Carrier.BIASES: LLAMA, Carrier.NONE: LLAMA},
    "mistral": {Carrier.BIAS: LLAMA, Carrier.RANK1: LLAMA, Carrier.BIASES: LLAMA, Carrier.NONE: LLAMA},
    "qwen2": {Carrier.BIAS: LLAMA, Carrier.RANK1: QWEN2, Carrier.BIASES: LLAMA, Carrier.NONE: QWEN2},
    "qwen3": {Carrier.RANK1: QWEN3, Carrier.BIASES: QWEN3, Carrier.NONE: QWEN3},
}


def loadable(layout: Layout, dims: Dims) -> Layout:
    """That layout, or llama's where its loader does not take the width of q: in padded models, for one."""
    return LLAMA if layout.is_square and dims.n_heads * dims.head != dims.hidden else layout


#: why a carrier is missing in WAYS
NO_CARRIER: Mapping[str, str] = {
    "qwen3": "llama.cpp's qwen3 loader takes no FFN bias, and none of its layouts has q/k norms and FFN biases both",
}

#: what it costs to be written as another architecture than one's own
RELABEL_NOTE = (
    "relabelled as llama, which llama.cpp computes identically; readers that map GGUF to Hugging Face classes by "
    "general.architecture (transformers, vLLM) will not understand the file"
)


def gguf_name(tensor: TensorId) -> str:
    """`blk.3.down.weight` → `blk.3.ffn_down.weight`."""
    prefix = "" if tensor.block is None else f"blk.{tensor.block}."
    return f"{prefix}{MODULES[tensor.role]}.{tensor.part}"


def tensor_id(name: str) -> TensorId:
    """Inverse of `gguf_name`; raises ValueError for any other name."""
    fields = name.split(".")
    block: int | None = None
    if len(fields) == 4 and fields[0] == "blk" and fields[1].isascii() and fields[1].isdigit():
        block, fields = int(fields[1]), fields[2:]
    if len(fields) == 2 and fields[0] in _ROLES and fields[1] in tuple(Part):
        found = TensorId(_ROLES[fields[0]], block, Part(fields[1]))
        if (found.role in _GLOBAL) == (block is None):
            return found
    raise ValueError(f"not a tensor of a GGUF decoder that we know: {name!r}")


def row_order(tensor: TensorId, layout: Layout, dims: Dims) -> Tensor | None:
    """Rows of the checkpoint in the order of the file, i64[n_out], or None where they are the same.

    Hugging Face's RoPE turns rows j and j + head/2 of a head together; llama.cpp's `llama` graph turns 2j and 2j + 1.
    So row 2j + s of the file is row s·head/2 + j of the checkpoint, head by head (`LlamaModel.permute` in
    llama.cpp's converter: reshape (heads, 2, head/2, …), swap axes 1 and 2). It holds for biases as for weights.
    """
    if tensor.role not in layout.permuted:
        return None
    n_heads = dims.n_heads if tensor.role is Role.Q else dims.n_kv_heads
    rows = torch.arange(n_heads * dims.head)
    return rows.reshape(n_heads, 2, dims.head // 2).swapaxes(1, 2).reshape(-1)


def checkpoint_order(tensor: TensorId, layout: Layout, dims: Dims) -> Tensor | None:
    """Inverse of `row_order`: rows of the file in the order of the checkpoint."""
    order = row_order(tensor, layout, dims)
    return None if order is None else torch.argsort(order)


def layout_refusals(layout: Layout, tensors: Mapping[TensorId, object], dims: Dims) -> list[Refusal]:
    """Why these tensors cannot stand in a file of that layout."""
    found = []
    for tensor in tensors:
        if tensor.role not in layout.roles:
            why = f"llama.cpp's {layout.name} loader has no {MODULES[tensor.role]}"
            found.append(Refusal(str(tensor), why))
        elif tensor.part is Part.BIAS and tensor.role not in layout.biases:
            why = f"llama.cpp's {layout.name} loader takes no {MODULES[tensor.role]}.bias"
            found.append(
                Refusal(str(tensor), why, "no layout of GGUF holds this model; nothing can be done here")
            )
    if layout.permuted and dims.head % 2:
        found.append(Refusal("head_dim", f"RoPE pairs rows, and {dims.head} is odd"))
    return found
