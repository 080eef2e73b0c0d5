"""Calibration without a text: sequences sampled from the model itself.

The model's own samples are distributed as the text it models (LLM-QAT, arXiv 2305.17888, uses the same data for
training), need no network and no licence. Temperature 1, no truncation. A sequence starts with the BOS token where
the tokenizer would put one, else with a token drawn uniformly.

This is the only part that needs the whole model in memory. On a GPU its matrices are in the checkpoint's own
dtype, multiplied in it with f32 sums; norms, attention and logits are f32. On the CPU everything is f32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as fn
from torch import Tensor

from d2qconv.arch.spec import ModelDesc
from d2qconv.decoder.block import Block, Past, load_block, rms_norm
from d2qconv.errors import RunError
from d2qconv.names import Part, Role, TensorId

#: Keys and values of one group of sequences, in bytes. Fixed, so that the memory there is does not choose the tokens.
GROUP_BYTES = 4 << 30
#: Seeds are below 2^63; the seed of the group that starts at sequence s is seed + s · STRIDE, modulo 2^63.
STRIDE = 0x1E3779B97F4A7C15


@dataclass(frozen=True)
class SampleBytes:
    """Memory that sampling takes on its device: all weights, one group's keys and values, and one step's arrays."""

    weights: int
    past: int
    step: int

    @property
    def total(self) -> int:
        """All of it, alive at the same time."""
        return self.weights + self.past + self.step


@torch.inference_mode()
def sample_sequences(
    model: ModelDesc,
    n_seq: int,
    length: int,
    *,
    bos: int | None,
    seed: int,
    device: torch.device | str,
    on_token: Callable[[int], None],
) -> Tensor:
    """Draw n_seq sequences of `length` tokens: i64[n_seq, length] on the CPU.

    Sequences are drawn in groups whose keys and values take at most GROUP_BYTES. Random numbers are drawn on the
    device (vocabulary × sequences for each position: on the host they took longer than the model), so two types of
    device draw different texts; every group has a generator of its own, seeded by `seed` and the number of its
    first sequence. on_token: called with the number of positions done, as if all groups were one. Raises RunError
    if logits are not finite.
    """
    device = torch.device(device)
    decoder = _Decoder.load(model, device)
    n_group = group_size(model, length, device)
    groups: list[Tensor] = []
    for start in range(0, n_seq, n_group):
        n = min(n_group, n_seq - start)

        def report(position: int, start: int = start, n: int = n) -> None:
            on_token((start * (length - 1) + n * position) // n_seq)

        generator = torch.Generator(device).manual_seed((seed + start * STRIDE) % (1 << 63))
        groups.append(decoder.draw(n, length, bos, generator, report))
    return torch.cat(groups)


def group_size(model: ModelDesc, length: int, device: torch.device) -> int:
    """Sequences that are drawn at once."""
    return max(GROUP_BYTES // _past_bytes(model, length, device), 1)


def sample_bytes(model: ModelDesc, n_seq: int, length: int, device: torch.device) -> SampleBytes:
    """Predicted memory of `sample_sequences` on `device`, in bytes.

    A step holds three arrays of logits' shape (the noise is one), one block's keys and values as f32 where they are
    kept shorter, and their copies for the query heads that share them.
    """
    dims = model.dims
    n = min(group_size(model, length, device), n_seq)
    is_cpu = device.type == "cpu"
    weights = sum(t.n_elements * (4 if is_cpu else t.dtype.itemsize) for t in model.tensors.values())
    if not is_cpu and not model.is_tied:
        embedding = model.tensors[TensorId(Role.EMBED)]
        weights -= embedding.n_elements * embedding.dtype.itemsize
    keys = n * length * dims.n_kv_heads * dims.head * 4
    copies = dims.n_heads // dims.n_kv_heads if dims.n_heads != dims.n_kv_heads else 0
    step = 3 * n * dims.vocab * 4 + 2 * keys * (copies + (0 if is_cpu else 1))
    return SampleBytes(weights, n * _past_bytes(model, length, device), step)


def _past_bytes(model: ModelDesc, length: int, device: torch.device) -> int:
    """Keys and values of one sequence in all blocks."""
    dims = model.dims
    return 2 * dims.n_layers * length * dims.n_kv_heads * dims.head * _dtype(model, device).itemsize


def _dtype(model: ModelDesc, device: torch.device) -> torch.dtype:
    """What keys and values are kept in: that of the first block's keys, on the CPU f32."""
    return torch.float32 if device.type == "cpu" else model.tensors[TensorId(Role.K, 0)].dtype


class _StoredBlock(Block):
    """A block whose matrices stay in the checkpoint's dtype. Norms, biases and what comes out are f32."""

    def linear(self, role: Role, x: Tensor) -> Tensor:
        """W x + b: x rounded to the dtype of W, sums in f32, W x rounded to that dtype, then f32."""
        w = self.weights[role]
        y = fn.linear(x.to(w.dtype), w).float()
        bias = self.biases.get(role)
        return y if bias is None else y + bias


@dataclass
class _ShortPast(Past):
    """A Past that keeps keys and values in a short dtype and gives them as f32."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See Past."""
        keys, values = super().append(k, v)
        return keys.float(), values.float()


@dataclass(frozen=True)
class _Decoder:
    """The whole model, on its device. embedding: on the host where the model is on a GPU, in the checkpoint's dtype."""

    model: ModelDesc
    device: torch.device
    blocks: list[Block]
    embedding: Tensor
    final_norm: Tensor
    head: Tensor

    @classmethod
    def load(cls, model: ModelDesc, device: torch.device) -> _Decoder:
        """Read all weights, in the precisions that the module says."""
        tensors = model.tensors
        is_cpu = device.type == "cpu"
        read = load_block if is_cpu else _load_stored
        blocks = [read(model, i, device) for i in range(model.dims.n_layers)]
        embedding = tensors[TensorId(Role.EMBED)].load()
        embedding = embedding.float() if is_cpu else embedding
        head = embedding if model.is_tied else tensors[TensorId(Role.HEAD)].load()
        head = head.float() if is_cpu else head.to(device)
        final_norm = tensors[TensorId(Role.FINAL_NORM)].load().to(device, torch.float32)
        return cls(model, device, blocks, embedding, final_norm, head)

    def draw(
        self,
        n_seq: int,
        length: int,
        bos: int | None,
        generator: torch.Generator,
        on_token: Callable[[int], None],
    ) -> Tensor:
        """One group: i64[n_seq, length]."""
        dims = self.model.dims
        pasts = [self._past(n_seq, length) for _ in self.blocks]
        tokens = torch.empty(n_seq, length, dtype=torch.int64)
        if bos is None:
            tokens[:, 0] = torch.randint(dims.vocab, (n_seq,), generator=generator, device=self.device).cpu()
        else:
            tokens[:, 0] = bos
        for position in range(1, length):
            x = fn.embedding(tokens[:, position - 1 : position], self.embedding).to(self.device).float()
            for block, past in zip(self.blocks, pasts, strict=True):
                x = block(x, past)
            logits = self._logits(x[:, 0])
            # Gumbel-max: argmax(logit + Gumbel noise) is a draw from softmax(logit).
            uniform = torch.rand(logits.shape, generator=generator, device=self.device).clamp_(
                1e-20, 1 - 1e-7
            )
            tokens[:, position] = (logits - uniform.log_().neg_().log_()).argmax(-1).cpu()
            on_token(position)
        return tokens

    def _past(self, n_seq: int, length: int) -> Past:
        if self.device.type == "cpu":
            return Past.empty(self.model, n_seq, length, self.device)
        shape = (n_seq, self.model.dims.n_kv_heads, length, self.model.dims.head)
        dtype = _dtype(self.model, self.device)
        keys, values = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))
        return _ShortPast(keys, values)

    def _logits(self, x: Tensor) -> Tensor:
        """f32[n, vocab]; raises RunError if one is not finite."""
        y = rms_norm(x, self.final_norm, self.model.norm_eps)
        logits = fn.linear(y.to(self.head.dtype), self.head).float()
        if not bool(torch.isfinite(logits).all()):
            raise RunError(
                f"sampling from the model in {self.head.dtype} gives values that are not finite",
                where="--calibration self",
                todo="give --calibration FILE",
            )
        return logits


def _load_stored(model: ModelDesc, index: int, device: torch.device) -> Block:
    """Read block `index` with its matrices as they are stored, everything else as f32."""
    block = _StoredBlock(model, {})
    for site in model.arch.sites:
        for part, into in ((Part.WEIGHT, block.weights), (Part.BIAS, block.biases)):
            dense = model.tensors.get(TensorId(site.role, index, part))
            if dense is not None:
                values = dense.load().to(device)
                into[site.role] = values if values.dim() == 2 else values.float()
    return block
