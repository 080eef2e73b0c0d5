"""Multiple-choice tasks, by EleutherAI's lm-evaluation-harness over a package's own runtime.

The harness brings the tasks, fetches their data sets and counts; `d2qconv.continuation` gives it log probabilities.
It is an extra: nothing of it is imported before it is asked for. Tasks that let the model write are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from d2qconv.continuation import Continuations
from d2qconv.errors import InputError, PluginError
from d2qconv.exporters.runtime import LoadedPackage
from d2qconv.measure.result import TaskScore
from d2qconv.measure.statistics import Estimate
from d2qconv.progress import Watch

#: The longest prompt, in tokens, unless another length is asked for or the package takes less.
WINDOW = 2048
_PIP = "pip install 'd2qconv[tasks]'"
_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskRun:
    """What is asked for. limit: samples of each task, None for all; shots: None for the task's own number.

    folder: with task files of one's own.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    folder: Path | None = None


def check_installed() -> None:
    """Raise PluginError with the pip command if the harness is not there."""
    if find_spec("lm_eval") is None:
        raise PluginError("tasks need the library lm-eval", where="--tasks", todo=_PIP)


def harness_version() -> str:
    """`lm-eval 0.4.12`."""
    return f"lm-eval {version('lm-eval')}"


def run_tasks(asked: TaskRun, runtime: LoadedPackage, window: int, watch: Watch) -> list[TaskScore]:
    """Score the tasks; raises InputError for a task that does not exist or cannot be had, PluginError."""
    check_installed()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = None if asked.folder is None else str(asked.folder)
    manager = TaskManager(include_path=folder)
    unknown = sorted(set(asked.tasks) - set(manager.all_tasks))
    if unknown:
        raise InputError(f"no task is called {', '.join(unknown)}", where="--tasks", todo="lm-eval ls tasks")
    model = _model(Continuations(runtime, min(window, runtime.max_length)), watch)
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(asked.tasks),
            num_fewshot=asked.shots,
            limit=asked.limit,
            task_manager=manager,
            log_samples=False,
        )
    except (InputError, PluginError):
        raise
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())[:500]
        raise InputError(f"lm-eval stopped: {said}", where=f"--tasks {','.join(asked.tasks)}") from error
    return scores(found or {})


def scores(found: Mapping[str, Any]) -> list[TaskScore]:
    """The harness' results as ours: `results`, `versions`, `n-shot` and `n-samples`, each by task.

    A metric is called `NAME,FILTER`, its error `NAME_stderr,FILTER`; the filter `none` is left out.
    """
    made = []
    for task, numbers in found.get("results", {}).items():
        metrics = {}
        for name, value in numbers.items():
            metric, _, chosen = name.partition(",")
            if not isinstance(value, int | float) or not chosen or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{chosen}")
            shown = metric if chosen == "none" else f"{metric},{chosen}"
            metrics[shown] = Estimate(float(value), float(error) if isinstance(error, int | float) else 0.0)
        n_samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        n_shots = found.get("n-shot", {}).get(task, 0)
        made.append(
            TaskScore(task, str(found.get("versions", {}).get(task, "")), n_shots, n_samples, metrics)
        )
    return made


def _model(continuations: Continuations, watch: Watch) -> Any:
    """The harness' model: an instance of a class that can be made only once the harness is there."""
    from lm_eval.api.model import LM

    class PackageModel(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return _each(watch, requests, lambda request: continuations.of(*request.args))

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return _each(watch, requests, lambda request: continuations.rolling(request.args[0]))

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            raise PluginError(
                f"{len(requests)} samples ask the model to write, and only texts that are given are scored",
                where="--tasks",
                todo="choose tasks whose output type is multiple_choice or loglikelihood",
            )

    return PackageModel()


def _each(watch: Watch, requests: Sequence[Any], score: Callable[[Any], _T]) -> list[_T]:
    """One result a request, with progress."""
    watch.stage("tasks", len(requests))
    found = []
    for number, request in enumerate(requests, 1):
        found.append(score(request))
        watch.step(number, str(request.task_name or ""))
    return found
