"""What D²Quant adds to a block beyond codes, before a fold has carried it into the package's own tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from d2qconv.names import Role


@dataclass(frozen=True)
class ColumnScale:
    """DSQ: the decoded columns of `source` are to be multiplied by c, f32[n_in], all positive."""

    source: Role
    c: Tensor


@dataclass(frozen=True)
class MeanShift:
    """DAC: mu, f32[hidden], is to be added to the output of the norm `source`.

    explained: the share of the norm's mean squared error that mu removes, ‖μ‖² / E‖h − h̃‖².
    """

    source: Role
    mu: Tensor
    explained: float


@dataclass(frozen=True)
class FoldRecord:
    """What a fold did, for the report and the package's metadata.

    residual: what was not carried, relative to what was asked; 0 is exact up to the rounding of the result's dtype.
    meaning: of `residual`, in words. explained: of a mean shift, the share of the mean squared error of the norm's
    output that it removes; None for other folds.
    """

    name: str
    block: int
    carrier: str
    residual: float
    meaning: str
    explained: float | None = None
