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
    h = gram.double()
    scale = h.diagonal().mean()
    if not torch.isfinite(scale):
        raise RunError("the calibration activations are not finite", where=where)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    for attempt in range(7):
        damped = h + (damping * 10**attempt) * scale * eye
        factor, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            upper = factor.flip(0, 1)
            inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
            return inverse.float()
    raise RunError(
        "the Hessian is not positive definite even with strong damping",
        where=where,
        todo="use more or longer calibration sequences, or raise --damping",
    )


def toward_source(w: Tensor, drift: Tensor, factor: Tensor, strength: float) -> Tensor:
    """Weights that give the source's outputs on the quantized model's inputs, as far as `strength` says.

    The sweep minimises ‖(W′ − Ŵ) X̃‖². With W′ = W E[x x̃ᵀ] H⁻¹ that is, up to a constant, ‖W X − Ŵ X̃‖²: the aim of
    GPTAQ (arXiv 2504.02692), reached before the sweep instead of column by column. X is what the source model feeds
    this linear, X̃ what the quantized blocks feed it. strength 0 gives W, 1 gives W′; in between is safer, since
    drift is measured on few tokens (D²Quant's authors take 0.25).

    w: f32[n_out, n_in]; drift: f32[n_in, n_in] = E[(x − x̃) x̃ᵀ]; factor: U with H⁻¹ = Uᵀ U.
    """
    return torch.addmm(w, (w @ drift) @ factor.T, factor, alpha=strength)
