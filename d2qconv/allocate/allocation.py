"""From what may be chosen to what is chosen: the measurement, kept in the work directory, and the choice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from d2qconv import __version__
from d2qconv.allocate.choose import Item, choose, frontier, least
from d2qconv.allocate.sensitivity import JUDGED, MEASURED, Measuring, Sensitivity, Storage, n_sequences
from d2qconv.arch.spec import ModelDesc
from d2qconv.budget import gibibytes
from d2qconv.errors import Refusal
from d2qconv.exporters.base import Candidates, type_name
from d2qconv.ir.workdir import prepare, read_measured, write_measured
from d2qconv.names import TensorId
from d2qconv.progress import Watch
from d2qconv.run import Recipe
from d2qconv.walk.activations import Placement
from d2qconv.walk.rounding import Rounder

#: Most points of the curve that a choice is made on, besides its last one.
CURVE = 48
#: Bytes of an f32.
_F32 = 4


@dataclass(frozen=True)
class Chosen:
    """One matrix of the choice. kld: what it is predicted to cost, nats per token."""

    storage: Storage
    n_bytes: int
    kld: float


@dataclass(frozen=True)
class Allocation:
    """A type for every matrix. asked: in the user's words; budget: bytes of all tensors. n_tokens: measured on.

    curve: what there was to choose from, bytes of all tensors and predicted cost from the smallest choice up; some
    CURVE points of `choose.frontier`.
    """

    asked: str
    budget: int
    tensors: Mapping[TensorId, Chosen]
    n_tokens: int
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def kld(self) -> float:
        """What all matrices together are predicted to cost, nats per token, their costs added up."""
        return sum(chosen.kld for chosen in self.tensors.values())

    @property
    def storages(self) -> Mapping[TensorId, Storage]:
        """By tensor."""
        return {tensor: chosen.storage for tensor, chosen in self.tensors.items()}


@dataclass(frozen=True)
class Measurement:
    """How sensitivities are measured, and where they are kept.

    content: digest of config and weights. tokens: i64[n, length], the calibration's.
    """

    desc: ModelDesc
    content: str
    tokens: Tensor
    rounder: Rounder
    placement: Placement
    folder: Path

    def sensitivity(self, candidates: Candidates, watch: Watch) -> Sensitivity:
        """What every candidate costs; from the work directory, if it has been measured before. Raises RunError."""
        choices = {t: tuple(o.storage for o in options) for t, options in candidates.options.items()}
        key = self._key({str(t): [type_name(s) for s in storages] for t, storages in choices.items()})
        kept = read_measured(self.folder, key)
        if kept is not None:
            watch.stage("sensitivity", 1)
            watch.step(1, "as measured before")
            return msgspec.json.decode(kept, type=Sensitivity)
        prepare(self.folder)
        found = Measuring(self.desc, choices, self.tokens, self.rounder, self.placement, watch).run()
        write_measured(self.folder, key, msgspec.json.encode(found))
        return found

    def _key(self, choices: Mapping[str, list[str]]) -> str:
        """Digest of all that the measurement depends on; the budget is not of it."""
        facts = {
            "version": __version__,
            "torch": str(torch.__version__),
            "content": self.content,
            "rotation": self.desc.rotation,
            "tokens": hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest(),
            "shape": list(self.tokens.shape),
            "n_tokens": [JUDGED, MEASURED],
            "recipe": self.rounder.recipe,
            "choices": choices,
            "device": self.placement.device.type,
        }
        return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def allocate(candidates: Candidates, measured: Sensitivity) -> Allocation:
    """The choice of least cost; the smallest one must fit."""
    tensors = list(candidates.options)
    items = []
    for tensor in tensors:
        cost, options = measured.costs[str(tensor)], candidates.options[tensor]
        losses = tuple(cost.kld[type_name(option.storage)] for option in options)
        items.append(Item(tuple(option.n_bytes for option in options), losses))
    numbers = choose(items, candidates.n_bytes - candidates.fixed_bytes)
    chosen = {
        tensor: Chosen(candidates.options[tensor][k].storage, item.sizes[k], item.losses[k])
        for tensor, item, k in zip(tensors, items, numbers, strict=True)
    }
    curve = [(candidates.fixed_bytes + n_bytes, kld) for n_bytes, kld in frontier(items)]
    every = max(-(-len(curve) // CURVE), 1)
    curve = [*curve[:-1:every], curve[-1]]
    return Allocation(candidates.asked, candidates.n_bytes, chosen, measured.n_tokens, tuple(curve))


def refusals(candidates: Candidates, recipe: Recipe) -> Iterator[Refusal]:
    """Why no choice can be made; known without any measurement."""
    if recipe.norm_scales:
        why = "they want one type for all matrices that read a norm, and the choice gives each its own"
        yield Refusal("norm-scales", why, f"leave out --norm-scales or {candidates.asked}")
    items = [
        Item(tuple(o.n_bytes for o in options), (0.0,) * len(options))
        for options in candidates.options.values()
    ]
    smallest = candidates.fixed_bytes + least(items)
    if smallest <= candidates.n_bytes:
        return
    why = (
        f"leaves {gibibytes(max(candidates.n_bytes, 0))} for the tensors, and the smallest types that fit this model "
        f"take {gibibytes(smallest)}"
    )
    yield Refusal(candidates.asked, why, "ask for more, or let smaller types be used")


def activation_bytes(desc: ModelDesc, candidates: Candidates, n_sequences_: int, length: int) -> int:
    """What all streams of the measurement hold together at the end."""
    measured, judged = n_sequences(n_sequences_, length)
    branches = sum(1 for t in candidates.options if t.block is not None)
    branches += sum(len(o) for t, o in candidates.options.items() if t.block is None)
    return _F32 * desc.dims.hidden * length * (measured + judged * branches)
