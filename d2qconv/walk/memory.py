"""How much memory a run will take, part by part, and where its activations therefore go.

A run passes through phases; a part is alive in some of them, and the peak is the phase whose parts sum to the most.
The sizes are those of the arrays that the code makes, in bytes; of an expression's temporaries, the most that are
alive at once. On a GPU there are CUDA's own memory and the gaps of PyTorch's allocator beside them. On the CPU there is
one memory and everything counts as the host's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import CUDA_CONTEXT, Budget, gibibytes
from d2qconv.calibrate.sample import sample_bytes
from d2qconv.errors import Refusal
from d2qconv.quant.slabs import slabs
from d2qconv.quant.sweep import LAZY_COLUMNS
from d2qconv.run import CalibrationSpec, Recipe
from d2qconv.walk.activations import Place
from d2qconv.walk.attribution import branch_bytes
from d2qconv.walk.last_pass import LastPass
from d2qconv.walk.rounding import Rounder
from d2qconv.walk.stream import BATCH_TOKENS, JUDGED_TOKENS

F32, F64 = 4, 8
#: Matrices of the widest input's size that are alive while the Hessian is inverted, in f64.
FACTOR_MATRICES = 2
#: Arrays of a slab's size: weights moved towards the source, the transposed rest, a product; a chunk's columns.
SWEEP_SLABS = 4
#: The same while codes are chosen again: moved weights, values, their gradient and its difference; a chunk's columns.
POLISH_SLABS = 5
#: Codes of a matrix: its slabs', put together, and as the parts of it take them.
CODES_HELD = 3
#: Arrays of a chunk's size that a recording of it keeps, in f32.
RECORDED_ARRAYS = 8
#: One part in so many of what tensors take is lost in the gaps between them. Measured at 8B: 15 %.
GAPS = 6
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
    REFINE = "last pass"
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
        is_gpu = self.budget.gpu_bytes is not None
        budget = self.budget.host_bytes if self.budget.gpu_bytes is None else self.budget.gpu_bytes
        held = sum(p.n_bytes for p in (self.gpu if is_gpu else self.host) if set(_WALK) <= set(p.phases))
        return (budget - held) * (GAPS - 1) // GAPS if is_gpu else budget - held

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
    last_pass: LastPass = LastPass(),  # noqa: B008 frozen
    *,
    is_attributed: bool = False,
) -> Footprint:
    """The first of device (a GPU's), host and disk with which both peaks are within the budget.

    If none is, the footprint of the disk with refusals. Sampling that does not fit is refused by itself: it needs
    the whole model, and a file of tokens does not.
    """
    sizes = _Sizes(desc, calibration, n_held_out, recipe, device, last_pass, is_attributed)
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
    held = [*streams, *compute] if place is Place.DEVICE else compute
    gpu = (*held, *_overhead(held))
    return Footprint(place, gpu, (*streams, *host) if place is Place.HOST else tuple(host), on_disk, budget)


def _overhead(parts: Sequence[MemoryPart]) -> Iterator[MemoryPart]:
    """What a GPU takes besides these tensors."""
    for phase in Phase:
        held = sum(p.n_bytes for p in parts if phase in p.phases)
        if held:
            yield MemoryPart("gaps between tensors", held // GAPS, (phase,))
    yield MemoryPart("CUDA context and libraries", CUDA_CONTEXT, tuple(Phase))


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
            instead = "leave it out (--refine 0)" if phase is Phase.REFINE else "use a shorter --length"
            todo = f"give {option} {-(-needed >> 20)}MiB on a machine that has it, or {instead}"
        yield Refusal("memory", why, todo)


@dataclass(frozen=True)
class _Sizes:
    """The arrays of one run."""

    desc: ModelDesc
    calibration: CalibrationSpec
    n_held_out: int
    recipe: Recipe
    device: torch.device
    last_pass: LastPass
    is_attributed: bool = False

    def streams(self) -> Iterator[MemoryPart]:
        """Activations; the held-out sequences always run through the source too."""
        recipe, per = self.recipe, self.calibration.length * self.desc.dims.hidden * F32
        is_source_wanted = Rounder(recipe).needs_source or recipe.refine != 0
        throughout = (*_WALK, Phase.REFINE)
        # They are needed behind the last block too where the last pass follows.
        phases = (*throughout, Phase.JUDGE) if self.last_pass.scope == "model" else throughout
        yield MemoryPart("activations", self.calibration.sequences * per, phases)
        if is_source_wanted:
            yield MemoryPart("source activations", self.calibration.sequences * per, phases)
        if self.last_pass.scope == "block":
            kept = self.calibration.sequences * per
            yield MemoryPart("inputs of the block for its last pass", kept, (*_BLOCK, Phase.REFINE))
        yield MemoryPart("held-out activations", 2 * self.n_held_out * per, (*throughout, Phase.JUDGE))
        if self.is_attributed:
            dims = self.desc.dims
            n_bytes = branch_bytes(dims.n_layers, dims.hidden, self.n_held_out, self.calibration.length)
            yield MemoryPart("branches for the attribution", n_bytes, (*throughout, Phase.JUDGE))

    def compute(self) -> Iterator[MemoryPart]:
        """What lies on the device besides activations."""
        yield from self._blocks()
        if self.recipe.rounding == "gptq":
            yield from self._compensation()
        yield from self._ends()
        yield MemoryPart("batch temporaries", self._batch(), (Phase.STATISTICS, Phase.FORWARD))
        if self.last_pass.steps:
            yield MemoryPart("last pass", self.last_pass.n_bytes, (Phase.REFINE,))
        if self.calibration.source == "self":
            n_seq = self.calibration.sequences + self.n_held_out
            sampling = sample_bytes(self.desc, n_seq, self.calibration.length, self.device)
            yield MemoryPart("whole model", sampling.weights, (Phase.SAMPLE,))
            yield MemoryPart("keys and values", sampling.past, (Phase.SAMPLE,))
            yield MemoryPart("sampling temporaries", sampling.step, (Phase.SAMPLE,))

    def _blocks(self) -> Iterator[MemoryPart]:
        """Weights, codes and statistics of a block."""
        recipe, block, dims = self.recipe, self._block_elements(), self.desc.dims
        phases = (*_BLOCK, Phase.REFINE) if self.last_pass.scope == "block" else _BLOCK
        yield MemoryPart("block weights, source's and quantized", 2 * block * F32, phases)
        yield MemoryPart("codes of the block", int(block * CODED_BYTES), (Phase.SWEEP, Phase.FORWARD))
        moments = (1 + Rounder(recipe).needs_source) * F32
        yield MemoryPart("Gram and cross moments", moments * self._square(), _BLOCK[:3])
        narrow = max(dims.hidden, dims.n_heads * dims.head) ** 2
        yield MemoryPart("moments of the inputs before", moments * narrow, (Phase.STATISTICS, Phase.FORWARD))
        rows = max(rows * columns for rows, columns in self._sweeps())
        is_moved = recipe.dac or recipe.norm_scales or recipe.value_scales or recipe.dsq
        yield MemoryPart("matrices rounded together", (1 + is_moved) * rows * F32, (Phase.SWEEP,))
        yield MemoryPart("their codes", int(CODES_HELD * rows * CODED_BYTES), (Phase.SWEEP,))

    def _compensation(self) -> Iterator[MemoryPart]:
        """What a sweep needs."""
        recipe, square = self.recipe, self._square()
        factor = square * (F32 + FACTOR_MATRICES * F64)
        yield MemoryPart("Hessian in its order, and inverted in f64", factor, (Phase.FACTOR,))
        is_polished, is_drifting = (
            recipe.polish > 0,
            recipe.asymmetry > 0 and recipe.asymmetry_form != "closed",
        )
        yield MemoryPart("factor", (1 + is_polished + is_drifting) * square * F32, (Phase.SWEEP,))
        n = (POLISH_SLABS if is_polished else SWEEP_SLABS) * F32
        *others, down = self._sweeps()
        whole = down[0] * down[1] if recipe.dsq else _slab(*down)
        yield MemoryPart("sweep temporaries", n * max(*(_slab(*m) for m in others), whole), (Phase.SWEEP,))
        dims = self.desc.dims
        head = n * _slab(dims.vocab, dims.hidden) + 4 * dims.hidden**2 * F32
        yield MemoryPart("sweep temporaries of the head", head, (Phase.ENDS,))
        if self.device.type != "cpu":
            heights = sum(slabs(*m)[0].stop for m in (*self._sweeps(), (dims.vocab, dims.hidden)))
            recorded = RECORDED_ARRAYS * LAZY_COLUMNS * heights * F32
            yield MemoryPart("recorded kernels", recorded, (*_WALK, Phase.JUDGE))

    def _ends(self) -> Iterator[MemoryPart]:
        """Embedding and head, which are never there at the same time; the temporaries are of a batch's final norm."""
        dims = self.desc.dims
        ends = dims.vocab * dims.hidden
        n_bytes = (
            ends * F32 + int(CODES_HELD * ends * CODED_BYTES) + 4 * self._batch_tokens() * dims.hidden * F32
        )
        yield MemoryPart("embedding or head, and its codes", n_bytes, (Phase.ENDS,))
        yield MemoryPart("heads, source's and quantized", 2 * ends * F32, (Phase.JUDGE,))
        n_judged = min(JUDGED_TOKENS, self.calibration.length)
        yield MemoryPart("log-probabilities", n_judged * dims.vocab * JUDGE_BYTES, (Phase.JUDGE,))

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

    def _square(self) -> int:
        """Elements of the widest input's second moments."""
        dims = self.desc.dims
        return int(max(dims.ffn, dims.hidden, dims.n_heads * dims.head) ** 2)

    def _batch_tokens(self) -> int:
        length = self.calibration.length
        n_seq = min(max(BATCH_TOKENS // length, 1), max(self.calibration.sequences, self.n_held_out))
        return n_seq * length

    def _batch(self) -> int:
        """Of one batch: the teacher's FFN with the student's output beside it, or the attention's arrays."""
        dims, length, n_tokens = self.desc.dims, self.calibration.length, self._batch_tokens()
        q_out, kv_out = dims.n_heads * dims.head, dims.n_kv_heads * dims.head
        ffn = n_tokens * (4 * dims.ffn + 5 * dims.hidden) * F32
        attention = n_tokens * (8 * q_out + 6 * kv_out + 4 * dims.hidden) * F32
        # `Block.attention_received` holds one sequence's scores, masked, their softmax and its square.
        received = 4 * dims.n_heads * length * length * F32 if self.recipe.attention_weights else 0
        return max(ffn, attention, received + 2 * n_tokens * dims.hidden * F32)

    def _noise(self) -> int:
        n_seq = self.calibration.sequences + self.n_held_out
        return 2 * n_seq * self.desc.dims.vocab * F32


def _slab(n_out: int, n_in: int) -> int:
    """Elements of the largest slab of a matrix."""
    return int(slabs(n_out, n_in)[0].stop) * n_in


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
