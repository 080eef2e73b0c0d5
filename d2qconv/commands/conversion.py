"""The options of a conversion, and how an exporter's own become some of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter

from d2qconv.exporters.info import ExporterInfo
from d2qconv.options import Calibration, Machine, Method, Output, Settings
from d2qconv.report_options import Report

Options = Annotated[Settings, Parameter(name="*")]
DEFAULTS = Settings()


def exporter_options(info: ExporterInfo) -> type:
    """The exporter's options dataclass, as the framework wants it.

    An option's help is its paragraph `name: text` in the class docstring, unless the field says it in its own way
    (metadata "help", or a string below the field). A field that has the name of a common option is called
    `--EXPORTER-FIELD`.
    """
    common = common_options()
    fields = dataclasses.fields(info.options)
    hints = get_type_hints(info.options, include_extras=True)
    texts = _field_texts(info.options.__doc__ or "", [f.name for f in fields])
    made: list[tuple[str, Any, Any]] = []
    for field in fields:
        hint = hints[field.name]
        if field.name in common:
            hint = Annotated[hint, Parameter(name=f"--{info.name}-{field.name.replace('_', '-')}")]
        if field.name in texts:
            hint = Annotated[hint, Parameter(help=texts[field.name])]
        if field.default == ():
            # Given again and again instead; an option for none of it says nothing that leaving it out does not.
            hint = Annotated[hint, Parameter(negative_iterable="", show_default=False)]
        made.append((field.name, hint, _again(field)))
    return dataclasses.make_dataclass(
        info.options.__name__, made, bases=(info.options,), frozen=True, namespace={"__module__": __name__}
    )


def common_options() -> set[str]:
    """Names of the options that every conversion has."""
    parts = (Output, Calibration, Method, Machine, Report)
    return {f.name for part in parts for f in dataclasses.fields(part)}


def _again(field: dataclasses.Field[Any]) -> Any:
    """A new field with the same default."""
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=field.metadata, kw_only=True)
    return dataclasses.field(default=field.default, metadata=field.metadata, kw_only=True)


def _field_texts(doc: str, names: Sequence[str]) -> dict[str, str]:
    """The texts behind `name:` in a docstring, each up to the next name."""
    if not names:
        return {}
    parts = re.split(rf"(?:^|(?<=[\s])) *({'|'.join(map(re.escape, names))}): ", doc)
    return {
        name: text[:1].upper() + " ".join(text.split())[1:]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
