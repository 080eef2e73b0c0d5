"""How large the inputs of a linear are, column by column: what importance-matrix quantizers weigh errors by."""

from __future__ import annotations

import msgspec
import numpy as np

from d2qconv.names import Role


class Importance(msgspec.Struct, frozen=True):
    """Mean squares of the inputs that some linears of one block share.

    roles: these linears. squares: f32 little endian, E x_j² over n_tokens tokens, in sequences of `length`.
    is_source: x is what the source model feeds them; else what the quantized blocks before them do, since the source
    was not run along.
    """

    roles: tuple[Role, ...]
    squares: bytes
    n_tokens: int
    length: int
    is_source: bool

    def mean_squares(self) -> np.ndarray:
        """f32[n_in]."""
        return np.frombuffer(self.squares, dtype="<f4")
