"""One step of a measurement in a process of its own: a request as JSON in, a result as JSON out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent.parent


class ChildError(RuntimeError):
    """A child process did not give a result."""


def child(script: str, request: object, folder: Path, timeout: float | None = None) -> dict[str, Any]:
    """Run a module of tools/bench in a fresh process; its result. Raises ChildError with the end of its output."""
    asked, got = folder / "request.json", folder / "result.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    got.unlink(missing_ok=True)
    paths = [str(ROOT), str(ROOT / "formats"), str(BENCH), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "HF_HUB_OFFLINE": "1"}
    log = folder / "log"
    with log.open("wb") as stream:
        command = [sys.executable, str(BENCH / script), str(asked), str(got)]
        try:
            code = subprocess.run(
                command,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise ChildError(f"stopped after {timeout:.0f} s\n{_end(log)}") from error
    if code or not got.exists():
        raise ChildError(f"exit code {code}\n{_end(log)}")
    result: dict[str, Any] = json.loads(got.read_text(encoding="utf-8"))
    return result


def _end(log: Path) -> str:
    return log.read_bytes().decode("utf-8", "replace")[-3000:]
