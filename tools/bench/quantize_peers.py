"""Other quantizers on the same folder and the same tokens; 2 bits in groups of 128 with zero points if not said.

`quantize_peers.py REQUEST.json RESULT.json` runs one of them, in a process of its own. Each is called as its own
documentation calls it, with its defaults where nothing is said here. `load` is transformers reading the checkpoint
into host memory, `quantize` the library's own work, `save` its packing to disk where it can save two bits. Our own run
has all of that in one number: it reads the checkpoint, packs, writes and verifies.
Ours at Q2_K stores 2.625 bits a weight in the blocks; 2 bits with a 16-bit scale and a 2-bit zero a group of 128
are 2.14.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantize_memory import Peaks, Sampler


@dataclass(frozen=True)
class PeerRequest:
    """peer: a key of PEERS. model: folder. tokens: `calibration.npy`, i32[sequences, length]. output: a new folder.

    group: weights that share a scale. is_symmetric: no zero points.
    """

    peer: str
    model: str
    tokens: str
    output: str
    device: str
    bits: int = 2
    group: int = 128
    is_symmetric: bool = False

    @property
    def stored(self) -> str:
        """What the package holds, for people."""
        return f"W{self.bits} g{self.group}{' symmetric' if self.is_symmetric else ''}"


@dataclass(frozen=True)
class Times:
    """Seconds of one peer. what: its settings in words. bits: what it stores, in words."""

    what: str
    bits: str
    load: float
    quantize: float
    save: float


@dataclass(frozen=True)
class PeerResult:
    """Times and peaks. version: of the library."""

    what: str
    bits: str
    version: str
    load: float
    quantize: float
    save: float
    peaks: Peaks


def _wait() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _tokens(path: str) -> torch.Tensor:
    """i64[sequences, length]."""
    return torch.from_numpy(np.load(path).astype(np.int64))


def _load(asked: PeerRequest) -> tuple[Any, Any, float]:
    """Model (bf16, host memory) and tokenizer, as transformers loads them, and the seconds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    return model, tokenizer, time.perf_counter() - started


def llmcompressor_gptq(asked: PeerRequest) -> Times:
    """llm-compressor's GPTQModifier: block size 128, damping 0.01, the sequential pipeline, compressed-tensors."""
    return _llmcompressor(asked, is_gptq=True)


def llmcompressor_rtn(asked: PeerRequest) -> Times:
    """llm-compressor's QuantizationModifier: min-max ranges of the weights, no calibration."""
    return _llmcompressor(asked, is_gptq=False)


def _llmcompressor(asked: PeerRequest, *, is_gptq: bool) -> Times:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from llmcompressor import oneshot  # noqa: PLC0415
    from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415
    from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: PLC0415

    model, tokenizer, load = _load(asked)
    arguments = QuantizationArgs(
        num_bits=asked.bits,
        type="int",
        symmetric=asked.is_symmetric,
        strategy="group",
        group_size=asked.group,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}
    modifier = (GPTQModifier if is_gptq else QuantizationModifier)(config_groups=groups, ignore=["lm_head"])
    started = time.perf_counter()
    if is_gptq:
        ids = _tokens(asked.tokens)
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        oneshot(
            model=model, tokenizer=tokenizer, dataset=Dataset.from_dict(rows), recipe=modifier,
            num_calibration_samples=len(ids), max_seq_length=ids.shape[1], shuffle_calibration_samples=False,
        )  # fmt: skip
    else:
        oneshot(model=model, tokenizer=tokenizer, recipe=modifier)
    quantized = _wait()
    model.save_pretrained(asked.output, save_compressed=True)
    what = "GPTQ, block by block" if is_gptq else "nearest, no data"
    return Times(what, asked.stored, load, quantized - started, _wait() - quantized)


def autoround(asked: PeerRequest) -> Times:
    """AutoRound with its default 200 steps of sign gradient descent a block, batches of 8."""
    return _autoround(asked, iters=200)


def autoround_rtn(asked: PeerRequest) -> Times:
    """AutoRound with 0 steps: its rounding to nearest."""
    return _autoround(asked, iters=0)


def autoround_best(asked: PeerRequest) -> Times:
    """What AutoRound's documentation recommends for W2A16: 1000 steps and its variant of the algorithm."""
    return _autoround(asked, iters=1000, is_extended=True)


def _autoround(asked: PeerRequest, *, iters: int, is_extended: bool = False) -> Times:
    from auto_round import AutoRound  # noqa: PLC0415

    model, tokenizer, load = _load(asked)
    ids = _tokens(asked.tokens)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    started = time.perf_counter()
    scheme = {
        "bits": asked.bits, "group_size": asked.group, "sym": asked.is_symmetric, "data_type": "int", "act_bits": 16,
    }  # fmt: skip
    rounder = AutoRound(
        model, tokenizer=tokenizer, scheme=scheme, dataset=batches, iters=iters, nsamples=len(ids),
        seqlen=ids.shape[1], device_map=asked.device, **({"enable_alg_ext": True} if is_extended else {}),
    )  # fmt: skip
    rounder.quantize()
    quantized = _wait()
    rounder.save_quantized(asked.output, format="auto_round")
    what = f"{iters} steps a block" if iters else "nearest (iters=0)"
    what += ", enable_alg_ext" if is_extended else ""
    return Times(what, asked.stored, load, quantized - started, _wait() - quantized)


def gptqmodel(asked: PeerRequest) -> Times:
    """GPTQModel's GPTQ, its defaults but for bits, group and zero points, which version 2 stores as they are."""
    if (os.cpu_count() or 1) < 4:  # its own choice for two cores is refused by its own check
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig, extension  # noqa: PLC0415

    # Compiled with g++ on first use, which is not the quantizer's time; without it packing goes a slower way.
    with contextlib.suppress(RuntimeError):
        extension.load("pack_block_cpu")
    started = time.perf_counter()
    config = QuantizeConfig(
        bits=asked.bits, group_size=asked.group, sym=asked.is_symmetric, device=asked.device, format="gptq_v2"
    )
    model = GPTQModel.load(asked.model, config)
    loaded = time.perf_counter()
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in _tokens(asked.tokens)]
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH, calibration_sort=None)
    quantized = _wait()
    model.save(asked.output)
    return Times("GPTQ", asked.stored, loaded - started, quantized - loaded, _wait() - quantized)


PEERS: dict[str, tuple[str, Callable[[PeerRequest], Times]]] = {
    "llmcompressor": ("llmcompressor", llmcompressor_gptq),
    "llmcompressor-rtn": ("llmcompressor", llmcompressor_rtn),
    "autoround": ("auto-round", autoround),
    "autoround-best": ("auto-round", autoround_best),
    "autoround-rtn": ("auto-round", autoround_rtn),
    "gptqmodel": ("gptqmodel", gptqmodel),
}


def run(asked: PeerRequest) -> PeerResult:
    """One peer under the sampler."""
    package, function = PEERS[asked.peer]
    with Sampler() as sampler:
        times = function(asked)
    return PeerResult(**asdict(times), version=version(package), peaks=sampler.peaks)


def main() -> None:
    asked = PeerRequest(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(asdict(run(asked))), encoding="utf-8")


if __name__ == "__main__":
    main()
