"""The folds: how a correction disappears into tensors that every runtime has.

Each rule says in its docstring why the function of the model stays the same, `check` says why it cannot be used on
an architecture, `apply` does it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2qconv.arch.spec import Architecture
from d2qconv.errors import Refusal
from d2qconv.fold.corrections import ColumnScale, FoldRecord, MeanShift
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Coded
from d2qconv.names import Role


@dataclass(frozen=True)
class ScaleIntoRows:
    """DSQ's column scale into the rows of the matrix that makes those columns' input.

    The gated FFN computes down(silu(gate h) ⊙ (up h)). A scale c_j on column j of down multiplies element j of its
    input, which is linear in row j of up and in up's bias:
    Σ_j D_ij c_j silu(g_j)(u_j·h + b_j) = Σ_j D_ij silu(g_j)((c_j u_j)·h + c_j b_j).
    The gate cannot take it: silu is not homogeneous. In the same way o reads Σ_t a_t (V h_t + b), linear in the rows of
    V; there c has one entry per row of V, and columns of o that read one row have one scale.
    Codes stay; a row's steps are multiplied by c_j and rounded to storage precision, which is the fold's whole error.
    An existing shift must be folded before (it becomes a bias).
    """

    def check(self, arch: Architecture, source: Role) -> list[Refusal]:
        """Why this architecture cannot take a column scale of `source`."""
        if arch.coupling("scale", source) is None:
            return [Refusal(arch.id, f"no linear neighbour can take a column scale of {source}")]
        return []

    def apply(
        self, arch: Architecture, index: int, block: QuantizedBlock, scale: ColumnScale
    ) -> tuple[QuantizedBlock, FoldRecord]:
        """Multiply c into every row of the coupled matrices, and into their biases."""
        coupling = arch.coupling("scale", scale.source)
        assert coupling is not None, "check() comes first"
        worst = 0.0
        for role in coupling.absorbs:
            linear = block.linears[role]
            if isinstance(linear, Coded):
                linear, exactness = linear.scale_rows(scale.c)
                worst = max(worst, exactness.max_relative_error)
            else:
                wanted = linear.float() * scale.c[:, None]
                linear = wanted.to(linear.dtype)
                worst = max(worst, _largest_relative(linear.float() - wanted, wanted))
            block = block.with_linear(role, linear)
            if role in block.biases:
                block = block.with_bias(role, block.biases[role] * scale.c)
        carrier = " and ".join(f"rows of {role}" for role in coupling.absorbs)
        return block, FoldRecord(
            "column_scale", index, carrier, worst, "largest relative rounding of a row's step"
        )


@dataclass(frozen=True)
class ScaleIntoGain:
    """Column scales of all matrices that read one norm, into that norm's gain.

    (Q diag(c)) h = Q (c ⊙ h), and h = x / rms(x) ⊙ g, so the gain c ⊙ g gives it. All readers must have the same c.
    A gain is stored in f32: rounded once. A shift of h must be given times c before (`ShiftIntoBiases`).
    """

    def check(self, arch: Architecture, source: Role) -> list[Refusal]:
        """Why this architecture cannot take column scales behind the norm `source`."""
        if arch.residual is None or source not in arch.residual.readers:
            return [Refusal(arch.id, f"{source} has no gain that could take a column scale")]
        return []

    def apply(
        self, arch: Architecture, index: int, block: QuantizedBlock, scale: ColumnScale
    ) -> tuple[QuantizedBlock, FoldRecord]:
        """Multiply c into the gain."""
        assert not self.check(arch, scale.source), "check() comes first"
        before = block.norms[scale.source]
        block = replace(block, norms={**block.norms, scale.source: before * scale.c})
        worst = float(torch.finfo(before.dtype).eps) / 2
        return block, FoldRecord(
            "column_scale", index, f"gain of {scale.source}", worst, "largest relative rounding of a gain"
        )


@dataclass(frozen=True)
class ShiftIntoBiases:
    """DAC's mean shift into biases of the norm's consumers.

    The FFN norm's output is read by gate and up alone: W (h + μ) = W h + W μ, so a bias b = W μ is the shift,
    exactly; W is the decoded matrix. The package holds b in f32.
    """

    def check(self, arch: Architecture, source: Role) -> list[Refusal]:
        """Why this architecture cannot take a shift of the norm `source`."""
        if arch.coupling("shift", source) is None:
            return [Refusal(arch.id, f"the consumers of {source} cannot take biases")]
        return []

    def apply(
        self, arch: Architecture, index: int, block: QuantizedBlock, shift: MeanShift
    ) -> tuple[QuantizedBlock, FoldRecord]:
        """Add W μ to the bias of every coupled matrix."""
        coupling = arch.coupling("shift", shift.source)
        assert coupling is not None, "check() comes first"
        for role in coupling.absorbs:
            bias = block.weight(role).double() @ shift.mu.double()
            if role in block.biases:
                bias = bias + block.biases[role].double()
            block = block.with_bias(role, bias.float())
        carrier = " and ".join(f"{role}.bias" for role in coupling.absorbs)
        return block, FoldRecord(
            "mean_shift", index, carrier, 0.0, "share of the shift not carried", shift.explained
        )


@dataclass(frozen=True)
class ShiftIntoWeights:
    """DAC's mean shift into the consumers' weights, by a rank-1 term, BEFORE they are quantized.

    Where a runtime has no bias there: if some a gives aᵀh ≈ 1 for every token, then
    (W + (W μ) aᵀ) h = W h + W μ (aᵀh) ≈ W (h + μ). The best such a under E(aᵀh − 1)² is a = (E[hhᵀ] + λI)⁻¹ E[h],
    and what it leaves is E(aᵀh − 1)² = aᵀE[hhᵀ]a − 2aᵀE[h] + 1, reported. Approximate; costs nothing at run time.
    """

    #: λ as a fraction of the mean diagonal of E[hhᵀ].
    damping: float = 0.001

    def direction(self, gram: Tensor, mean: Tensor) -> tuple[Tensor, float]:
        """(a f32[n], E(aᵀh − 1)²) from gram f32[n, n] = E hhᵀ and mean f32[n] = E h. Works in f64."""
        g, m = gram.double(), mean.double()
        damped = g + self.damping * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype, device=g.device)
        a = torch.linalg.solve(damped, m)
        left = float(a @ g @ a - 2 * (a @ m) + 1)
        return a.float(), max(left, 0.0)

    def apply(self, w: Tensor, mu: Tensor, a: Tensor) -> Tensor:
        """W + (W μ) aᵀ. w: f32[n_out, n_in]; mu, a: f32[n_in]."""
        return torch.addr(w, w @ mu, a)


def _largest_relative(error: Tensor, of: Tensor) -> float:
    """Max |error| / |of| where `of` is not 0."""
    return float((error.abs() / of.abs().clamp_min(torch.finfo(of.dtype).tiny)).max())
