"""How much memory a run will take, part by part, and where its activations therefore go.

A run passes through phases; a part is alive in some of them, and the peak is the phase whose parts sum to the most.
The sizes are those of the arrays that the code makes, in bytes; of an expression's temporaries, the most that are
alive at once. On the CPU there is one memory and everything counts as the host's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import Budget, gibibytes
from d2qconv.calibrate.sample import sample_bytes
from d2qconv.errors import Refusal
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.walk.activations import Place
from d2qconv.walk.rounding import Rounder
from d2qconv.walk.stream import BATCH_TOKENS, JUDGED_TOKENS

F32, F64 = 4, 8
#: Matrices of the widest input's size that are alive while the Hessian is inverted, in f64.
FACTOR_MATRICES = 4
#: Matrices of a sweep's size: weights, source's weights, the transposed rest, the miss, its product, the decoded.
SWEEP_MATRICES = 6
#: The same while codes are chosen again: values, their gradient, a chunk's and the columns' arrays.
POLISH_MATRICES = 4
#: The same for the head, and the columns' arrays while the embedding is rounded.
ENDS_MATRICES = 5
#: f64 arrays of a piece's log-probabilities, and two of f32 logits.
JUDGE_BYTES = 5 * F64 + 2 * F32
#: Codes of a weight with their parameters, before packing.
CODED_BYTES = 1.25
#: The interpreter, torch and its libraries; the same with CUDA's. Measured: .35 and 1.4 GiB.
CPU_PROCESS, CUDA_PROCESS = 500 << 20, 2 << 30


class Phase(StrEnum):
    """What a run is doing."""

    SAMPLE = "sampling"
    ENDS = "embedding and head"
    STATISTICS = "statistics"
    FACTOR = "factor"
    SWEEP = "sweep"
    FORWARD = "forward"
    JUDGE = "KL divergence"
    PACKAGE = "package"


_BLOCK = (Phase.STATISTICS, Phase.FACTOR, Phase.SWEEP, Phase.FORWARD)
_WALK = (Phase.ENDS, *_BLOCK)


@dataclass(frozen=True)
class MemoryPart:
    """Some arrays with a common purpose, all alive throughout `phases`."""

    name: str
    n_bytes: int
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Footprint:
    """Predicted memory. place: of the activations. gpu: empty on the CPU. disk_bytes: of activations on disk."""

    place: Place
    gpu: tuple[MemoryPart, ...]
    host: tuple[MemoryPart, ...]
    disk_bytes: int
    budget: Budget
    refusals: tuple[Refusal, ...] = ()

    @property
    def gpu_peak(self) -> int:
        """Bytes on the GPU in the phase that needs most."""
        return peak(self.gpu)[1]

    @property
    def free_for_last_pass(self) -> int:
        """Bytes on the device beside what lives through the whole walk."""
        if self.budget.gpu_bytes is not None:
            held, budget = self.gpu, self.budget.gpu_bytes
        else:
            held, budget = self.host, self.budget.host_bytes
        return budget - sum(p.n_bytes for p in held if set(_WALK) <= set(p.phases))

    @property
    def host_peak(self) -> int:
        """Bytes of the host in the phase that needs most."""
        return peak(self.host)[1]


def peak(parts: Sequence[MemoryPart]) -> tuple[Phase, int]:
    """The phase that needs most, and its bytes."""
    sums = {phase: sum(p.n_bytes for p in parts if phase in p.phases) for phase in Phase}
    phase = max(sums, key=lambda phase: sums[phase])
    return phase, sums[phase]


def predict(
    desc: ModelDesc,
    calibration: CalibrationSpec,
    n_held_out: int,
    recipe: Recipe,
    budget: Budget,
    device: torch.device,
) -> Footprint:
    """The first of device (a GPU's), host and disk with which both peaks are within the budget.

    If none is, the footprint of the disk with refusals. Sampling that does not fit is refused by itself: it needs
    the whole model, and a file of tokens does not.
    """
    sizes = _Sizes(desc, calibration, n_held_out, recipe, device)
    is_cuda = device.type != "cpu"
    places = (Place.DEVICE, Place.HOST, Place.DISK) if is_cuda else (Place.HOST, Place.DISK)
    for place in places:
        found = _footprint(sizes, place, budget)
        refusals = [*_excess(found, is_sampling=False)]
        if not refusals:
            break
    if calibration.source == "self":
        refusals += _excess(found, is_sampling=True)
    return Footprint(found.place, found.gpu, found.host, found.disk_bytes, budget, tuple(refusals))


def _footprint(sizes: _Sizes, place: Place, budget: Budget) -> Footprint:
    streams = [*sizes.streams()]
    compute, host = [*sizes.compute()], [*sizes.host()]
    on_disk = sum(part.n_bytes for part in streams) if place is Place.DISK else 0
    if sizes.device.type == "cpu":
        here = streams if place is Place.HOST else []
        return Footprint(place, (), (*here, *compute, *host), on_disk, budget)
    gpu = (*streams, *compute) if place is Place.DEVICE else tuple(compute)
    return Footprint(place, gpu, (*streams, *host) if place is Place.HOST else tuple(host), on_disk, budget)


def _excess(found: Footprint, *, is_sampling: bool) -> Iterator[Refusal]:
    """One refusal for each memory whose budget is too small."""
    memories = (("GPU", "--max-gpu-mem", found.gpu, found.budget.gpu_bytes),
                ("host", "--max-host-mem", found.host, found.budget.host_bytes))  # fmt: skip
    for name, option, parts, allowed in memories:
        here = [
            MemoryPart(p.name, p.n_bytes, tuple(f for f in p.phases if (f is Phase.SAMPLE) == is_sampling))
            for p in parts
        ]
        phase, needed = peak(here)
        if allowed is None or needed <= allowed:
            continue
        biggest = max((p for p in here if phase in p.phases), key=lambda p: p.n_bytes)
        why = (
            f"{phase} needs {gibibytes(needed)} of {name} memory, and the budget is {gibibytes(allowed)}; "
            f"most of it is {biggest.name} ({gibibytes(biggest.n_bytes)})"
        )
        if is_sampling:
            todo = "give --calibration FILE: only sampling from the model needs all of it in memory"
        else:
            todo = f"give {option} {-(-needed >> 20)}MiB on a machine that has it, or use a shorter --length"
        yield Refusal("memory", why, todo)


@dataclass(frozen=True)
class _Sizes:
    """The arrays of one run."""

    desc: ModelDesc
    calibration: CalibrationSpec
    n_held_out: int
    recipe: Recipe
    device: torch.device

    def streams(self) -> Iterator[MemoryPart]:
        """Activations; the held-out sequences always run through the source too."""
        recipe, per = self.recipe, self.calibration.length * self.desc.dims.hidden * F32
        is_source_wanted = Rounder(recipe).needs_source or recipe.refine != 0
        yield MemoryPart("activations", self.calibration.sequences * per, _WALK)
        if is_source_wanted:
            yield MemoryPart("source activations", self.calibration.sequences * per, _WALK)
        yield MemoryPart("held-out activations", 2 * self.n_held_out * per, (*_WALK, Phase.JUDGE))

    def compute(self) -> Iterator[MemoryPart]:
        """What lies on the device besides activations."""
        dims = self.desc.dims
        block = self._block_elements()
        wide = max(dims.ffn, dims.hidden, dims.n_heads * dims.head)
        has_source = Rounder(self.recipe).needs_source
        square = wide * wide
        matrices = max(rows * columns for rows, columns in self._sweeps())
        yield MemoryPart("block weights, source's and quantized", 2 * block * F32, _BLOCK)
        yield MemoryPart("the block as decoded for the next", block * F32, (Phase.FORWARD,))
        yield MemoryPart("codes of the block", int(block * CODED_BYTES), (Phase.SWEEP, Phase.FORWARD))
        yield MemoryPart("Gram and cross moments", (1 + has_source) * square * F32, _BLOCK[:3])
        yield MemoryPart("batch temporaries", self._batch(), (Phase.STATISTICS, Phase.FORWARD))
        if self.recipe.rounding == "gptq":
            factor = FACTOR_MATRICES * square * F64
            yield MemoryPart("inverse Hessian's factor, f64", factor, (Phase.FACTOR,))
            yield MemoryPart("factor, f32", square * F32, (Phase.SWEEP,))
        yield MemoryPart("sweep temporaries", SWEEP_MATRICES * matrices * F32, (Phase.SWEEP,))
        if self.recipe.polish and self.recipe.rounding == "gptq":
            polish = (square + POLISH_MATRICES * matrices) * F32
            yield MemoryPart("codes chosen again", polish, (Phase.SWEEP,))
        ends = dims.vocab * dims.hidden * F32
        yield MemoryPart("embedding or head, and its rounding", ENDS_MATRICES * ends, (Phase.ENDS,))
        yield MemoryPart("heads, source's and quantized", 2 * ends, (Phase.JUDGE,))
        n_judged = min(JUDGED_TOKENS, self.calibration.length)
        yield MemoryPart("log-probabilities", n_judged * dims.vocab * JUDGE_BYTES, (Phase.JUDGE,))
        if self.calibration.source == "self":
            n_seq = self.calibration.sequences + self.n_held_out
            sampling = sample_bytes(self.desc, n_seq, self.calibration.length, self.device)
            yield MemoryPart("whole model", sampling.weights, (Phase.SAMPLE,))
            yield MemoryPart("keys and values", sampling.past, (Phase.SAMPLE,))
            yield MemoryPart("sampling temporaries", sampling.step, (Phase.SAMPLE,))

    def host(self) -> Iterator[MemoryPart]:
        """What lies in host memory whatever the device is. The two embeddings stay until the streams are made."""
        dims, tensors = self.desc.dims, self.desc.tensors
        largest = max(tensors.values(), key=lambda t: t.n_elements)
        ends = dims.vocab * dims.hidden
        stored = max(self._block_elements(), ends)
        process = CPU_PROCESS if self.device.type == "cpu" else CUDA_PROCESS
        yield MemoryPart("interpreter and libraries", process, tuple(Phase))
        yield MemoryPart("embeddings as stored", int(ends * (F32 + CODED_BYTES)), (Phase.ENDS,))
        reading = largest.n_elements * (largest.dtype.itemsize + F32)
        yield MemoryPart("a tensor on its way from the checkpoint", reading, (*_WALK, Phase.SAMPLE))
        itemsize = next(t.dtype.itemsize for i, t in tensors.items() if i.block is not None)
        yield MemoryPart("the next block, read ahead", self._block_elements() * itemsize, _BLOCK)
        writing = int(2 * stored * CODED_BYTES)
        yield MemoryPart("a part on its way to the work directory", writing, (Phase.ENDS, Phase.FORWARD))
        packing = int(largest.n_elements * (2 * F32 + 2 * CODED_BYTES))
        yield MemoryPart("a tensor on its way to the package", packing, (Phase.PACKAGE,))
        if self.device.type != "cpu" and self.calibration.source == "self":
            yield MemoryPart("random numbers", self._noise(), (Phase.SAMPLE,))

    def _block_elements(self) -> int:
        """Weights of the largest block."""
        blocks: dict[int, int] = {}
        for tensor_id, tensor in self.desc.tensors.items():
            if tensor_id.block is not None:
                blocks[tensor_id.block] = blocks.get(tensor_id.block, 0) + tensor.n_elements
        return max(blocks.values())

    def _sweeps(self) -> list[tuple[int, int]]:
        """(rows, columns) of the matrices that are rounded together."""
        dims = self.desc.dims
        q_out, kv_out = dims.n_heads * dims.head, dims.n_kv_heads * dims.head
        return [
            (q_out + 2 * kv_out, dims.hidden),
            (dims.hidden, q_out),
            (2 * dims.ffn, dims.hidden),
            (dims.hidden, dims.ffn),
        ]

    def _batch(self) -> int:
        """Of one batch: gate, SiLU of it and up, or the attention's arrays, for the teacher and for the student."""
        dims, length = self.desc.dims, self.calibration.length
        n_seq = min(max(BATCH_TOKENS // length, 1), max(self.calibration.sequences, self.n_held_out))
        q_out, kv_out = dims.n_heads * dims.head, dims.n_kv_heads * dims.head
        ffn = 2 * n_seq * length * (3 * dims.ffn + 3 * dims.hidden) * F32
        attention = n_seq * length * (8 * q_out + 6 * kv_out + 4 * dims.hidden) * F32
        # `Block.attention_received` holds one sequence's scores, masked, their softmax and its square.
        received = 4 * dims.n_heads * length * length * F32 if self.recipe.attention_weights else 0
        return max(ffn, attention, received + 2 * n_seq * length * dims.hidden * F32)

    def _noise(self) -> int:
        n_seq = self.calibration.sequences + self.n_held_out
        return 2 * n_seq * self.desc.dims.vocab * F32


def choose_place(n_bytes: int, footprint: Footprint, device: torch.device) -> Place:
    """Where activations go that live beside what a run needs at its peak: the fastest place that has room."""
    budget = footprint.budget
    if device.type == "cuda" and n_bytes <= (budget.gpu_bytes or 0) - footprint.gpu_peak:
        return Place.DEVICE
    return Place.HOST if n_bytes <= budget.host_bytes - footprint.host_peak else Place.DISK


def footprint_facts(footprint: Footprint) -> Mapping[str, object]:
    """A footprint as JSON."""
    return {
        "activations": footprint.place,
        "gpu": _facts(footprint.gpu, footprint.budget.gpu_bytes) if footprint.gpu else None,
        "host": _facts(footprint.host, footprint.budget.host_bytes),
        "disk_bytes": footprint.disk_bytes,
    }


def _facts(parts: Sequence[MemoryPart], budget: int | None) -> Mapping[str, object]:
    phase, n_bytes = peak(parts)
    listed = [{"name": p.name, "n_bytes": p.n_bytes, "phases": p.phases} for p in parts]
    return {"peak": n_bytes, "phase": phase, "budget": budget, "parts": listed}
