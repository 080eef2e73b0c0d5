"""Turning the residual stream before quantization: groupwise Hadamard and Walsh rotations.

With Q = diag(B, B, …) orthogonal, the stream x becomes x Q. An RMSNorm without gain commutes with it, because
|x Q| = |x|; so norm gains g go into the linears that read the norm, and then

::

    embedding      E → E Q
    readers        W → W diag(g) Q          (q, k, v, gate, up, head)
    norm gains     g → 1
    writers        W → Qᵀ W,  b → Qᵀ b      (o, down)

is the same function, exactly up to rounding. Biases of readers, norms of q and k, and all that lies between a reader
and a writer stay. A tied head becomes a matrix of its own, E diag(g) Q. Source: QuaRot (arXiv 2404.00456), without its
subtraction of the embedding's mean, which RMSNorm does not take; blocks of 128 are D²Quant's released default. Which
linear does what says the architecture's `Residual`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from d2qconv.arch.spec import Architecture, Dim, ModelDesc, Residual
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import Refusal, refuse
from d2qconv.names import Part, Role, TensorId

#: Channels that are turned together, at most and at least.
LARGEST, SMALLEST = 128, 16
#: Elements that are held in f64 at once.
_CHUNK = 1 << 19
_TODO = "leave the rotation out (--rotation none)"


@dataclass(frozen=True)
class Rotation:
    """How the residual stream is turned.

    kind `hadamard`: B = diag(s) H / √n, H in Sylvester's order, s random signs drawn from `seed`. Every channel is
    spread evenly over its block, and s keeps channels that agree from adding up in one place.
    kind `walsh`: B = H' / √n, H' the rows of H by rising number of sign changes (sequency). It has no signs: with
    random s it would be a random Hadamard matrix with its columns in another order. So `seed` does not matter to it.
    """

    kind: Literal["hadamard", "walsh"]
    seed: int = 0

    def size(self, hidden: int) -> int:
        """Side n of B: the largest power of two that divides `hidden`, at most 128."""
        return math.gcd(hidden, LARGEST)

    def matrix(self, n: int) -> Tensor:
        """B, f64[n, n], orthogonal; n is a power of two. Equal settings give equal matrices."""
        signs = torch.ones(n, dtype=torch.float64)
        if self.kind == "walsh":
            h = walsh(n)
        else:
            h = hadamard(n)
            generator = torch.Generator().manual_seed(self.seed)
            signs -= 2 * torch.randint(0, 2, (n,), generator=generator)
        return signs[:, None] * h / math.sqrt(n)

    def describe(self, hidden: int) -> str:
        """`hadamard 128, seed 0`, `walsh 64`."""
        seed = f", seed {self.seed}" if self.kind == "hadamard" else ""
        return f"{self.kind} {self.size(hidden)}{seed}"


def hadamard(n: int) -> Tensor:
    """Sylvester's matrix, ±1 in f64[n, n]: H(2n) = [[H, H], [H, −H]]. n is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h


def walsh(n: int) -> Tensor:
    """The rows of `hadamard(n)` by rising number of sign changes, which are 0 … n−1; the result is symmetric."""
    h = hadamard(n)
    return h[(h[:, 1:] != h[:, :-1]).sum(dim=1).argsort()]


def check(desc: ModelDesc, rotation: Rotation) -> list[Refusal]:
    """Why this model cannot be turned. Reads no weight."""
    residual, hidden = desc.arch.residual, desc.dims.hidden
    if desc.rotation:
        return [Refusal("rotation", f"the model is rotated already ({desc.rotation})")]
    if residual is None:
        return [
            Refusal(desc.arch.id, "its table does not say who reads and writes the residual stream", _TODO)
        ]
    found = list(_table_refusals(desc.arch, residual))
    if rotation.size(hidden) < SMALLEST:
        why = f"{hidden} is not a multiple of {SMALLEST}, the fewest channels that are worth turning together"
        found.append(Refusal("hidden_size", why, _TODO))
    return found


def _table_refusals(arch: Architecture, residual: Residual) -> Iterator[Refusal]:
    """A plug-in's table that forgets a site, or has norms that a rotation does not pass through."""
    for site in arch.sites:
        if Dim.HIDDEN in (site.n_out, site.n_in) and site.role not in residual.roles:
            why = f"{site.role} is as wide as the residual stream, and the table does not say what it does there"
            yield Refusal(arch.id, why, _TODO)
        if site.role in residual.readers and site.can_have_bias:
            yield Refusal(arch.id, f"the norm {site.role} can have a bias, which is not turned yet", _TODO)


def rotated(desc: ModelDesc, rotation: Rotation) -> ModelDesc:
    """The same function with its residual stream turned; every changed tensor is f32 and made when it is loaded.

    Loading computes in f64 and rounds once, to f32; it holds the source's tensor, the result and a few MB. The
    result's head is never tied. Raises PlanError with `check`'s refusals.
    """
    refuse(check(desc, rotation))
    residual = desc.arch.residual
    assert residual is not None, "check() looked"
    block = rotation.matrix(rotation.size(desc.dims.hidden))
    turn = _Turn(desc.tensors, residual, block)
    tensors = {tensor: turn(tensor, dense) for tensor, dense in desc.tensors.items()}
    if desc.is_tied:
        head = TensorId(Role.HEAD)
        tensors[head] = turn(head, desc.tensors[TensorId(residual.source)])
    return replace(
        desc,
        tensors=tensors,
        is_tied=False,
        is_untied=desc.is_tied,
        rotation=rotation.describe(desc.dims.hidden),
    )


@dataclass(frozen=True)
class _Turn:
    """From a tensor of the checkpoint to the turned model's."""

    tensors: Mapping[TensorId, Dense]
    residual: Residual
    block: Tensor

    def __call__(self, tensor: TensorId, dense: Dense) -> Dense:
        """The turned tensor, not computed yet; itself where the rotation does not touch it."""
        role, residual = tensor.role, self.residual
        if role in residual.writers:
            return _made(dense, _Rows(dense, self.block))
        if tensor.part is Part.BIAS:
            return dense
        if role in residual.readers:
            return _made(dense, _Ones(dense.shape))
        if role is residual.source:
            return _made(dense, _Columns(dense, None, self.block))
        for norm, readers in residual.readers.items():
            if role in readers:
                return _made(dense, _Columns(dense, self.tensors[TensorId(norm, tensor.block)], self.block))
        return dense


@dataclass(frozen=True)
class _Ones:
    """The gain of a norm whose own went into its readers."""

    shape: tuple[int, ...]

    def __call__(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.float32)


@dataclass(frozen=True)
class _Columns:
    """W diag(gain) Q for W [n_out, hidden]; `gain` None is 1. block: B, f64[n, n]."""

    source: Dense
    gain: Dense | None
    block: Tensor

    def __call__(self) -> Tensor:
        """f32[n_out, hidden]: rows in chunks, each as [·, hidden/n, n] @ B in f64, rounded to f32."""
        w = self.source.load()
        gain = None if self.gain is None else self.gain.load().double()
        out = torch.empty(w.shape, dtype=torch.float32)
        step = max(_CHUNK // w.shape[1], 1)
        for start in range(0, len(w), step):
            x = w[start : start + step].double()
            x = x if gain is None else x * gain
            out[start : start + step] = (x.view(-1, len(self.block)) @ self.block).view(x.shape)
        return out


@dataclass(frozen=True)
class _Rows:
    """Qᵀ W for W [hidden, n_in], or Qᵀ b for b [hidden]. block: B, f64[n, n]."""

    source: Dense
    block: Tensor

    def __call__(self) -> Tensor:
        """f32 in the source's shape: Bᵀ times n rows at a time in f64, rounded to f32."""
        w = self.source.load()
        rows = w.reshape(len(w), -1)
        out = torch.empty(rows.shape, dtype=torch.float32)
        n = len(self.block)
        for start in range(0, len(rows), n):
            out[start : start + n] = self.block.T @ rows[start : start + n].double()
        return out.reshape(w.shape)


def _made(dense: Dense, read: _Ones | _Columns | _Rows) -> Dense:
    return Dense(dense.shape, torch.float32, read)
