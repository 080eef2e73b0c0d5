"""Which tensors go into which file where a package is split, and the keys that hold the files together.

llama.cpp's layout (tools/gguf-split/gguf-split.cpp; read by `llama_model_loader`): every file has `split.no` (from 0),
`split.count` (both u16) and `split.tensors.count` (i32, over all files); the first has all other metadata too, the
others have none. The names are those of `d2qconv.exporters.file_set.member`, by which llama.cpp finds the other files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gguf import GGUFValueType
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from d2qconv.errors import ExportError
from d2qconv_gguf.container import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS
from d2qconv_gguf.metadata import KV
from d2qconv_gguf.writer import Entry

SPLIT_KEYS = frozenset({SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS})
#: `split.count` is a u16.
MOST_FILES = (1 << 16) - 1
#: Bytes of a value by its type; strings and arrays are counted where they stand.
_SIZES: Mapping[GGUFValueType, int] = {
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT32: 4,
    GGUFValueType.UINT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


def split_keys(number: int, n_files: int, n_tensors: int) -> list[KV]:
    """The keys of file `number`, from 0; none for a package of one file."""
    if n_files == 1:
        return []
    return [
        KV(SPLIT_NO, number, GGUFValueType.UINT16),
        KV(SPLIT_COUNT, n_files, GGUFValueType.UINT16),
        KV(SPLIT_TENSORS, n_tensors, GGUFValueType.INT32),
    ]


def groups(keys: Sequence[KV], made: Sequence[Entry], limit: int | None) -> list[list[Entry]]:
    """The tensors in their order, cut so that no file has more than `limit` bytes, None for one file.

    keys: all metadata, which the first file holds besides its tensors. A file has at least one tensor, so that a
    tensor, or the metadata with the first one, may make it larger. Raises ExportError for more files than llama.cpp
    can count.
    """
    if limit is None or not made:
        return [list(made)]
    found: list[list[Entry]] = [[]]
    header = header_bytes([*keys, *split_keys(0, 2, len(made))])
    infos, data = 0, 0
    for entry in made:
        info, size = _info_bytes(entry), _padded(entry.n_bytes)
        if found[-1] and _padded(header + infos + info) + data + size > limit:
            found.append([])
            header, infos, data = header_bytes(split_keys(1, 2, len(made))), 0, 0
        found[-1].append(entry)
        infos, data = infos + info, data + size
    if len(found) > MOST_FILES:
        raise ExportError(
            f"would be {len(found)} files, and llama.cpp takes {MOST_FILES}", todo="raise --max-shard-size"
        )
    return found


def header_bytes(keys: Sequence[KV]) -> int:
    """Bytes of a file before its tensor infos (ggml's docs/gguf.md): magic, version, two counts, the keys."""
    return 24 + sum(8 + len(kv.key.encode()) + 4 + _value_bytes(kv) for kv in keys)


def _value_bytes(kv: KV) -> int:
    if kv.type is GGUFValueType.STRING:
        return 8 + len(str(kv.value).encode())
    if kv.type is not GGUFValueType.ARRAY:
        return _SIZES[kv.type]
    assert kv.sub_type is not None, "an array has a type of its elements"
    assert not isinstance(kv.value, bool | int | float), "an array is a sequence"
    if kv.sub_type is GGUFValueType.STRING:
        return 12 + sum(8 + len(str(text).encode()) for text in kv.value)
    return 12 + _SIZES[kv.sub_type] * len(kv.value)


def _info_bytes(entry: Entry) -> int:
    """Name, number of dimensions, dimensions, type, offset."""
    return 8 + len(entry.name.encode()) + 4 + 8 * len(entry.shape) + 4 + 8


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // int(GGUF_DEFAULT_ALIGNMENT)) * int(GGUF_DEFAULT_ALIGNMENT)
