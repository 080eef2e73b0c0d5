"""Codes in 32-bit words, as the dialects pack them: lowest bits first, words read as unsigned."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def unpack_dense(words: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes of every row of a bit stream without gaps: i32[rows, n_words] → u8[rows, n]."""
    array = _unsigned(words)
    if 32 % bits == 0:
        return torch.from_numpy(_apart(array, bits)[:, :n])
    single = np.unpackbits(array.view(np.uint8), axis=1, count=n * bits, bitorder="little")
    single = single.reshape(len(array), n, bits)
    codes = single[:, :, 0].copy()
    for place in range(1, bits):
        codes |= single[:, :, place] << np.uint8(place)
    return torch.from_numpy(codes)


def unpack_whole(words: Tensor, bits: int, n: int) -> Tensor:
    """The same where no code reaches into the next word: 32 // bits codes a word, the highest bits unused."""
    return torch.from_numpy(_apart(_unsigned(words), bits)[:, :n])


def dense_words(n: int, bits: int) -> int:
    """Words of n codes without gaps."""
    return -(-n * bits // 32)


def whole_words(n: int, bits: int) -> int:
    """Words of n codes, 32 // bits a word."""
    return -(-n // (32 // bits))


def _unsigned(words: Tensor) -> np.ndarray:
    """Little endian u32, row by row."""
    return np.ascontiguousarray(words.numpy()).view("<u4")


def _apart(array: np.ndarray, bits: int) -> np.ndarray:
    """u8[rows, n_words · (32 // bits)], contiguous."""
    places = 32 // bits
    codes = np.empty((*array.shape, places), np.uint8)
    for place in range(places):
        codes[:, :, place] = array >> np.uint32(place * bits) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(array), -1)
