"""The words that ask for a job again: what was given, as `d2qconv` reads it, without the folders of anybody's disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from d2qconv.commands.conversion import common_options
from d2qconv.exporters.base import ExporterInfo
from d2qconv.options import Settings

#: Options that change no bit of the package, and are this machine's or this call's alone.
_NOT_AGAIN = ("output", "overwrite", "dry_run", "all", "report", "work_dir", "max_gpu_mem", "max_host_mem")


def command_words(
    info: ExporterInfo, model: str, options: object, settings: Settings, output: Path
) -> tuple[str, ...]:
    """`d2qconv to-gguf org/model -o m.gguf --type q4_k`: every option that is not the default, names for paths."""
    words = ["d2qconv", f"to-{info.name}", _name(model), "-o", output.name]
    for part in dataclasses.fields(settings):
        value = getattr(settings, part.name)
        for field in dataclasses.fields(value):
            if field.name not in _NOT_AGAIN:
                words += _option(f"--{_dashed(field.name)}", getattr(value, field.name), _default(field))
    if options is not None and dataclasses.is_dataclass(options):
        common = common_options()
        for field in dataclasses.fields(options):
            dashed = _dashed(field.name)
            name = f"--{info.name}-{dashed}" if field.name in common else f"--{dashed}"
            words += _option(name, getattr(options, field.name), _default(field))
    return tuple(words)


def _option(name: str, value: object, default: object) -> Iterator[str]:
    if value == default or value is None:
        return
    if isinstance(value, bool):
        yield name if value else name.replace("--", "--no-", 1)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from (name, _also(one) if name == "--also" else _name(one))
    else:
        yield from (name, _name(value))


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _name(value: object) -> str:
    """A file's or folder's own name, there or not yet; anything else, such as `org/model`, as it is."""
    if isinstance(value, Path):
        return value.name
    text = str(value)
    return Path(text).resolve().name if Path(text).expanduser().exists() else text


def _also(value: object) -> str:
    """`FORMAT=PATH` without the folders of the path."""
    head, _, path = str(value).partition("=")
    return f"{head}={Path(path).name}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
