"""What the commands have in common: their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from d2qconv.package_options import Deep
from d2qconv.report_options import Report

Model = Annotated[
    str, Parameter(help="Folder of a Hugging Face checkpoint, or a hub id such as Qwen/Qwen3-8B.")
]
ReportOptions = Annotated[Report, Parameter(name="*")]
TALK = Report()
DeepOptions = Annotated[Deep, Parameter(name="*")]
SHALLOW = Deep()
Format = Annotated[
    str, Parameter(name="--format", help="Exporter of the file; by default the one with its suffix.")
]
File = Annotated[Path, Parameter(help="A package that d2qconv wrote.")]
