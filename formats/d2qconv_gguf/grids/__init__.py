"""The grids that ggml defines, by id."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from d2qconv.grids.base import Grid
from d2qconv_gguf.grids.affine_k import Q2K, Q4K, Q5K
from d2qconv_gguf.grids.code_book import IQ2S, IQ2XS, IQ2XXS, IQ3S, IQ3XXS
from d2qconv_gguf.grids.offset import Q41
from d2qconv_gguf.grids.symmetric import IQ4NL, IQ4XS, Q3K, Q6K, Q20, Q40, Q50, Q80, TQ20

#: By rising bits per weight, as help and tables list them.
_ALL: tuple[Grid, ...] = (
    TQ20(), IQ2XXS(), Q20(), IQ2XS(), IQ2S(), Q2K(), IQ3XXS(), IQ3S(), Q3K(), IQ4XS(), IQ4NL(), Q4K(), Q40(), Q41(),
    Q50(), Q5K(), Q6K(), Q80(),
)  # fmt: skip

#: By id: `q2_k`, `q3_k`, …
GRIDS: Mapping[str, Grid] = MappingProxyType({grid.id: grid for grid in _ALL})
