"""The command under torchrun, as a user starts it: two processes on the CPU, more processes than sequences, a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from d2qconv.testing.models import make_checkpoint

TOKENIZER = Path(__file__).parent.parent / "data" / "tiny-llama-5m"
#: Seconds after which a run is taken to hang.
LIMIT = 400


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random model, and tokens for it."""
    folder = tmp_path_factory.mktemp("team") / "model"
    sizes = {"hidden": 64, "ffn": 128, "heads": 2, "kv_heads": 1, "head_dim": 32}
    return make_checkpoint(folder, "llama", vocab=8192, tokenizer=TOKENIZER, layers=2, **sizes)


@pytest.fixture(scope="module")
def by_two(model, tmp_path_factory):
    """What two processes print and write."""
    out = tmp_path_factory.mktemp("two") / "two.gguf"
    return make(2, model, out), out


def start(processes, model, out, sequences=12):
    """A conversion under torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "d2qconv", "to-gguf", str(model), "-o", str(out), "--length", "32", "--device", "cpu", "--json",
        "--sequences", str(sequences), "--type", "q2_0",
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(run):
    """(exit code, standard output, standard error); all processes are gone then."""
    try:
        out, err = run.communicate(timeout=LIMIT)
    finally:
        kill(run)
    return run.returncode, out, err


def kill(run):
    """`kill -9` of torchrun and of all that it started, which are in sessions of their own."""
    if run.poll() is not None:
        return
    started = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for pid in (run.pid, *map(int, started)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.communicate()


def make(processes, model, out, sequences=12):
    """The JSON object that one of the processes printed."""
    code, printed, err = end(start(processes, model, out, sequences))
    assert code == 0, err
    return json.loads(printed)


def test_two_processes_make_what_one_makes(model, by_two, tmp_path):
    one = make(1, model, tmp_path / "one.gguf")
    two, two_path = by_two
    assert one["fingerprint"] == two["fingerprint"]
    assert [e["tensor"] for e in one["errors"]] == [e["tensor"] for e in two["errors"]]
    for before, after in zip(one["errors"], two["errors"], strict=True):
        assert after["output"] == pytest.approx(before["output"], rel=0.1)
    assert one["n_tokens"] == two["n_tokens"]
    assert two["perplexity_source"] == pytest.approx(one["perplexity_source"], rel=1e-4)
    files = sorted([*tmp_path.iterdir(), *two_path.parent.iterdir()])
    assert sorted(path.suffix for path in files) == [".gguf"] * 2 + [".html"] * 2 + [".json"] * 2
    # The leader alone measures it, on its own sequences.
    first, second = (
        json.loads(path.with_name(f"{path.name}.report.json").read_text())
        for path in (tmp_path / "one.gguf", two_path)
    )
    assert second["environment"]["processes"] == 2
    assert sum(second["contribution"]["blocks"]) == pytest.approx(
        sum(first["contribution"]["blocks"]), rel=0.5
    )
    for before, after in zip(first["blocks"], second["blocks"], strict=True):
        assert after["error"] == pytest.approx(before["error"], rel=0.1)


def test_more_processes_than_sequences(model, tmp_path):
    made = make(3, model, tmp_path / "m.gguf", sequences=2)
    assert made["n_tokens"] == 31
    assert all(check["is_passed"] for check in made["checks"])


def test_an_error_ends_all(model, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"mine")
    code, printed, err = end(start(2, model, tmp_path / "m.gguf"))
    assert code != 0
    assert "exists" in printed + err
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


def test_a_killed_run_goes_on_to_the_same_bytes(model, by_two, tmp_path):
    run = start(2, model, tmp_path / "killed.gguf")
    manifest = tmp_path / "killed.gguf.work" / "manifest.json"
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and run.poll() is None:
        if manifest.is_file() and "block-0000" in manifest.read_text():
            break
        time.sleep(0.01)
    was_running = run.poll() is None
    kill(run)
    assert was_running, "the run ended before it could be killed"
    assert not (tmp_path / "killed.gguf").exists()
    make(2, model, tmp_path / "killed.gguf")
    assert (tmp_path / "killed.gguf").read_bytes() == by_two[1].read_bytes()
