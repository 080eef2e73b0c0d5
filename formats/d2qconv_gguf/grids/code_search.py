"""Which code of a code book comes nearest to some weights.

A code of `step` columns is one or two words (magnitudes from a table) and a sign for every column. Of the signs, either
all are free, or their number of minuses must be even (`is_even`).

Under a metric M (an error e costs eᵀ M e) the signs are tried in eight patterns: those of the weights, and with flips
at the three or four columns where a flip costs least by M's diagonal. For one pattern σ, the word m of least
(u − σm)ᵀ M (u − σm) is found among all of them exactly: that is a sum over products m_i m_j and m_j, so that one matrix
product with a table gives the cost of every word. A code of two words takes the first as if the second could make up
for it freely, then the second; the patterns are compared by their full cost.

Under an importance per column (M diagonal) the words do not depend on each other, and the signs hardly on the words;
`Prepared` serves a search for scales, where the same weights are asked for many times.

Dtypes: f32; codes are i32. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from d2qconv_gguf.grids import code_words

#: Costs in memory at a time: the second-level caches of a CPU; 256 MiB on a GPU.
_CPU_COSTS, _GPU_COSTS = 2**20, 2**26


@dataclass(frozen=True, eq=False)
class Book:
    """A code book. table: the words, as `code_words` has them. width: columns of a word. step: columns of a code.

    is_even: the number of minuses of a code is even, so that the last sign is not stored.
    """

    table: str
    levels: tuple[int, ...]
    width: int
    step: int
    is_even: bool

    @cached_property
    def n_words(self) -> int:
        """Words in the table."""
        return len(code_words.words(self.table, self.levels, self.width))

    @property
    def word_bits(self) -> int:
        """Bits of a word's number."""
        return (self.n_words - 1).bit_length()

    @property
    def sign_bits(self) -> int:
        """Stored signs of a code."""
        return self.step - self.is_even

    @property
    def n_codes(self) -> int:
        """Codes: signs above the words' numbers, the first word's in the lowest bits."""
        return 1 << (self.word_bits * (self.step // self.width) + self.sign_bits)

    def values(self, codes: Tensor) -> Tensor:
        """Signed magnitudes f32[..., step] of codes i32[...]."""
        t = tables(self, codes.device)
        n_halves = self.step // self.width
        mask = (1 << self.word_bits) - 1
        words = [embedding(codes >> self.word_bits * half & mask, t.words) for half in range(n_halves)]
        magnitudes = words[0] if n_halves == 1 else torch.cat(words, -1)
        return magnitudes * embedding(codes >> self.word_bits * n_halves, t.signs)


@dataclass(frozen=True)
class Tables:
    """A book on a device. N words of k columns.

    words: f32[N, k]. squares: f32[k, N]. products: f32[k(k−1)/2 + k, N]: m_i m_j for i < j, then m_j. first, second:
    i64, i and j of the products. moments: f32[2k, N]: squares, then words. signs: f32[2^sign_bits, step].
    flips: f32[2, 8, 3 or 4]: for an even and an odd number of minuses, which of the cheapest columns change sign.
    """

    words: Tensor
    squares: Tensor
    products: Tensor
    first: Tensor
    second: Tensor
    moments: Tensor
    signs: Tensor
    flips: Tensor


@cache
@torch.inference_mode(False)
def tables(book: Book, device: torch.device) -> Tables:
    """Made once for a device; not to be changed."""
    words = torch.from_numpy(code_words.words(book.table, book.levels, book.width))
    pairs = torch.tensor([*combinations(range(book.width), 2)])
    products = (words[:, pairs[:, 0]] * words[:, pairs[:, 1]]).T
    numbers = np.arange(1 << book.sign_bits)
    minus = numbers[:, None] >> np.arange(book.sign_bits) & 1
    if book.is_even:
        minus = np.concatenate([minus, minus.sum(1, keepdims=True) & 1], axis=1)
    n = 4 if book.is_even else 3
    every = np.arange(1 << n)[:, None] >> np.arange(n) & 1
    parity = every.sum(1) & 1
    flips = np.stack([every[parity == p] if book.is_even else every for p in (0, 1)])
    made = Tables(
        words,
        words.square().T.contiguous(),
        torch.cat([products, words.T]).contiguous(),
        pairs[:, 0],
        pairs[:, 1],
        torch.cat([words.square().T, words.T]).contiguous(),
        torch.from_numpy(1.0 - 2.0 * minus).float(),
        torch.from_numpy(flips).float(),
    )
    return Tables(*(t.to(device) for t in vars(made).values()))


def nearest(book: Book, u: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The codes i32[n] of least cost and their costs f32[n]; see the module.

    u: f32[n, step], weights in units of the scale. metric: f32[step, step].
    """
    size = max(_limit(u.device) // (8 * book.n_words), 1)
    found = [_nearest(book, u[at : at + size], metric) for at in range(0, len(u), size)]
    if len(found) == 1:
        return found[0]
    codes, costs = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(costs)


def _nearest(book: Book, u: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    t = tables(book, u.device)
    signs = _patterns(book, t, u, metric.diagonal())
    n, n_patterns, step = signs.shape
    target = u[:, None].expand(signs.shape).reshape(-1, step)
    flat = signs.view(-1, step)
    numbers = _words(t, target, flat, metric) if book.width == step else _two_words(t, target, flat, metric)
    values = torch.cat([embedding(word, t.words) for word in numbers], 1) * flat
    miss = target - values
    cost = ((miss @ metric) * miss).sum(1).view(n, n_patterns)
    cost, best = cost.min(1)
    code = _sign_numbers(book, flat)
    for half, word in enumerate(numbers):
        code = code | word << book.word_bits * half
    return code.view(n, n_patterns).gather(1, best[:, None])[:, 0].to(torch.int32), cost


def _patterns(book: Book, t: Tables, u: Tensor, diagonal: Tensor) -> Tensor:
    """Signs ±1 to be tried: f32[n, 8, step]."""
    signs = torch.where(u < 0, -1.0, 1.0)
    n_flips = t.flips.shape[2]
    cheapest = (u.abs() * diagonal).topk(n_flips, dim=1, largest=False, sorted=False).indices
    where = torch.zeros(len(u), n_flips, book.step, device=u.device).scatter_(2, cheapest[:, :, None], 1.0)
    is_odd = (
        (signs < 0).sum(1) & 1 if book.is_even else torch.zeros(len(u), dtype=torch.long, device=u.device)
    )
    flipped = t.flips[is_odd] @ where
    return signs[:, None] * (1 - 2 * flipped)


def _words(t: Tables, target: Tensor, signs: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
    """The best word under signs, i64[m]. target, signs: f32[m, k]; metric: f32[k, k]."""
    linear = (target @ metric).mul_(signs).mul_(-2)
    crossed = signs[:, t.first] * signs[:, t.second] * (2 * metric[t.first, t.second])
    costs = torch.addmm(metric.diagonal() @ t.squares, torch.cat([crossed, linear], 1), t.products)
    return (costs.argmin(1),)


def _two_words(t: Tables, target: Tensor, signs: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
    """The two words of a code: the first with the second free to make up for it, then the second."""
    k = t.words.shape[1]
    a, b, c = metric[:k, :k], metric[:k, k:], metric[k:, k:]
    # An error e of the first half is best met by −c⁻¹ bᵀ e of the second.
    lower, _ = torch.linalg.cholesky_ex(c)
    half = torch.linalg.solve_triangular(lower, b.T, upper=False)
    answer = torch.linalg.solve_triangular(lower.T, half, upper=True)
    (first,) = _words(t, target[:, :k], signs[:, :k], a - b @ answer)
    miss = target[:, :k] - embedding(first, t.words) * signs[:, :k]
    (second,) = _words(t, target[:, k:] + miss @ answer.T, signs[:, k:], c)
    return first, second


def _sign_numbers(book: Book, signs: Tensor) -> Tensor:
    """The stored number of signs f32[m, step]: i64[m], bits in place above the words'."""
    places = torch.arange(book.sign_bits, device=signs.device)
    bits = (signs[:, : book.sign_bits] < 0).long() << places
    return bits.sum(1) << book.word_bits * (book.step // book.width)


@dataclass(frozen=True)
class Prepared:
    """Weights of G groups and n rows with their signs taken off, for a search under an importance.

    target: f32[G·n, words, k], |w|, but negative where a sign had to be flipped; asked: f32[G·n, words, k], importance.
    """

    book: Book
    target: Tensor
    asked: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, book: Book, w: Tensor, importance: Tensor) -> Prepared:
        """w: f32[G, g, n]; importance: f32[G, g, 1]. An odd number of minuses is mended where that costs least."""
        n_groups, group, n = w.shape
        runs = w.permute(0, 2, 1).reshape(n_groups * n, group // book.step, book.step)
        a = importance.permute(0, 2, 1).reshape(n_groups, 1, group // book.step, book.step)
        a = a.expand(-1, n, -1, -1).reshape(runs.shape)
        target = runs.abs()
        if book.is_even:
            is_odd = ((runs < 0).sum(2, keepdim=True) & 1).bool()
            cheapest = (target * a).argmin(2, keepdim=True)
            is_flipped = torch.zeros_like(runs, dtype=torch.bool).scatter_(2, cheapest, is_odd)
            target = torch.where(is_flipped, -target, target)
        shape = (n_groups * n, group // book.width, book.width)
        return cls(book, target.reshape(shape), a.reshape(shape), (n_groups, n))

    def sums(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ a m w, Σ a m²) of the words m nearest at these scales (not 0), each f32[G, n]. scale: f32[G, n]."""
        t = tables(self.book, self.target.device)
        pull = self.asked * self.target
        found = torch.empty(self.target.shape[:2], dtype=torch.long, device=pull.device)
        flat_scale = scale.reshape(-1, 1, 1)
        size = max(_limit(pull.device) // (found.shape[1] * len(t.words)), 1)
        for at in range(0, len(found), size):
            rows = slice(at, at + size)
            asked = torch.cat([self.asked[rows], pull[rows] * (-2 / flat_scale[rows])], 2)
            found[rows] = (asked.flatten(0, 1) @ t.moments).argmin(1).view(-1, found.shape[1])
        words = embedding(found, t.words)
        wm = (pull * words).sum((1, 2)).view(self.shape)
        return wm, (self.asked * words.square_()).sum((1, 2)).view(self.shape)


def _limit(device: torch.device) -> int:
    return _CPU_COSTS if device.type == "cpu" else _GPU_COSTS
