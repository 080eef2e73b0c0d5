"""The grids that ggml defines, by id."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from d2qconv.grids.base import Grid
from d2qconv_gguf.grids.affine_k import Q2K, Q4K
from d2qconv_gguf.grids.code_book import IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS
from d2qconv_gguf.grids.symmetric import Q3K, Q40, Q80

#: In the order in which help and tables list them.
_ALL: tuple[Grid, ...] = (
    IQ2XXS(), IQ2XS(), IQ2S(), Q2K(), IQ3XXS(), IQ3S(), Q3K(), Q4K(), Q40(), Q80(),
)  # fmt: skip

#: `iq2_xxs`, `q2_k`, …
GRIDS: Mapping[str, Grid] = MappingProxyType({grid.id: grid for grid in _ALL})
