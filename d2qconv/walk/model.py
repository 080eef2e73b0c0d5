"""The whole model, from the embedding to the head.

One stream of activations belongs to the calibration sequences and runs through quantized blocks. The held-out
sequences run twice, through the source's blocks and through the quantized ones; at the end they give the KL
divergence. All forward arithmetic is f32. Finished blocks live in the store, and are read back from it before they
are computed with: a resumed run goes through the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.calibrate.tokens import CalibrationTokens
from d2qconv.decoder.block import Block, Ends, load_block, load_ends, rms_norm
from d2qconv.errors import RunError
from d2qconv.evaluate.metrics import Divergence
from d2qconv.export.base import TargetPlan
from d2qconv.fold.corrections import FoldRecord
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Held, decoded
from d2qconv.ir.store import Store
from d2qconv.names import Part, Role, TensorId
from d2qconv.progress import Watch
from d2qconv.walk.block import BlockNotes, BlockWalk
from d2qconv.walk.rounding import Rounder, TensorError, error_of
from d2qconv.walk.stream import Stream

#: Parts of the store that stand outside the blocks.
INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class WalkResult:
    """What the walk measured. The tensors are in the store."""

    divergence: Divergence
    errors: Sequence[TensorError]
    folds: Sequence[FoldRecord]


@dataclass(frozen=True)
class Walk:
    """One run over a model."""

    desc: ModelDesc
    plan: TargetPlan
    rounder: Rounder
    tokens: CalibrationTokens
    store: Store
    device: torch.device
    watch: Watch

    @torch.inference_mode()
    def run(self) -> WalkResult:
        """Quantize every tensor that the store does not hold yet; raises RunError."""
        n_layers = self.desc.dims.n_layers
        self.watch.stage("quantize", n_layers + 1)
        source_ends = load_ends(self.desc, self.device)
        ends = load_ends(self.desc, self.device, {Role.EMBED: self._embedding()})
        held_out = self.tokens.held_out.to(self.device)
        judged = Stream(ends.embed(held_out), source_ends.embed(held_out))
        calibration = self.tokens.calibration.to(self.device)
        is_source_wanted = self.rounder.recipe.asymmetry > 0 and self.rounder.recipe.rounding == "gptq"
        stream = Stream(ends.embed(calibration), source_ends.embed(calibration) if is_source_wanted else None)
        notes = BlockNotes()
        for index in range(n_layers):
            self.watch.step(index, f"block {index}")
            teacher = load_block(self.desc, index, self.device)
            block, about = self._block(index, teacher, stream)
            notes.errors += about.errors
            notes.folds += about.folds
            judged.advance(block, teacher)
            if not bool(torch.isfinite(stream.x).all()):
                raise RunError("activations are not finite any more", where=f"block {index}")
        self.watch.step(n_layers, "output")
        ends = self._output(ends, stream, notes)
        divergence = _compare(source_ends, ends, judged, held_out)
        self.watch.step(n_layers + 1, "output")
        return WalkResult(divergence, notes.errors, notes.folds)

    def _embedding(self) -> Tensor:
        """The embedding as the package will hold it; rounded to nearest, since its input is one-hot."""
        embed = TensorId(Role.EMBED)
        if INPUT not in self.store.parts():
            w = self._source(embed)
            held = self.rounder(w, self.plan.storage(embed), None, str(embed))
            self.store.write(INPUT, {embed: held}, None)
        return decoded(self._stored(INPUT, embed))

    def _block(self, index: int, teacher: Block, stream: Stream) -> tuple[Block, BlockNotes]:
        """A quantized block, ready to compute, and its notes; from the store if it is there. Moves the stream on."""
        part = f"block-{index:04d}"
        is_new = part not in self.store.parts()
        if is_new:
            walk = BlockWalk(index, teacher, self.plan, self.rounder)
            quantized = walk.quantize(stream)
            self.store.write(part, _tensors(quantized, index), walk.notes)
        block = Block(self.desc, {}, {})
        for tensor_id in self.store.tensor_ids(part):
            into = block.weights if tensor_id.part is Part.WEIGHT else block.biases
            into[tensor_id.role] = decoded(self._stored(part, tensor_id))
        if is_new:
            stream.advance(block.feed, teacher.feed)
        else:
            stream.advance(block, teacher)
        return block, self.store.notes(part, BlockNotes)

    def _output(self, ends: Ends, stream: Stream, notes: BlockNotes) -> Ends:
        """Store final norm and head; returns the ends as the package has them."""
        norm, head = TensorId(Role.FINAL_NORM), TensorId(Role.HEAD)
        if OUTPUT not in self.store.parts():
            gain = self._source(norm)

            def final_norm(x: Tensor) -> Tensor:
                return rms_norm(x, gain, self.desc.norm_eps)

            tensors: dict[TensorId, Held] = {norm: gain}
            errors: list[TensorError] = []
            if not self.desc.is_tied:
                statistics = stream.measure(final_norm, final_norm)
                w = self._source(head)
                tensors[head] = self.rounder(w, self.plan.storage(head), statistics, str(head))
                errors.append(error_of(str(head), w, decoded(tensors[head]), statistics))
            self.store.write(OUTPUT, tensors, BlockNotes(errors))
        notes.errors += self.store.notes(OUTPUT, BlockNotes).errors
        if self.desc.is_tied:
            return ends
        return Ends(self.desc, ends.embedding, ends.final_norm, decoded(self._stored(OUTPUT, head)))

    def _source(self, tensor_id: TensorId) -> Tensor:
        return self.desc.tensors[tensor_id].load().to(self.device, torch.float32)

    def _stored(self, part: str, tensor_id: TensorId) -> Held:
        return self.store.read_tensor(part, tensor_id).to(self.device)


def _tensors(block: QuantizedBlock, index: int) -> dict[TensorId, Held]:
    """All tensors of a block by id."""
    tensors: dict[TensorId, Held] = {TensorId(r, index): held for r, held in block.linears.items()}
    tensors |= {TensorId(r, index): gain for r, gain in block.norms.items()}
    return tensors | {TensorId(r, index, Part.BIAS): bias for r, bias in block.biases.items()}


def _compare(source_ends: Ends, ends: Ends, judged: Stream, tokens: Tensor) -> Divergence:
    """Next-token distributions at every position of the held-out sequences, one sequence at a time."""
    divergence = Divergence()
    assert judged.source is not None, "the held-out sequences run through both models"
    for x, source, ids in zip(judged.x, judged.source, tokens, strict=True):
        divergence.add(source_ends.logits(source[:-1]), ends.logits(x[:-1]), ids[1:])
    return divergence
