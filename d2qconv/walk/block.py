"""One block on its way from float to codes.

::

    q, k, v  →  o  →  measure the mean shift and carry it  →  gate, up  →  down on ColumnScaled(grid)
    →  shift into biases  →  column scales into rows and gains

The order is D²Quant's (§DSQ, §DAC): what comes later is measured on what was quantized before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch
from torch import Tensor

from d2qconv.calibrate.statistics import InputStatistics
from d2qconv.decoder.block import Block
from d2qconv.exporters.base import Carrier, FloatType, TargetPlan
from d2qconv.fold.corrections import ColumnScale, FoldRecord, MeanShift
from d2qconv.fold.rules import ScaleIntoGain, ScaleIntoRows, ShiftIntoBiases, ShiftIntoWeights
from d2qconv.grids.base import Grid
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Coded, Held, decoded
from d2qconv.ir.importance import Importance
from d2qconv.names import Part, Role, TensorId
from d2qconv.quant.dac import ShiftAccumulator
from d2qconv.quant.dsq import ColumnScaled, split
from d2qconv.quant.tied import column_scales
from d2qconv.refine.settings import RefineNotes
from d2qconv.team import Team
from d2qconv.timing import timed
from d2qconv.walk.rounding import Rounder, TensorError, error_of, positive
from d2qconv.walk.sharing import RowShare
from d2qconv.walk.stream import Stream


class BlockNotes(msgspec.Struct):
    """What is remembered of a block besides its tensors. It has no times in it: equal runs give equal notes."""

    errors: list[TensorError] = []
    folds: list[FoldRecord] = []
    refined: RefineNotes | None = None
    importance: list[Importance] = []


@dataclass
class BlockWalk:
    """Quantizes one block: `teacher` stays the source, `student` is replaced weight by weight."""

    index: int
    teacher: Block
    plan: TargetPlan
    rounder: Rounder
    team: Team
    student: Block = field(init=False)
    linears: dict[Role, Held] = field(init=False, default_factory=dict)
    scales: list[ColumnScale] = field(init=False, default_factory=list)
    notes: BlockNotes = field(init=False, default_factory=BlockNotes)

    def __post_init__(self) -> None:
        self.student = Block(self.teacher.desc, dict(self.teacher.weights), dict(self.teacher.biases))

    def quantize(self, stream: Stream) -> QuantizedBlock:
        """The whole block, folds done. `stream` holds its input, and behind this the input r of its FFN part."""
        student, teacher = self.student, self.teacher
        self._attention_inputs(stream)
        statistics = stream.measure(
            lambda x: student.mix(student.attention_input(x)),
            lambda x: teacher.mix(teacher.attention_input(x)),
        )
        self._note_importance((Role.O,), statistics, stream)
        self._linears((Role.O,), statistics, self._tied_to_values(statistics))
        statistics, shift = self._attend(stream)
        self._note_importance((Role.GATE, Role.UP), statistics, stream)
        if shift is not None:
            statistics = self._carry(shift, statistics)
        gate_up = (Role.GATE, Role.UP)
        self._linears(gate_up, statistics, self._into_gain(gate_up, Role.FFN_NORM, statistics))
        statistics = stream.measure(
            lambda r: student.gated(student.ffn_input(r)), lambda r: teacher.gated(teacher.ffn_input(r))
        )
        self._note_importance((Role.DOWN,), statistics, stream)
        self._down(statistics)
        del statistics
        norms = {role: w for role, w in student.weights.items() if w.dim() == 1}
        biases = {role: b for role, b in student.biases.items() if role in self.linears}
        with timed("fold"):
            return self._fold(QuantizedBlock(dict(self.linears), norms, biases), shift)

    def _attention_inputs(self, stream: Stream) -> None:
        """Quantize q, k, v; k and v for the tokens that are attended to, if the recipe says so."""
        student, teacher = self.student, self.teacher
        statistics = stream.measure(student.attention_input, teacher.attention_input)
        qkv = (Role.Q, Role.K, Role.V)
        self._note_importance(qkv, statistics, stream)
        scale = self._into_gain(qkv, Role.ATTN_NORM, statistics)
        if not self.rounder.recipe.attention_weights:
            self._linears(qkv, statistics, scale)
            return
        self._linears((Role.Q,), statistics, scale)
        weighed = stream.measure_weighed(
            student.attention_input, teacher.attention_input, teacher.attention_received
        )
        self._linears((Role.K, Role.V), weighed, scale)

    def _into_gain(self, roles: tuple[Role, ...], norm: Role, statistics: InputStatistics) -> Tensor | None:
        """Column scales of matrices that read one norm, if the recipe has them and one grid stores all of them."""
        grids = {self.plan.storage(self._id(role)) for role in roles}
        if not self.rounder.recipe.norm_scales or len(grids) > 1:
            return None
        grid = grids.pop()
        if isinstance(grid, FloatType):
            return None
        w = torch.cat([self.student.weights[role] for role in roles])
        c = self._column_scales(w, grid, statistics, None)
        self.scales.append(ColumnScale(norm, c))
        return c

    def _tied_to_values(self, statistics: InputStatistics) -> Tensor | None:
        """Column scales of o that are equal for the heads which share a value head, if the recipe has them."""
        grid = self.plan.storage(self._id(Role.O))
        if not self.rounder.recipe.value_scales or isinstance(grid, FloatType):
            return None
        dims = self.student.desc.dims
        shared = dims.n_heads // dims.n_kv_heads
        rows = torch.arange(dims.n_kv_heads * dims.head).view(dims.n_kv_heads, 1, dims.head)
        ties = rows.expand(-1, shared, -1).reshape(-1).to(statistics.gram.device)
        c = self._column_scales(self.student.weights[Role.O], grid, statistics, ties)
        per_value = torch.empty(len(rows.view(-1)), device=c.device)
        per_value[ties] = c
        self.scales.append(ColumnScale(Role.O, per_value))
        return c

    def _column_scales(
        self, w: Tensor, grid: Grid, statistics: InputStatistics, ties: Tensor | None
    ) -> Tensor:
        with timed("fit"):
            return column_scales(w, positive(statistics.gram.diagonal()), grid, ties)

    def _attend(self, stream: Stream) -> tuple[InputStatistics, MeanShift | None]:
        """Move the stream to r; statistics of the FFN's input, and its mean shift against the teacher."""
        student, teacher = self.student, self.teacher
        shifts = ShiftAccumulator(student.desc.dims.hidden, stream.device)
        is_shift_wanted = self.plan.carrier in (Carrier.BIAS, Carrier.RANK1)

        def attend(x: Tensor) -> Tensor:
            r = student.attend(x)
            if is_shift_wanted:
                shifts.add(teacher.ffn_input(teacher.attend(x)), student.ffn_input(r))
            return r

        stream.advance(attend, teacher.attend)
        statistics = stream.measure(student.ffn_input, teacher.ffn_input)
        if not is_shift_wanted:
            return statistics, None
        mu, explained = shifts.finish(self.team, self.rounder.recipe.dac_gate)
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

    def _linears(
        self, roles: tuple[Role, ...], statistics: InputStatistics, scale: Tensor | None = None
    ) -> None:
        """Quantize matrices that share an input; rows on the same grid go through one sweep.

        scale: f32[n_in], their column scales: the codes are those of W / scale, and a fold takes it from there.
        """
        together: dict[tuple[str, bool], list[Role]] = {}
        for role in roles:
            key = self.plan.by_id[self._id(role)].type_name, self._has_own_bias(role)
            together.setdefault(key, []).append(role)
        for (_, is_centred), alike in together.items():
            seen = statistics.centred() if is_centred else statistics
            weights = [self.student.weights[role] for role in alike]
            held = self._rounded(alike, weights, seen, scale)
            first = 0
            for role, w in zip(alike, weights, strict=True):
                rows = torch.arange(first, first + len(w), device=w.device)
                part = held.take_rows(rows) if isinstance(held, Coded) else held[rows]
                self._settle(role, w, part, statistics, seen, scale)
                first += len(w)

    def _rounded(
        self,
        roles: Sequence[Role],
        weights: Sequence[Tensor],
        statistics: InputStatistics,
        scale: Tensor | None,
    ) -> Held:
        """All rows of these matrices on their grid."""
        of_source = [self.teacher.weights[role] for role in roles]
        is_source = all(a is b for a, b in zip(weights, of_source, strict=True))
        w = _together(weights, scale)
        source = w if is_source else _together(of_source, scale)
        statistics = statistics if scale is None else statistics.scaled(scale)
        storage = self.plan.storage(self._id(roles[0]))
        rows = RowShare(self.team, len(w))
        return rows.gather(
            self.rounder(w[rows.mine], storage, statistics, self._where(roles), source[rows.mine])
        )

    def _settle(
        self,
        role: Role,
        w: Tensor,
        held: Held,
        statistics: InputStatistics,
        seen: InputStatistics,
        scale: Tensor | None,
    ) -> None:
        """From here on the student computes with what was stored for this role."""
        got = decoded(held)
        if scale is not None:
            got = got * scale
        self.linears[role] = held
        self.student.weights[role] = got
        if self._has_own_bias(role):
            before = self.teacher.biases.get(role)
            wanted = statistics.mean if statistics.source_mean is None else statistics.source_mean
            bias = self.teacher.weights[role] @ wanted - got @ statistics.mean
            self.student.biases[role] = bias if before is None else before + bias
        self._note_error(role, w, got, seen)

    def _has_own_bias(self, role: Role) -> bool:
        """Whether this matrix gets a bias that takes the means out of its quantization."""
        return (
            self.plan.carrier is Carrier.BIASES
            and TensorId(role, self.index, Part.BIAS) in self.plan.by_id
            and self.rounder.recipe.rounding == "gptq"
        )

    def _down(self, statistics: InputStatistics) -> None:
        """Quantize down, with column scales where the recipe and the plan have them."""
        storage = self.plan.storage(self._id(Role.DOWN))
        if not self.rounder.recipe.dsq or isinstance(storage, FloatType):
            self._linears((Role.DOWN,), statistics)
            return
        w = self.student.weights[Role.DOWN]
        seen = statistics.centred() if self._has_own_bias(Role.DOWN) else statistics
        rows = RowShare(self.team, len(w))
        grid = ColumnScaled(storage, rows.reduce)
        scaled = rows.gather(self.rounder(w[rows.mine], grid, seen, self._where([Role.DOWN])))
        assert isinstance(scaled, Coded), "a grid gives codes"
        held, c = split(scaled)
        self._settle(Role.DOWN, w, held, statistics, seen, c)
        self.scales.append(ColumnScale(Role.DOWN, c))

    def _fold(self, block: QuantizedBlock, shift: MeanShift | None) -> QuantizedBlock:
        """Shifts first, scales second: a scale must reach the bias that a shift made.

        The shift is one of the norm's output as the quantized matrices see it, that is times their column scales.
        """
        arch = self.student.desc.arch
        if shift is not None and self.plan.carrier is Carrier.BIAS:
            for scale in self.scales:
                if scale.source is shift.source:
                    shift = replace(shift, mu=shift.mu * scale.c)
            block, record = ShiftIntoBiases().apply(arch, self.index, block, shift)
            self.notes.folds.append(record)
        for scale in self.scales:
            is_norm = scale.source in (Role.ATTN_NORM, Role.FFN_NORM)
            rule: Callable[..., tuple[QuantizedBlock, FoldRecord]]
            rule = ScaleIntoGain().apply if is_norm else ScaleIntoRows().apply
            block, record = rule(arch, self.index, block, scale)
            self.notes.folds.append(record)
        return block

    def _note_error(self, role: Role, w: Tensor, got: Tensor, statistics: InputStatistics) -> None:
        self.notes.errors.append(error_of(str(self._id(role)), w, got, statistics))

    def _note_importance(self, roles: tuple[Role, ...], statistics: InputStatistics, stream: Stream) -> None:
        """Kept with the block, so that a resumed run has it too."""
        self.notes.importance.append(statistics.importance(roles, stream.x.shape[1]))

    def _id(self, role: Role) -> TensorId:
        return TensorId(role, self.index)

    def _where(self, roles: Sequence[Role]) -> str:
        return f"block {self.index}, {', '.join(roles)}"


def _together(weights: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    """All rows of these matrices, their columns divided by f32[n_in] scales."""
    w = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    return w if scale is None else w / scale
