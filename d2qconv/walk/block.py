"""One block on its way from float to codes.

::

    q, k, v  →  o  →  measure the mean shift and carry it  →  gate, up  →  down on ColumnScaled(grid)
    →  shift into biases  →  column scale into the rows of up

The order is D²Quant's (§DSQ, §DAC): what comes later is measured on what was quantized before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.decoder.block import Block
from d2qconv.export.base import Carrier, FloatType, TargetPlan
from d2qconv.fold.corrections import ColumnScale, FoldRecord, MeanShift
from d2qconv.fold.rules import ScaleIntoRows, ShiftIntoBiases, ShiftIntoWeights
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Coded, Held, decoded
from d2qconv.names import Role, TensorId
from d2qconv.quant.dac import ShiftAccumulator
from d2qconv.quant.dsq import ColumnScaled, split
from d2qconv.walk.rounding import Rounder, TensorError, error_of
from d2qconv.walk.stream import Stream


class BlockNotes(msgspec.Struct):
    """What is remembered of a block besides its tensors."""

    errors: list[TensorError] = []
    folds: list[FoldRecord] = []


@dataclass
class BlockWalk:
    """Quantizes one block: `teacher` stays the source, `student` is replaced weight by weight."""

    index: int
    teacher: Block
    plan: TargetPlan
    rounder: Rounder
    student: Block = field(init=False)
    linears: dict[Role, Held] = field(init=False, default_factory=dict)
    notes: BlockNotes = field(init=False, default_factory=BlockNotes)

    def __post_init__(self) -> None:
        self.student = Block(self.teacher.desc, dict(self.teacher.weights), dict(self.teacher.biases))

    def quantize(self, stream: Stream) -> QuantizedBlock:
        """The whole block, folds done. `stream` holds its input, and behind this the input r of its FFN part."""
        student, teacher = self.student, self.teacher
        statistics = stream.measure(student.attention_input, teacher.attention_input)
        self._linears((Role.Q, Role.K, Role.V), statistics)
        statistics = stream.measure(
            lambda x: student.mix(student.attention_input(x)),
            lambda x: teacher.mix(teacher.attention_input(x)),
        )
        self._linears((Role.O,), statistics)
        statistics, shift = self._attend(stream)
        if shift is not None:
            statistics = self._carry(shift, statistics)
        self._linears((Role.GATE, Role.UP), statistics)
        statistics = stream.measure(
            lambda r: student.gated(student.ffn_input(r)), lambda r: teacher.gated(teacher.ffn_input(r))
        )
        scale = self._down(statistics)
        norms = {role: w for role, w in student.weights.items() if w.dim() == 1}
        biases = {role: b for role, b in student.biases.items() if role in self.linears}
        return self._fold(QuantizedBlock(dict(self.linears), norms, biases), shift, scale)

    def _attend(self, stream: Stream) -> tuple[InputStatistics, MeanShift | None]:
        """Move the stream to r; statistics of the FFN's input, and its mean shift against the teacher."""
        student, teacher = self.student, self.teacher
        shifts = ShiftAccumulator(student.desc.dims.hidden, stream.x.device)
        is_shift_wanted = self.plan.carrier is not Carrier.NONE

        def attend(x: Tensor) -> Tensor:
            r = student.attend(x)
            if is_shift_wanted:
                shifts.add(teacher.ffn_input(teacher.attend(x)), student.ffn_input(r))
            return r

        stream.advance(attend, teacher.attend)
        statistics = stream.measure(student.ffn_input, teacher.ffn_input)
        if not is_shift_wanted:
            return statistics, None
        mu, explained = shifts.finish()
        return statistics, MeanShift(Role.FFN_NORM, mu, explained)

    def _carry(self, shift: MeanShift, statistics: InputStatistics) -> InputStatistics:
        """Let the student feel the shift as the package will carry it; returns the statistics it then sees."""
        if self.plan.carrier is Carrier.BIAS:
            self.student.biases[Role.FFN_NORM] = shift.mu
            return statistics.shifted(shift.mu)
        rule = ShiftIntoWeights()
        direction, left = rule.direction(statistics.gram, statistics.mean)
        for role in (Role.GATE, Role.UP):
            self.student.weights[role] = rule.apply(self.student.weights[role], shift.mu, direction)
        self.notes.folds.append(
            FoldRecord(
                "mean_shift",
                self.index,
                "rank-1 term of gate and up",
                left,
                "E(aᵀh − 1)²",
                shift.explained,
            )
        )
        return statistics

    def _linears(self, roles: tuple[Role, ...], statistics: InputStatistics) -> None:
        """Quantize matrices that share an input; rows on the same grid go through one sweep."""
        together: dict[str, list[Role]] = {}
        for role in roles:
            together.setdefault(self.plan.by_id[self._id(role)].type_name, []).append(role)
        for alike in together.values():
            weights = [self.student.weights[role] for role in alike]
            source = torch.cat([self.teacher.weights[role] for role in alike])
            storage = self.plan.storage(self._id(alike[0]))
            held = self.rounder(torch.cat(weights), storage, statistics, self._where(alike), source)
            first = 0
            for role, w in zip(alike, weights, strict=True):
                rows = torch.arange(first, first + len(w), device=w.device)
                part = held.take_rows(rows) if isinstance(held, Coded) else held[rows]
                self.linears[role] = part
                self.student.weights[role] = decoded(part)
                self._note_error(role, w, self.student.weights[role], statistics)
                first += len(w)

    def _down(self, statistics: InputStatistics) -> Tensor | None:
        """Quantize down, with column scales where the recipe and the plan have them; returns the scales."""
        storage = self.plan.storage(self._id(Role.DOWN))
        if not self.rounder.recipe.dsq or isinstance(storage, FloatType):
            self._linears((Role.DOWN,), statistics)
            return None
        w = self.student.weights[Role.DOWN]
        scaled = self.rounder(w, ColumnScaled(storage), statistics, self._where([Role.DOWN]))
        assert isinstance(scaled, Coded), "a grid gives codes"
        self._note_error(Role.DOWN, w, scaled.decode(), statistics)
        self.linears[Role.DOWN], scale = split(scaled)
        return scale

    def _fold(self, block: QuantizedBlock, shift: MeanShift | None, scale: Tensor | None) -> QuantizedBlock:
        """Shifts first, scales second: a scale must reach the bias that a shift made."""
        arch = self.student.desc.arch
        if shift is not None and self.plan.carrier is Carrier.BIAS:
            block, record = ShiftIntoBiases().apply(arch, self.index, block, shift)
            self.notes.folds.append(record)
        if scale is not None:
            block, record = ScaleIntoRows().apply(arch, self.index, block, ColumnScale(Role.DOWN, scale))
            self.notes.folds.append(record)
        return block

    def _note_error(self, role: Role, w: Tensor, got: Tensor, statistics: InputStatistics) -> None:
        self.notes.errors.append(error_of(str(self._id(role)), w, got, statistics))

    def _id(self, role: Role) -> TensorId:
        return TensorId(role, self.index)

    def _where(self, roles: Sequence[Role]) -> str:
        return f"block {self.index}, {', '.join(roles)}"
