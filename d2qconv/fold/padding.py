"""Widening a model with zeros, so that its rows fit storage types with large blocks. The function stays the same.

With n channels in the residual stream and n' > n after it, F wide feed-forward layers and F' after it::

    embedding      columns n … n'−1 are 0        readers (q, k, v, gate, up, head)   columns n … n'−1 are 0
    writers        rows n … n'−1 are 0 (o, down; their biases too)
    norm gains     g → g·√(n/n'), 0 beyond n     norm epsilon  ε → ε·n/n'
    gate, up       rows F … F'−1 are 0           down          columns F … F'−1 are 0

The new channels of the stream are exactly 0 everywhere, so the sum of squares S of a position stays. An RMSNorm gives

    x / √(S/n' + ε·n/n') · g·√(n/n') = x / √(S/n + ε) · g .

A gain of 0 makes what readers hold in the new columns meaningless, whatever a grid rounds it to. New rows of gate and
up give silu(0)·0 = 0. Heads, q and k norms, RoPE and what o reads are not touched: a width of heads · head_dim can be
changed only by whole heads, for which llama.cpp would compute and cache more at every token, and whose rows and columns
cost more bytes than a wider type for o alone (SmolLM2-135M in Q2_K, per block: three more heads and their key and value
head 80 kB, o in Q4_0 58 kB more than o in Q2_K would take).
Source of the trick: practice with llama.cpp; LayerNorm is not an RMSNorm, and its models are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2qconv.arch.spec import Dim, ModelDesc, Padding
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import Refusal, refuse
from d2qconv.names import Part, TensorId

_TODO = "leave the padding out, and choose types that fit the widths"


def check(desc: ModelDesc, padding: Padding) -> list[Refusal]:
    """Why this model cannot be widened so. Reads no weight."""
    dims, arch = desc.dims, desc.arch
    if desc.unpadded is not None:
        return [Refusal("padding", f"the model is padded already ({desc.padding})")]
    if padding.hidden < dims.hidden or padding.ffn < dims.ffn:
        why = f"{dims.hidden} and {dims.ffn} channels cannot become {padding.hidden} and {padding.ffn}"
        return [Refusal("padding", why)]
    if arch.residual is None:
        why = "its table does not say who reads and writes the residual stream"
        return [Refusal(arch.id, why, _TODO)]
    return list(_table_refusals(desc))


def _table_refusals(desc: ModelDesc) -> Iterator[Refusal]:
    """A plug-in's table that forgets a site, or has norms of another kind."""
    residual = desc.arch.residual
    assert residual is not None, "check() looked"
    for site in desc.arch.sites:
        if Dim.HIDDEN in (site.n_out, site.n_in) and site.role not in residual.roles:
            why = f"{site.role} is as wide as the residual stream, and the table does not say what it does there"
            yield Refusal(desc.arch.id, why, _TODO)
        if site.role in residual.readers and site.can_have_bias:
            yield Refusal(desc.arch.id, f"the norm {site.role} can have a bias: no RMSNorm", _TODO)


def padded(desc: ModelDesc, padding: Padding) -> ModelDesc:
    """The same function with wider layers; tensors are widened when they are loaded, in their own dtype.

    Gains are computed in f64 and rounded once, to f32, if `hidden` grows. Raises PlanError with `check`'s refusals.
    """
    refuse(check(desc, padding))
    old = desc.dims
    new = replace(old, hidden=padding.hidden, ffn=padding.ffn)
    share = old.hidden / new.hidden
    residual = desc.arch.residual
    assert residual is not None, "check() looked"
    tensors: dict[TensorId, Dense] = {}
    for tensor, dense in desc.tensors.items():
        site = desc.arch.site(tensor.role)
        assert site is not None, "a tensor has a site"
        shape = [new.size(site.n_out)]
        if site.n_in is not None and tensor.part is Part.WEIGHT:
            shape.append(new.size(site.n_in))
        is_gain = tensor.role in residual.readers and share != 1
        tensors[tensor] = _widened(dense, tuple(shape), math.sqrt(share) if is_gain else None)
    made = replace(desc, dims=new, tensors=tensors, norm_eps=desc.norm_eps * share, unpadded=old)
    zeros = sum(d.n_elements for d in tensors.values()) - sum(d.n_elements for d in desc.tensors.values())
    return replace(made, padding=describe(desc, padding), n_zeros=zeros)


def describe(desc: ModelDesc, padding: Padding) -> str:
    """`hidden 576 → 768`, `hidden 80 → 256, ffn 200 → 256`."""
    pairs = (("hidden", desc.dims.hidden, padding.hidden), ("ffn", desc.dims.ffn, padding.ffn))
    return ", ".join(f"{name} {before} → {after}" for name, before, after in pairs if before != after)


def _widened(dense: Dense, shape: tuple[int, ...], factor: float | None) -> Dense:
    if shape == dense.shape and factor is None:
        return dense
    return Dense(shape, dense.dtype if factor is None else torch.float32, _Widened(dense, shape, factor))


@dataclass(frozen=True)
class _Widened:
    """A tensor times `factor`, with zeros behind its last row and column."""

    source: Dense
    shape: tuple[int, ...]
    factor: float | None

    def __call__(self) -> Tensor:
        """In `shape`; f32 where there is a factor."""
        values = self.source.load()
        if self.factor is not None:
            values = (values.double() * self.factor).float()
        more = [(0, new - old) for new, old in zip(self.shape, values.shape, strict=True)]
        # torch counts dimensions from the last one
        return pad(values, [n for pair in reversed(more) for n in pair])
