"""The grids that ggml defines, by id."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from d2qconv.grids.base import Grid
from d2qconv_gguf.grids.affine_k import Q2K, Q4K, Q5K
from d2qconv_gguf.grids.scalar import ScalarGrid
from d2qconv_gguf.grids.symmetric import IQ4NL, IQ4XS, Q3K, Q6K, Q20, Q40, Q80, TQ20

_ALL: tuple[ScalarGrid, ...] = (
    Q2K(),
    Q3K(),
    Q4K(),
    Q5K(),
    Q6K(),
    IQ4XS(),
    IQ4NL(),
    Q20(),
    TQ20(),
    Q40(),
    Q80(),
)

#: By id: `q2_k`, `q3_k`, …
GRIDS: Mapping[str, Grid] = MappingProxyType({grid.id: grid for grid in _ALL})
