"""Column scales chosen before the sweep: where scales of several columns must be equal, or a norm's gain takes them.

Quantizing W with column scales c on a grid is quantizing W/c on it for the inputs c ⊙ x, so nothing else need know of
them. The search starts from c_j = (E x_j²)^(−α/2), which gives salient columns finer steps (AWQ, arXiv 2306.00978),
takes the best α, and then alternates as DSQ does (D²Quant §DSQ): codes to nearest, c_j = ⟨q_j, w_j⟩/⟨q_j, q_j⟩ over all
rows and over the columns that are tied to j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.grids.base import Grid
from d2qconv.quant.sweep import round_to_nearest

#: Exponents tried.
EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
#: Alternations after that.
N_ROUNDS = 2
#: Scales stay within [1/LIMIT, LIMIT].
LIMIT = 8.0


def column_scales(w: Tensor, energy: Tensor, grid: Grid, ties: Tensor | None = None) -> Tensor:
    """c, f32[n_in], positive, geometric mean 1, of least Σ_ij energy_j (w_ij − c_j q_ij)² among those tried.

    w: f32[n_out, n_in]. energy: f32[n_in] = E x_j², positive. ties: i64[n_in], equal numbers get equal scales.
    """
    members = torch.empty(0)
    if ties is not None:
        # A product, since scattered sums on CUDA come in no fixed order.
        members = (ties == torch.arange(int(ties.max()) + 1, device=ties.device)[:, None]).double()

    def tied(total: Tensor) -> Tensor:
        if ties is None:
            return total
        return (members @ total.double()).float()[ties]

    def judge(c: Tensor) -> tuple[float, Tensor]:
        q = round_to_nearest(w / c, energy * c.square(), grid).decode()
        return float(((w - q * c).square().sum(0) * energy).sum(dtype=torch.float64)), q

    shared = tied(energy) / tied(torch.ones_like(energy))
    best, best_loss, best_q = torch.ones_like(energy), torch.inf, w
    for exponent in EXPONENTS:
        c = _normal(shared.pow(-exponent / 2))
        loss, q = judge(c)
        if loss < best_loss:
            best, best_loss, best_q = c, loss, q
    c, q = best, best_q
    for _ in range(N_ROUNDS):
        dot, norm = tied((w * q).sum(0) * energy), tied(q.square().sum(0) * energy)
        is_good = (dot > 0) & (norm > 0)
        c = _normal(torch.where(is_good, dot / torch.where(norm > 0, norm, 1.0), c))
        loss, q = judge(c)
        if loss < best_loss:
            best, best_loss = c, loss
    return best


def _normal(c: Tensor) -> Tensor:
    """Geometric mean 1, within the limits."""
    return (c / c.log().mean().exp()).clamp(1 / LIMIT, LIMIT)
