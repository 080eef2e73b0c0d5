"""Opens model.onnx without reading its tensors, and gives them as views of the data file.

A model is not trusted: what names a file outside its folder, points outside its data file, or is larger than a graph
without tensors can be, is refused before anything of that size is allocated.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from d2qconv.checkpoint.folder import is_regular
from d2qconv.errors import VerifyError
from d2qconv_onnx.genai import MODEL

#: Graphs of our models take some hundred kilobytes.
MOST_BYTES = 32 << 20
_DTYPES: Mapping[int, np.dtype] = {
    onnx.TensorProto.FLOAT: np.dtype("<f4"),
    onnx.TensorProto.UINT8: np.dtype("u1"),
    onnx.TensorProto.INT64: np.dtype("<i8"),
}
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
#: Dimensions of a tensor at most.
_MOST_DIMS = 4
_TODO = "only folders that d2qconv wrote can be verified"


@dataclass(frozen=True)
class Span:
    """Where the bytes of an initializer stand."""

    file: Path
    offset: int
    n_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def view(self) -> np.ndarray:
        """The array, mapped from the file; read only."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class Container:
    """An opened model. proto: without external data."""

    folder: Path
    proto: onnx.ModelProto

    @property
    def path(self) -> Path:
        """model.onnx."""
        return self.folder / MODEL

    @cached_property
    def spans(self) -> Mapping[str, Span]:
        """Every initializer that lies in a data file, by name; raises VerifyError."""
        found: dict[str, Span] = {}
        for tensor in self.proto.graph.initializer:
            if tensor.name in found:
                raise self.error(f"two initializers are called {tensor.name!r}")
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                found[tensor.name] = self._span(tensor)
        return found

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The model's metadata_props."""
        return {prop.key: prop.value for prop in self.proto.metadata_props}

    def array(self, name: str) -> np.ndarray:
        """An initializer's values; raises VerifyError if there is none of that name in a data file."""
        if name not in self.spans:
            raise self.error(f"has no initializer {name!r} in its data file")
        return self.spans[name].view()

    def error(self, what: str) -> VerifyError:
        """What is wrong with this model."""
        return VerifyError(what, where=str(self.path), todo=_TODO)

    def _span(self, tensor: onnx.TensorProto) -> Span:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if Path(location).name != location or location in ("", ".", "..") or "\\" in location:
            raise self.error(f"{tensor.name} lies in {location!r:.80}, which is no file of its folder")
        file = self.folder / location
        size = _size(file)
        if size is None:
            raise self.error(f"{tensor.name} lies in {location!r:.80}, which is not there")
        dtype = _DTYPES.get(tensor.data_type)
        shape = tuple(tensor.dims)
        if dtype is None or len(shape) > _MOST_DIMS or any(n < 1 for n in shape):
            raise self.error(f"{tensor.name} has a type or shape that d2qconv does not write")
        try:
            offset, n_bytes = int(entries.get("offset", "0")), int(entries["length"])
        except (KeyError, ValueError) as error:
            raise self.error(f"{tensor.name} does not say where it lies") from error
        if n_bytes != math.prod(shape) * dtype.itemsize:
            raise self.error(f"{tensor.name} has {n_bytes} bytes, which is not its shape {list(shape)}")
        if offset < 0 or offset + n_bytes > size:
            raise self.error(f"{tensor.name} lies outside {location}")
        return Span(file, offset, n_bytes, shape, dtype)


def open_model(folder: Path) -> Container:
    """Open `folder`/model.onnx; raises VerifyError if it is no ONNX model, or too large for a graph."""
    path = folder / MODEL
    try:
        if not is_regular(path):
            raise VerifyError("is not there, or no regular file", where=str(path), todo=_TODO)
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise VerifyError(f"has {size:,} bytes, too many for a graph", where=str(path), todo=_TODO)
        proto = onnx.load_model_from_string(path.read_bytes())
        is_text = all(isinstance(text, str) for text in _texts(proto))
    except OSError as error:
        raise VerifyError(f"cannot be read: {error.strerror}", where=str(path), todo=_TODO) from error
    except (DecodeError, ValueError) as error:
        raise VerifyError("is not an ONNX model", where=str(path), todo=_TODO) from error
    container = Container(folder, proto)
    if not is_text:
        raise container.error("has names that are not UTF-8")
    inside = [a.name for node in proto.graph.node for a in node.attribute if a.type in _GRAPHS]
    # Data of another file, which no span has looked at.
    inside += [
        a.name
        for node in proto.graph.node
        for a in node.attribute
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in (a.t, *a.tensors))
    ]
    if inside or proto.functions or proto.graph.sparse_initializer:
        raise container.error("holds graphs, functions, sparse or external tensors inside its graph")
    return container


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    """Every name and text that is looked at here. protobuf gives bytes for one that is not UTF-8."""
    for pair in proto.metadata_props:
        yield from (pair.key, pair.value)
    for tensor in proto.graph.initializer:
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for node in proto.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _size(file: Path) -> int | None:
    """Bytes of a regular file; None for anything else, a link too."""
    try:
        found = file.lstat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
