"""The peers of tools/bench_onnx: what onnxruntime and onnxruntime-genai make of the same Hugging Face folder.

From the float graph of the genai builder, `onnxruntime.quantization.matmul_nbits_quantizer` makes its packages of 2
and 4 bits. Where it has an algorithm but no way to store its result (k-quant at 2 bits, all at 3), the library's own
function makes the codes and this file stores them, 3-bit codes in a container of 4; the row says so. The builder's own
int4 comes from its command line.

Embedding and head are made alike everywhere: 8 bits by onnxruntime's own rounding to nearest, one set of bytes for both
where the model ties them, as the builder's `*_last` does; or left float.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from onnx_nbits import F32, LEVEL, Rounded, as_nbits, drop_unread, quantize_ends
from onnx_package import CODE_BITS, Graph
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantizer,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor, quant_tensor_k_quant_cpu

ALGORITHMS = ("rtn", "k_quant", "hqq")
#: int4 of the builder: `algo_config` by what the row is called. `_last`: embedding and head in 8 bits.
BUILDER = {"default": "default", "rtn": "rtn_last", "k_quant": "k_quant_last"}
#: What the builder calls head and embedding.
FLOAT_ENDS = "/lm_head/MatMul,/model/embed_tokens/Gather"
DATA = "model.onnx.data"


@dataclass(frozen=True)
class Peer:
    """One package to make. who: for the table. algorithm: of ALGORITHMS, or of BUILDER if `builder`."""

    who: str
    bits: int
    block: int
    algorithm: str
    builder: bool
    note: str = ""

    @property
    def name(self) -> str:
        return f"{'builder-' if self.builder else ''}{self.algorithm}-{self.bits}b-g{self.block}"


def peers(bits: list[int], blocks: list[int], algorithms: list[str], builder: bool) -> list[Peer]:
    """All peers of a comparison; a note says what the library could not do by itself."""
    found = []
    for b in bits:
        for block in blocks:
            for algorithm in algorithms:
                stored = not _by_library(b, algorithm)
                note = "codes by the library's function, stored by this tool" if stored else ""
                if b == 3:
                    note += ", in a 4-bit container"
                found.append(Peer(f"onnxruntime {algorithm}", b, block, algorithm, False, note))
            if builder and b == 4:
                found += [Peer(f"genai builder {name}", b, block, name, True) for name in BUILDER]
    return found


def _by_library(bits: int, algorithm: str) -> bool:
    return bits == 4 or (bits == 2 and algorithm != "k_quant")


def run_builder(model: Path, out: Path, precision: str, *extra: str) -> tuple[str, ...]:
    """`onnxruntime_genai.models.builder` for the CPU, offline. Returns the command; raises RuntimeError."""
    with tempfile.TemporaryDirectory() as cache:
        command = (
            sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out),
            "-p", precision, "-e", "cpu", "-c", cache, *(("--extra_options", *extra) if extra else ()),
        )  # fmt: skip
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise RuntimeError(f"the builder ended with {done.returncode}: {lines[-1]}")
    return command


def make(peer: Peer, model: Path, source: Path, out: Path, ends: str) -> None:
    """Write one peer to the folder `out`, whole or not at all.

    source: the float package of the same model. ends: `8` or `float`. Raises RuntimeError, and whatever the
    libraries raise.
    """
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if peer.builder:
        extra = [f"algo_config={BUILDER[peer.algorithm]}", f"block_size={peer.block}"]
        if ends == "float":
            extra = [
                f"algo_config={peer.algorithm}",
                f"block_size={peer.block}",
                f"nodes_to_exclude={FLOAT_ENDS}",
            ]
        run_builder(model, part, "int4", *extra)
    else:
        quantized = _quantized(peer, source)
        if ends != "float":
            quantize_ends(quantized, peer.block)
        _save(quantized, source, part)
    part.rename(out)


def _quantized(peer: Peer, source: Path) -> ModelProto:
    """The float graph with every linear of the blocks quantized."""
    for name in (MatMulNBitsQuantizer.__module__, "neural_compressor"):
        logging.getLogger(name).setLevel(logging.WARNING)
    model = onnx.load(source / "model.onnx")
    head = Graph(model).head().name
    if not _by_library(peer.bits, peer.algorithm):
        return _stored_here(model, peer)
    config = {
        "rtn": lambda: DefaultWeightOnlyQuantConfig(
            block_size=peer.block, is_symmetric=False, accuracy_level=LEVEL, bits=peer.bits
        ),
        "k_quant": KQuantWeightOnlyQuantConfig,
        "hqq": lambda: HQQWeightOnlyQuantConfig(block_size=peer.block, bits=peer.bits),
    }[peer.algorithm]()
    work = MatMulNBitsQuantizer(
        model, bits=peer.bits, block_size=peer.block, is_symmetric=False, accuracy_level=LEVEL,
        nodes_to_exclude=[head], algo_config=config,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        work.process()
    return work.model.model


def _round(weight: F32, peer: Peer) -> Rounded:
    """weight: f32[N, K], K a multiple of the block, by the library's function."""
    n_out, n_in = weight.shape
    if peer.algorithm == "hqq":
        solver = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=peer.block))
        codes, scales, zeros = solver.quantize_internal(
            torch.from_numpy(weight.copy()), bits=peer.bits, group_size=peer.block
        )
        return Rounded(codes.numpy().astype(np.uint8), scales.numpy(), zeros.numpy())
    if peer.algorithm == "k_quant":
        codes, scales, zeros = quant_tensor_k_quant_cpu(weight, peer.bits, peer.block)
    else:
        codes, scales, zeros = quant_tensor(weight, peer.bits, peer.block, "asym", "uint")
    return Rounded(
        codes.astype(np.uint8).reshape(n_out, n_in),
        scales.astype(np.float32).reshape(n_out, -1),
        zeros.astype(np.uint8).reshape(n_out, -1),
    )


def _stored_here(model: ModelProto, peer: Peer) -> ModelProto:
    """Every linear of the blocks as MatMulNBits, from codes of the library's function."""
    container = 4 if peer.bits == 3 else peer.bits
    graph = Graph(model)
    names = {}
    for node in graph.linears():
        weight = numpy_helper.to_array(graph.constants[node.input[1]]).T
        rounded = _round(weight, peer)
        level = LEVEL if rounded.zeros.dtype == np.uint8 else 0
        names[as_nbits(model, node, rounded, peer.block, container, level)] = peer.bits
    if container != peer.bits:
        entry = model.metadata_props.add()
        entry.key, entry.value = CODE_BITS, json.dumps(names)
    return model


def _save(model: ModelProto, source: Path, out: Path) -> None:
    """Graph, data, and the side files of the float package."""
    drop_unread(model)
    onnx.save(
        model, out / "model.onnx", save_as_external_data=True, all_tensors_to_one_file=True, location=DATA,
        size_threshold=1024,
    )  # fmt: skip
    for file in source.iterdir():
        if file.is_file() and file.name not in {"model.onnx", DATA}:
            shutil.copyfile(file, out / file.name)
