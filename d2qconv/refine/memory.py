"""How much memory a last pass takes, before it is begun."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from d2qconv.arch.spec import Dim, ModelDesc, Site
from d2qconv.grids.base import Grid, code_dtype
from d2qconv.names import Role
from d2qconv.refine.attention import SCORE_BYTES, score_bytes
from d2qconv.refine.descent import BLOCK_BYTES, token_bytes
from d2qconv.refine.divergence import LOGIT_BYTES
from d2qconv.refine.settings import RefineSettings

_ENDS = (Role.EMBED, Role.FINAL_NORM, Role.HEAD)
#: Embedding and head count as if they were Q8_0: bytes of codes and scales per byte of f32, weights of one scale.
_END_CODES, _END_GROUP = 0.27, 32


def predict_bytes(
    desc: ModelDesc,
    grids: Mapping[Role, Grid],
    length: int,
    settings: RefineSettings,
    scope: Literal["model", "block"],
) -> int:
    """Peak bytes on the device, about; rather too many than too few.

    grids: of the matrices inside the blocks; those not in it count as f32. length: of a sequence. Counted for `model`
    scope are all blocks, their parameters, the embedding and the heads of both models (the source's embedding is not
    read) with their gradients, the inputs of all blocks for one batch, and what one block, one chunk of logits or one
    of the ends takes; for `block` scope one block, its parameters and one batch. What the caller holds besides
    (activations on the device, a source block) is not counted.
    """
    dims = desc.dims
    n_blocks = dims.n_layers if scope == "model" else 1
    n_tokens = max(settings.batch_tokens // length, 1) * length
    held = n_blocks * _held_bytes(desc, grids)
    # A parameter, its gradient, two moments, and the root that Adam takes.
    trained = 5 * 4 * n_blocks * _n_parameters(desc, grids)
    # The inputs of all blocks; and output, gradient, target and one more.
    streams = 4 * n_tokens * dims.hidden * (n_blocks + 4)
    matrices = [math.prod(_shape(desc, site)) for site in _matrices(desc)]
    # Weights and their gradients; and one matrix four times while its gradient is carried to its scales.
    decoded = 4 * (2 * sum(matrices) + 4 * max(matrices))
    scores = 4 * max(SCORE_BYTES, score_bytes(dims.n_heads, dims.n_kv_heads, length))
    activations = max(min(BLOCK_BYTES, token_bytes(desc) * n_tokens), token_bytes(desc) * length)
    if scope == "block":
        return held + trained + streams + decoded + activations + scores
    end = 4 * dims.vocab * dims.hidden
    n_ends = 1 if desc.is_tied else 2
    # Decoded and as codes, the source's head, parameters as above; the head's gradient while blocks are computed.
    ends = end * (n_ends + 1) + n_ends * int(end * _END_CODES + 5 * end / _END_GROUP) + end
    logits = 5 * max(min(LOGIT_BYTES, 4 * dims.vocab * n_tokens), 4 * dims.vocab)
    # The gradient by the embedded tokens, and one matrix four times while its gradient is carried to its scales.
    carried = 5 * end
    return held + trained + streams + ends + max(decoded + activations + scores, logits, carried)


def _held_bytes(desc: ModelDesc, grids: Mapping[Role, Grid]) -> int:
    """Bytes of the codes and parameters of one block as they are in memory.

    A code takes a byte, or four where there are many, whatever its bits; an integer parameter a byte, which is
    at most twice what it takes in a file.
    """
    total = 0.0
    for site in _matrices(desc):
        n = math.prod(_shape(desc, site))
        grid = grids.get(site.role)
        if grid is None:
            total += 4 * n
            continue
        in_file = grid.bits_per_weight - math.log2(grid.levels) / grid.step
        total += n / grid.step * code_dtype(grid.levels).itemsize + n * 2 * max(in_file, 0) / 8
    return math.ceil(total)


def _n_parameters(desc: ModelDesc, grids: Mapping[Role, Grid]) -> int:
    """Scales, gains and biases of one block, as if every bias existed that may."""
    total = 0
    for site in desc.arch.sites:
        if site.role in _ENDS:
            continue
        shape = _shape(desc, site)
        grid = grids.get(site.role)
        if grid is not None and len(shape) == 2:
            total += len(grid.scales) * shape[0] * (shape[1] // grid.block)
        total += shape[0] if len(shape) == 1 or site.can_have_bias else 0
    return total


def _matrices(desc: ModelDesc) -> list[Site]:
    return [site for site in desc.arch.sites if site.n_in is not None and site.role not in _ENDS]


def _shape(desc: ModelDesc, site: Site) -> tuple[int, ...]:
    dims: tuple[Dim, ...] = (site.n_out,) if site.n_in is None else (site.n_out, site.n_in)
    return tuple(desc.dims.size(dim) for dim in dims)
