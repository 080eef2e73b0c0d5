"""Rules that give single matrices a storage type: `v=q4_k`, `down@0-3,7=q4_k`.

How a user of any format says it; the names of the types are the format's own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from d2qconv.arch.spec import ModelDesc
from d2qconv.errors import Refusal
from d2qconv.names import Part, Role, TensorId

#: Roles that a rule may name.
ROLES = (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN, Role.EMBED, Role.HEAD)
_RULE = re.compile(
    r"(?P<role>[a-z_]+)(?:@(?P<blocks>[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*))?=(?P<type>\w+)"
)


@dataclass(frozen=True)
class Override:
    """The matrices of `role`, in those blocks or in all of them, are stored as `type`.

    blocks: pairs of first and last block, empty for all.
    """

    text: str
    role: Role
    blocks: tuple[tuple[int, int], ...]
    type: str

    def holds(self, tensor: TensorId) -> bool:
        """Whether it is about this tensor."""
        if tensor.role is not self.role or tensor.part is not Part.WEIGHT:
            return False
        return not self.blocks or any(
            tensor.block is not None and a <= tensor.block <= b for a, b in self.blocks
        )


@dataclass(frozen=True)
class OverrideOption:
    """The option that takes such rules: its name, and the types that may be named. example: one of them."""

    name: str
    types: Collection[str]
    example: str

    @property
    def how(self) -> str:
        """What to write."""
        e = self.example
        return f"write ROLE=TYPE or ROLE@BLOCKS=TYPE, such as v={e} or down@0-3,7={e}"

    def where(self, text: str) -> str:
        """The place that a refusal names."""
        return f"option {self.name} {text}"

    def parse(self, text: str) -> Override | Refusal:
        """`down@0-3,7=q4_k`; a Refusal if it is no such thing."""
        where = self.where(text)
        found = _RULE.fullmatch(text)
        if found is None:
            return Refusal(where, "not a rule", self.how)
        role = next((role for role in ROLES if role == found["role"]), None)
        if role is None:
            return Refusal(where, f"no matrix is called {found['role']!r}", f"use one of {', '.join(ROLES)}")
        if found["type"] not in self.types:
            return Refusal(
                where, f"{found['type']!r} is not a storage type", f"use one of {', '.join(self.types)}"
            )
        pieces = [piece.split("-") for piece in (found["blocks"] or "").split(",") if piece]
        blocks = tuple((int(piece[0]), int(piece[-1])) for piece in pieces)
        if any(first > last for first, last in blocks):
            return Refusal(where, "the last block of a range comes before its first", self.how)
        return Override(text, role, blocks, found["type"])

    def overrides(self, texts: Sequence[str]) -> tuple[Override, ...]:
        """Those of the texts that are rules."""
        return tuple(o for o in map(self.parse, texts) if isinstance(o, Override))

    def refusals(self, texts: Sequence[str], model: ModelDesc) -> list[Refusal]:
        """What of the texts is no rule, or matches no matrix of the model."""
        parsed = map(self.parse, texts)
        found = (o if isinstance(o, Refusal) else self._unmatched(o, model) for o in parsed)
        return [refusal for refusal in found if refusal is not None]

    def _unmatched(self, override: Override, model: ModelDesc) -> Refusal | None:
        where, n = self.where(override.text), model.dims.n_layers
        if override.role is Role.HEAD and model.is_tied:
            return Refusal(where, "this model's head is its embedding", f"say embed={override.type}")
        if override.blocks and override.role in (Role.EMBED, Role.HEAD):
            return Refusal(
                where, f"{override.role} stands in no block", f"say {override.role}={override.type}"
            )
        if any(last >= n for _, last in override.blocks):
            return Refusal(where, f"the model has blocks 0 to {n - 1}")
        if not any(override.holds(tensor) for tensor in model.tensors):
            return Refusal(where, f"the model has no matrix {override.role}")
        return None


def last_that_holds(overrides: Sequence[Override], tensor: TensorId) -> Override | None:
    """The rule that decides about a tensor: later ones win."""
    return next((o for o in reversed(overrides) if o.holds(tensor)), None)
