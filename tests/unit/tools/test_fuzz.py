"""A slice of tools/fuzz that is the same each time, and that the tool notices what it is there to notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Cases of each reader; the tool itself plays some 10^5.
N_CASES = 40

SCRIPT = """
import os, sys
from pathlib import Path
from fuzz_readers import READERS, Reader
from fuzz_worker import say, work
from d2qconv.errors import InputError

place = Path(sys.argv[1])
fuzzer = work(place, 5, [(name, 0, int(sys.argv[2])) for name in READERS], is_limited=False)

def make(root):
    (root / "v").mkdir()
    (root / "v" / "a.json").write_text('{"a": 1}')

def once_made(call):
    return lambda folder: call(folder) if made else None

def refuse(folder):
    raise InputError("no")

def fail(folder):
    return {}["a"]

def look_out(folder):
    return (folder.parent / "outside" / "a.json").read_bytes()

def remove(folder):
    (folder.parent / "outside" / "a.json").unlink()

def run_code(folder):
    exec(compile("1", "stranger.py", "exec"))

def start(folder):
    os.system("true")

def unmarshal(folder):
    import marshal
    marshal.loads(marshal.dumps(1))

def import_cached(folder):
    sys.modules.pop("json.tool", None)
    import json.tool

def take(folder):
    bytearray(300 << 20)

def change(folder):
    return os.urandom(8)

made = False
for call in (refuse, fail, look_out, remove, run_code, start, unmarshal, import_cached, take, change):
    made = False
    reader = Reader(call.__name__, make, once_made(call), is_exact=call is change)
    fuzzer.prepare(reader)
    made = True
    kind, why, changed = fuzzer.run(reader, 0, 0)
    say({"bad": call.__name__, "kind": kind, "why": why})
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the tool says, line by line; one process, since the audit hook of one cannot be taken away."""
    paths = [str(p) for p in (ROOT / "tools" / "fuzzing", ROOT, ROOT / "formats")]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path_factory.mktemp("fuzz"), str(N_CASES)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_reader_takes_corrupted_files_or_refuses_them(said):
    ends = [line for line in said if "end" in line]
    findings = [line for line in ends if line["kind"] == "finding"]
    assert not findings, json.dumps(findings, indent=1)
    names = {line["end"][0] for line in ends}
    assert {"checkpoint", "tokenizer", "tokens", "gguf", "onnx", "hf-mlx", "workdir", "manifest"} <= names
    assert len(ends) == N_CASES * len(names)
    for name in names:
        # Some of the corruption shows, everywhere.
        assert any(line["kind"] == "refused" for line in ends if line["end"][0] == name), name


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("fail", "KeyError"),
        ("look_out", "opened"),
        ("remove", "os.remove of"),
        ("run_code", "exec of 'stranger.py'"),
        ("start", "os.system"),
        ("unmarshal", "marshal.loads"),
        ("take", "MiB of memory"),
        ("change", "other values"),
    ],
)
def test_what_no_reader_may_do_is_a_finding(said, call, why):
    (line,) = (line for line in said if line.get("bad") == call)
    assert line["kind"] == "finding"
    assert why in line["why"]


@pytest.mark.parametrize(("call", "kind"), [("refuse", "refused"), ("import_cached", "accepted")])
def test_an_error_of_ours_is_none_and_a_module_from_its_cache_neither(said, call, kind):
    (line,) = (line for line in said if line.get("bad") == call)
    assert line["kind"] == kind, line["why"]
