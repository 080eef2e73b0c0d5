"""What an architecture is: tables of sites and couplings, and the numbers that a config fills in.

Layout is data. A new architecture is one module beside this one that builds an `Architecture`; nothing here or
elsewhere branches on its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from d2qconv.names import Role, TensorId

if TYPE_CHECKING:
    from d2qconv.checkpoint.dense import Dense


class Dim(StrEnum):
    """A size that a config gives."""

    VOCAB = "vocab"
    HIDDEN = "hidden"
    FFN = "ffn"
    Q_OUT = "q_out"
    KV_OUT = "kv_out"
    HEAD = "head"


@dataclass(frozen=True)
class Dims:
    """The sizes of one model."""

    vocab: int
    hidden: int
    ffn: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head: int

    @property
    def n_embedding(self) -> int:
        """Weights of the embedding."""
        return self.vocab * self.hidden

    def size(self, dim: Dim) -> int:
        """Length of one dimension."""
        match dim:
            case Dim.Q_OUT:
                return self.n_heads * self.head
            case Dim.KV_OUT:
                return self.n_kv_heads * self.head
        return int(getattr(self, dim.value))


@dataclass(frozen=True)
class Site:
    """One parameterised place: its module name in the checkpoint (`{i}` is the block), and its shape.

    n_in is None for a vector (a norm gain). `can_have_bias`: a bias may stand there; whether it does is seen in
    the checkpoint and must agree with the config.
    """

    role: Role
    module: str
    n_out: Dim
    n_in: Dim | None = None
    can_have_bias: bool = False


@dataclass(frozen=True)
class Coupling:
    """A function-preserving neighbourhood.

    kind `scale`: a scale c on the input columns of `source` can be undone by multiplying the rows of every
    `absorbs` by c. kind `shift`: a constant added to the output of the norm `source` equals biases on `absorbs`,
    its only consumers.
    """

    kind: str
    source: Role
    absorbs: tuple[Role, ...]
    why: str


@dataclass(frozen=True)
class Residual:
    """Who touches the residual stream, the sum that runs through all blocks.

    source: the rows of this matrix are the stream's first values; a tied head is the same matrix. writers: linears
    whose outputs are added to the stream. readers: every norm of the stream, and the linears that read its output.
    A norm scales each position by its root mean square and multiplies by a gain; nothing else reads the stream.
    """

    source: Role
    writers: tuple[Role, ...]
    readers: Mapping[Role, tuple[Role, ...]]

    @property
    def roles(self) -> frozenset[Role]:
        """Every site with a side as wide as the stream."""
        linears = {role for readers in self.readers.values() for role in readers}
        return frozenset({self.source, *self.writers, *self.readers, *linears})


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, the half-split (NEOX) layout of Hugging Face.

    kind: `default`, `linear`, `llama3` or `yarn`. Fields not used by a kind keep their defaults. Names and meaning
    are those of transformers' `rope_parameters`.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class ConfigKey:
    """What is done with one key of config.json.

    `must_be`: the values with which the function is the one we compute; anything else is refused with `why`.
    A key without `must_be` is either read elsewhere or does not change the function (`why` says which).
    """

    name: str
    why: str
    must_be: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Architecture:
    """One family of models, as tables."""

    id: str
    model_type: str
    class_names: tuple[str, ...]
    sites: tuple[Site, ...]
    couplings: tuple[Coupling, ...]
    config_keys: tuple[ConfigKey, ...]
    #: config keys whose defaults differ from the shared ones when they are absent
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    #: None where the stream is not as `Residual` says; such a model cannot be rotated
    residual: Residual | None = None

    def site(self, role: Role) -> Site | None:
        """The site with that role, or None if the architecture has none."""
        return next((s for s in self.sites if s.role is role), None)

    @property
    def has_qk_norm(self) -> bool:
        """Whether q and k are normalised per head before RoPE."""
        return self.site(Role.Q_NORM) is not None

    def coupling(self, kind: str, source: Role) -> Coupling | None:
        """The coupling of that kind at that place, or None."""
        return next((c for c in self.couplings if c.kind == kind and c.source is source), None)


@dataclass(frozen=True)
class Padding:
    """Widths that a model is widened to with zeros: of the residual stream, and inside the feed-forward layers."""

    hidden: int
    ffn: int


@dataclass(frozen=True)
class ModelDesc:
    """A checkpoint bound to its architecture: everything that planning and the forward pass need.

    tensors: every tensor of the model, lazily; a tied head is absent (`is_tied`). bos/eos: as in the config.
    rotation: how the residual stream was turned (`hadamard 128, seed 0`), empty if it is the checkpoint's; an
    exporter that cannot take such a model refuses it. is_untied: the checkpoint's head is tied and the rotation gave
    it a matrix of its own. padding: which widths were filled up with zeros (`hidden 576 → 768`), empty if none was;
    unpadded: the checkpoint's sizes then. n_zeros: elements of tensors that this added.
    """

    arch: Architecture
    dims: Dims
    rope: Rope
    norm_eps: float
    is_tied: bool
    max_positions: int
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    tensors: Mapping[TensorId, Dense]
    rotation: str = ""
    is_untied: bool = False
    padding: str = ""
    unpadded: Dims | None = None
    n_zeros: int = 0

    @property
    def n_weights(self) -> int:
        """Number of weights in the checkpoint; a tied head counts once, also after a rotation untied it.

        Zeros of a padding do not count.
        """
        n = sum(d.n_elements for d in self.tensors.values()) - self.n_zeros
        return n - (self.dims if self.unpadded is None else self.unpadded).n_embedding * self.is_untied
