"""Tokens per second of packages in onnxruntime-genai on the CPU: `onnx_speed.py REQUEST.json` measures one once.

Every measurement is a process of its own; packages take turns over several rounds and the best round of each counts,
so that what else the machine does falls on all alike.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

#: Tokens made before the clock starts.
WARM = 4


@dataclass(frozen=True)
class Request:
    """prompt: token ids. n_decode: tokens timed after it."""

    folder: str
    prompt: list[int]
    n_decode: int
    threads: int


@dataclass(frozen=True)
class Speed:
    """Tokens a second; load: seconds until the model was ready. nan: not measured."""

    prompt: float = math.nan
    decode: float = math.nan
    load: float = math.nan
    error: str = ""

    def best(self, other: "Speed") -> "Speed":
        """The better of two rounds, each number for itself; an error stays."""
        if self.error or other.error:
            return self if self.error else other
        if math.isnan(self.decode):
            return other
        return Speed(
            max(self.prompt, other.prompt), max(self.decode, other.decode), min(self.load, other.load)
        )


def measured(request: Request) -> Speed:
    """In this process. The library is imported here, since only these processes need it."""
    import onnxruntime_genai as og  # noqa: PLC0415

    start = time.perf_counter()
    config = og.Config(request.folder)
    threads = {"intra_op_num_threads": request.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    load = time.perf_counter() - start
    length = len(request.prompt) + WARM + request.n_decode
    params = og.GeneratorParams(model)
    # A minimum as large as the maximum: no end-of-text token stops it.
    params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
    # The first pass over a prompt packs and allocates; it is not timed.
    og.Generator(model, params).append_tokens(request.prompt)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(request.prompt)
    prompt = len(request.prompt) / (time.perf_counter() - start)
    for _ in range(WARM):
        generator.generate_next_token()
    start = time.perf_counter()
    for _ in range(request.n_decode):
        generator.generate_next_token()
    decode = request.n_decode / (time.perf_counter() - start)
    made = len(generator.get_sequence(0))
    if made != length:
        raise RuntimeError(f"{made} tokens came out instead of {length}")
    return Speed(prompt, decode, load)


def in_process(request: Request, work: Path) -> Speed:
    """In a process of its own; what goes wrong there is the result's `error`."""
    file = work / "speed-request.json"
    file.write_text(json.dumps(asdict(request)), encoding="utf-8")
    command = (sys.executable, str(Path(__file__).resolve()), str(file))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Speed(error=lines[-1])
    return Speed(**json.loads(done.stdout.strip().splitlines()[-1]))


def speeds(
    folders: list[Path], prompt: list[int], n_decode: int, threads: int, rounds: int, work: Path
) -> list[Speed]:
    """Best of `rounds` of every folder, in turns."""
    best = [Speed()] * len(folders)
    for index in range(rounds):
        for i, folder in enumerate(folders):
            if not best[i].error:
                best[i] = best[i].best(in_process(Request(str(folder), prompt, n_decode, threads), work))
        print(f"speed: round {index + 1} of {rounds}", file=sys.stderr)
    return best


if __name__ == "__main__":
    print(json.dumps(asdict(measured(Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))))
