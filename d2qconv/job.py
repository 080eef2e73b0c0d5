"""One conversion: as it is asked for, and as it will be done."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import torch

from d2qconv.allocate.allocation import Allocation
from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.folder import is_text
from d2qconv.checkpoint.open import Checkpoint
from d2qconv.errors import InputError
from d2qconv.exporters.base import Candidates, Carrier, Exporter, ExporterInfo, TargetPlan
from d2qconv.exporters.beside import page_of, report_of
from d2qconv.exporters.info import written_files
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.walk.last_pass import LastPass
from d2qconv.walk.memory import Footprint


@dataclass(frozen=True)
class Also:
    """Another package of the same quantization: by which exporter, with its default options, and where."""

    exporter: ExporterInfo
    output: Path


@dataclass(frozen=True)
class Destination:
    """One package that will be written: by which exporter, where, and what."""

    info: ExporterInfo
    output: Path
    exporter: Exporter
    target: TargetPlan


@dataclass(frozen=True)
class Job:
    """One conversion, as asked for.

    carrier: None for the most exact that the target has. device: None for the first GPU, or the CPU.
    work_dir: None for `<output>.work`. max_gpu_mem, max_host_mem: sizes such as `24GiB`; None for a share of what is
    free, see `d2qconv.budget`. They choose where activations lie, and, where the recipe leaves that open, what a last
    pass goes over; no other bit of the result. also: further packages. requantize: quantize a checkpoint again that
    another tool has quantized.
    is_reported: measure where the divergence comes from, and write the report beside the package. command: the words
    that ask for this job, for the report.
    """

    model: str
    exporter: ExporterInfo
    options: object
    output: Path
    recipe: Recipe = field(default_factory=Recipe)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    carrier: Carrier | None = None
    device: str | None = None
    work_dir: Path | None = None
    revision: str | None = None
    overwrite: bool = False
    max_gpu_mem: str | None = None
    max_host_mem: str | None = None
    also: tuple[Also, ...] = ()
    requantize: bool = False
    is_reported: bool = False
    command: tuple[str, ...] = ()

    @property
    def work_folder(self) -> Path:
        """Where finished parts are kept until the packages are written."""
        return self.work_dir or self.output.with_name(self.output.name + ".work")


def check_places(job: Job) -> None:
    """Refuse outputs, or a work directory, that are the same or lie in each other, links followed; raises InputError.

    Each is written or removed as a whole, so what lies in another one would stand in its way or go with it.
    """
    places = [(f"-o {job.output}", job.output)]
    places += [(f"--also {also.exporter.name}={also.output}", also.output) for also in job.also]
    places += [(f"{option} {path}", path) for option, path in written_files(job.options).items()]
    for option, path in places:
        if path.name in ("", ".."):
            raise InputError("gives what is written no name", where=option, todo="end it with a name")
        if not is_text(str(path)):
            # Manifests and reports say names.
            shown = ascii(str(path))
            raise InputError("is a name that is not UTF-8", where=shown, todo="name it by letters")
    if job.is_reported:
        report = report_of(job.output)
        places += [(f"the report {path}", path) for path in (report, page_of(report))]
    work = f"--work-dir {job.work_folder}"
    for (outer, folder), (inner, path) in permutations([*places, (work, job.work_folder)], 2):
        if not path.resolve().is_relative_to(folder.resolve()):
            continue
        how = "is the same as" if path.resolve() == folder.resolve() else "lies in"
        what = "the work directory, which is emptied at the end" if outer is work else outer
        what = f"the package {what}" if what.startswith(("-o", "--also")) else what
        raise InputError(
            f"{how} {what}",
            where=inner,
            todo="name a place of its own for each package, and for the work directory with --work-dir",
        )


@dataclass(frozen=True)
class Planned:
    """What will be done; nothing is refused.

    source: the checkpoint's model. desc: the model that is quantized, the same but for a rotation and a padding.
    footprint: the memory that it is predicted to take. candidates: what types are to be chosen from, if they are; until
    `allocate` has made the allocation, `target` has the smallest of them. content: digest of the weights, empty if not
    read yet. also: the further packages.
    """

    job: Job
    checkpoint: Checkpoint
    source: ModelDesc
    desc: ModelDesc
    target: TargetPlan
    exporter: Exporter
    device: torch.device
    footprint: Footprint
    last_pass: LastPass
    candidates: Candidates | None = None
    allocation: Allocation | None = None
    content: str = ""
    also: tuple[Destination, ...] = ()

    @property
    def main(self) -> Destination:
        """The package that the job names first."""
        return Destination(self.job.exporter, self.job.output, self.exporter, self.target)

    @property
    def n_weights(self) -> int:
        """Weights of the source; a tied head counts once."""
        return self.desc.n_weights

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors of the package, metadata not counted, per weight of the source. Exact, not an estimate."""
        return 8 * self.target.n_bytes / self.n_weights

    @property
    def most_bytes(self) -> int:
        """Bytes that all tensors of the package may take."""
        is_open = self.candidates is not None and self.allocation is None
        return self.candidates.n_bytes if is_open and self.candidates else self.target.n_bytes
