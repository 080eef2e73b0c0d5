"""Random checkpoints in the layouts of other tools, packed a code at a time: shares nothing with our readers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from d2qconv.testing.models import make_checkpoint

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Scheme:
    """How every linear is quantized. step_bits: significant bits of the steps. order: columns lie in random groups."""

    bits: int = 4
    group: int = 32
    symmetric: bool = True
    step_bits: int = 11
    dtype: str = "float16"
    order: bool = False

    def quantize(self, w, random):
        """(codes u8[n_out, n_in], zeros and steps [n_out, n_groups], group of every column)."""
        n_out, n_in = w.shape
        size = self.group if self.group > 0 else n_in
        n_groups, top = n_in // size, 2**self.bits - 1
        column = np.arange(n_in) // size
        if self.order:
            column = random.permutation(column)
        codes = np.empty(w.shape, np.uint8)
        zeros, steps = np.empty((n_out, n_groups), np.int64), np.empty((n_out, n_groups), np.float32)
        for g in range(n_groups):
            part = w[:, column == g]
            if self.symmetric:
                step = np.abs(part).max(1) / (top / 2)
                zero = np.full(n_out, 2 ** (self.bits - 1))
            else:
                low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
                step = (high - low) / top
                zero = np.clip(np.rint(-low / step), 1, top)
            step = rounded(step, self.step_bits, self.dtype)
            codes[:, column == g] = np.clip(np.rint(part / step[:, None]) + zero[:, None], 0, top)
            zeros[:, g], steps[:, g] = zero, step
        return codes, zeros, steps, column


def rounded(step, bits, dtype):
    """Steps to so many significant bits, and to what the dtype holds."""
    mantissa, exponent = np.frexp(step)
    kept = np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent)
    return kept.astype(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def stream(codes, bits):
    """Rows of codes as u32 words without gaps, a bit at a time."""
    rows, n = codes.shape
    words = np.zeros((rows, -(-n * bits // 32)), np.uint64)
    for i in range(n):
        for b in range(bits):
            at = i * bits + b
            words[:, at // 32] |= (
                (codes[:, i].astype(np.uint64) >> np.uint64(b)) & np.uint64(1)
            ) << np.uint64(at % 32)
    return words.astype(np.uint32).view(np.int32)


def apart(codes, bits, order=None):
    """Rows of codes as u32 words, 32 // bits a word, in that order inside a word."""
    each = 32 // bits
    rows, n = codes.shape
    padded = np.zeros((rows, -(-n // each) * each), np.uint64)
    padded[:, :n] = codes
    words = np.zeros((rows, padded.shape[1] // each), np.uint64)
    for place, column in enumerate(order or range(each)):
        words |= padded[:, column::each] << np.uint64(place * bits)
    return words.astype(np.uint32).view(np.int32)


def gptq(codes, zeros, steps, column, scheme, version=1, index=True):
    """GPTQ's arrays; AutoRound's without index."""
    stored = (zeros - (version == 1)) % 2**scheme.bits
    found = {
        "qweight": stream(codes.T.T, scheme.bits).T.copy(),
        "qzeros": stream(stored.T.astype(np.uint8), scheme.bits),
        "scales": steps.T.astype(scheme.dtype).copy(),
    }
    return found | ({"g_idx": column.astype(np.int32)} if index else {})


def awq(codes, zeros, steps, column, scheme):
    """AutoAWQ's."""
    return {
        "qweight": apart(codes.T, 4, AWQ_ORDER),
        "qzeros": apart(zeros.T.astype(np.uint8), 4, AWQ_ORDER),
        "scales": steps.T.astype(scheme.dtype).copy(),
    }


def compressed(codes, zeros, steps, column, scheme, old=False, signed_zeros=False):
    """compressed-tensors'."""
    pack = apart if old else stream
    found = {
        "weight_packed": pack(codes, scheme.bits),
        "weight_scale": steps.astype(scheme.dtype),
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        packed = pack(zeros.T.astype(np.uint8), scheme.bits).T.copy()
        found["weight_zero_point"] = (zeros - middle).astype(np.int8) if signed_zeros else packed
    if scheme.order:
        found["weight_g_idx"] = column.astype(np.int32)
    return found


CONFIGS = {
    "gptq": lambda s: {
        "quant_method": "gptq", "bits": s.bits, "group_size": s.group, "sym": s.symmetric,
        "desc_act": s.order, "checkpoint_format": "gptq",
    },
    "awq": lambda s: {
        "quant_method": "awq", "bits": s.bits, "group_size": s.group, "zero_point": True, "version": "gemm",
    },
    "auto-round": lambda s: {
        "quant_method": "auto-round", "packing_format": "auto_round", "bits": s.bits, "group_size": s.group,
        "sym": s.symmetric, "data_type": "int",
    },
    "compressed-tensors": lambda s: {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": s.bits, "type": "int", "symmetric": s.symmetric,
            "strategy": "group" if s.group > 0 else "channel", "group_size": s.group if s.group > 0 else None,
            "actorder": "group" if s.order else None,
        }}}, "ignore": ["lm_head"],
    },
}  # fmt: skip
PACKERS = {
    "gptq": gptq,
    "awq": awq,
    "auto-round": lambda *a, **k: gptq(*a, **({"version": 2, "index": False} | k)),
    "compressed-tensors": compressed,
}


def make_foreign(
    folder: Path, method: str, scheme: Scheme, *, arch="llama", config=(), keep=(), float_dtype=np.float16,
    zero_biases=False, model=(), **packing,
):  # fmt: skip
    """Write a quantized checkpoint; returns (folder, {weight name: values f32}). keep: linears left as floats."""
    random = np.random.default_rng(0)
    import torch

    sizes = {"hidden": 64, "ffn": 128, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 32} | dict(model)
    make_checkpoint(folder, arch, dtype=torch.float32, **sizes)
    values, tensors = {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module.rsplit(".", 1)[-1] not in LINEARS or name in keep:
            tensors[name] = w.astype(float_dtype)
            continue
        codes, zeros, steps, column = scheme.quantize(w, random)
        values[name] = (codes - zeros[:, column].astype(np.float32)) * steps[:, column]
        parts = PACKERS[method](codes, zeros, steps, column, scheme, **packing)
        tensors |= {f"{module}.{part}": array for part, array in parts.items()}
        if zero_biases and f"{module}.bias" not in tensors:
            tensors[f"{module}.bias"] = np.zeros(len(w), float_dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] = CONFIGS[method](scheme) | dict(config)
    (folder / "config.json").write_text(json.dumps(about))
    return folder, values


def change(folder: Path, **arrays):
    """Replace arrays of every linear: part = function of the array, None to take it out."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        part = name.rsplit(".", 1)[-1]
        if part in arrays:
            made = None if arrays[part] is None else arrays[part](tensors[name])
            del tensors[name]
            if made is not None:
                tensors[name] = made
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
