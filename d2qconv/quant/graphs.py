"""Rounding a chunk by replaying a CUDA graph.

A chunk is some thousand small kernels, and Python takes longer to launch one than a GPU to run it. The work is the
same for every chunk of one shape, so it is recorded once and replayed: the same kernels on other numbers, bit for bit
what `round_chunk` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from d2qconv.grids.base import Grid, Params, code_dtype
from d2qconv.quant.chunk import Chunk, Rounded, round_chunk

#: Shapes kept: a model has three or four.
N_KEPT = 16


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
        self.graph.replay()
        into.codes.copy_(self.into.codes)
        into.errors.copy_(self.into.errors)
        return [{name: p.clone() for name, p in block.items()} for block in self.params]


@lru_cache(maxsize=N_KEPT)
def recorded(grid: Grid, n: int, n_out: int, device: torch.device, *, is_refit: bool) -> Recorded | None:
    """The recording for n consecutive columns of n_out rows; None if the grid waits for the GPU inside and cannot be.

    The first run, on a stream of its own, compiles kernels and fills caches; the second is recorded.
    """
    with torch.inference_mode(False), torch.no_grad():
        chunk = Chunk(
            rest=torch.zeros(n, n_out, device=device),
            factor=torch.eye(n, device=device),
            importance=torch.ones(n, device=device),
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
