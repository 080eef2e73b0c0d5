"""What the walk shares out over a team: the rows of a matrix, and the work directory, which only the leader has.

Rows are independent of each other once the Hessian's factor is known, so every process sweeps its own and the parts
are put together. What depends on all rows at once (the column scales of DSQ) goes through `RowShare.reduce`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from d2qconv.grids.base import Grid
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Coded, Held
from d2qconv.ir.store import Store
from d2qconv.names import Role, TensorId
from d2qconv.refine.settings import RefineNotes
from d2qconv.team import Team

#: Rows of every process, at least; below that all of them do the whole matrix. With one row a parameter of this
#: row and one shared by all rows would look the same.
MIN_ROWS = 2

Notes = TypeVar("Notes")


@dataclass(frozen=True)
class RowShare:
    """The part of a matrix with n_out rows that this process quantizes."""

    team: Team
    n_out: int

    @property
    def is_shared(self) -> bool:
        """Whether there are rows enough to share out."""
        return self.team.size > 1 and self.n_out >= MIN_ROWS * self.team.size

    @property
    def mine(self) -> slice:
        """The rows to quantize here."""
        return self.team.share(self.n_out) if self.is_shared else slice(0, self.n_out)

    @property
    def reduce(self) -> Callable[[Tensor], Tensor] | None:
        """For `ColumnScaled`: sums over these rows → sums over all rows; None if they are all here."""
        return self._sum if self.is_shared else None

    def gather(self, part: Held) -> Held:
        """The whole matrix, on every process; part: what became of `mine`."""
        if not self.is_shared:
            return part
        if isinstance(part, Coded):
            return gather_coded(self.team, part, self.n_out)
        return self.team.gather_rows(part, self.n_out)

    def _sum(self, sums: Tensor) -> Tensor:
        self.team.sum_(sums)
        return sums


def gather_coded(team: Team, coded: Coded, n_out: int) -> Coded:
    """A matrix of n_out rows from every process's share of its rows; the same on all of them.

    Parameters that all rows share (`[1, ...]`) stay as they are; RunError if they differ between the processes. Every
    share must have MIN_ROWS rows, else ValueError.
    """
    if team.size == 1:
        return coded
    if n_out < MIN_ROWS * team.size:
        raise ValueError(f"{n_out} rows are too few to share out over {team.size} processes")
    shared = {name: p for name, p in coded.params.items() if p.shape[0] == 1}
    if shared:
        same_tensors(team, f"a shared parameter of {coded.grid.id} ({', '.join(sorted(shared))})", shared)
    rows = {name: team.gather_rows(p, n_out) for name, p in coded.params.items() if name not in shared}
    return Coded(
        coded.grid,
        (n_out, coded.shape[1]),
        team.gather_rows(coded.codes, n_out),
        {name: shared[name] if name in shared else rows[name] for name in coded.params},
    )


def same_tensors(team: Team, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise RunError on all processes if these differ by a bit between them; they are copied to the CPU."""
    if team.size > 1:
        team.same(what, _digest(tensors))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes, shortened: it is only compared and shown."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha.update(name.encode() + bytes(1))
        sha.update(flat.numpy().data)
    return sha.hexdigest()[:12]


class SharedStore:
    """The leader's `Store`, as every process of a team sees it: all read the same, the leader alone writes.

    Has the methods of `Store` that a walk uses. All but those that write are collective.
    """

    def __init__(self, team: Team, store: Store | None, grids: Mapping[str, Grid]) -> None:
        """Every process makes one. store: on the leader alone. grids: by id, all that parts may name.

        A device that is given must be `cpu`, or the team's.
        """
        self._team = team
        self._store = store
        self._grids = grids

    def parts(self) -> tuple[str, ...]:
        """Names of the finished parts."""
        return self._team.from_leader(lambda: self.leaders.parts())  # noqa: PLW0108 only the leader may look

    def write(self, part: str, tensors: Mapping[TensorId, Held], notes: object) -> None:
        """Add a finished part, which all processes hold alike; raises RunError on the leader, which ends all."""
        if self._team.is_leader:
            self.leaders.write(part, tensors, notes)

    def write_changed(self, part: str, changed: Mapping[TensorId, Held], notes: object) -> None:
        """Add a finished part of changes; raises as `write` does."""
        if self._team.is_leader:
            self.leaders.write_changed(part, changed, notes)

    def notes(self, part: str, kind: type[Notes]) -> Notes:
        """The notes given with a part."""
        return self._team.from_leader(lambda: self.leaders.notes(part, kind))

    def tensor_ids(self, part: str) -> Iterator[TensorId]:
        """What a part holds."""
        return iter(self._team.from_leader(lambda: list(self.leaders.tensor_ids(part))))

    def read_tensor(
        self, part: str, tensor_id: TensorId, device: torch.device | str = "cpu", *, as_written: bool = False
    ) -> Held:
        """One tensor of a part, read by the leader and sent to all, from and to their `device`."""
        found: list[Held] = []

        def about() -> tuple[str, tuple[int, int]] | None:
            held = self.leaders.read_tensor(part, tensor_id, device, as_written=as_written)
            found.append(held)
            return (held.grid.id, held.shape) if isinstance(held, Coded) else None

        def tensors() -> dict[str, Tensor]:
            (held,) = found
            return {"codes": held.codes, **held.params} if isinstance(held, Coded) else {"values": held}

        layout = self._team.from_leader(about)
        sent = self._team.tensors_from_leader(tensors, device)
        if layout is None:
            return sent["values"]
        grid, shape = layout
        codes = sent.pop("codes")
        return Coded(self._grids[grid], shape, codes, sent)

    @property
    def leaders(self) -> Store:
        """The store itself; of the leader alone."""
        assert self._store is not None, "the leader has the store"
        return self._store


def refined_by_leader(
    team: Team, block: QuantizedBlock, refine: Callable[[], tuple[QuantizedBlock, RefineNotes]]
) -> tuple[QuantizedBlock, RefineNotes]:
    """What `refine` returns on the leader, where alone it is called, on every process.

    block: what is refined, which all processes hold alike; the codes are taken from it.
    """
    if team.size == 1:
        return refine()
    made: list[QuantizedBlock] = []

    def about() -> RefineNotes:
        found, notes = refine()
        made.append(found)
        return notes

    notes = team.from_leader(about)
    sent = team.tensors_from_leader(lambda: _changeable(made[0]))

    def taken(role: Role, held: Held) -> Held:
        if not isinstance(held, Coded):
            return sent[f"linear {role}"]
        return replace(held, params={name: sent[f"{role} {name}"] for name in held.params})

    return (
        QuantizedBlock(
            {role: taken(role, held) for role, held in block.linears.items()},
            {role: sent[f"norm {role}"] for role in block.norms},
            {role: sent[f"bias {role}"] for role in block.biases},
        ),
        notes,
    )


def _changeable(block: QuantizedBlock) -> dict[str, Tensor]:
    """Everything of a block but codes, by name."""
    found = {f"norm {role}": gain for role, gain in block.norms.items()}
    found |= {f"bias {role}": bias for role, bias in block.biases.items()}
    for role, held in block.linears.items():
        if isinstance(held, Coded):
            found |= {f"{role} {name}": p for name, p in held.params.items()}
        else:
            found[f"linear {role}"] = held
    return found
