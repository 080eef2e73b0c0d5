"""What the quantizer knows of a linear's input: its Gram matrix and its mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2qconv.ir.importance import Importance
from d2qconv.names import Role
from d2qconv.team import Team


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of the input x̃ of one or several linears, and of x, the input that the source model has there.

    gram: f32[n_in, n_in] = E x̃ x̃ᵀ over tokens. mean: f32[n_in] = E x̃. cross: f32[n_in, n_in] = E x x̃ᵀ and
    source_mean: E x, or both None if the source was not run along. source_squares: f32[n_in] = E x_j², None likewise
    and for inputs that were changed since. n_tokens: that were averaged over, 0 if that is not known.
    """

    gram: Tensor
    mean: Tensor
    cross: Tensor | None = None
    source_mean: Tensor | None = None
    source_squares: Tensor | None = None
    n_tokens: int = 0

    def importance(self, roles: tuple[Role, ...], length: int) -> Importance:
        """For the linears `roles`, as measured on sequences of `length`: the source's inputs if it was run along.

        Importance matrices are of the source model by tradition (llama-imatrix runs the unquantized model).
        """
        squares = self.gram.diagonal() if self.source_squares is None else self.source_squares
        values = squares.detach().cpu().numpy().astype("<f4").tobytes()
        return Importance(roles, values, self.n_tokens, length, self.source_squares is not None)

    def shifted(self, mu: Tensor) -> InputStatistics:
        """The statistics of x̃ + mu, mu: f32[n_in]: E(x̃+μ)(x̃+μ)ᵀ = E x̃x̃ᵀ + m μᵀ + μ mᵀ + μ μᵀ."""
        product = torch.outer(self.mean, mu)
        gram = self.gram + product + product.T + torch.outer(mu, mu)
        cross = self.cross
        if cross is not None and self.source_mean is not None:
            cross = cross + torch.outer(self.source_mean, mu)
        return InputStatistics(gram, self.mean + mu, cross, self.source_mean)

    def centred(self) -> InputStatistics:
        """The statistics of x̃ − E x̃ and x − E x: covariances, for a linear whose bias carries the means."""
        gram = self.gram - torch.outer(self.mean, self.mean)
        if self.cross is None or self.source_mean is None:
            return InputStatistics(gram, torch.zeros_like(self.mean))
        cross = self.cross - torch.outer(self.source_mean, self.mean)
        none = torch.zeros_like(self.mean)
        return InputStatistics(gram, none, cross, none)

    def scaled(self, c: Tensor) -> InputStatistics:
        """The statistics of c ⊙ x̃ and c ⊙ x, c: f32[n_in]."""
        both = torch.outer(c, c)
        cross, source_mean = self.cross, self.source_mean
        return InputStatistics(
            self.gram * both,
            self.mean * c,
            None if cross is None else cross * both,
            None if source_mean is None else source_mean * c,
        )


class InputAccumulator:
    """Sums over batches, products in f32 (on CUDA in TF32 where `precision.tensor_cores` is on), means in f64.

    The products are added up in f32 too: a matrix as wide as a feed-forward network would take twice the memory in
    f64, and some hundred batches lose less than the last bit of what TF32 leaves.
    """

    def __init__(self, n_in: int, device: torch.device | str, *, is_source_seen: bool) -> None:
        self._gram = torch.zeros(n_in, n_in, device=device)
        self._sum = torch.zeros(n_in, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._gram) if is_source_seen else None
        self._source_sum = torch.zeros_like(self._sum)
        self._source_squares = torch.zeros_like(self._sum)
        self._n_tokens = 0

    def add(self, x: Tensor, source: Tensor | None = None) -> None:
        """x: f32[..., n_in] of the quantized model; source: the same tokens in the source model."""
        rows = x.reshape(-1, x.shape[-1])
        self._gram.addmm_(rows.T, rows)
        self._sum += rows.sum(0, dtype=torch.float64)
        self._n_tokens += len(rows)
        if self._cross is not None:
            assert source is not None, "this accumulator was made to see the source"
            source_rows = source.reshape(rows.shape)
            self._cross.addmm_(source_rows.T, rows)
            self._source_sum += source_rows.sum(0, dtype=torch.float64)
            self._source_squares += source_rows.square().sum(0, dtype=torch.float64)

    def finish(self, team: Team | None = None) -> InputStatistics:
        """Means over all tokens seen, f32; with a team over those of all its processes. Ends the accumulator."""
        n: float = self._n_tokens
        if team is not None:
            n = team.total(n)
            team.sum_(self._gram, self._sum)
            if self._cross is not None:
                team.sum_(self._cross, self._source_sum, self._source_squares)
        mean, n_tokens = (self._sum / n).float(), round(n)
        if self._cross is None:
            return InputStatistics(self._gram.div_(n), mean, n_tokens=n_tokens)
        source_mean, squares = (self._source_sum / n).float(), (self._source_squares / n).float()
        return InputStatistics(self._gram.div_(n), mean, self._cross.div_(n), source_mean, squares, n_tokens)
