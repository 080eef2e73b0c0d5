"""Checkpoints with the real shapes of known models and random weights, and random calibration tokens.

Run as a program with a JSON request (see `Request`), so that the maker's memory is not the quantizer's.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

#: Largest file of weights. Hugging Face cuts at 5 GB; smaller ones keep the maker's memory low.
SHARD_BYTES = 2 << 30
#: Standard deviation of a matrix, as Hugging Face initialises Llama and Qwen3.
STD = 0.02
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

LLAMA3_ROPE: Mapping[str, object] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
PLAIN_ROPE: Mapping[str, object] = {"rope_type": "default", "rope_theta": 1000000.0}


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a model. blocks: as made; full_blocks: of the real model."""

    name: str
    model_type: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    blocks: int
    full_blocks: int
    is_tied: bool = False
    max_positions: int = 131072
    norm_eps: float = 1e-5

    @property
    def block_matrices(self) -> Mapping[str, tuple[int, int]]:
        """(n_out, n_in) of a block's linears."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    @property
    def block_weights(self) -> int:
        """Weights of one block's linears."""
        return sum(out * n_in for out, n_in in self.block_matrices.values())

    @property
    def end_weights(self) -> int:
        """Weights of embedding and head."""
        return self.vocab * self.hidden * (1 if self.is_tied else 2)


def _llama(name: str, hidden: int, ffn: int, heads: int, blocks: int) -> Shape:
    return Shape(name, "llama", hidden, ffn, heads, 8, 128, 128256, blocks, blocks)


SHAPES: Mapping[str, Shape] = {
    "llama-3.1-8b": _llama("llama-3.1-8b", 4096, 14336, 32, 32),
    "llama-3.1-70b": _llama("llama-3.1-70b", 8192, 28672, 64, 80),
    "qwen3-8b": Shape("qwen3-8b", "qwen3", 4096, 12288, 32, 8, 128, 151936, 36, 36,
                      max_positions=40960, norm_eps=1e-6),
    "small": Shape("small", "llama", 256, 768, 4, 2, 64, 8192, 2, 2, max_positions=2048),
}  # fmt: skip


def widened(shape: Shape, hidden: int) -> Shape:
    """The shape at another width, its proportions kept: head size, share of key heads, ffn as a multiple of 256."""
    ffn = max(round(shape.ffn * hidden / shape.hidden / 256), 1) * 256
    heads = max(hidden // shape.head, 1)
    kv_heads = max(heads * shape.kv_heads // shape.heads, 1)
    return replace(
        shape, name=f"{shape.name}@{hidden}", hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads
    )


@dataclass(frozen=True)
class Request:
    """What to make. tokens: those of every sequence, held-out ones included, are drawn from the vocabulary."""

    shape: Shape
    folder: str
    tokenizer: str
    device: str
    sequences: int
    held_out: int
    length: int
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """What was made, and how long that took."""

    n_bytes: int
    n_weights: int
    seconds: float
    seconds_drawing: float
    seconds_writing: float


def config_of(shape: Shape) -> dict[str, object]:
    """config.json, transformers 5 style."""
    is_llama = shape.model_type == "llama"
    rope = LLAMA3_ROPE if is_llama and shape.max_positions > 8192 else PLAIN_ROPE
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM" if is_llama else "Qwen3ForCausalLM"],
        "model_type": shape.model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.is_tied,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": dict(rope),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": STD,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
        "transformers_version": "5.17.0",
    }
    if is_llama:
        config["mlp_bias"] = False
    else:
        config |= {"sliding_window": None, "use_sliding_window": False, "max_window_layers": shape.blocks}
    return config


def tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """(name, shape, standard deviation) of every tensor; 0 stands for a gain, all ones.

    Matrices that write into the residual stream are scaled by 1/sqrt(2·blocks of the real model), as GPT-2's, so
    that activations do not grow with depth.
    """
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden), STD
    into_stream = STD / (2 * shape.full_blocks) ** 0.5
    for block in range(shape.blocks):
        at = f"model.layers.{block}"
        yield f"{at}.input_layernorm.weight", (shape.hidden,), 0.0
        yield f"{at}.post_attention_layernorm.weight", (shape.hidden,), 0.0
        if shape.model_type == "qwen3":
            yield f"{at}.self_attn.q_norm.weight", (shape.head,), 0.0
            yield f"{at}.self_attn.k_norm.weight", (shape.head,), 0.0
        for name, size in shape.block_matrices.items():
            is_writer = name.endswith(("o_proj", "down_proj"))
            yield f"{at}.{name}.weight", size, into_stream if is_writer else STD
    yield "model.norm.weight", (shape.hidden,), 0.0
    if not shape.is_tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden), STD


def make_checkpoint(request: Request) -> Made:
    """Write the folder; weights are drawn on the device, rounded to bf16 there, and written shard by shard."""
    started = time.perf_counter()
    shape, folder = request.shape, Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(request.device).manual_seed(request.seed)
    drawing = writing = 0.0
    n_bytes = n_weights = 0
    shard: dict[str, torch.Tensor] = {}
    files: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        nonlocal writing
        if not shard:
            return
        begun = time.perf_counter()
        path = folder / f"part-{len(files):05d}.safetensors"
        save_file(shard, path, {"format": "pt"})
        files.append((path, list(shard)))
        shard.clear()
        writing += time.perf_counter() - begun

    held = 0
    for name, size, std in tensors_of(shape):
        begun = time.perf_counter()
        tensor = _draw(size, std, request.device, generator)
        drawing += time.perf_counter() - begun
        if held and held + tensor.nbytes > SHARD_BYTES:
            flush()
            held = 0
        shard[name] = tensor
        held += tensor.nbytes
        n_bytes += tensor.nbytes
        n_weights += tensor.numel()
    flush()
    _name_shards(folder, files, n_bytes)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(Path(request.tokenizer) / name, folder / name)
    _write_tokens(request)
    return Made(n_bytes, n_weights, time.perf_counter() - started, drawing, writing)


def _draw(size: tuple[int, ...], std: float, device: str, generator: torch.Generator) -> torch.Tensor:
    if std == 0:
        return torch.ones(size, dtype=torch.bfloat16)
    drawn = torch.empty(size, dtype=torch.bfloat16, device=device)
    for piece in drawn.split(max((1 << 28) // size[-1], 1)):
        piece.copy_(torch.randn(piece.shape, device=device, generator=generator).mul_(std))
    return drawn.cpu()


def _name_shards(folder: Path, files: list[tuple[Path, list[str]]], n_bytes: int) -> None:
    """Final names and the index, as Hugging Face has them."""
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_tokens(request: Request) -> None:
    """`tokens.npy`: i32[sequences + held_out, length], uniform over the vocabulary."""
    draw = np.random.default_rng(request.seed)
    n = request.sequences + request.held_out
    tokens = draw.integers(request.shape.vocab, size=(n, request.length), dtype=np.int32)
    np.save(Path(request.folder) / "tokens.npy", tokens)


def chosen_tokens(folder: Path, sequences: int, length: int, held_out: int) -> np.ndarray:
    """The calibration sequences that `load_tokens` takes of tokens.npy, for the peers: i64[sequences, length]."""
    from d2qconv.arch.bind import bind  # noqa: PLC0415
    from d2qconv.calibrate.tokens import load_tokens  # noqa: PLC0415
    from d2qconv.checkpoint.open import open_checkpoint  # noqa: PLC0415
    from d2qconv.run import CalibrationSpec  # noqa: PLC0415

    checkpoint = open_checkpoint(str(folder))
    spec = CalibrationSpec(str(folder / "tokens.npy"), sequences, length)
    tokens = load_tokens(spec, checkpoint, bind(checkpoint), device="cpu", on_step=lambda _done: None)
    if len(tokens.calibration) != sequences or len(tokens.held_out) != held_out:
        raise ValueError(f"{len(tokens.calibration)} + {len(tokens.held_out)} sequences were chosen")
    array: np.ndarray = tokens.calibration.numpy()
    return array


def main() -> None:
    """`quantize_model.py REQUEST.json RESULT.json`."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    request = Request(**{**asked, "shape": Shape(**asked["shape"])})
    made = make_checkpoint(request)
    tokens = chosen_tokens(Path(request.folder), request.sequences, request.length, request.held_out)
    np.save(Path(request.folder) / "calibration.npy", tokens.astype(np.int32))
    Path(sys.argv[2]).write_text(json.dumps(asdict(made)), encoding="utf-8")


if __name__ == "__main__":
    main()
