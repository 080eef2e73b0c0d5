"""Decodes a package from its bytes, without the writer's code: from config.json and arrays to f32 matrices.

::

    config.json  →  which dialect, and of every linear: bits, group size, zero points
    arrays       →  bits, one by one (numpy's unpackbits), → codes → step · (code - zero) in f32

MLX: code · scale + bias, the product exact in f64, the sum rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from d2qconv.arch.bind import described
from d2qconv.arch.config import read_config
from d2qconv.arch.registry import BUILT_IN
from d2qconv.arch.spec import Architecture, ModelDesc
from d2qconv.checkpoint.dense import Dense
from d2qconv.errors import PlanError
from d2qconv.names import Part, Role, TensorId
from d2qconv_hf.container import Folder

#: Arrays that belong to a quantized linear, by dialect; the first one says that it is one.
_PARTS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "auto-round": ("qweight", "qzeros", "scales"),
    "mlx": ("scales", "weight", "biases"),
}
_BITS = (2, 3, 4, 8)
_MOST_BITS_SIDE = 1 << 31
#: Values that are decoded at a time.
_PIECE = 1 << 19


@dataclass(frozen=True)
class Scheme:
    """How one linear is stored. group: columns, 0 for a whole row. has_zero: zero points are stored."""

    bits: int
    group: int
    has_zero: bool


@dataclass(frozen=True)
class Matrix:
    """A quantized linear in a folder."""

    folder: Folder
    dialect: str
    module: str
    shape: tuple[int, int]
    scheme: Scheme

    def decode(self) -> np.ndarray:
        """Values f32[n_out, n_in]."""
        values, at = np.empty(self.shape, np.float32), 0
        for piece in self.pieces():
            values[at : at + len(piece)] = piece
            at += len(piece)
        return values

    def pieces(self) -> Iterator[np.ndarray]:
        """The values, f32[rows, n_in] of some rows at a time."""
        words, zeros, steps = self._parts()
        n_out, n_in = self.shape
        step = max(1, _PIECE // n_in)
        for at in range(0, n_out, step):
            rows = slice(at, at + step)
            yield self._values(self._codes(words[rows], n_in), zeros[rows], steps[rows])

    def _values(self, codes: np.ndarray, zeros: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Values f32[n, n_in] of n rows; codes [n, n_in], the others [n, n_groups]."""
        n, n_in = codes.shape
        group = self.scheme.group or n_in
        grouped = codes.reshape(n, n_in // group, group)
        if self.dialect == "mlx":
            product = grouped.astype(np.float64) * steps[:, :, None].astype(np.float64)
            values = (product + zeros[:, :, None].astype(np.float64)).astype(np.float32)
            # As step · 0 has it: the sign of a zero is that of its step.
            return np.where(values == 0, np.copysign(np.float32(0), steps[:, :, None]), values).reshape(
                n, n_in
            )
        centred = grouped.astype(np.float32) - zeros[:, :, None].astype(np.float32)
        return np.asarray((centred * steps[:, :, None]).reshape(n, n_in))

    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Words of codes u32[n_out, words]; zero points (MLX: biases) and steps [n_out, n_groups]."""
        n_out, n_in = self.shape
        bits, n_groups = self.scheme.bits, n_in // (self.scheme.group or n_in)
        get = partial(self._array, n_groups=n_groups)
        if self.dialect == "mlx":
            words = self._words(self._raw("weight"), n_in)
            return words, get("biases", (n_out,)), get("scales", (n_out,))
        if self.dialect == "compressed-tensors":
            words = self._words(self._raw("weight_packed"), n_in)
            steps = get("weight_scale", (n_out,))
            if tuple(self._raw("weight_shape").tolist()) != self.shape:
                raise self.folder.error(f"{self.module} has another weight_shape than its arrays")
            if not self.scheme.has_zero:
                return words, np.full(steps.shape, 1 << (bits - 1)), steps
            packed = self._words(self._raw("weight_zero_point").T, n_out, rows=n_groups)
            return words, self._codes(packed, n_out).T, steps
        self._check_index(n_in)
        words = self._words(self._raw("qweight").T, n_in)
        steps = self.folder.span(f"{self.module}.scales").floats()
        if steps.shape != (n_groups, n_out):
            raise self.folder.error(f"{self.module} has scales {steps.shape}")
        packed = self._words(self._raw("qzeros"), n_out, rows=n_groups)
        return words, self._codes(packed, n_out).T, steps.T

    def _raw(self, part: str) -> np.ndarray:
        return self.folder.span(f"{self.module}.{part}").raw()

    def _array(self, part: str, rows: tuple[int], n_groups: int) -> np.ndarray:
        found = self.folder.span(f"{self.module}.{part}").floats()
        if found.shape != (*rows, n_groups):
            raise self.folder.error(f"{self.module}.{part} has shape {found.shape}")
        return found

    def _words(self, words: np.ndarray, n: int, rows: int | None = None) -> np.ndarray:
        """The same words; raises VerifyError unless they hold n codes in each of as many rows."""
        bits = self.scheme.bits
        wanted = (self.shape[0] if rows is None else rows, -(-n * bits // 32))
        if words.shape != wanted or words.dtype != np.dtype("<u4"):
            raise self.folder.error(f"{self.module} has {words.shape} words of codes, not {wanted}")
        return words

    def _codes(self, words: np.ndarray, n: int) -> np.ndarray:
        """The first n values of each row of u32 words."""
        bits = self.scheme.bits
        as_bytes = np.ascontiguousarray(words).view(np.uint8)
        single = np.unpackbits(as_bytes, axis=1, count=n * bits, bitorder="little")
        places = np.left_shift(1, np.arange(bits)).astype(np.uint8)
        return np.asarray(single.reshape(len(words), n, bits) @ places)

    def _check_index(self, n_in: int) -> None:
        name = f"{self.module}.g_idx"
        if name in self.folder.spans:
            group = self.scheme.group or n_in
            if not np.array_equal(self.folder.span(name).raw(), np.arange(n_in) // group):
                raise self.folder.error(f"{name} puts columns into other groups than their own")


@dataclass(frozen=True)
class Model:
    """Everything that a folder holds, by the module's name and part."""

    folder: Folder
    desc: ModelDesc
    matrices: Mapping[str, Matrix]
    floats: tuple[str, ...]


def read_model(folder: Folder, architecture: str) -> Model:
    """The model of a folder. architecture: which one it is, whatever its label says; raises VerifyError."""
    dialect, schemes = _schemes(folder)
    arch = BUILT_IN.get(architecture)
    if arch is None:
        raise folder.error(f"its record names the architecture {architecture!r:.80}, which is not known")
    try:
        facts = read_config(arch, _own_label(folder.config, arch))
    except PlanError as error:
        raise folder.error(f"its config.json is not one of {architecture}: {error}") from error
    tensors: dict[TensorId, Dense] = {}
    matrices: dict[str, Matrix] = {}
    floats: list[str] = []
    left = set(folder.spans)
    for site in arch.sites:
        for block in range(facts.dims.n_layers) if "{i}" in site.module else (None,):
            if site.role is Role.HEAD and facts.is_tied:
                continue
            module, n_out = site.module.format(i=block), facts.dims.size(site.n_out)
            shape = (n_out,) if site.n_in is None else (n_out, facts.dims.size(site.n_in))
            weight = f"{module}.weight"
            if f"{module}.{_PARTS[dialect][0]}" in folder.spans:
                scheme = schemes(module, shape)
                matrix = Matrix(folder, dialect, module, (shape[0], shape[-1]), scheme)
                matrices[weight] = matrix
                tensors[TensorId(site.role, block)] = _decoded(matrix)
                left -= {f"{module}.{part}" for part in _PARTS[dialect]}
            else:
                tensors[TensorId(site.role, block)] = _dense(folder, weight, shape)
                floats.append(weight)
                left.discard(weight)
            bias = f"{module}.bias"
            if bias in left:
                dense = _dense(folder, bias, (n_out,))
                floats.append(bias)
                left.discard(bias)
                tensors[TensorId(site.role, block, Part.BIAS)] = dense
    if left:
        raise folder.error(f"holds arrays that {architecture} has not: {', '.join(sorted(left)[:5])}")
    return Model(folder, described(arch, facts, tensors), matrices, tuple(floats))


def _own_label(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """config.json under the label of the architecture that the package was made from."""
    dropped = {"quantization_config", "quantization", "mlp_layer_types"}
    found = {key: value for key, value in config.items() if key not in dropped}
    if config.get("model_type") != arch.model_type:
        # Biases are seen by their arrays.
        dropped_too = {"attention_bias", "mlp_bias"}
        found = {key: value for key, value in found.items() if key not in dropped_too}
        found |= {"model_type": arch.model_type, "architectures": list(arch.class_names[:1])}
        known = {key.name for key in arch.config_keys}
        if "use_sliding_window" in known:
            found["use_sliding_window"] = False
        elif "sliding_window" in known:
            found["sliding_window"] = None
    return found


def _decoded(matrix: Matrix) -> Dense:
    return Dense(matrix.shape, torch.float32, lambda: torch.from_numpy(matrix.decode()))


def _dense(folder: Folder, name: str, shape: tuple[int, ...]) -> Dense:
    span = folder.span(name)
    if span.shape != shape:
        raise folder.error(f"{name} has shape {list(span.shape)}, not {list(shape)}")
    return Dense(
        shape,
        torch.float32,
        lambda: torch.from_numpy(span.floats()),
        (lambda index: torch.from_numpy(span.rows(index.numpy()))) if len(shape) > 1 else None,
    )


class _Schemes:
    """Which scheme a linear has, as config.json says."""

    def __init__(self, folder: Folder, dialect: str, quantization: Mapping[str, Any]) -> None:
        self.folder, self.dialect, self.given = folder, dialect, quantization

    def __call__(self, module: str, shape: tuple[int, ...]) -> Scheme:
        """Raises VerifyError where there is none, or not one that can be read."""
        try:
            found = self._find(module)
            bits, group = found["bits"], found["group_size"]
        except (KeyError, TypeError, AttributeError, re.error) as error:
            raise self.folder.error(f"its config.json does not say how {module} is stored") from error
        group = 0 if group in (-1, None) else group
        n_in = shape[-1]
        is_sound = (
            len(shape) == 2 and bits in _BITS and type(bits) is int and type(group) is int and group >= 0
        )
        if not is_sound or (group and n_in % group) or n_in * bits > _MOST_BITS_SIDE:
            raise self.folder.error(f"{module} has {bits!r:.20} bits in groups of {group!r:.20}")
        return Scheme(bits, group, bool(found.get("has_zero", True)))

    def _find(self, module: str) -> dict[str, Any]:
        given = self.given
        if self.dialect == "compressed-tensors":
            for group in given["config_groups"].values():
                if "Linear" in group["targets"] or module in group["targets"]:
                    w = group["weights"]
                    size = w["group_size"] if w["strategy"] == "group" else None
                    return {"bits": w["num_bits"], "group_size": size, "has_zero": not w["symmetric"]}
            raise KeyError(module)
        own: Mapping[str, Any] = {}
        if self.dialect == "gptq":
            for pattern, values in (given.get("dynamic") or {}).items():
                # Ours are `^escaped name$`: no pattern of a stranger is run.
                if pattern == f"+:^{re.escape(module)}$":
                    own = values
        elif self.dialect == "auto-round":
            own = (given.get("extra_config") or {}).get(module, {})
        else:
            own = given.get(module) or {}
        return {**given, **own}


def _schemes(folder: Folder) -> tuple[str, _Schemes]:
    """The dialect and its schemes; raises VerifyError for another one."""
    given = folder.config.get("quantization_config")
    if isinstance(folder.config.get("quantization"), dict):
        return "mlx", _Schemes(folder, "mlx", folder.config["quantization"])
    if not isinstance(given, dict):
        raise folder.error("its config.json has no quantization_config")
    method = given.get("quant_method")
    if method not in ("compressed-tensors", "gptq", "auto-round"):
        raise folder.error(f"its quant_method is {method!r:.80}, not one that d2qconv writes")
    if method == "gptq" and given.get("checkpoint_format") != "gptq_v2":
        raise folder.error("its checkpoint_format is not gptq_v2: zero points would be off by one")
    return method, _Schemes(folder, method, given)
