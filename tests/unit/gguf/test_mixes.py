from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest

from d2qconv.names import Role
from d2qconv_gguf.mixes import MIXES, Model, Where

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "mixes.json").read_text())["models"]
ROLES = (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN)


def runs(types):
    return " ".join(f"{kind}*{len([*run])}" for kind, run in groupby(types))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g['arch']}-{g['n_layers']}-{g['n_heads']}")
@pytest.mark.parametrize("name", MIXES)
def test_types_are_those_of_llama_quantize(golden, name):
    """`tools/golden_mixes` asked a stock llama.cpp."""
    n, is_tied = golden["n_layers"], golden["is_tied"]
    model = Model(golden["arch"], n, golden["n_heads"], golden["n_kv_heads"])
    mix = MIXES[name]
    found = {
        str(role): runs(mix.type_of(role, i, model, is_tied=is_tied) for i in range(n)) for role in ROLES
    }
    for role in (Role.EMBED,) if is_tied else (Role.EMBED, Role.HEAD):
        found[str(role)] = mix.type_of(role, None, model, is_tied=is_tied) + "*1"
    assert found == golden["mixes"][name]


def test_the_golden_models_tell_every_rule_apart():
    """Each place that a rule may be about is in some model true of one block and false of another."""
    for where in Where:
        if where is not Where.ALL:
            assert any(
                {True, False} == {where.holds(i, g["n_layers"]) for i in range(g["n_layers"])} for g in GOLDEN
            )
    models = [Model(g["arch"], g["n_layers"], g["n_heads"], g["n_kv_heads"]) for g in GOLDEN]
    assert {m.is_shared for m in models} == {m.is_70b for m in models} == {True, False}
