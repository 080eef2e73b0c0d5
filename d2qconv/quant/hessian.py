"""The inverse Hessian's Cholesky factor, which steers error compensation.

For the loss ‖(W − Ŵ) X‖² the Hessian of every row is H = E[x xᵀ] (times 2, which cancels). GPTQ (arXiv 2210.17323)
needs U, upper triangular, with H⁻¹ = Uᵀ U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2qconv.errors import RunError


def inverse_factor(gram: Tensor, damping: float, where: str) -> Tensor:
    """U, f32[n, n] upper triangular with (H + λI)⁻¹ = Uᵀ U, λ = damping · mean(diag H).

    gram: f32[n, n], symmetric. Works in f64: H = R Rᵀ with R upper triangular is the Cholesky factorisation of H
    with rows and columns reversed, and U = R⁻¹. An input that was always zero gets λ alone, so its weights are
    rounded to nearest. If H is not positive definite, λ grows tenfold, at most six times; then RunError.
    """
    scale = gram.diagonal().double().mean()
    if not torch.isfinite(scale):
        raise RunError(
            "the activations are not finite: the source's weights are too large for f32 arithmetic",
            where=where,
        )
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    for attempt in range(7):
        # Two f64 matrices at a time, at most: of the widest input they are most of what a block needs.
        h = gram.flip(0, 1).double()
        h.diagonal().add_(damping * 10**attempt * scale)
        factor, info = torch.linalg.cholesky_ex(h)
        del h
        if int(info) == 0:
            upper = factor.flip(0, 1)
            del factor
            # Column-major, as the solver wants it, so that it works in place.
            inverse = torch.eye(len(upper), dtype=upper.dtype, device=upper.device).T
            torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
            del upper
            return inverse.float().contiguous()
    raise RunError(
        "the Hessian is not positive definite even with strong damping",
        where=where,
        todo="use more or longer calibration sequences, or raise --damping",
    )


def toward_source(
    w: Tensor, miss: Tensor, factor: Tensor, strength: float, order: Tensor | None = None
) -> Tensor:
    """Weights that give the source's outputs on the quantized model's inputs, as far as `strength` says.

    The sweep minimises ‖(W′ − Ŵ) X̃‖². With W′ = S E[x x̃ᵀ] H⁻¹ that is, up to a constant, ‖S X − Ŵ X̃‖²: the aim of
    GPTAQ (arXiv 2504.02692), reached before the sweep instead of column by column. S are the source's weights, X is
    what it feeds this linear, X̃ what the quantized blocks feed it. w is S, or S with a shift folded in. strength 0
    gives w, 1 gives W′; in between is safer, since E[x x̃ᵀ] is measured on few tokens (D²Quant's authors take 0.25).

    w: f32[n_out, n_in]; miss: f32[n_out, n_in] = S E[x x̃ᵀ] − w H, overwritten; factor: U with H⁻¹ = Uᵀ U. order:
    i64[n_in] on the CPU, the columns as the factor has them; None for as they are.
    """
    if order is not None:
        index = order.to(miss.device)
        torch.mm(miss[:, index] @ factor.T, factor, out=miss)
        miss = miss[:, index.argsort()]
        return torch.add(w, miss, alpha=strength)
    return torch.addmm(w, miss @ factor.T, factor, alpha=strength)


def drift(gram: Tensor, cross: Tensor, factor: Tensor, strength: float) -> Tensor:
    """P = α · triu(D Uᵀ, 1) U, f32[n, n], with D = E[(x − x̃) x̃ᵀ]: GPTAQ's term (arXiv 2504.02692).

    All in the sweep's order. gram: E x̃x̃ᵀ, cross: E x x̃ᵀ, both f32[n, n]. factor: U with (E x̃x̃ᵀ + λI)⁻¹ = Uᵀ U.
    strength: α, of which D²Quant's authors take 0.25.
    """
    moved = ((cross - gram) @ factor.T).triu_(1)
    return (moved @ factor).mul_(strength)
