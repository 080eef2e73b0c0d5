"""What quantization hands to an exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from d2qconv.arch.spec import ModelDesc
from d2qconv.checkpoint.dense import Dense
from d2qconv.ir.coded import Coded
from d2qconv.ir.importance import Importance
from d2qconv.names import TensorId

#: A tensor as it goes into the package: codes on a grid, or a float tensor already in its final values.
Stored: TypeAlias = Coded | Dense


@dataclass(frozen=True)
class Provenance:
    """Where a package comes from; goes into its metadata as text.

    carriers: per kind of correction (`mean_shift`, `column_scale`) how the package carries it. source_revision: the
    hub's commit, empty for a folder. source_sha256: over config and weights, see `checkpoint.digest`.
    """

    version: str
    fingerprint: str
    source: str
    source_license: str
    recipe: str
    calibration: str
    carriers: Mapping[str, str]
    source_revision: str = ""
    source_sha256: str = ""

    def facts(self) -> dict[str, str]:
        """All of it by name, as packages say it; what is empty is left out, but for the license."""
        found = {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "source_license": self.source_license,
            "recipe": self.recipe,
            "calibration": self.calibration,
        }
        found |= {f"carrier.{kind}": how for kind, how in sorted(self.carriers.items())}
        more = {"source_revision": self.source_revision, "source_sha256": self.source_sha256}
        return found | {name: text for name, text in more.items() if text}


@dataclass(frozen=True)
class QuantizedModel:
    """A whole model, folds done, in the checkpoint's row order.

    tensors: every tensor the package must hold, loaded or decoded one at a time; biases that a fold created are
    among them, a tied head is not. importance: per linear that was calibrated, the size of its inputs.
    """

    desc: ModelDesc
    tensors: Mapping[TensorId, Stored]
    provenance: Provenance
    importance: Mapping[TensorId, Importance] = field(default_factory=dict)
