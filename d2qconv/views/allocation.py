"""A choice of types as people read it: a table by role and blocks, and facts for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2qconv.allocate.allocation import Allocation, Chosen
    from d2qconv.names import TensorId

HEADER = ("matrix", "blocks", "type", "bytes", "bits/weight", "predicted KLD")


def rows(allocation: Allocation, weights: Mapping[TensorId, int]) -> list[Sequence[str]]:
    """One row for all matrices of a role that have one type, in the order of the package. weights: their numbers."""
    from d2qconv.exporters.base import type_name

    alike: dict[tuple[str, str], list[TensorId]] = {}
    roles = dict.fromkeys(tensor.role for tensor in allocation.tensors)
    for role in roles:
        for tensor, chosen in allocation.tensors.items():
            if tensor.role is role:
                alike.setdefault((str(role), type_name(chosen.storage)), []).append(tensor)
    found: list[Sequence[str]] = []
    for (role_name, kind), tensors in alike.items():
        held: list[Chosen] = [allocation.tensors[t] for t in tensors]
        n_bytes, n_weights = sum(c.n_bytes for c in held), sum(weights[t] for t in tensors)
        numbers = [t.block for t in tensors if t.block is not None]
        found.append(
            (
                role_name,
                ranges(numbers),
                kind,
                f"{n_bytes:,}",
                f"{8 * n_bytes / n_weights:.2f}",
                f"{sum(c.kld for c in held):.2e}",
            )
        )
    return found


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` of 0, 1, 2, 3, 7: as `--tensor-type` reads it."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def pairs(allocation: Allocation, n_bytes: int) -> Iterator[tuple[str, str]]:
    """The lines beside the plan. n_bytes: of all tensors."""
    yield (
        "types",
        f"chosen for {allocation.asked}: {n_bytes:,} of {allocation.budget:,} bytes for tensors",
    )
    yield "predicted", f"{prediction(allocation)}, measured on {allocation.n_tokens:,} tokens"


def prediction(allocation: Allocation) -> str:
    """The predicted divergence in words."""
    return f"KL divergence {allocation.kld:.4f}, the costs of the single matrices added up"


def facts(allocation: Allocation) -> dict[str, Any]:
    """As JSON."""
    from d2qconv.exporters.base import type_name

    return {
        "asked": allocation.asked,
        "budget_bytes": allocation.budget,
        "kld": allocation.kld,
        "n_tokens": allocation.n_tokens,
        "tensors": {
            str(tensor): {"type": type_name(chosen.storage), "n_bytes": chosen.n_bytes, "kld": chosen.kld}
            for tensor, chosen in allocation.tensors.items()
        },
    }
