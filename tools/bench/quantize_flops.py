"""How many operations a run needs, by its shapes, and how fast the chip multiplies matrices.

A multiplication and an addition are two operations. What is counted is what the method needs, each product once:
a forward pass that is done twice, or a product over both halves of a symmetric matrix, does not count twice, so
such work shows as a lower share. Fits, searches, norms and softmax are not counted: they are no matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from quantize_model import Shape


def input_widths(shape: Shape) -> tuple[int, ...]:
    """n_in of the four inputs of a block that have statistics of their own: q|k|v, o, gate|up, down."""
    return shape.hidden, shape.heads * shape.head, shape.hidden, shape.ffn


def block_forward(shape: Shape, tokens: int, length: int) -> float:
    """One block on `tokens` tokens: 2·weights each, and 2·2·heads·head·(length / 2) of causal attention."""
    attention = 2 * 2 * shape.heads * shape.head * length / 2
    return tokens * (2.0 * shape.block_weights + attention)


def operations(shape: Shape, tokens: int, held_out: int, length: int, *, refine: int = 0) -> dict[str, float]:
    """Operations of the whole run by phase.

    forward: each block once as source and once quantized, over calibration and held-out tokens, and both heads over
    the held-out ones. statistics: E x̃x̃ᵀ and E x x̃ᵀ of four inputs a block and one at an untied head, the symmetric
    one as its half: T·n² + 2T·n². factor: Cholesky n³/3 and the inverse of a triangle n³/3. target: moving the
    weights towards the source's outputs, W(C − H) and two products with triangles: 2mn² + mn² + mn², m rows.
    sweep: the error of every column into all later ones, mn². refine: a step is a forward pass, a backward pass
    to the inputs and one to the weights: 3 × forward of the quantized model over the calibration tokens.
    """
    heads = 2 * 2.0 * held_out * shape.vocab * shape.hidden
    one = block_forward(shape, tokens, length) + block_forward(shape, held_out, length)
    widths = input_widths(shape)
    rows = [(out, n) for out, n in shape.block_matrices.values()] * shape.blocks
    inputs = list(widths) * shape.blocks
    if not shape.is_tied:
        rows.append((shape.vocab, shape.hidden))
        inputs.append(shape.hidden)
    counted = {
        "forward": 2 * one * shape.blocks + heads,
        "statistics": sum(3.0 * tokens * n**2 for n in inputs),
        "factor": sum(2.0 / 3.0 * n**3 for n in inputs),
        "target": sum(4.0 * m * n**2 for m, n in rows),
        "sweep": sum(1.0 * m * n**2 for m, n in rows),
    }
    if refine > 0:
        counted["refine"] = 3.0 * refine * block_forward(shape, length, length) * shape.blocks
    return counted


def chip_rates(device: str, n: int | None = None) -> Mapping[str, float]:
    """Operations a second of an n×n×n product of random matrices: mean of ten after three, by type.

    On a GPU n = 8192 in bf16, TF32 and f32; on a CPU n = 1024 in f32.
    """
    is_gpu = device.startswith("cuda")
    n = n or (8192 if is_gpu else 1024)
    kinds = {"bf16": torch.bfloat16, "tf32": torch.float32, "f32": torch.float32} if is_gpu else {}
    rates = {}
    kept = torch.get_float32_matmul_precision()
    for kind, dtype in (kinds or {"f32": torch.float32}).items():
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        out = torch.empty_like(a)
        for _ in range(3):
            torch.mm(a, b, out=out)
        _wait(device)
        started = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b, out=out)
        _wait(device)
        rates[kind] = 10 * 2.0 * n**3 / (time.perf_counter() - started)
    torch.set_float32_matmul_precision(kept)
    return rates


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
