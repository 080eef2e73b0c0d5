"""Rounding a chunk by replaying a CUDA graph.

A chunk is some thousand small kernels, and Python takes longer to launch one than a GPU to run it. The work is the
same for every chunk of one shape, so it is recorded once and replayed: the same kernels on other numbers, bit for bit
what `round_chunk` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeAlias

import torch

from d2qconv.grids.base import Grid, Params, code_dtype
from d2qconv.quant.chunk import Chunk, Rounded, round_chunk

#: Recordings kept: a model has five or six shapes, each swept and chosen again.
N_KEPT = 24
#: Name, shape and dtype of every parameter of every block that is given.
Layout: TypeAlias = tuple[tuple[tuple[str, tuple[int, ...], torch.dtype], ...], ...]


@dataclass(frozen=True)
class Recorded:
    """A recording: its inputs and outputs lie at fixed addresses."""

    graph: torch.cuda.CUDAGraph
    chunk: Chunk
    into: Rounded
    params: Sequence[Params]

    def __call__(self, chunk: Chunk, into: Rounded) -> Sequence[Params]:
        """As `round_chunk`, for a chunk of the recorded shape; leaves chunk.rest as it was."""
        self.chunk.rest.copy_(chunk.rest)
        self.chunk.factor.copy_(chunk.factor)
        self.chunk.importance.copy_(chunk.importance)
        if self.chunk.old is not None and chunk.old is not None:
            self.chunk.old.copy_(chunk.old)
        for mine, block in zip(self.chunk.given or (), chunk.given or (), strict=True):
            for name, p in block.items():
                mine[name].copy_(p)
        self.graph.replay()
        into.codes.copy_(self.into.codes)
        into.errors.copy_(self.into.errors)
        if chunk.given is not None:
            return chunk.given
        return [{name: p.clone() for name, p in block.items()} for block in self.params]


def layout(given: Sequence[Params] | None) -> Layout | None:
    """What `recorded` must know of given parameters."""
    if given is None:
        return None
    return tuple(tuple((name, tuple(p.shape), p.dtype) for name, p in block.items()) for block in given)


@lru_cache(maxsize=N_KEPT)
def recorded(
    grid: Grid,
    n: int,
    n_out: int,
    device: torch.device,
    given: Layout | None,
    *,
    is_refit: bool,
    has_old: bool,
) -> Recorded | None:
    """The recording for n columns of n_out rows; None if the grid waits for the GPU inside and cannot be.

    given, has_old: whether the chunk has parameters and old values.

    The first run, on a stream of its own, compiles kernels and fills caches; the second is recorded.
    """
    with torch.inference_mode(False), torch.no_grad():
        chunk = Chunk(
            rest=torch.zeros(n, n_out, device=device),
            factor=torch.eye(n, device=device),
            importance=torch.ones(n, device=device),
            old=torch.zeros(n, n_out, device=device) if has_old else None,
            given=None
            if given is None
            else [
                {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape, dtype in block}
                for block in given
            ],
        )
        into = Rounded(
            torch.zeros(n // grid.step, n_out, dtype=code_dtype(grid.levels), device=device),
            torch.zeros(n, n_out, device=device),
        )
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            round_chunk(chunk, grid, into, is_refit=is_refit)
        torch.cuda.current_stream(device).wait_stream(beside)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=_pool(device), capture_error_mode="thread_local"):
                params = round_chunk(chunk, grid, into, is_refit=is_refit)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None
    return Recorded(graph, chunk, into, params)


@cache
def _pool(device: torch.device) -> Any:  # noqa: ARG001 one for each device
    """Memory that all recordings share: they run one after another, and each keeps its outputs."""
    return torch.cuda.graph_pool_handle()
