"""`to-<name>`, one for every exporter, and `plan`: a command line becomes the pipeline's job."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

from d2qconv.commands.parameters import TALK, Model, ReportOptions
from d2qconv.console import Console
from d2qconv.errors import InputError, PluginError
from d2qconv.exporters.discover import Found, Sampler, discover, find
from d2qconv.exporters.info import ExporterInfo

if TYPE_CHECKING:
    from d2qconv.importing import PlannedImport
    from d2qconv.job import Also, Job
    from d2qconv.options import Output, Settings


def add(app: App, found: Collection[Found], console: Console, words: Collection[str] | None = None) -> None:
    """Add `plan`, and a command for each exporter that is not broken.

    words: of the command line. Those that it does not name are added without options, which take their time to be
    made: enough to be listed. None for all with everything.
    """
    for exporter in found:
        if exporter.info is None:
            continue
        if words is None or {exporter.name, f"to-{exporter.name}", f"--to={exporter.name}"} & set(words):
            _add_exporter(app, exporter.info, console)
        else:
            _add_listed(app, exporter.info)
    _add_plan(app, found)


def _add_listed(app: App, info: ExporterInfo) -> None:
    """The command as the list of commands shows it."""

    def convert() -> None:
        raise AssertionError("a command that the words name is added whole")

    app.command(convert, name=f"to-{info.name}", help=_help(info))


def _help(info: ExporterInfo) -> str:
    return f"Write {info.summary}."


def _add_exporter(app: App, info: ExporterInfo, console: Console) -> None:
    # Here, since of a start's commands few are conversions.
    from d2qconv.commands.conversion import DEFAULTS, Options, exporter_options

    kind = exporter_options(info)
    try:
        # Not None: cyclopts checks a default too, once any library has imported pydantic.
        untouched: object = kind()
    except TypeError:
        untouched = None

    def convert(
        model: Model,
        /,
        *,
        options: Any = untouched,
        settings: Settings = DEFAULTS,
        report: ReportOptions = TALK,
    ) -> None:
        job = make_job(info, model, options, settings)
        report.tell(console)
        if settings.output.dry_run:
            show_plan(job, console, is_all=settings.output.all)
        else:
            run_job(job, console)

    flat = Parameter(name="*", group=Group(f"Options of {info.name}", sort_key=2))
    convert.__annotations__.update(options=Annotated[kind, flat], settings=Options)
    app.command(
        convert,
        name=f"to-{info.name}",
        help=_help(info),
        help_epilogue=f"Example:\n  {info.example or f'd2qconv to-{info.name} MODEL'}",
    )


def _add_plan(app: App, found: Collection[Found]) -> None:
    def plan(
        model: Model,
        /,
        *more: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        to: Annotated[str, Parameter(help="Exporter, as `d2qconv exporters` lists them.")],
    ) -> None:
        find(to, found)
        app([f"to-{to}", model, *more, "--dry-run"], exit_on_error=False, print_error=False)

    app.command(
        plan,
        help="Show what would be written: type and size of every tensor, carrier of the mean shift, refusals. Reads no "
        "weights, unless types are to be chosen by measurement. "
        "Takes all options of to-NAME (d2qconv to-NAME --help lists them), and is the same as to-NAME --dry-run.",
        help_epilogue="Example:\n  d2qconv plan Qwen/Qwen3-8B --to gguf --all",
    )


def make_job(info: ExporterInfo, model: str, options: object, settings: Settings) -> Job:
    """The pipeline's job. options: None for the exporter's defaults. Raises PluginError without torch."""
    absent = [m for m in ("torch", "tokenizers") if find_spec(m) is None]
    if absent:
        raise PluginError(f"converting needs {', '.join(absent)}", todo="pip install 'd2qconv[quantize]'")
    output, method, machine = settings.output, settings.method, settings.machine
    path = output.output or Path(Path(model).resolve().name + info.suffix)
    if not output.dry_run:
        _check(info, path, output.overwrite)
    from d2qconv.commands.again import command_words
    from d2qconv.exporters.base import Carrier
    from d2qconv.job import Job

    return Job(
        model=model,
        revision=machine.revision,
        exporter=info,
        options=info.default_options() if options is None else options,
        output=path,
        recipe=method.recipe(),
        calibration=settings.calibration.spec(),
        carrier=None if method.carrier == "auto" else Carrier(method.carrier),
        device=machine.device,
        work_dir=machine.work_dir,
        overwrite=output.overwrite,
        max_gpu_mem=machine.max_gpu_mem,
        max_host_mem=machine.max_host_mem,
        also=tuple(_also(text, output) for text in output.also),
        requantize=output.requantize,
        is_reported=output.report,
        command=command_words(info, model, options, settings, path),
    )


def _also(text: str, output: Output) -> Also:
    """`onnx=folder`; raises InputError or PluginError for what is no such thing, or cannot be written there."""
    from d2qconv.job import Also

    name, is_given, path = text.partition("=")
    if not (name and is_given and path):
        raise InputError(
            "not FORMAT=PATH", where=f"--also {text}", todo="write, for example, onnx=model-onnx"
        )
    info = find(name, discover())
    if not output.dry_run:
        _check(info, Path(path), output.overwrite)
    return Also(info, Path(path))


def _check(info: ExporterInfo, path: Path, overwrite: bool) -> None:
    """Refuse an output that could not be written at its end; raises InputError."""
    from d2qconv.exporters.folder import check_folder
    from d2qconv.exporters.package import check_output

    (check_folder if info.is_folder else check_output)(path, overwrite)


def show_plan(job: Job, console: Console, *, is_all: bool) -> None:
    """Print what a job would write. Raises PlanError with every reason if anything is refused.

    Where types are to be chosen, the plan says which; for that every weight is read, and what was measured stays in the
    work directory.
    """
    from d2qconv import importing, pipeline
    from d2qconv.foreign.read import Foreign

    source = importing.open_source(job)
    if isinstance(source, Foreign):
        console.show_import_plan(importing.plan_import(job, source), is_all=is_all)
        return
    planned = pipeline.plan(job, source)
    if planned.candidates is not None:
        with console.watch() as watch:
            planned = pipeline.allocate(planned, watch)
    console.show_plan(planned, is_all=is_all)


def run_job(job: Job, console: Console, *, prompt: str = "") -> None:
    """Convert, and print what came of it; with a prompt, let the package continue it.

    A checkpoint that is quantized already is imported, unless it is to be quantized again.
    """
    from d2qconv import importing, pipeline
    from d2qconv.exporters.beside import check_report
    from d2qconv.foreign.read import Foreign
    from d2qconv.team import started

    rank, n_processes, _ = started()
    if rank:
        # Under torchrun the first process speaks for all.
        console.ask(is_json=False, is_quiet=True)
    if job.is_reported and not Path(job.model).exists():
        # Not after a download.
        check_report(job.output, job.overwrite)
    source = importing.open_source(job)
    if isinstance(source, Foreign):
        _import(importing.plan_import(job, source), console, is_leader=rank == 0)
        return
    if job.is_reported:
        # Types may be measured before anything else looks at the outputs.
        check_report(job.output, job.overwrite)
    planned = pipeline.plan(job, source)
    if planned.candidates is not None and n_processes == 1:
        # A team measures once it has met.
        with console.watch() as watch:
            planned = pipeline.allocate(planned, watch)
    console.announce(planned)
    with console.watch() as watch:
        outcome = pipeline.convert(planned, watch)
        sample = _sample(job, prompt) if prompt and outcome is not None else ""
    if outcome is not None:
        console.show_outcome(outcome, sample)


def _import(planned: PlannedImport, console: Console, *, is_leader: bool) -> None:
    """Write packages of a quantized checkpoint; one process's work, whatever their number."""
    from d2qconv import importing

    if not is_leader:
        return
    console.announce_import(planned)
    with console.watch() as watch:
        done = importing.convert_import(planned, watch)
    console.show_imported(done)


def _sample(job: Job, prompt: str) -> str:
    exporter = job.exporter.load(job.options)
    if not isinstance(exporter, Sampler):
        return f"(the exporter {job.exporter.name} cannot run its packages)"
    try:
        return prompt + exporter.sample(job.output, prompt)
    except PluginError as error:
        return f"(not run) {error}"
