"""`convert` with several types in one block: walk, last pass and file agree on every one of them."""

from dataclasses import replace

import pytest
from test_convert_recipes import RECIPE, job, kl_of_the_file, run, small, text  # noqa: F401

from d2qconv.errors import PlanError
from d2qconv.pipeline import plan
from d2qconv_gguf import GgufOptions
from d2qconv_gguf.container import read

#: q, k, v, gate and up read two inputs and are on five grids between them; one matrix is float.
MIXED = ("q=q8_0", "v@0=f16", "k@1=q8_0", "up=q8_0", "down@1=q8_0", "embed=f16")


def mixed(*arguments, recipe=RECIPE, **changes):
    options = GgufOptions(type="q4_0", tensor_type=MIXED)
    return replace(job(*arguments, **changes), options=options, recipe=recipe)


@pytest.mark.parametrize("scope", ["none", "model", "block"])
def test_every_matrix_is_stored_as_planned_and_the_file_is_what_was_measured(small, text, tmp_path, scope):  # noqa: F811
    out = tmp_path / "m.gguf"
    refined = {} if scope == "none" else {"refine": 3, "refine_scope": scope}
    recipe = replace(RECIPE, order="gar", **refined)
    planned, outcome = run(mixed(small, out, text, recipe=recipe))
    assert planned.last_pass.scope == scope
    stored = {name: tensor.type.name.lower() for name, tensor in read(out).tensors.items()}
    assert {t.stored_as: t.type_name for t in planned.target.tensors} == stored
    assert (stored["blk.0.attn_v.weight"], stored["blk.1.attn_v.weight"]) == ("f16", "q4_0")
    assert (stored["blk.0.attn_k.weight"], stored["blk.1.attn_k.weight"]) == ("q4_0", "q8_0")
    assert outcome.kld == pytest.approx(kl_of_the_file(planned, out), rel=1e-3)


def test_scales_in_a_gain_want_one_type_for_its_readers(small, text, tmp_path):  # noqa: F811
    asked = mixed(small, tmp_path / "m.gguf", text, recipe=replace(RECIPE, norm_scales=True))
    with pytest.raises(PlanError, match="q, k, v are stored in different types in block 0, 1") as caught:
        plan(asked)
    assert "gate, up are stored in different types in block 0, 1" in str(caught.value)
