"""What `--size` and `--bpw` may choose from, and how many bytes they leave for tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from gguf import GGUFValueType

from d2qconv.budget import parse_size
from d2qconv.errors import InputError, Refusal
from d2qconv.exporters.base import Candidates, FloatType, Option, TensorPlan
from d2qconv.names import TensorId
from d2qconv_gguf import GgufOptions, types
from d2qconv_gguf.grids import GRIDS
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.type_map import TypeMap

#: Left out unless asked for by name: llama.cpp has no fast kernel for it on x86 CPUs.
SLOW = ("q2_0",)
#: Bytes kept for what is not known before the file is written: provenance in words, the padding of the header.
UNKNOWN = 4096
#: ggml starts every tensor at a multiple of this.
ALIGNMENT = 32
_WIDE = (GGUFValueType.UINT64, GGUFValueType.INT64, GGUFValueType.FLOAT64)


def is_asked(options: GgufOptions) -> bool:
    """Whether the types are to be chosen."""
    return options.size is not None or options.bpw is not None


def refusals(options: GgufOptions) -> Iterator[Refusal]:
    """What of the options cannot be meant."""
    names = _names(options)
    if names is not None:
        unknown = [name for name in names if name not in GRIDS]
        if not is_asked(options):
            yield Refusal("option candidates", "nothing is to be chosen", "give --size or --bpw too")
        elif unknown or not names:
            why = f"not quantized types: {', '.join(unknown)}" if unknown else "there is no type in it"
            yield Refusal("option candidates", why, f"use some of {', '.join(GRIDS)}")
    if not is_asked(options):
        return
    where = "option size" if options.size is not None else "option bpw"
    for name in ("type", "mix"):
        if getattr(options, name) is not None:
            todo = "leave out one of them; --tensor-type, --embedding and --head may stay"
            yield Refusal(where, f"it chooses the types, and --{name} does too", todo)
    if options.pad != "never":
        why = "it chooses among the types that fit the widths there are, and --pad changes these"
        yield Refusal(where, why, "leave out one of them")
    if options.size is not None and options.bpw is not None:
        yield Refusal(where, "--bpw says how large the file becomes, too", "leave out one of them")
    elif options.bpw is not None and not 0 < options.bpw < math.inf:
        yield Refusal(where, f"{options.bpw:g} is not a number of bits above 0", "write 2.5, for example")
    elif options.size is not None:
        try:
            parse_size(options.size, "--size")
        except InputError as error:
            yield Refusal(where, error.what, error.todo)


def options_of(type_map: TypeMap, tensor: TensorId, shape: Sequence[int]) -> tuple[Option, ...]:
    """Every way to store one matrix, fewest bytes first; the one that was asked for, if one was.

    Nothing if the type that was asked for does not exist. Where no quantized type fits, f16.
    """
    asked = type_map.asked(tensor)
    if asked is not None:
        stored = types.storage(asked)
        found = [] if stored is None else [stored]
    else:
        fitting = [grid for grid in GRIDS.values() if grid.accepts(shape) is None]
        wanted = _names(type_map.options)
        found = [g for g in fitting if (g.id in wanted if wanted is not None else g.id not in SLOW)] or [
            *fitting
        ]
        found = found or [FloatType.F16]
    made = [Option(stored, types.n_bytes(stored, shape)) for stored in found]
    return tuple(sorted(made, key=lambda o: o.n_bytes))


def candidates(
    options: GgufOptions, tensors: Sequence[TensorPlan], choices: Mapping[TensorId, tuple[Option, ...]],
    n_weights: int, n_extra: int, header: int,
) -> Candidates:  # fmt: skip
    """The choice that the options ask for; nothing of them is refused.

    tensors: of the file in some choice. n_weights: of the source. n_extra: bytes of tensors that are not the model's.
    header: bytes of the file that are no tensor's.
    """
    if options.size is not None:
        asked = f"--size {options.size}"
        n_bytes = parse_size(options.size, "--size") - header
    else:
        asked = f"--bpw {options.bpw:g}"
        n_bytes = math.floor((options.bpw or 0.0) * n_weights / 8)
    fixed = n_extra + sum(t.n_bytes for t in tensors if t.id not in choices)
    return Candidates(asked, n_bytes, fixed, choices)


def header_bytes(keys: Sequence[KV], tensors: Sequence[TensorPlan]) -> int:
    """An upper bound on the bytes before and between the tensors, provenance and digests counted in.

    Per key a length, a name and a type; per string a length; per tensor its name, shape, type and place (ggml's
    docs/gguf.md), a digest in the provenance, and padding.
    """
    total = UNKNOWN
    for kv in keys:
        total += 8 + len(kv.key.encode()) + 4 + _value_bytes(kv)
    for tensor in tensors:
        name = len(tensor.stored_as.encode())
        total += 8 + name + 4 + 8 * len(tensor.shape) + 4 + 8 + ALIGNMENT
        total += 8 + name + 8 + 64
    return total


def _value_bytes(kv: KV) -> int:
    """A number counts as 8 bytes, in an array as what its type takes."""
    if isinstance(kv.value, str):
        return 8 + len(kv.value.encode())
    if not isinstance(kv.value, Sequence):
        return 8
    width = 8 if kv.sub_type in _WIDE else 4
    return 12 + sum(8 + len(v.encode()) if isinstance(v, str) else width for v in kv.value)


def _names(options: GgufOptions) -> tuple[str, ...] | None:
    """The types that `--candidates` lists."""
    if options.candidates is None:
        return None
    return tuple(name for name in re.split(r"[,\s]+", options.candidates) if name)
