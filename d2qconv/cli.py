"""The commands.

Thin: each reads its options, asks for the work, and hands what came back to the console. A `to-<name>` command is
made from every usable exporter, its options from the exporter's options dataclass. Importing this module, and every
`--help`, loads neither torch nor any format library; the pipeline is imported when a job starts.

Exit codes are those of `d2qconv.errors`; 1 is a bug of ours, 130 an interrupt (Ctrl-C, SIGTERM, SIGHUP).
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter

import d2qconv
from d2qconv.console import Console, by_steps
from d2qconv.errors import D2qError, InputError, PluginError, VerifyError
from d2qconv.export.base import Carrier, ExporterInfo
from d2qconv.export.discover import Found, Sampler, discover, find, first_ready, for_file
from d2qconv.export.folder import check_folder
from d2qconv.export.package import check_output
from d2qconv.options import Calibration, Flag, Machine, Method, Output, OutputPath, Report, Settings

if TYPE_CHECKING:
    from d2qconv.job import Also, Job

#: The model that `demo` converts; it is part of the package.
DEMO_MODEL = Path(d2qconv.__file__).parent / "data" / "tiny-qwen3-5m"
EXIT_BUG = 1
EXIT_INTERRUPTED = 130
#: Set to anything, every error comes with its traceback.
TRACEBACK = "D2QCONV_TRACEBACK"

ABOUT = """Turn a Hugging Face language model into a verified low-bit package.

Start with `d2qconv demo`, or see what would be written with `d2qconv plan MODEL --to gguf`.
The --help of every command has an example."""

EXIT_CODES = """Exit codes:
  0    done
  1    a bug in d2qconv
  2    the checkpoint, a file or an option is not what it should be
  3    the job cannot be done as asked; known before any work was spent
  4    quantization stopped; the same command goes on
  5    the package could not be written
  6    a package is not what the quantizer made
  7    an exporter is unknown, broken, or lacks a library
  130  interrupted; the same command goes on"""


# ---- parameters of the commands ----


Model = Annotated[
    str, Parameter(help="Folder of a Hugging Face checkpoint, or a hub id such as Qwen/Qwen3-8B.")
]
Options = Annotated[Settings, Parameter(name="*")]
ReportOptions = Annotated[Report, Parameter(name="*")]
DEFAULTS = Settings()
TALK = Report()
#: Enough for the model of the demo, and quick.
DEMO_CALIBRATION = Calibration(sequences=32, length=128)
DEMO_PROMPT = "Once upon a time"
Format = Annotated[
    str, Parameter(name="--format", help="Exporter of the file; by default the one with its suffix.")
]
File = Annotated[Path, Parameter(help="A package that d2qconv wrote.")]


def exporter_options(info: ExporterInfo) -> type:
    """The exporter's options dataclass, as the framework wants it.

    An option's help is its paragraph `name: text` in the class docstring, unless the field says it in its own way
    (metadata "help", or a string below the field). A field that has the name of a common option is called
    `--EXPORTER-FIELD`.
    """
    parts = (Output, Calibration, Method, Machine, Report)
    common = {f.name for part in parts for f in dataclasses.fields(part)}
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


# ---- the commands ----


def make_app(console: Console) -> App:
    """All commands, one `to-<name>` for each exporter that is not broken among them."""
    app = App(
        name="d2qconv",
        version=d2qconv.__version__,
        help=ABOUT,
        help_epilogue=EXIT_CODES,
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    found = discover()
    for exporter in found:
        if exporter.info is not None:
            _add_exporter(app, exporter.info, console)
    _add_plan(app, found)
    _add_readers(app, found, console)
    _add_demo(app, found, console)
    return app


def _add_exporter(app: App, info: ExporterInfo, console: Console) -> None:
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
        settings: Options = DEFAULTS,
        report: ReportOptions = TALK,
    ) -> None:
        job = make_job(info, model, options, settings)
        report.tell(console)
        if settings.output.dry_run:
            show_plan(job, console, is_all=settings.output.all)
        else:
            run_job(job, console)

    flat = Parameter(name="*", group=Group(f"Options of {info.name}", sort_key=2))
    convert.__annotations__["options"] = Annotated[kind, flat]
    app.command(
        convert,
        name=f"to-{info.name}",
        help=f"Write {info.summary}.",
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


def _add_readers(app: App, found: Collection[Found], console: Console) -> None:
    def verify(file: File, /, *, format_name: Format = "", report: ReportOptions = TALK) -> None:
        info = _exporter_of(file, format_name, found)
        exporter = info.load(default_options(info))
        report.tell(console)
        with console.watch() as watch:
            checks = exporter.verify(file, by_steps(watch, "verify"))
        console.show_checks(file, checks)
        failed = [c for c in checks if not c.is_passed]
        if failed:
            raise VerifyError(
                "not what the quantizer made: " + "; ".join(f"{c.name}: {c.detail}" for c in failed),
                where=str(file),
                todo="convert again; a second failure is a bug in d2qconv",
            )

    def inspect(file: File, /, *, format_name: Format = "", report: ReportOptions = TALK) -> None:
        info = _exporter_of(file, format_name, found)
        report.tell(console)
        console.show_facts(file, info.load(default_options(info)).inspect(file))

    def exporters(*, report: ReportOptions = TALK) -> None:
        report.tell(console)
        console.show_exporters(found)

    app.command(
        verify,
        help="Compare every tensor of a package bit for bit with its record, through an independent reader; then "
        "load it in its runtime, where that is installed.",
        help_epilogue="Example:\n  d2qconv verify qwen3-8b-q2_k.gguf",
    )
    app.command(
        inspect,
        help="Print what is in a package: layout, sizes, where it comes from. Reads no weights.",
        help_epilogue="Example:\n  d2qconv inspect qwen3-8b-q2_k.gguf --json",
    )
    app.command(
        exporters,
        help="List the installed exporters, those that cannot be used with the reason.",
        help_epilogue="Example:\n  d2qconv exporters",
    )


def _add_demo(app: App, found: Collection[Found], console: Console) -> None:
    def demo(
        *,
        to: Annotated[str, Parameter(help="Exporter. By default the first that is ready.")] = "",
        prompt: Annotated[str, Parameter(help="Text that the converted model continues.")] = DEMO_PROMPT,
        output: Annotated[
            OutputPath, Parameter(help="The package. By default demo.* in the current folder.")
        ] = None,
        overwrite: Annotated[Flag, Parameter(help="Replace an existing output.")] = False,
        report: ReportOptions = TALK,
    ) -> None:
        info = find(to, found) if to else first_ready(found)
        target = Output(output=output or Path(f"demo{info.suffix}"), overwrite=overwrite)
        settings = Settings(output=target, calibration=DEMO_CALIBRATION)
        report.tell(console)
        run_job(make_job(info, str(DEMO_MODEL), None, settings), console, prompt=prompt)

    app.command(
        demo,
        help="Convert the small model that comes with d2qconv, then let it write a few words. Needs no network.",
        help_epilogue="Example:\n  d2qconv demo --prompt 'The little dog'",
    )


# ---- what they do ----


def make_job(info: ExporterInfo, model: str, options: object, settings: Settings) -> Job:
    """The pipeline's job. options: None for the exporter's defaults. Raises PluginError without torch."""
    absent = [m for m in ("torch", "tokenizers") if find_spec(m) is None]
    if absent:
        raise PluginError(f"converting needs {', '.join(absent)}", todo="pip install 'd2qconv[quantize]'")
    output, method, machine = settings.output, settings.method, settings.machine
    path = output.output or Path(Path(model).resolve().name + info.suffix)
    if not output.dry_run:
        check = check_folder if info.is_folder else check_output
        check(path, output.overwrite)
    from d2qconv.job import Job

    return Job(
        model=model,
        revision=machine.revision,
        exporter=info,
        options=default_options(info) if options is None else options,
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
    check = check_folder if info.is_folder else check_output
    if not output.dry_run:
        check(Path(path), output.overwrite)
    return Also(info, Path(path))


def show_plan(job: Job, console: Console, *, is_all: bool) -> None:
    """Print what a job would write. Raises PlanError with every reason if anything is refused.

    Where types are to be chosen, the plan says which; for that every weight is read, and what was measured stays in the
    work directory.
    """
    from d2qconv import pipeline

    planned = pipeline.plan(job)
    if planned.candidates is not None:
        with console.watch() as watch:
            planned = pipeline.allocate(planned, watch)
    console.show_plan(planned, is_all=is_all)


def run_job(job: Job, console: Console, *, prompt: str = "") -> None:
    """Convert, and print what came of it; with a prompt, let the package continue it."""
    from d2qconv import pipeline
    from d2qconv.team import started

    rank, n_processes, _ = started()
    if rank:
        # Under torchrun the first process speaks for all.
        console.ask(is_json=False, is_quiet=True)
    planned = pipeline.plan(job)
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


def _sample(job: Job, prompt: str) -> str:
    exporter = job.exporter.load(job.options)
    if not isinstance(exporter, Sampler):
        return f"(the exporter {job.exporter.name} cannot run its packages)"
    try:
        return prompt + exporter.sample(job.output, prompt)
    except PluginError as error:
        return f"(not run) {error}"


def _exporter_of(file: Path, name: str, found: Collection[Found]) -> ExporterInfo:
    if not file.exists():
        raise InputError("there is no such file", where=str(file))
    return find(name, found) if name else for_file(file, found)


def default_options(info: ExporterInfo) -> object:
    """The exporter's options, none given; raises PluginError if one has no default."""
    try:
        return info.options()
    except TypeError as error:
        raise PluginError(f"the exporter's options need values: {error}", where=info.name) from error


# ---- from errors to exit codes ----


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Never raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console(is_json="--json" in words)
    try:
        with _terminate_like_interrupt():
            make_app(console)(words, exit_on_error=False, print_error=False)
            sys.stdout.flush()
    except CycloptsError as error:
        command = " ".join(error.command_chain or ())
        todo = f"see d2qconv {command} --help".replace("  ", " ")
        return _fail(console, InputError(str(error), todo=todo), InputError.exit_code)
    except D2qError as error:
        return _fail(console, error, error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(
            console, error, EXIT_INTERRUPTED, "interrupted; the same command goes on where this one stopped"
        )
    except BrokenPipeError:
        # The reader of our output has gone, `| head` for one. Nothing is left to be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 the last resort: no traceback meets a user unasked
        text = f"{type(error).__name__}: {error}\n  → this is a bug in d2qconv; {TRACEBACK}=1 shows where"
        return _fail(console, error, EXIT_BUG, text)
    return 0


def _fail(console: Console, error: BaseException, exit_code: int, text: str = "") -> int:
    trace = traceback.format_exc() if os.environ.get(TRACEBACK) else ""
    console.show_error(type(error).__name__, text or str(error), exit_code, trace)
    return exit_code


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that a half-written package is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        kind: signal.signal(kind, signal.default_int_handler) for kind in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
