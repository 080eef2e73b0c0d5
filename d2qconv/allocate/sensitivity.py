"""What storing one matrix on one grid costs: the KL divergence that it alone causes at the model's output.

For a matrix inside a block it is measured once, rounded to nearest on the grid of the fewest bits, and carried over to
the others by the error of the matrix's own output, which is cheap to have:

    KLD(matrix, grid) = KLD(matrix, base) · E(grid) / E(base) · gain(role, grid),    E = tr(Δ H Δᵀ) / tr(W H Wᵀ),

H = E[x xᵀ] of the source's input there: a small change of a layer's output moves the output distribution by its
square. (Measured over the matrices of a Llama of 5 M weights and q2_k to q8_0, three orders of magnitude: the sums per
type are right within 6 %, eight of ten matrices within 21 %; tools/LOG.md.) The gain is what the recipe's
error compensation leaves of E, measured for every role and grid in one block, the middle one. Embedding and head
have few grids and no such input (the embedding's is one-hot), so each of theirs is measured, rounded as in the walk.

How: block by block. One stream of activations is the source's. For every matrix a copy of it leaves the source at its
block, through the one perturbed matrix, and follows through the source's later blocks; at the end each is judged
against the source. So each block is read once, and never more than one is in memory; what grows is the number of
streams, one a matrix, of few sequences each. All arithmetic is f32, of the divergence f64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.decoder.block import Block, build_block, read_block, rms_norm
from d2qconv.errors import RunError
from d2qconv.exporters.base import FloatType, type_name
from d2qconv.grids.base import Grid
from d2qconv.ir.coded import Held, decoded
from d2qconv.names import Role, TensorId
from d2qconv.precision import tensor_cores
from d2qconv.progress import Watch
from d2qconv.run import Recipe
from d2qconv.team import Team
from d2qconv.timing import timed
from d2qconv.walk.activations import Activations, Placement
from d2qconv.walk.rounding import Rounder, error_of
from d2qconv.walk.stream import BATCH_TOKENS, JUDGED_TOKENS, Stream

Storage: TypeAlias = Grid | FloatType
#: The storages that every matrix may have.
Choices: TypeAlias = Mapping[TensorId, tuple[Storage, ...]]

#: Tokens that the divergences are measured on, and that the statistics of the inputs are taken of; whole sequences.
JUDGED, MEASURED = 4096, 16384
#: What perturbs a matrix, and what the errors of all its grids are taken of.
_NEAREST = Rounder(Recipe(rounding="nearest"))
#: Matrices that read one input.
_INPUTS: tuple[tuple[Role, ...], ...] = (
    (Role.Q, Role.K, Role.V),
    (Role.O,),
    (Role.GATE, Role.UP),
    (Role.DOWN,),
)


class TensorCost(msgspec.Struct, frozen=True):
    """What one matrix costs by type.

    kld: nats per token. errors: E of the matrix's output, rounded to nearest; empty for embedding and head.
    measured: the types at which a divergence was measured.
    """

    kld: dict[str, float]
    errors: dict[str, float]
    measured: tuple[str, ...]


class Sensitivity(msgspec.Struct, frozen=True):
    """Costs by tensor id, and on how many tokens they were measured."""

    costs: dict[str, TensorCost]
    n_tokens: int


@dataclass
class _Branch:
    """One perturbed matrix's activations, f32[n_judged, length, hidden], and the head that judges them."""

    tensor: TensorId
    type: str
    x: Activations
    head: Held | None = None


@dataclass
class Measuring:
    """One measurement. tokens: i64[n, length] on the CPU; the first ones are judged on. rounder: the recipe's."""

    desc: ModelDesc
    choices: Choices
    tokens: Tensor
    rounder: Rounder
    placement: Placement
    watch: Watch
    _branches: list[_Branch] = field(init=False, default_factory=list)
    _errors: dict[TensorId, dict[str, float]] = field(init=False, default_factory=dict)
    _gains: dict[tuple[Role, str], float] = field(init=False, default_factory=dict)
    _done: int = field(init=False, default=0)

    @torch.inference_mode()
    def run(self) -> Sensitivity:
        """Measure every matrix; raises RunError if activations are not finite."""
        desc, n_layers = self.desc, self.desc.dims.n_layers
        self.watch.stage("sensitivity", self._n_steps())
        length = self.tokens.shape[1]
        measured, self._n_judged = n_sequences(len(self.tokens), length)
        with tensor_cores(), ThreadPoolExecutor(1, "files") as reader:
            stream = self._start(self.tokens[:measured])
            reading = reader.submit(read_block, desc, 0)
            for index in range(n_layers):
                with timed("read"):
                    block = build_block(desc, index, reading.result(), self._device)
                if index + 1 < n_layers:
                    reading = reader.submit(read_block, desc, index + 1)
                self._block(index, block, stream)
                if not stream.x.is_finite():
                    raise RunError("activations are not finite", where=f"block {index} of the source")
            costs = self._judge(stream)
            stream.close()
        return Sensitivity(costs, self._n_judged * (length - 1))

    @property
    def _device(self) -> torch.device:
        return self.placement.device

    def _n_steps(self) -> int:
        """Roundings, and forwards of a branch through a block behind its own."""
        n_layers, blocks = self.desc.dims.n_layers, [t.block for t in self.choices]
        forwards = sum(n_layers - 1 - b for b in blocks if b is not None)
        forwards += n_layers * len(self.choices.get(TensorId(Role.EMBED), ()))
        return sum(len(storages) for storages in self.choices.values()) + forwards

    def _step(self, what: str) -> None:
        self._done += 1
        self.watch.step(self._done, what)

    def _start(self, tokens: Tensor) -> Stream:
        """The source's stream, and a branch for every grid of the embedding."""
        embed = TensorId(Role.EMBED)
        source = self.desc.tensors[embed].load()
        team = Team.alone(self._device)
        for storage in self.choices.get(embed, ()):
            with timed("fit"):
                held = self.rounder(self._source(embed), storage, None, str(embed)).to("cpu")
            x = Stream.embedded(tokens[: self._n_judged], held, None, self.placement, team).x
            head = held if self.desc.is_tied else None
            self._branches.append(_Branch(embed, type_name(storage), x, head))
            self._step(f"{embed} as {type_name(storage)}")
        return Stream.embedded(tokens, source, None, self.placement, team)

    def _block(self, index: int, block: Block, stream: Stream) -> None:
        """Let the branches pass, start those of this block, let the source pass."""
        for branch in self._branches:
            _pass(branch.x, branch.x, block)
            self._step(f"{branch.tensor} through block {index}")
        new: list[_Branch] = []
        for roles, statistics in zip(_INPUTS, self._statistics(block, stream), strict=True):
            for role in roles:
                tensor = TensorId(role, index)
                if tensor in self.choices:
                    new.append(self._branch(tensor, block, statistics, stream))
        self._branches += new
        stream.advance(block, _same)

    def _statistics(self, block: Block, stream: Stream) -> Iterator[InputStatistics]:
        """Of the inputs of q k v, of o, of gate and up, and of down, one in memory at a time."""
        yield stream.measure(block.attention_input, _same)
        yield stream.measure(lambda x: block.mix(block.attention_input(x)), _same)
        yield stream.measure(lambda x: block.ffn_input(block.attend(x)), _same)
        yield stream.measure(lambda x: block.gated(block.ffn_input(block.attend(x))), _same)

    def _branch(self, tensor: TensorId, block: Block, statistics: InputStatistics, stream: Stream) -> _Branch:
        """Errors of every storage of one matrix, and the branch of its base."""
        w, role, base = block.weights[tensor.role], tensor.role, base_of(self.choices[tensor])
        errors = self._errors.setdefault(tensor, {})
        x = self.placement.empty(self._n_judged, *stream.x.shape[1:])
        for storage in self.choices[tensor]:
            name = type_name(storage)
            got = decoded(_NEAREST(w, storage, statistics, str(tensor)))
            errors[name] = error_of(str(tensor), w, got, statistics).output
            if storage == base:
                _pass(stream.x, x, Block(block.desc, {**block.weights, role: got}, block.biases))
            if tensor.block == self.desc.dims.n_layers // 2 and errors[name] > 0:
                got = decoded(self.rounder(w, storage, statistics, str(tensor)))
                self._gains[role, name] = error_of(str(tensor), w, got, statistics).output / errors[name]
            self._step(f"{tensor} as {name}")
        return _Branch(tensor, type_name(base), x)

    def _judge(self, stream: Stream) -> dict[str, TensorCost]:
        """The divergence of every branch, and of every storage of a head of its own."""
        head_id = TensorId(Role.HEAD)
        gain = self._source(TensorId(Role.FINAL_NORM))
        head = self._source(TensorId(Role.EMBED) if self.desc.is_tied else head_id)
        judge = _Judge(stream.x, self._n_judged, gain, head, self.desc.norm_eps)
        plain = [branch for branch in self._branches if branch.head is None]
        found: dict[TensorId, dict[str, float]] = {}
        for branch, kl in zip(plain, judge([branch.x for branch in plain], head), strict=True):
            found.setdefault(branch.tensor, {})[branch.type] = kl
        for branch in self._branches:
            if branch.head is not None:
                [kl] = judge([branch.x], decoded(branch.head.to(self._device)))
                found.setdefault(branch.tensor, {})[branch.type] = kl
            branch.x.close()
        for name, held in self._heads(stream, gain):
            [found.setdefault(head_id, {})[name]] = judge([stream.x], decoded(held))
        return {str(tensor): self._cost(tensor, kld) for tensor, kld in found.items()}

    def _heads(self, stream: Stream, gain: Tensor) -> Iterator[tuple[str, Held]]:
        """The untied head in each of its storages, one at a time."""
        tensor = TensorId(Role.HEAD)
        storages = self.choices.get(tensor, ())
        if not storages:
            return
        statistics = stream.measure(lambda x: rms_norm(x, gain, self.desc.norm_eps), _same)
        for storage in storages:
            yield type_name(storage), self.rounder(self._source(tensor), storage, statistics, str(tensor))
            self._step(f"{tensor} as {type_name(storage)}")

    def _cost(self, tensor: TensorId, measured: Mapping[str, float]) -> TensorCost:
        """From what was measured to every type. Rounding may leave a tiny negative divergence."""
        whole = {name: max(value, 0.0) for name, value in measured.items()}
        errors = self._errors.get(tensor, {})
        if errors:
            [(base, kld)] = whole.items()
            per_error = kld / errors[base] if errors[base] > 0 else 0.0
            whole = {n: per_error * e * self._gains.get((tensor.role, n), 1.0) for n, e in errors.items()}
        return TensorCost(whole, dict(errors), tuple(measured))

    def _source(self, tensor: TensorId) -> Tensor:
        return self.desc.tensors[tensor].load().to(self._device, torch.float32)


@dataclass(frozen=True)
class _Judge:
    """Compares final activations with the source's, of its first n sequences. gain, head: the source's, f32."""

    source: Activations
    n: int
    gain: Tensor
    head: Tensor
    eps: float

    def __call__(self, others: Sequence[Activations], own: Tensor) -> list[float]:
        """Mean KL divergence of each, nats, over all positions but each sequence's last. own: their head, f32.

        With logits z and z' it is Σ p z − lse z − Σ p z' + lse z', in f64; the logits are f32.
        """
        length = self.source.shape[1]
        totals = torch.zeros(len(others), dtype=torch.float64, device=self.head.device)
        with tensor_cores(False), timed("forward"):
            for i in range(self.n):
                for start in range(0, length - 1, JUDGED_TOKENS):
                    some = slice(start, min(start + JUDGED_TOKENS, length - 1))
                    z = self._logits(self.source, i, some, self.head)
                    p = z.softmax(-1)
                    entropy = _score(p, z)
                    for k, other in enumerate(others):
                        totals[k] += (entropy - _score(p, self._logits(other, i, some, own))).sum()
        return [float(total) / max(self.n * (length - 1), 1) for total in totals]

    def _logits(self, x: Activations, i: int, some: slice, head: Tensor) -> Tensor:
        """f64[n, vocab] of some positions of sequence i."""
        return (rms_norm(x.rows(slice(i, i + 1))[0][some], self.gain, self.eps) @ head.T).double()


def _score(p: Tensor, z: Tensor) -> Tensor:
    """Σ p log softmax(z), f64[n]; p, z: f64[n, vocab]."""
    return (p * z).sum(-1) - z.logsumexp(-1)


def n_sequences(n: int, length: int) -> tuple[int, int]:
    """How many of n sequences statistics are taken of, and how many of those are judged."""
    measured = min(max(MEASURED // length, 1), n)
    return measured, min(max(JUDGED // length, 1), measured)


def base_of(storages: Sequence[Storage]) -> Storage:
    """The storage at which a matrix of a block is measured: the grid of the fewest bits, or a float type."""
    grids = [s for s in storages if not isinstance(s, FloatType)]
    return min(grids, key=lambda g: (g.bits_per_weight, g.id)) if grids else storages[0]


def _pass(source: Activations, into: Activations, block: Block) -> None:
    """Let `into` be block(source), of as many sequences as it has."""
    n_seq = max(BATCH_TOKENS // into.shape[1], 1)
    with timed("forward"):
        for start in range(0, len(into), n_seq):
            rows = slice(start, min(start + n_seq, len(into)))
            into.set(rows, block(source.rows(rows)))


def _same(x: Tensor) -> Tensor:
    return x
