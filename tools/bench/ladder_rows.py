"""The rows of tools/ladder: which Recipe each one is, and which row it is one change away from.

A row is its parent's recipe with some fields changed, so a chain of parents is a cumulative ladder. All recipes here
leave the last pass out (`refine` 0) except the rows that measure it.
Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TypeAlias

from d2qconv.run import Recipe

Value: TypeAlias = str | bool | int | float

#: Of the row `refine`: more fits the calibration better and held-out text worse (tools/LOG.md).
REFINE_STEPS = 100

#: The recipe's settings as a table may change them, and their values in the row `gptq`: GPTQ as published, on the
#: target's own grid. `carrier` is how the mean shift is carried; "" leaves it to the command line.
START: Mapping[str, Value] = MappingProxyType({
    "rounding": "gptq", "refit": False, "rotation": "none", "asymmetry": 0.0, "polish": 0, "order": "natural",
    "dsq": False,
    "norm_scales": False, "value_scales": False, "dac": False, "dac_final": False, "attention_weights": False,
    "refine": 0,
})  # fmt: skip
CARRIER = "carrier"
_FIELDS = {f.name: f.default for f in fields(Recipe)}
BASE = Recipe(**{name: value for name, value in START.items() if name in _FIELDS})


@dataclass(frozen=True)
class Row:
    """One row. parent: the row that it is compared with, "" for none. changes: in words, for the table."""

    name: str
    parent: str
    recipe: Recipe
    changes: str
    carrier: str = ""


#: name → (parent, changed fields). A parent stands above its children. Fields that Recipe does not have leave their
#: row and all that stands on it out.
TABLE: Mapping[str, tuple[str, Mapping[str, Value]]] = MappingProxyType({
    "rtn": ("", {"rounding": "nearest"}),
    "gptq": ("rtn", {"rounding": "gptq"}),
    # The paper's ladder: each row on top of the one above.
    "+rotation": ("gptq", {"rotation": "hadamard"}),
    "+gptaq": ("+rotation", {"asymmetry": 0.25, "asymmetry_form": "gptaq"}),
    "+gar": ("+gptaq", {"order": "gar"}),
    "+dsq": ("+gar", {"dsq": True}),
    "+dac": ("+dsq", {"dac": True}),
    "+dac_final": ("+dac", {"dac_final": True}),
    # Ours: first the two changes that everything below stands on.
    "refit": ("gptq", {"refit": True}),
    "closed": ("refit", {"asymmetry": 0.5, "asymmetry_form": "closed"}),
    # Then each candidate alone.
    "hadamard": ("closed", {"rotation": "hadamard"}),
    "walsh": ("closed", {"rotation": "walsh"}),
    "gptaq": ("closed", {"asymmetry": 0.25, "asymmetry_form": "gptaq"}),
    "rescomp": ("closed", {"asymmetry": 0.25, "asymmetry_form": "rescomp"}),
    "gar": ("closed", {"order": "gar"}),
    "dsq": ("closed", {"dsq": True}),
    "dac": ("closed", {"dac": True}),
    "norm_scales": ("closed", {"norm_scales": True}),
    "value_scales": ("closed", {"value_scales": True}),
    "biases": ("closed", {"dac": True, "carrier": "biases"}),
    "attention_weights": ("closed", {"attention_weights": True}),
    "polish": ("closed", {"polish": 2}),
    "refine": ("closed", {"refine": REFINE_STEPS}),
})  # fmt: skip

#: Names for several rows at once; `minus` and `default` are made from Recipe's own defaults.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "paper": ("rtn", "gptq", "+rotation", "+gptaq", "+gar", "+dsq", "+dac", "+dac_final"),
    "ours": (
        "gptq", "refit", "closed", "hadamard", "walsh", "gptaq", "rescomp", "gar", "dsq", "dac", "norm_scales",
        "value_scales", "biases", "attention_weights", "polish", "refine",
    ),
})  # fmt: skip
#: A part of the default recipe and the fields that hold it.
PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    name: (name, "dac_gate") if name == "dac" else (name,) for name in START if name != "rounding"
})  # fmt: skip


class RowError(ValueError):
    """A row that cannot be made; the message says which and why."""


def all_rows() -> dict[str, Row]:
    """Every named row that this version's Recipe can express, parents first."""
    rows: dict[str, Row] = {}
    for name, (parent, changed) in TABLE.items():
        if all(field in _FIELDS or field == CARRIER for field in changed) and (not parent or parent in rows):
            rows[name] = changed_row(name, rows[parent] if parent else Row("", "", BASE, ""), changed)
    default = Recipe()
    rows["default"] = Row("default", "gptq", default, _difference(BASE, default))
    for part, names in PARTS.items():
        known = [name for name in names if name in _FIELDS]
        off = replace(default, **{name: START.get(name, _FIELDS[name]) for name in known})
        if off != default:
            name = f"default-{part}"
            rows[name] = Row(name, "default", off, _difference(default, off))
    return rows


def changed_row(name: str, parent: Row, changed: Mapping[str, Value]) -> Row:
    """`parent` with some fields changed."""
    recipe = replace(parent.recipe, **{field: value for field, value in changed.items() if field != CARRIER})
    carrier = str(changed.get(CARRIER, parent.carrier))
    words = [_difference(parent.recipe, recipe), f"{CARRIER} {carrier}" if carrier != parent.carrier else ""]
    return Row(name, parent.name, recipe, ", ".join(w for w in words if w), carrier)


def parse_rows(asked: Sequence[str]) -> list[Row]:
    """Rows of `--rows`, in that order, none twice: names, the groups paper, ours, minus and all, and ad-hoc rows.

    An ad-hoc row is `name:field=value,field=value`, one change from `gptq`, or from the row that a first item
    `from=row` names. Raises RowError.
    """
    known = all_rows()
    minus = tuple(name for name in known if name.startswith("default"))
    groups = {name: tuple(row for row in rows if row in known) for name, rows in GROUPS.items()} | {
        "minus": minus
    }
    groups["all"] = (*groups["paper"], *groups["ours"], *minus)
    chosen: dict[str, Row] = {}
    for item in asked:
        if ":" in item:
            row = ad_hoc(item, known)
            known[row.name] = row
            chosen[row.name] = row
            continue
        for name in groups.get(item, (item,)):
            if name not in known:
                raise RowError(f"no row {name!r}; there are {', '.join([*groups, *known])}")
            chosen.setdefault(name, known[name])
    return list(chosen.values())


def ad_hoc(item: str, known: Mapping[str, Row]) -> Row:
    """The row that `name:field=value,…` describes; raises RowError."""
    name, _, rest = item.partition(":")
    if not name or name in known:
        raise RowError(
            f"{item!r}: a row of that name exists already" if name else f"{item!r}: the row has no name"
        )
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    parent, changed = "gptq", {}
    for field, _, text in pairs:
        if field == "from":
            parent = text
        else:
            changed[field] = _value(field, text, item)
    if parent not in known:
        raise RowError(f"{item!r}: no row {parent!r} to start from")
    return changed_row(name, known[parent], changed)


def _value(field: str, text: str, item: str) -> Value:
    """`text` as the type that the Recipe's default of that field has; raises RowError."""
    if field == CARRIER:
        return text
    default = _FIELDS.get(field)
    if default is None:
        raise RowError(f"{item!r}: Recipe has no field {field!r}")
    if isinstance(default, bool):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise RowError(f"{item!r}: {field} is true or false, not {text!r}")
        return words[text.lower()]
    try:
        return type(default)(text)
    except ValueError as error:
        raise RowError(f"{item!r}: {field} is a number, not {text!r}") from error


def _difference(before: Recipe, after: Recipe) -> str:
    """`dsq True, asymmetry 0.25`: the fields of `after` that differ."""
    changed = [
        f"{f.name} {getattr(after, f.name)}"
        for f in fields(Recipe)
        if getattr(before, f.name) != getattr(after, f.name)
    ]
    return ", ".join(changed)
