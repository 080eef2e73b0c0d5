"""Codes as a dense stream of bits in little-endian 32-bit words, lowest bits first: what all four dialects store.

Value i of a row takes bits i·b … i·b + b - 1 of the row's stream; bit j is bit j mod 32 of word j div 32. No code is
padded, so that one of 3 bits may lie in two words. Layout: compressed-tensors 0.18 (`pack_to_int32`), GPTQModel
(`pack_block`), MLX (`quantize`).
"""

from __future__ import annotations

import math

import numpy as np

WORD = 32


def n_words(n: int, bits: int) -> int:
    """Words of a row of n values."""
    return -(-n * bits // WORD)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """u8[n_rows, n] of values below 2^bits → u32[n_rows, n_words(n, bits)]; the last word's spare bits are 0.

    Raises ValueError for a value of more bits.
    """
    n_rows, n = values.shape
    if values.size and int(values.max()) >> bits:
        raise ValueError(f"a code {int(values.max())} does not fit into {bits} bits")
    # After `period` values the pattern of words begins again.
    period = WORD // math.gcd(WORD, bits)
    spare = -n % period
    full = np.pad(values, ((0, 0), (0, spare))) if spare else values
    parts = full.reshape(n_rows, -1, period)
    words = np.zeros((n_rows, parts.shape[1], period * bits // WORD), dtype=np.uint32)
    for place in range(period):
        word, shift = divmod(place * bits, WORD)
        value = parts[:, :, place].astype(np.uint32)
        words[:, :, word] |= value << np.uint32(shift)
        if shift + bits > WORD:
            words[:, :, word + 1] |= value >> np.uint32(WORD - shift)
    return np.ascontiguousarray(words.reshape(n_rows, -1)[:, : n_words(n, bits)])
