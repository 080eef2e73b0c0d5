"""The whole model, from the embedding to the head.

One stream of activations belongs to the calibration sequences and runs through quantized blocks, a second one of the
same sequences through the source's, if the recipe looks at both. The held-out sequences run twice too; at the end they
give the KL divergence. A block is read while the one before it is quantized, and written while the next one is; the
embedding and the head are in memory only while something is done with them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.decoder.block import Block, Ends, build_block, read_block, rms_norm
from d2qconv.errors import RunError
from d2qconv.exporters.base import TargetPlan
from d2qconv.fold.corrections import FoldRecord
from d2qconv.fold.rules import ShiftIntoWeights
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Held, decoded
from d2qconv.ir.importance import Importance
from d2qconv.measure.metrics import Divergence
from d2qconv.names import Part, Role, TensorId
from d2qconv.precision import tensor_cores
from d2qconv.progress import Watch
from d2qconv.refine.blockwise import refine_block
from d2qconv.refine.ends import HeldEnds
from d2qconv.refine.model import refine_model
from d2qconv.refine.settings import RefineNotes, n_reserved
from d2qconv.team import Team
from d2qconv.timing import timed
from d2qconv.walk.activations import Activations, Placement
from d2qconv.walk.attribution import Branches, Contributions, stream_error
from d2qconv.walk.block import BlockNotes, BlockWalk
from d2qconv.walk.last_pass import LastPass
from d2qconv.walk.rounding import Rounder, TensorError, embedding_error, error_of
from d2qconv.walk.sharing import RowShare, SharedStore, refined_by_leader, same_tensors
from d2qconv.walk.stream import JUDGED_TOKENS, Stream

#: Parts of the store that stand outside the blocks; REFINED holds what the last pass changed in all others.
INPUT, OUTPUT, REFINED = "input", "output", "refined"


@dataclass(frozen=True)
class BlockRecord:
    """What is known of a block besides its tensors.

    error: Σ‖x − s‖² / Σ‖s‖² of the held-out activations behind it, against the source's. seconds: that quantizing it
    took, 0 where an earlier process did (is_resumed). refined: of a last pass block by block.
    """

    index: int
    error: float
    seconds: float
    refined: RefineNotes | None = None
    is_resumed: bool = False


@dataclass(frozen=True)
class WalkResult:
    """What the walk measured. The tensors are in the store.

    divergence: of the finished model; unrefined: before the last pass, None if there was none or it changed nothing.
    importance: of every linear that was calibrated. refined: what the last pass over the whole model says; of one
    block by block the notes are in `blocks`. contributions: where the divergence comes from, if that was asked for; on
    the team's leader alone.
    """

    divergence: Divergence
    errors: Sequence[TensorError]
    folds: Sequence[FoldRecord]
    unrefined: Divergence | None = None
    refined: RefineNotes | None = None
    blocks: Sequence[BlockRecord] = ()
    importance: Mapping[TensorId, Importance] = field(default_factory=dict)
    contributions: Contributions | None = None


@dataclass(frozen=True)
class Walk:
    """One run over a model. Of a team every process makes one, with all the tokens, and takes its share of them.

    is_attributed: measure which part of the model the divergence comes from; changes no tensor.
    """

    desc: ModelDesc
    plan: TargetPlan
    rounder: Rounder
    tokens: CalibrationTokens
    store: SharedStore
    device: torch.device
    watch: Watch
    placement: Placement
    team: Team = field(default_factory=Team.alone)
    last_pass: LastPass = field(default_factory=LastPass)
    is_attributed: bool = False

    @torch.inference_mode()
    def run(self) -> WalkResult:
        """Quantize every tensor that the store does not hold yet; raises RunError."""
        n_layers = self.desc.dims.n_layers
        self.watch.stage("quantize", n_layers + 1)
        notes = BlockNotes()
        blocks: list[BlockRecord] = []
        importance: dict[TensorId, Importance] = {}
        with tensor_cores(), _Files(self.desc, self.store) as files:
            files.read_ahead(0)
            stream, judged = self._streams(notes)
            branches = self._branches(judged)
            for index in range(n_layers):
                self.watch.step(index, f"block {index}")
                with timed("read"):
                    teacher = build_block(self.desc, index, files.take(index), self.device)
                files.read_ahead(index + 1)
                began = time.monotonic()
                block, about = self._block(index, teacher, stream, files)
                is_resumed = f"block-{index:04d}" in files.found
                seconds = 0.0 if is_resumed else time.monotonic() - began
                notes.errors += about.errors
                notes.folds += about.folds
                importance |= _by_tensor(about.importance, index)
                judged.advance(block, teacher)
                if branches is not None:
                    branches.advance(judged, teacher)
                error = stream_error(judged, self.team)
                blocks.append(BlockRecord(index, error, seconds, about.refined, is_resumed))
                self.watch.figure("error", error)
                if self.team.total(not stream.x.is_finite()):
                    raise RunError("activations are not finite any more", where=f"block {index}")
                del teacher, block
            self.watch.step(n_layers, "output")
            files.wait()
            self._output(stream, notes)
            importance |= _by_tensor(notes.importance, None)
            if self.last_pass.scope != "model":
                stream.close()
            divergence = self._compare(judged)
            self.watch.step(n_layers + 1, "output")
            result = WalkResult(divergence, notes.errors, notes.folds, blocks=blocks, importance=importance)
            if self.last_pass.scope == "model":
                result = self._refined(result, stream, judged)
            if branches is not None:
                result = replace(result, contributions=self._contributions(branches, judged, result))
            stream.close()
            judged.close()
        return result

    def _branches(self, judged: Stream) -> Branches | None:
        """The branches of the attribution, where it is asked for."""
        if not (self.is_attributed and self.team.is_leader):
            return None
        return Branches(judged, self.desc.dims.n_layers, self.placement)

    def _contributions(self, branches: Branches, judged: Stream, result: WalkResult) -> Contributions:
        gain = self._source(TensorId(Role.FINAL_NORM))
        head = self._source(TensorId(Role.EMBED if self.desc.is_tied else Role.HEAD))

        def logits(x: Tensor) -> Tensor:
            return rms_norm(x, gain, self.desc.norm_eps) @ head.T

        before = result.divergence if result.unrefined is None else result.unrefined
        after = None if result.unrefined is None else result.divergence
        with tensor_cores(False), timed("attribution"):
            return branches.measure(judged, logits, before, after)

    def _refined(self, result: WalkResult, stream: Stream, judged: Stream) -> WalkResult:
        """The last pass over the whole model, and the model judged again. The leader's sequences alone are seen."""
        if REFINED not in self.store.parts():
            stream.x.close()
            with timed("refine"):
                changed, about = self._refine(stream) if self.team.is_leader else ({}, None)
            self.team.barrier()
            self.store.write_changed(REFINED, changed, about)
        about = self.store.notes(REFINED, RefineNotes)
        if not about.kept:
            return replace(result, refined=about)
        with timed("forward"):
            embedding = self.store.read_tensor(INPUT, TensorId(Role.EMBED), "cpu")
            ids = self.tokens.held_out[self.team.share(len(self.tokens.held_out))]
            again = Stream.embedded(ids, embedding, None, self.placement, self.team)
            for index in range(self.desc.dims.n_layers):
                again.advance(self._stored_block(f"block-{index:04d}", is_refined=True), _same)
            divergence = self._compare(Stream(again.x, judged.source, self.team), is_refined=True)
            again.close()
        return replace(result, divergence=divergence, unrefined=result.divergence, refined=about)

    def _refine(self, stream: Stream) -> tuple[dict[TensorId, Held], RefineNotes]:
        """Every tensor that the last pass changed, if it is kept."""
        steps = self.last_pass.steps
        self.watch.stage("refine", steps)
        source = stream.source
        assert source is not None, "the source runs along where there is a last pass"
        n_layers, store = self.desc.dims.n_layers, self.store.leaders
        parts = [f"block-{index:04d}" for index in range(n_layers)]
        blocks = [
            _quantized({t: store.read_tensor(part, t, self.device) for t in store.tensor_ids(part)})
            for part in parts
        ]
        embed, head, final = (TensorId(role) for role in (Role.EMBED, Role.HEAD, Role.FINAL_NORM))
        is_tied = self.desc.is_tied
        ends = HeldEnds(
            store.read_tensor(INPUT, embed, self.device),
            decoded(store.read_tensor(OUTPUT, final, self.device)),
            None if is_tied else store.read_tensor(OUTPUT, head, self.device),
        )
        source_head = self._source(embed if is_tied else head)
        source_ends = Ends(self.desc, source_head, self._source(final), source_head)
        ids, n_kept = self._sequences()
        new, new_ends, about = refine_model(
            self.desc,
            blocks,
            ends,
            source.rows,
            source_ends,
            ids.to(self.device),
            self.last_pass.settings,
            self.watch.step,
            n_kept,
        )
        if not about.kept:
            return {}, about
        changed: dict[TensorId, Held] = {embed: new_ends.embedding, final: new_ends.final_norm}
        if new_ends.head is not None:
            changed[head] = new_ends.head
        for index, block in enumerate(new):
            changed |= _tensors(block, index)
        return changed, about

    def _streams(self, notes: BlockNotes) -> tuple[Stream, Stream]:
        """Calibration and held-out sequences, as far as they are this process's, embedded."""
        embed = TensorId(Role.EMBED)
        embedding = self._embedding()
        source = self.desc.tensors[embed].load()
        if self.is_attributed:
            notes.errors.append(embedding_error(str(embed), source, embedding, self.tokens.calibration))
        seen = source if self.rounder.needs_source or self.last_pass.steps else None
        ids, n_kept = self._sequences()
        stream = Stream.embedded(ids, embedding, seen, self.placement, self.team)
        if self.last_pass.steps:
            stream.n_measured = self._n_calibration - n_kept
        held_out = self.tokens.held_out[self.team.share(len(self.tokens.held_out))]
        return stream, Stream.embedded(held_out, embedding, source, self.placement, self.team)

    @property
    def _n_calibration(self) -> int:
        """Calibration sequences of this process."""
        share = self.team.share(len(self.tokens.calibration))
        return int(share.stop - share.start)

    def _sequences(self) -> tuple[Tensor, int]:
        """Sequences of this process, and how many at their end the last pass is judged by.

        Those the sweep must not look at either. The model's own stand before them.
        """
        ids = self.tokens.calibration[self.team.share(len(self.tokens.calibration))]
        n_kept = n_reserved(len(ids)) if self.last_pass.steps else 0
        if self.tokens.own is None or not n_kept:
            return ids, n_kept
        own = self.tokens.own[self.team.share(len(self.tokens.own))]
        return torch.cat([ids[:-n_kept], own, ids[-n_kept:]]), n_kept

    def _embedding(self) -> Held:
        """The embedding as the package will hold it; rounded to nearest, since its input is one-hot."""
        embed = TensorId(Role.EMBED)
        if INPUT not in self.store.parts():
            w = self._source(embed)
            rows = RowShare(self.team, len(w))
            held = rows.gather(self.rounder(w[rows.mine], self.plan.storage(embed), None, str(embed)))
            del w
            self.store.write(INPUT, {embed: held}, None)
        return self.store.read_tensor(INPUT, embed, "cpu", as_written=True)

    def _block(self, index: int, teacher: Block, stream: Stream, files: _Files) -> tuple[Block, BlockNotes]:
        """A quantized block, ready to compute, and its notes; from the store if it is there. Moves the stream on."""
        part = f"block-{index:04d}"
        if part in files.found:
            block = self._stored_block(part)
            stream.advance(block, teacher)
            return block, self.store.notes(part, BlockNotes)
        is_refined = self.last_pass.scope == "block"
        start = self.placement.empty(*stream.x.shape) if is_refined else None
        if start is not None:
            start.copy_from(stream.x)
        walk = BlockWalk(index, teacher, self.plan, self.rounder, self.team)
        quantized = walk.quantize(stream)
        notes = walk.notes
        del walk
        if start is not None:
            stream.advance_source(teacher.feed)
            quantized, notes.refined = self._refine_block(quantized, start, stream)
        floats = {str(role): t for role, t in (*quantized.norms.items(), *quantized.biases.items())}
        same_tensors(self.team, f"block {index}", floats)
        files.write(part, _tensors(quantized, index), notes)
        block = _ready(self.desc, quantized)
        if start is None:
            stream.advance(block.feed, teacher.feed)
        else:
            with timed("forward"):
                stream.restart(start, block)
            start.close()
        return block, notes

    def _refine_block(
        self, block: QuantizedBlock, start: Activations, stream: Stream
    ) -> tuple[QuantizedBlock, RefineNotes]:
        """The last pass over one block; the leader's sequences alone are seen."""
        assert stream.source is not None, "the source runs along where there is a last pass"
        shape, n_kept = (start.shape[0], start.shape[1]), n_reserved(self._n_calibration)

        def refine() -> tuple[QuantizedBlock, RefineNotes]:
            assert stream.source is not None
            return refine_block(
                self.desc,
                block,
                start.rows,
                stream.source.rows,
                shape,
                self.last_pass.settings,
                _silent,
                n_kept,
            )

        with timed("refine"):
            return refined_by_leader(self.team, block, refine)

    def _stored_block(self, part: str, *, is_refined: bool = False) -> Block:
        block = Block(self.desc, {}, {})
        for tensor_id in self.store.tensor_ids(part):
            into = block.weights if tensor_id.part is Part.WEIGHT else block.biases
            into[tensor_id.role] = decoded(self._stored(part, tensor_id, is_refined=is_refined))
        return block

    def _output(self, stream: Stream, notes: BlockNotes) -> None:
        """Store final norm and head."""
        norm, head = TensorId(Role.FINAL_NORM), TensorId(Role.HEAD)
        if OUTPUT not in self.store.parts():
            gain = self._source(norm)

            def final_norm(x: Tensor) -> Tensor:
                return rms_norm(x, gain, self.desc.norm_eps)

            tensors: dict[TensorId, Held] = {norm: gain}
            about = BlockNotes()
            if not self.desc.is_tied:
                statistics = stream.measure(final_norm, final_norm)
                w = source = self._source(head)
                about.importance.append(statistics.importance((Role.HEAD,), stream.x.shape[1]))
                if self.rounder.recipe.dac_final and statistics.source_mean is not None:
                    rule = ShiftIntoWeights()
                    mu = statistics.source_mean - statistics.mean
                    direction, left = rule.direction(statistics.gram, statistics.mean)
                    w = rule.apply(source, mu, direction)
                    about.folds.append(
                        FoldRecord(
                            "final_shift", self.desc.dims.n_layers, "rank-1 term of head", left, "E(aᵀh − 1)²"
                        )
                    )
                rows = RowShare(self.team, len(w))
                part = self.rounder(
                    w[rows.mine], self.plan.storage(head), statistics, str(head), source[rows.mine]
                )
                tensors[head] = rows.gather(part)
                about.errors.append(error_of(str(head), w, tensors[head], statistics))
            self.store.write(OUTPUT, tensors, about)
        about = self.store.notes(OUTPUT, BlockNotes)
        notes.errors += about.errors
        notes.folds += about.folds
        notes.importance += about.importance

    def _compare(self, judged: Stream, *, is_refined: bool = False) -> Divergence:
        """Next-token distributions at every position of the held-out sequences, some hundred at a time."""
        divergence = Divergence()
        source_gain = self._source(TensorId(Role.FINAL_NORM))
        source_head = self._source(TensorId(Role.EMBED if self.desc.is_tied else Role.HEAD))
        gain = decoded(self._stored(OUTPUT, TensorId(Role.FINAL_NORM), is_refined=is_refined))
        place = (INPUT, TensorId(Role.EMBED)) if self.desc.is_tied else (OUTPUT, TensorId(Role.HEAD))
        head = decoded(self._stored(*place, is_refined=is_refined))
        assert judged.source is not None, "the held-out sequences run through both models"
        ids = self.tokens.held_out[self.team.share(len(self.tokens.held_out))].to(self.device)
        eps = self.desc.norm_eps
        with tensor_cores(False):
            for x, source, targets in zip(judged.x, judged.source, ids[:, 1:], strict=True):
                for start in range(0, len(targets), JUDGED_TOKENS):
                    some = slice(start, min(start + JUDGED_TOKENS, len(targets)))
                    divergence.add(
                        rms_norm(source[some], source_gain, eps) @ source_head.T,
                        rms_norm(x[some], gain, eps) @ head.T,
                        targets[some],
                    )
        return divergence.joined(self.team)

    def _source(self, tensor_id: TensorId) -> Tensor:
        return self.desc.tensors[tensor_id].load().to(self.device, torch.float32)

    def _stored(self, part: str, tensor_id: TensorId, *, is_refined: bool = False) -> Held:
        return self.store.read_tensor(part, tensor_id, self.device, as_written=not is_refined)


class _Files:
    """Reads the next block and writes the last one while the program computes. At most one of each is under way.

    found: the parts that the store held at the start.
    """

    def __init__(self, desc: ModelDesc, store: SharedStore) -> None:
        self._desc, self._store = desc, store
        self._threads = ThreadPoolExecutor(2, "files")
        self._reading: Future[Mapping[TensorId, Tensor]] | None = None
        self._writing: Future[None] | None = None
        self.found = frozenset(store.parts())

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        # What is finished is written, also where the run ends here for another reason.
        if self._reading is not None:
            self._reading.cancel()
        self._threads.shutdown(wait=True)

    def read_ahead(self, index: int) -> None:
        """Begin to read a block, if there is one of that number."""
        if index < self._desc.dims.n_layers:
            self._reading = self._threads.submit(read_block, self._desc, index)

    def take(self, index: int) -> Mapping[TensorId, Tensor]:
        """The block that `read_ahead` began with."""
        assert self._reading is not None, f"block {index} was not asked for"
        found = self._reading.result()
        self._reading = None
        return found

    def write(self, part: str, tensors: Mapping[TensorId, Held], notes: object) -> None:
        """Begin to write a part, once the one before is written; its errors come with the next call here."""
        self.wait()
        self._writing = self._threads.submit(self._store.write, part, tensors, notes)

    def wait(self) -> None:
        """Until everything is written; raises what went wrong."""
        if self._writing is not None:
            with timed("disk"):
                self._writing.result()
            self._writing = None


def _by_tensor(found: Sequence[Importance], block: int | None) -> dict[TensorId, Importance]:
    return {TensorId(role, block): some for some in found for role in some.roles}


def _same(x: Tensor) -> Tensor:
    return x


def _silent(done: int, what: str) -> None:
    """Progress inside a block is not shown."""


def _ready(desc: ModelDesc, block: QuantizedBlock) -> Block:
    """The block as a reader of the package will compute with it."""
    weights = {role: decoded(held) for role, held in block.linears.items()}
    return Block(desc, weights | dict(block.norms), dict(block.biases))


def _quantized(tensors: Mapping[TensorId, Held]) -> QuantizedBlock:
    """A block from all its tensors; inverse of `_tensors`."""
    weights = {t.role: held for t, held in tensors.items() if t.part is Part.WEIGHT}
    biases = {t.role: decoded(held) for t, held in tensors.items() if t.part is Part.BIAS}
    norms = {role: held for role, held in weights.items() if isinstance(held, Tensor) and held.dim() == 1}
    return QuantizedBlock({r: held for r, held in weights.items() if r not in norms}, norms, biases)


def _tensors(block: QuantizedBlock, index: int) -> dict[TensorId, Held]:
    """All tensors of a block by id."""
    tensors: dict[TensorId, Held] = {TensorId(r, index): held for r, held in block.linears.items()}
    tensors |= {TensorId(r, index): gain for r, gain in block.norms.items()}
    return tensors | {TensorId(r, index, Part.BIAS): bias for r, bias in block.biases.items()}
