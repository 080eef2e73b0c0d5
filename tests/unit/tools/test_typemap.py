"""tools/bench/typemap.py: what a file is made of, against type maps written out by hand."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools" / "bench"))

from llama import TensorInfo
from typemap import TypeMap, type_map


def tensor(name, type_name, *shape):
    return TensorInfo(name, 0, type_name, shape, 0)


MIXED = (
    tensor("token_embd.weight", "q6_K", 256, 100),
    tensor("blk.0.attn_norm.weight", "f32", 256),
    tensor("blk.0.attn_v.weight", "q4_K", 256, 256),
    tensor("blk.0.attn_k.weight", "q4_K", 256, 256),
    tensor("blk.0.ffn_up.weight", "q2_K", 256, 768),
    tensor("blk.0.rope_table", "f16", 256, 9999),
)
KNOWN = {t.name: t for t in MIXED if t.name != "blk.0.rope_table"}


def mixed():
    return type_map({t.name: t for t in MIXED}, KNOWN)


def test_holds_the_matrices_that_the_source_has_too():
    assert mixed().types == {
        "token_embd.weight": "q6_k",
        "blk.0.attn_v.weight": "q4_k",
        "blk.0.attn_k.weight": "q4_k",
        "blk.0.ffn_up.weight": "q2_k",
    }


def test_majority_counts_weights_inside_the_blocks_and_not_tensors():
    assert mixed().majority() == "q2_k"
    assert TypeMap({"token_embd.weight": "q8_0"}, {"token_embd.weight": 5}).majority() == ""


def test_overrides_are_the_matrices_of_another_type():
    assert mixed().overrides("q2_k") == {"blk.0.attn_v.weight": "q4_k", "blk.0.attn_k.weight": "q4_k"}
    assert set(mixed().overrides("q4_k")) == {"blk.0.ffn_up.weight"}


def test_the_note_says_what_differs_inside_and_outside_the_blocks():
    assert mixed().note("q2_k", "q8_0") == "2 of its matrices are q4_k; token_embd.weight is q6_k"
    assert mixed().note("q4_k", "q6_k") == "1 of its matrices are q2_k"
    pure = TypeMap({"blk.0.ffn_up.weight": "q2_k"}, {"blk.0.ffn_up.weight": 1})
    assert pure.note("q2_k", "q8_0") == ""
