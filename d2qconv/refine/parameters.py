"""What the last pass may change, and how it gets back into storage.

Every scale s of a quantized matrix becomes s · m, every norm gain g becomes g · m, each element with a multiplier m of
its own that starts at 1: what is zero stays zero. A bias b becomes b + rms(b) · a, a starting at 0; a bias of zeros
stays as it is. Codes, inner scales and float matrices are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.grids.affine import AffineGrid
from d2qconv.grids.scaling import stored, top
from d2qconv.ir.block import QuantizedBlock
from d2qconv.ir.coded import Coded, Held, decoded
from d2qconv.names import Role
from d2qconv.refine.attention import SteadyBlock
from d2qconv.refine.settings import RefineSettings


class Kind(StrEnum):
    """What a parameter belongs to; each kind has its rate."""

    SCALE = "scale"
    GAIN = "gain"
    BIAS = "bias"


#: Where each kind starts.
_START = {Kind.SCALE: 1.0, Kind.GAIN: 1.0, Kind.BIAS: 0.0}


class Pool:
    """All parameters of one kind in one vector, so that a step of Adam is a handful of operations.

    values, gradients: f32[n]. `take` hands out leaves of autograd that are views of both.
    """

    def __init__(self, sizes: Mapping[Kind, int], device: torch.device) -> None:
        self.values = {k: torch.full((n,), _START[k], device=device) for k, n in sizes.items()}
        self.gradients = {k: torch.zeros(n, device=device) for k, n in sizes.items()}
        self._moments = {k: (torch.zeros_like(v), torch.zeros_like(v)) for k, v in self.values.items()}
        self._used = dict.fromkeys(sizes, 0)
        self._n_steps = 0

    def take(self, kind: Kind, shape: Sequence[int]) -> Tensor:
        """The next parameters, f32[shape], that require gradients and have one already: zeros."""
        start, n = self._used[kind], torch.Size(shape).numel()
        self._used[kind] = start + n
        leaf = self.values[kind][start : start + n].view(tuple(shape)).requires_grad_()
        leaf.grad = self.gradients[kind][start : start + n].view(tuple(shape))
        return leaf

    def snapshot(self) -> dict[Kind, Tensor]:
        """The values as they are now."""
        return {kind: values.detach().clone() for kind, values in self.values.items()}

    @torch.no_grad()
    def restore(self, values: Mapping[Kind, Tensor]) -> None:
        """Back to the values of a snapshot."""
        for kind, old in values.items():
            self.values[kind].copy_(old)

    @torch.no_grad()
    def step(self, settings: RefineSettings, slope: float) -> None:
        """One step of Adam (arXiv 1412.6980, algorithm 1, eps 1e-12: losses are small), then zero gradients."""
        self._n_steps += 1
        first, second = settings.betas
        rates = {
            Kind.SCALE: settings.scale_rate,
            Kind.GAIN: settings.gain_rate,
            Kind.BIAS: settings.bias_rate,
        }
        for kind, gradient in self.gradients.items():
            mean, square = self._moments[kind]
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            root = (square / (1 - second**self._n_steps)).sqrt_().add_(1e-12)
            self.values[kind].addcdiv_(mean, root, value=-slope * rates[kind] / (1 - first**self._n_steps))
            gradient.zero_()


def count(block: QuantizedBlock) -> dict[Kind, int]:
    """Parameters of a block by kind."""
    coded = [linear for linear in block.linears.values() if isinstance(linear, Coded)]
    return {
        Kind.SCALE: sum(n_scales(c) for c in coded),
        Kind.GAIN: sum(gain.numel() for gain in block.norms.values()),
        Kind.BIAS: sum(bias.numel() for bias in block.biases.values()),
    }


def n_scales(coded: Coded) -> int:
    """Scales of a matrix that may change."""
    return sum(coded.params[name].numel() for name in coded.grid.scales)


def plain(tensor: Tensor) -> Tensor:
    """The same values as a tensor that autograd may keep, also where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


@dataclass(frozen=True)
class TrainedGain:
    """One norm gain. gain: f32[n]; multiplier: f32[n], a leaf."""

    gain: Tensor
    multiplier: Tensor

    @classmethod
    def of(cls, gain: Tensor, pool: Pool) -> TrainedGain:
        """Its multipliers taken from the pool."""
        return cls(plain(gain), pool.take(Kind.GAIN, gain.shape))

    def value(self) -> Tensor:
        """f32[n], with a gradient if that is on."""
        return self.gain.float() * self.multiplier

    def stored(self) -> Tensor:
        """The value in the gain's own dtype."""
        return to_storage(self.value().detach(), self.gain.dtype)


@dataclass(frozen=True)
class TrainedMatrix:
    """One quantized matrix. multipliers: a leaf for every name in `grid.scales`."""

    coded: Coded
    multipliers: Mapping[str, Tensor]

    @classmethod
    def of(cls, coded: Coded, pool: Pool) -> TrainedMatrix:
        """Its multipliers taken from the pool."""
        names = coded.grid.scales
        params = {n: plain(p) if n in names else p for n, p in coded.params.items()}
        taken = {n: pool.take(Kind.SCALE, params[n].shape) for n in names}
        return cls(replace(coded, params=params), taken)

    def value(self) -> Tensor:
        """f32[n_out, n_in], with a gradient if that is on."""
        return self.coded.grid.decode(self.coded.codes, {**self.coded.params, **self._scales()})

    def backward(self, gradient: Tensor) -> None:
        """Carry the gradient of the value, f32[n_out, n_in], on to the multipliers."""
        with torch.enable_grad():
            torch.autograd.backward(self.value(), gradient)

    def stored(self) -> Coded:
        """The matrix with every scale rounded to its storage dtype."""
        grid = self.coded.grid
        significand = grid.significand if isinstance(grid, AffineGrid) else 0
        scales = {
            name: to_storage(scale.detach(), self.coded.params[name].dtype, significand)
            for name, scale in self._scales().items()
        }
        return replace(self.coded, params={**self.coded.params, **scales})

    def _scales(self) -> dict[str, Tensor]:
        return {n: self.coded.params[n].float() * m for n, m in self.multipliers.items()}


@dataclass(frozen=True)
class TrainedBias:
    """One bias. bias: f32[n_out]; addend: f32[n_out], a leaf, in units of the bias's root mean square.

    An element that is exactly 0 stays so: the new channels of a padded model must.
    """

    bias: Tensor
    addend: Tensor

    @classmethod
    def of(cls, bias: Tensor, pool: Pool) -> TrainedBias:
        """Its addends taken from the pool."""
        return cls(plain(bias), pool.take(Kind.BIAS, bias.shape))

    def value(self) -> Tensor:
        """f32[n_out], with a gradient if that is on."""
        bias = self.bias.float()
        return bias + bias.square().mean().sqrt() * self.addend * (bias != 0)

    def stored(self) -> Tensor:
        """The value in the bias's own dtype."""
        return to_storage(self.value().detach(), self.bias.dtype)


@dataclass(frozen=True)
class TrainedBlock:
    """One block. weights and biases: what changes, by role; fixed: matrices kept in float, f32."""

    desc: ModelDesc
    block: QuantizedBlock
    weights: dict[Role, TrainedMatrix | TrainedGain] = field(default_factory=dict)
    biases: dict[Role, TrainedBias] = field(default_factory=dict)

    @classmethod
    def of(cls, desc: ModelDesc, block: QuantizedBlock, pool: Pool) -> TrainedBlock:
        """A block whose parameters are the next ones of the pool."""
        made = cls(desc, block)
        for role, held in block.linears.items():
            if isinstance(held, Coded):
                made.weights[role] = TrainedMatrix.of(held, pool)
        made.weights.update({role: TrainedGain.of(gain, pool) for role, gain in block.norms.items()})
        made.biases.update({role: TrainedBias.of(bias, pool) for role, bias in block.biases.items()})
        return made

    @torch.no_grad()
    def computed(self) -> SteadyBlock:
        """The block as it is now. Its tensors belong to nobody else; they carry no gradient yet."""
        weights = {role: trained.value() for role, trained in self.weights.items()}
        weights |= {
            r: plain(held.float()) for r, held in self.block.linears.items() if isinstance(held, Tensor)
        }
        biases = {role: trained.value() for role, trained in self.biases.items()}
        return SteadyBlock(self.desc, weights, biases)

    def backward(self, block: SteadyBlock) -> None:
        """Carry the gradients of `block`'s tensors on to the parameters, one tensor at a time; they are used up."""
        for trained, tensor in self._pairs(block):
            gradient, tensor.grad = tensor.grad, None
            assert gradient is not None, "every weight of a block is used"
            with torch.enable_grad():
                torch.autograd.backward(trained.value(), gradient)

    def require_grad(self, block: SteadyBlock) -> None:
        """Let the tensors of `block` that have parameters behind them collect gradients."""
        for _, tensor in self._pairs(block):
            tensor.requires_grad_()

    @torch.no_grad()
    def stored(self) -> QuantizedBlock:
        """The block in storage precision."""
        linears: dict[Role, Held] = dict(self.block.linears)
        norms = dict(self.block.norms)
        for role, trained in self.weights.items():
            if isinstance(trained, TrainedMatrix):
                linears[role] = trained.stored()
            else:
                norms[role] = trained.stored()
        return QuantizedBlock(linears, norms, {role: bias.stored() for role, bias in self.biases.items()})

    def _pairs(
        self, block: SteadyBlock
    ) -> Iterator[tuple[TrainedMatrix | TrainedGain | TrainedBias, Tensor]]:
        """What is trained beside the tensor that was made of it."""
        for role, trained in self.weights.items():
            yield trained, block.weights[role]
        for role, bias in self.biases.items():
            yield bias, block.biases[role]


@torch.no_grad()
def computed(desc: ModelDesc, block: QuantizedBlock) -> SteadyBlock:
    """A block in storage precision, ready to compute."""
    weights = {role: decoded(held) for role, held in block.linears.items()}
    weights |= {role: gain.float() for role, gain in block.norms.items()}
    return SteadyBlock(desc, weights, {r: b.float() for r, b in block.biases.items()})


def to_storage(values: Tensor, dtype: torch.dtype, significand: int = 0) -> Tensor:
    """Rounded as `stored` does; what is beyond the largest finite number becomes that. NaN stays."""
    largest = top(dtype, significand)
    return stored(values.clamp(-largest, largest), dtype, significand)
