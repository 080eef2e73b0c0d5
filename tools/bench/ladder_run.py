"""One job of tools/ladder: quantize one model by one recipe on one grid, and measure it. No exporter takes part.

What is measured: the decoded weights in the float reference (f32), against the source's, on held-out chunks. As
llama-perplexity does, a chunk of ctx tokens runs alone and positions ctx/2 … ctx - 2 are scored against the token
that follows. Bytes are those of the tensors alone: codes and parameters by the grid's bits per weight, the rest in
the dtype in which it is held.
"""

import hashlib
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import metrics
import msgspec
import numpy as np
import torch

from d2qconv.arch.bind import bind
from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.open import open_checkpoint
from d2qconv.decoder.block import load_block, load_ends
from d2qconv.errors import PlanError
from d2qconv.exporters.base import Carrier, FloatType, TargetPlan, TensorPlan, type_name
from d2qconv.fold import rotation
from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Coded, decoded
from d2qconv.ir.model import Stored
from d2qconv.ir.store import Store
from d2qconv.measure.metrics import Divergence
from d2qconv.names import Part, Role, TensorId
from d2qconv.progress import Unwatched
from d2qconv.run import Recipe, check_recipe
from d2qconv.team import Team
from d2qconv.walk.activations import Place, Placement
from d2qconv.walk.last_pass import LastPass
from d2qconv.walk.model import Walk, WalkResult
from d2qconv.walk.rounding import Rounder
from d2qconv.walk.sharing import SharedStore
from d2qconv_gguf.grids import GRIDS

#: Architectures whose runtimes take no bias at gate and up, so that the rank-1 carrier is what a package would hold.
RANK1 = ("qwen3",)
#: Tokens that go through a block at once while measuring.
BATCH_TOKENS = 8192
#: Sequences that the Walk measures itself; they are not those of the table.
WALK_HELD_OUT = 2


class Settings(msgspec.Struct, frozen=True):
    """What all jobs of a run share. calibration, heldout: .npy of token ids, or a text. bos: -1 for none.

    ends: grid or float type of embedding and head. carrier: `auto`, `bias`, `rank1` or `none`.
    """

    calibration: str
    heldout: str
    sequences: int = 256
    length: int = 512
    seed: int = 0
    ctx: int = 512
    chunks: int = 40
    all_positions: bool = False
    ends: str = "q8_0"
    carrier: str = "auto"
    bos: int = -1
    device: str = "cpu"
    threads: int = 2


class Job(msgspec.Struct, frozen=True):
    """One cell of the tables. kld: file for the KL divergence of every scored position (f32 .npy)."""

    model: str
    label: str
    grid: str
    row: str
    recipe: Recipe
    kld: str
    settings: Settings


class Skipped(Exception):  # noqa: N818 a result, not a failure
    """The job cannot be had, for a reason that belongs in the table."""


def run_job(job: Job) -> dict[str, Any]:
    """The numbers of one job, ready for JSON; raises Skipped where grid and model do not fit."""
    given = job.settings
    started = time.monotonic()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    check_recipe(job.recipe)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    source = bind(open_checkpoint(job.model))
    desc = rotated(source, job.recipe)
    plan = make_plan(desc, find_grid(job.grid), find_storage(given.ends), _carrier(desc, job))
    tokens = calibration_tokens(job, source)
    heldout = heldout_chunks(job, source)
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(Path(folder) / "store", job.grid, grids_of(plan)) as store,
    ):
        before = time.monotonic()
        result = quantize(desc, plan, job.recipe, tokens, store, device)
        seconds = time.monotonic() - before
        made = store.tensors()
        second, everywhere = measure(source, desc, made, heldout, device, is_all=given.all_positions)
        size, block_bits, digest = _content(made)
    kld = torch.cat(second.kl).numpy()
    np.save(job.kld, kld.astype(np.float32))
    estimate = metrics.estimate(kld)
    numbers = {
        "kld": estimate.mean,
        "kld_se": estimate.se,
        "perplexity": second.perplexity.value,
        "perplexity_source": second.perplexity_source.value,
        "same_top": second.same_top,
        "n_positions": second.n_tokens,
        "bytes": size,
        "bits_per_weight": 8 * size / source.n_weights,
        "block_bits_per_weight": block_bits,
        "carrier": plan.carrier.value,
        "output_error": sum(e.output for e in result.errors) / max(len(result.errors), 1),
        "weights_sha256": digest,
        "tokens_sha256": tokens.digest,
        "sequences": len(tokens.calibration),
        "chunks": len(heldout),
        "seconds": seconds,
        "seconds_in_all": time.monotonic() - started,
    }
    if everywhere is not None:
        all_kld = metrics.estimate(torch.cat(everywhere.kl).numpy())
        numbers |= {
            "kld_all": all_kld.mean,
            "kld_all_se": all_kld.se,
            "perplexity_all": everywhere.perplexity.value,
        }
    if device.type == "cuda":
        numbers["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    return numbers


def quantize(
    desc: ModelDesc,
    plan: TargetPlan,
    recipe: Recipe,
    tokens: CalibrationTokens,
    store: Store,
    device: torch.device,
) -> WalkResult:
    """The walk, as `d2qconv.pipeline.convert` does it; activations stay on the device."""
    shared = SharedStore(Team.alone(device), store, grids_of(plan))
    place = Placement(Place.DEVICE, device)
    last = LastPass("model", recipe.refine) if recipe.refine > 0 else LastPass()
    walk = Walk(
        desc, plan, Rounder(recipe), tokens, shared, device, Unwatched(), place, Team.alone(device), last
    )
    return walk.run()


def grids_of(plan: TargetPlan) -> dict[str, Grid]:
    """All grids of the plan, by id."""
    return {t.storage.id: t.storage for t in plan.tensors if not isinstance(t.storage, FloatType)}


def rotated(desc: ModelDesc, recipe: Recipe) -> ModelDesc:
    """The model with its residual stream turned, or itself; raises PlanError where that cannot be done.

    On the CPU, as loading does it; what is computed from it is kept, since every job reads a matrix several times.
    """
    if recipe.rotation == "none":
        return desc
    made = rotation.rotated(desc, rotation.Rotation(recipe.rotation))
    return replace(made, tensors={tensor: Dense.of(dense.load()) for tensor, dense in made.tensors.items()})


def find_grid(name: str) -> Grid:
    """A grid by its id: ggml's, or `affine2_g128_int`; raises Skipped if there is none."""
    if name in GRIDS:
        return GRIDS[name]
    fields = re.fullmatch(r"affine(\d+)_(g|channel)(\d+)_(int|float|sym)", name)
    if fields is None:
        raise Skipped(f"no grid {name}; there are {', '.join(GRIDS)} and affine2_g128_int, …")
    zeros = {"int": "integer", "float": "float", "sym": "none"}
    return AffineGrid(int(fields[1]), int(fields[3]), zeros[fields[4]], is_per_channel=fields[2] == "channel")


def find_storage(name: str) -> Grid | FloatType:
    """A grid, or f32, f16, bf16."""
    return FloatType(name) if name in [t.value for t in FloatType] else find_grid(name)


def make_plan(desc: ModelDesc, grid: Grid, ends: Grid | FloatType, carrier: Carrier) -> TargetPlan:
    """Every linear of the blocks on `grid`, embedding and head on `ends`, vectors in f32; raises Skipped."""
    shapes = {tensor: dense.shape for tensor, dense in desc.tensors.items()}
    for tensor in _new_biases(desc, carrier):
        shapes.setdefault(tensor, (shapes[TensorId(tensor.role, tensor.block)][0],))
    tensors = []
    for tensor, shape in shapes.items():
        storage: Grid | FloatType = grid if tensor.block is not None else ends
        if len(shape) == 1:
            storage = FloatType.F32
        if not isinstance(storage, FloatType):
            refusal = storage.accepts(shape)
            if refusal is not None:
                raise Skipped(f"{tensor}: {refusal.why}")
        tensors.append(TensorPlan(tensor, str(tensor), shape, storage, math.ceil(_n_bytes(storage, shape))))
    return TargetPlan("ladder", tuple(tensors), carrier, type_name(grid), ())


def _new_biases(desc: ModelDesc, carrier: Carrier) -> Iterator[TensorId]:
    """The biases that this carrier needs; raises Skipped where the architecture has no such place."""
    roles: tuple[Role, ...] = ()
    if carrier is Carrier.BIAS:
        coupling = desc.arch.coupling("shift", Role.FFN_NORM)
        if coupling is None:
            raise Skipped(f"{desc.arch.id} cannot carry a shift of {Role.FFN_NORM} as biases")
        roles = coupling.absorbs
    elif carrier.value == "biases":
        roles = tuple(s.role for s in desc.arch.sites if s.can_have_bias and s.n_in is not None)
    for block in range(desc.dims.n_layers):
        yield from (TensorId(role, block, Part.BIAS) for role in roles)


def _n_bytes(storage: Grid | FloatType, shape: tuple[int, ...]) -> float:
    bits = 8 * storage.dtype.itemsize if isinstance(storage, FloatType) else storage.bits_per_weight
    return bits * math.prod(shape) / 8


def _carrier(desc: ModelDesc, job: Job) -> Carrier:
    """How the mean shift is carried; NONE where the recipe measures none."""
    if not job.recipe.dac:
        return Carrier.NONE
    if job.settings.carrier != "auto":
        return Carrier(job.settings.carrier)
    return Carrier.RANK1 if desc.arch.id in RANK1 else Carrier.BIAS


def calibration_tokens(job: Job, desc: ModelDesc) -> CalibrationTokens:
    """A seeded choice of whole sequences, the same as the pipeline's; the Walk's own held-out ones come after it."""
    given = job.settings
    stream = read_tokens(given.calibration, job.model, desc)
    n = len(stream) // given.length
    if n <= WALK_HELD_OUT:
        raise Skipped(
            f"{given.calibration}: {len(stream)} tokens are too few for sequences of {given.length}"
        )
    choice = torch.randperm(n, generator=torch.Generator().manual_seed(given.seed))
    wanted = min(given.sequences, n - WALK_HELD_OUT)
    rows = stream[: n * given.length].view(n, given.length)[choice[: wanted + WALK_HELD_OUT]].clone()
    if given.bos >= 0:
        rows[:, 0] = given.bos
    return CalibrationTokens(rows[:wanted], rows[wanted:], f"{wanted} × {given.length} tokens")


def heldout_chunks(job: Job, desc: ModelDesc) -> torch.Tensor:
    """i64[chunks, ctx]: the first chunks of the held-out tokens."""
    given = job.settings
    stream = read_tokens(given.heldout, job.model, desc)
    n = min(given.chunks, len(stream) // given.ctx)
    if n < 1:
        raise Skipped(f"{given.heldout}: {len(stream)} tokens are less than one chunk of {given.ctx}")
    rows = stream[: n * given.ctx].view(n, given.ctx).clone()
    if given.bos >= 0:
        rows[:, 0] = given.bos
    return rows


def read_tokens(file: str, model: str, desc: ModelDesc) -> torch.Tensor:
    """All tokens of a .npy, or of a text by the model's tokenizer.json (needs `tokenizers`); i64[n]."""
    path = Path(file)
    if path.suffix == ".npy":
        ids = np.load(path, allow_pickle=False).astype(np.int64).reshape(-1)
    else:
        from tokenizers import Tokenizer  # noqa: PLC0415 token files do without

        tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids)
    if len(ids) and not 0 <= ids.min() <= ids.max() < desc.dims.vocab:
        raise Skipped(f"{file} holds token {ids.max()}, the vocabulary of {model} has {desc.dims.vocab}")
    return torch.from_numpy(ids.astype(np.int64))


class Decoded(Mapping[TensorId, Dense]):
    """The tensors of a store as a checkpoint has them, f32, decoded when read."""

    def __init__(self, made: Mapping[TensorId, Stored]) -> None:
        self._made = made

    def __getitem__(self, key: TensorId) -> Dense:
        held = self._made[key]
        if isinstance(held, Coded):
            return Dense(held.shape, torch.float32, lambda: decoded(held))
        return held

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@torch.inference_mode()
def measure(
    source: ModelDesc,
    desc: ModelDesc,
    made: Mapping[TensorId, Stored],
    chunks: torch.Tensor,
    device: torch.device,
    *,
    is_all: bool = False,
) -> tuple[Divergence, Divergence | None]:
    """Source against decoded weights: over the second halves, and over every position if asked.

    chunks: i64[n, ctx]. desc: the model that was quantized (rotated, perhaps). One block of each is in memory.
    """
    model = replace(desc, tensors=Decoded(made))
    chunks = chunks.to(device)
    first = chunks.shape[1] // 2
    ends = [load_ends(m, device) for m in (source, model)]
    streams = [e.embed(chunks) for e in ends]
    n = max(BATCH_TOKENS // chunks.shape[1], 1)
    for index in range(source.dims.n_layers):
        for m, x in zip((source, model), streams, strict=True):
            block = load_block(m, index, device)
            for start in range(0, len(x), n):
                x[start : start + n] = block(x[start : start + n])
    second, everywhere = Divergence(), Divergence() if is_all else None
    for of_source, x, ids in zip(*streams, chunks, strict=True):
        logits = [e.logits(y[first:-1]) for e, y in zip(ends, (of_source, x), strict=True)]
        second.add(logits[0], logits[1], ids[first + 1 :])
        if everywhere is not None:
            everywhere.add(ends[0].logits(of_source[:-1]), ends[1].logits(x[:-1]), ids[1:])
    return second, everywhere


def _content(made: Mapping[TensorId, Stored]) -> tuple[int, float, str]:
    """Bytes of all tensors, bits per weight of the blocks' coded matrices, and a digest of all decoded values.

    Equal digests are the same model.
    """
    sha, size, block_bits, n_coded = hashlib.sha256(), 0.0, 0.0, 0
    for tensor in sorted(made, key=str):
        held = made[tensor]
        if isinstance(held, Coded):
            values, n = decoded(held), math.prod(held.shape)
            bits = held.grid.bits_per_weight * n
            if tensor.block is not None:
                block_bits, n_coded = block_bits + bits, n_coded + n
        else:
            values, bits = held.load().float(), 8 * held.dtype.itemsize * held.n_elements
        size += bits / 8
        sha.update(f"{tensor} {tuple(values.shape)}".encode())
        sha.update(values.contiguous().numpy().data)
    return math.ceil(size), block_bits / max(n_coded, 1), sha.hexdigest()


def answer(line: str) -> dict[str, Any]:
    """Do the job that one line of JSON describes; whatever happens is an answer."""
    try:
        return {"status": "ok", **run_job(msgspec.json.decode(line, type=Job))}
    except (Skipped, PlanError) as reason:
        return {"status": "skipped", "reason": " ".join(str(reason).split())}
    except Exception as error:  # noqa: BLE001 one failing job must not stop the others
        import traceback  # noqa: PLC0415

        traceback.print_exc(file=sys.stderr)
        return {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}


def serve() -> None:
    """Jobs from standard input, one a line; answers to standard output, one a line. Other output goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(msgspec.json.encode(answer(line)).decode(), file=out, flush=True)
