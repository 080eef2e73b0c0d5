"""Small tables on a device, made once.

Copying a table to a GPU makes the program wait for it, and is forbidden while a CUDA graph is recorded.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

Table: TypeAlias = tuple[float, ...] | tuple[tuple[float, ...], ...]


@cache
@torch.inference_mode(False)
def constant(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table as a tensor; the same object every time, not to be changed."""
    return torch.tensor(table, dtype=dtype, device=device)
