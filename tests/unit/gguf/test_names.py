from __future__ import annotations

import gguf
import pytest
import torch
from gguf_models import DIMS, make_desc
from hypothesis import given
from hypothesis import strategies as st

from d2qconv.arch.spec import Dims
from d2qconv.names import Part, Role, TensorId
from d2qconv_gguf.names import (
    LAYOUTS,
    LLAMA,
    MODULES,
    QWEN2,
    QWEN3,
    WAYS,
    checkpoint_order,
    gguf_name,
    layout_refusals,
    row_order,
    tensor_id,
)

GLOBAL = (Role.EMBED, Role.FINAL_NORM, Role.HEAD)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_names_are_those_of_gguf_py(layout):
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.name)
    known = {gguf.TENSOR_NAMES[t].format(bid=3) for t in gguf.MODEL_TENSORS[arch]}
    for role in layout.roles:
        tensor = TensorId(role, None if role in GLOBAL else 3)
        assert gguf_name(tensor).removesuffix(".weight") in known


@given(st.sampled_from(list(MODULES)), st.integers(0, 200), st.sampled_from(list(Part)))
def test_names_read_back(role, block, part):
    tensor = TensorId(role, None if role in GLOBAL else block, part)
    assert tensor_id(gguf_name(tensor)) == tensor


@pytest.mark.parametrize(
    "name",
    [
        "",
        "token_embd",
        "attn_q.weight",
        "blk.0.token_embd.weight",
        "blk.x.attn_q.weight",
        "blk.0.attn_qkv.weight",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="not a tensor"):
        tensor_id(name)


def test_adjacent_pairs_of_a_file_are_half_split_pairs_of_a_checkpoint():
    dims = Dims(vocab=8, hidden=8, ffn=8, n_layers=1, n_heads=2, n_kv_heads=1, head=6)
    order = row_order(TensorId(Role.Q, 0), LLAMA, dims)
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert row_order(TensorId(Role.K, 0, Part.BIAS), LLAMA, dims).tolist() == [0, 3, 1, 4, 2, 5]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 16), st.sampled_from([Role.Q, Role.K]))
def test_orders_are_inverse(kv, ratio, half, role):
    dims = Dims(8, 8, 8, 1, kv * ratio, kv, 2 * half)
    tensor = TensorId(role, 0)
    there, back = row_order(tensor, LLAMA, dims), checkpoint_order(tensor, LLAMA, dims)
    assert torch.equal(there[back], torch.arange(len(there)))


def test_only_q_and_k_of_llama_are_permuted():
    for role in MODULES:
        for layout in (LLAMA, QWEN2, QWEN3):
            is_moved = row_order(TensorId(role, 0), layout, DIMS) is not None
            assert is_moved == (layout is LLAMA and role in (Role.Q, Role.K))


def test_each_layout_refuses_what_its_loader_does_not_create():
    qwen3 = make_desc("qwen3")
    assert any("attn_q_norm" in r.why for r in layout_refusals(LLAMA, qwen3.tensors, DIMS))
    biased = make_desc("llama", biases=(Role.GATE, Role.O))
    assert layout_refusals(LLAMA, biased.tensors, DIMS) == []
    refused = layout_refusals(QWEN2, biased.tensors, DIMS)
    assert len(refused) == 2 * DIMS.n_layers
    assert {r.where.split(".")[2] for r in refused} == {"gate", "o"}


def test_every_architecture_can_be_written_without_a_shift():
    assert all(ways for ways in WAYS.values())
    assert all(layout.name in LAYOUTS for ways in WAYS.values() for layout in ways.values())
