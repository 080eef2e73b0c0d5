from __future__ import annotations

from dataclasses import replace

import pytest
from gguf_models import DIMS, make_desc

from d2qconv.errors import Refusal
from d2qconv.exporters.overrides import Override
from d2qconv.names import Part, Role, TensorId
from d2qconv_gguf import GgufOptions
from d2qconv_gguf import types as known
from d2qconv_gguf.exporter import GgufExporter
from d2qconv_gguf.type_map import RULES

FOUR = replace(DIMS, n_layers=4)


def plan(*, desc=None, **options):
    return GgufExporter(GgufOptions(**options)).plan(
        desc or make_desc("llama", dims=FOUR, is_tied=False), None
    )


def types(**options):
    return {str(t.id).removesuffix(".weight"): t.type_name for t in plan(**options).tensors}


@pytest.mark.parametrize(
    ("text", "role", "blocks", "kind"),
    [
        ("v=q4_k", Role.V, (), "q4_k"),
        ("down@3=q8_0", Role.DOWN, ((3, 3),), "q8_0"),
        ("down@0-3,7=f16", Role.DOWN, ((0, 3), (7, 7)), "f16"),
        ("embed=q4_0", Role.EMBED, (), "q4_0"),
    ],
)
def test_rules_are_read(text, role, blocks, kind):
    assert RULES.parse(text) == Override(text, role, blocks, kind)


def test_a_rule_is_about_weights_of_its_blocks():
    rule = RULES.parse("down@0-1,3=q4_k")
    held = [i for i in range(5) if rule.holds(TensorId(Role.DOWN, i))]
    assert held == [0, 1, 3]
    assert not rule.holds(TensorId(Role.UP, 0))
    assert not rule.holds(TensorId(Role.DOWN, 0, Part.BIAS))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("down", "not a rule"),
        ("down@=q4_k", "not a rule"),
        ("down@-1=q4_k", "not a rule"),
        ("ffn=q4_k", "no matrix is called 'ffn'"),
        ("ffn_norm=q4_k", "no matrix is called 'ffn_norm'"),
        ("down=q9_k", "'q9_k' is not a storage type"),
        ("down@3-1=q4_k", "before its first"),
        ("down@2-4=q4_k", "blocks 0 to 3"),
        ("embed@0=q4_k", "in no block"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(text, why):
    refusals = plan(tensor_type=(text,)).refusals
    assert [r.where for r in refusals] == [f"option tensor-type {text}"]
    assert why in refusals[0].why


def test_a_tied_head_is_its_embedding():
    refusals = plan(desc=make_desc("llama"), tensor_type=("head=q4_k",)).refusals
    assert "embed=q4_k" in refusals[0].todo


def test_later_rules_win_and_all_win_over_everything_else():
    found = types(
        mix="Q3_K_S", embedding="q4_0", head="q4_0",
        tensor_type=("down=q8_0", "down@1-2=q4_k", "down@2=f16", "embed=q2_k"),
    )  # fmt: skip
    assert [found[f"blk.{i}.down"] for i in range(4)] == ["q8_0", "q4_k", "f16", "q8_0"]
    assert (found["embed"], found["head"], found["blk.0.q"]) == ("q2_k", "q4_0", "q3_k")


def test_a_mix_has_ends_of_its_own():
    """The widths fit all its types but the head's, which is not there yet in every version."""
    found = types(mix="q3_k_s", head="q8_0")
    assert (found["embed"], found["head"]) == ("q3_k", "q8_0")
    assert types()["embed"] == types()["head"] == "q8_0"


def test_a_mix_with_an_absent_type_is_refused_unless_nothing_needs_it(monkeypatch):
    real = known.storage
    monkeypatch.setattr(known, "storage", lambda name: None if name in ("q5_k", "q6_k") else real(name))
    refusals = plan(mix="Q3_K_M").refusals
    assert [r.where for r in refusals] == ["option mix"]
    assert "matrices in q5_k, q6_k" in refusals[0].why
    kept = ("v=q4_k", "head=q8_0")
    assert plan(mix="Q3_K_M", tensor_type=kept).refusals == ()


def test_what_contradicts_is_refused():
    assert "chooses the types" in plan(mix="Q3_K_S", type="q2_k", head="q8_0").refusals[0].why
    assert "'Q9' is not a mix" in plan(mix="Q9").refusals[0].why
    assert "--mix Q2_K" in plan(type="Q2_K").refusals[0].todo
    assert isinstance(RULES.parse(""), Refusal)
