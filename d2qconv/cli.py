"""The command line: puts the commands together, and turns errors into exit codes.

The commands are thin: each reads its options, asks for the work, and hands what came back to the console. Importing
this module, and every `--help`, loads neither torch nor any format library; the pipeline is imported when a job starts.

Exit codes are those of `d2qconv.errors`; 1 is a bug of ours, 130 an interrupt (Ctrl-C, SIGTERM, SIGHUP).
"""

from __future__ import annotations

import d2qconv.startup  # isort: split

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from cyclopts import App, CycloptsError

from d2qconv.commands import convert, demo, doctor, evaluate, packages, report
from d2qconv.console import Console
from d2qconv.errors import D2qError, InputError
from d2qconv.exporters.discover import discover
from d2qconv.startup import paused

d2qconv.startup.end()

EXIT_BUG = 1
EXIT_INTERRUPTED = 130
#: Words that ask for nothing but text.
TOLD = {"--help", "-h", "--version"}
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


def make_app(console: Console, words: Sequence[str] | None = None) -> App:
    """All commands, one `to-<name>` for each exporter that is not broken among them.

    words: a command line; of the conversions those that it does not name need not be whole. None for all.
    """
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
    convert.add(app, found, console, words)
    for group in (packages, evaluate, report, doctor, demo):
        group.add(app, found, console)
    return app


# ---- from errors to exit codes ----


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Never raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console(is_json="--json" in words)
    try:
        with _terminate_like_interrupt():
            with paused():
                app = make_app(console, words)
            # What is only told ends the process.
            with paused() if not words or TOLD & set(words) else nullcontext():
                app(words, exit_on_error=False, print_error=False)
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
