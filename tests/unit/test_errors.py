"""The exception tree and its exit codes."""

from __future__ import annotations

import pytest

from d2qconv import errors
from d2qconv.errors import D2qError, PlanError, Refusal, refuse

KINDS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, D2qError)]


def test_exit_codes_are_2_to_7_one_for_each_kind():
    assert sorted(e.exit_code for e in KINDS if e is not D2qError) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_in_the_docstring_is_the_tree(kind):
    line = next(s for s in (errors.__doc__ or "").splitlines() if f" {kind.__name__} " in f" {s}")
    assert f"exit {kind.exit_code} " in line


@pytest.mark.parametrize(
    ("where", "todo", "text"),
    [
        ("", "", "it broke"),
        ("blk.0", "", "blk.0: it broke"),
        ("", "mend it", "it broke\n  → mend it"),
        ("blk.0", "mend it", "blk.0: it broke\n  → mend it"),
    ],
)
def test_message_is_where_what_todo(where, todo, text):
    assert str(PlanError("it broke", where=where, todo=todo)) == text


def test_refuse_lists_every_refusal():
    with pytest.raises(PlanError) as caught:
        refuse(iter([Refusal("a", "too wide"), Refusal("b", "too long", "cut it")]))
    assert str(caught.value) == "this cannot be done:\n- a: too wide\n- b: too long\n  → cut it"


def test_nothing_to_refuse():
    refuse([])
