"""An exporter as it is known before it is loaded.

By itself, since every start of the command line reads it of all exporters: what a loaded one is, is in `base`, which
has these names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from d2qconv.errors import PluginError

if TYPE_CHECKING:
    from d2qconv.exporters.base import Exporter


#: Metadata of an options field, a path or None: the exporter writes that file too.
WRITTEN: Mapping[str, bool] = {"d2qconv.is_written": True}


def written_files(options: object) -> dict[str, Path]:
    """Files that these options have written besides the package, by option: `--imatrix`."""
    assert is_dataclass(options), "options are a dataclass"
    named = {f.name: getattr(options, f.name) for f in fields(options) if f.metadata.keys() & WRITTEN.keys()}
    return {f"--{name.replace('_', '-')}": Path(path) for name, path in named.items() if path is not None}


@dataclass(frozen=True)
class Runtime:
    """A runtime that loads packages and that `verify` uses where it is installed.

    distributions: as pip calls them, all of them needed; a module has the name of its distribution, `-` as `_`.
    extra: the pip extra that brings them, empty if none does. details: `module:function`, gives facts of the installed
    runtime by name; it is called in a process of its own.
    """

    name: str
    distributions: tuple[str, ...]
    extra: str = ""
    details: str = ""

    @property
    def pip(self) -> str:
        """The command that installs it."""
        what = f"'d2qconv[{self.extra}]'" if self.extra else " ".join(self.distributions)
        return f"pip install {what}"


@dataclass(frozen=True)
class ExporterInfo:
    """An exporter as it is known before it is loaded: the entry point's object. Imports nothing heavy.

    name: the command is `to-<name>`. options: a frozen dataclass, its fields become the command's options; one whose
    metadata are WRITTEN names a file that is written besides the package. target: `module:Class`, called with the
    options. requires: modules that must be importable. extra: the pip extra that brings them. suffix: of the default
    output name. is_folder: a package is a folder that holds a manifest (`d2qconv.exporters.manifest`), and not a file.
    example: the command's example in its help. runtimes: what loads its packages, for `doctor`.
    """

    name: str
    summary: str
    options: type
    target: str
    requires: tuple[str, ...] = ()
    extra: str = ""
    suffix: str = ""
    is_folder: bool = False
    example: str = ""
    architectures: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    runtimes: tuple[Runtime, ...] = ()

    def missing(self) -> tuple[str, ...]:
        """The required modules that are not installed. Imports none of them."""
        return tuple(m for m in self.requires if find_spec(m) is None)

    def default_options(self) -> object:
        """The options, none given; raises PluginError if one has no default."""
        try:
            return self.options()
        except TypeError as error:
            raise PluginError(f"the exporter's options need values: {error}", where=self.name) from error

    def load(self, options: object) -> Exporter:
        """Import the exporter and make it; raises PluginError with the pip command if a library is missing."""
        missing = self.missing()
        if missing:
            raise PluginError(
                f"to-{self.name} needs {', '.join(missing)}",
                todo=f"pip install 'd2qconv[{self.extra}]'",
            )
        module, _, name = self.target.partition(":")
        try:
            made = getattr(import_module(module), name)(options)
        except (ImportError, AttributeError) as error:
            raise PluginError(f"exporter {self.name} does not load: {error}", where=self.target) from error
        return made  # type: ignore[no-any-return]
