"""A model on its way out: which tensors go into a data file, the message, and both files of a draft."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]  # protobuf ships no types
from onnx import ModelProto

from onnxdp import place, walk
from onnxdp.errors import ModelError
from onnxdp.records import File

INLINE_LIMIT = 2_000_000_000
"""Tensor bytes above which data goes into a file of its own; the rest of 2 GB is for the graph."""
EXTERNAL_FROM = 1024
"""Tensors smaller than this stay in the model file, where shape inference reads them."""
ALIGNMENT = 64
"""Offsets in a data file are multiples of this: a cache line; ONNX Runtime needs no more."""

_LARGE = 1 << 20
"""Bytes of a tensor from which it is counted without being copied into a message."""

Layout: TypeAlias = dict[int, tuple[int, int]]
"""``id(tensor) -> (offset, length)`` in the data file, in bytes."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A graph and where its tensors will lie.

    Attributes
    ----------
    graph : onnx_ir.Model
    value_info : set of (str, str)
        Scopes and names of the values that keep their value_info; onnx-ir adds all others.
    layout : dict of int to (int, int)
        Empty where there is no data file.
    data_bytes : int
        Of the data file.
    """

    graph: ir.Model
    value_info: Set[tuple[str, str]]
    layout: Layout
    data_bytes: int

    @classmethod
    def of(cls, graph: ir.Model, value_info: Set[tuple[str, str]], *, external: bool) -> Draft:
        """Lay out a graph: tensors go into a data file where ``external`` or where they are over 2 GB."""
        layout, size = _layout(graph) if external or not fits_inline(graph) else ({}, 0)
        return cls(graph, value_info, layout, size)

    def nbytes(self, name: str) -> int:
        """Count the bytes of both files, the model's being called ``name``; no large tensor is copied."""
        graph = self._drawn(place.data_name(name, "0" * 64))
        held = [v.const_value for v in graph.graph.initializers.values() if v.const_value is not None]
        large = [_counted_apart(t) for t in held]
        if any(large):
            graph = graph.clone() if graph is self.graph else graph
            for value in graph.graph.initializers.values():
                if value.const_value is not None and _counted_apart(value.const_value):
                    value.const_value = _Hollow.of(value.const_value)
        proto = self._serialized(graph)
        grown = sum(_grown(t.ByteSize(), n) for t, n in zip(proto.graph.initializer, large, strict=True) if n)
        inner = proto.graph.ByteSize()
        return int(proto.ByteSize()) + grown + _varint(inner + grown) - _varint(inner) + self.data_bytes

    def proto(self, location: str = "") -> ModelProto:
        """Serialize without additions; what the layout names becomes a reference into ``location``."""
        return self._serialized(self._drawn(location))

    def _drawn(self, location: str) -> ir.Model:
        return self._referring(location) if self.layout else self.graph

    def _serialized(self, graph: ir.Model) -> ModelProto:
        proto = ir.serde.serialize_model(graph)
        for opset in proto.opset_import:
            if not opset.domain:
                opset.ClearField("domain")
        for value, told in zip(graph.graph.outputs, proto.graph.output, strict=True):
            if walk.TYPE in value.meta:
                told.type.ParseFromString(value.meta[walk.TYPE])
        walk.keep_value_infos(proto, self.value_info | walk.told(graph))
        for tensor in walk.tensor_protos(proto):
            once = {e.key: e for e in tensor.metadata_props}
            if len(once) < len(tensor.metadata_props):
                kept_props = list(once.values())
                del tensor.metadata_props[:]
                tensor.metadata_props.extend(kept_props)
        return proto

    def write(self, room: Path, name: str) -> tuple[Path, Path | None, File]:
        """Write the model, and its data file where there is one, into a folder.

        Raises
        ------
        ModelError
            The model would be over 2 GB even without its large initializers.
        """
        data = self._write_data(room, name) if self.layout else None
        try:
            content = self.proto(data.name if data else "").SerializeToString(deterministic=True)
        except EncodeError as e:
            raise ModelError(
                "The result is over 2 GB without its large initializers; lift its Constant nodes."
            ) from e
        path = room / name
        place.write(path, content)
        digest = sha256_of(path, *([data] if data else []))
        return path, data, File(None, digest, len(content) + self.data_bytes)

    def _referring(self, location: str) -> ir.Model:
        """Clone the graph, with references in the place of what the layout names."""
        graph = self.graph.clone()
        for g in walk.graphs(graph):
            for value in g.initializers.values():
                if (tensor := value.const_value) is not None and id(tensor) in self.layout:
                    value.const_value = _reference(tensor, location, *self.layout[id(tensor)])
        return graph

    def _write_data(self, room: Path, name: str) -> Path:
        """Write the tensors of the layout and name the file after its content."""
        tensors = {self.layout[id(t)]: t for t in walk.initializers(self.graph) if id(t) in self.layout}
        path, digest, end = room / "data", hashlib.sha256(), 0
        with path.open("wb") as f:
            for (offset, length), tensor in tensors.items():
                for block in (b"\0" * (offset - end), tensor.tobytes()):
                    digest.update(block)
                    f.write(block)
                end = offset + length
            f.flush()
            os.fsync(f.fileno())
        return path.rename(room / place.data_name(name, digest.hexdigest()))


class _Hollow(ir.Tensor[Any]):
    """A tensor of which a message gets all but the numbers."""

    @classmethod
    def of(cls, tensor: ir.TensorProtocol) -> _Hollow:
        made = cls(tensor.raw, tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
        made.metadata_props.update(tensor.metadata_props)
        return made

    def tobytes(self) -> bytes:
        return b""


def _counted_apart(tensor: ir.TensorProtocol) -> int:
    """Return the bytes of a tensor that is counted without being copied; 0 where it is not."""
    return tensor.nbytes if type(tensor) is ir.Tensor and tensor.nbytes >= _LARGE else 0


def _grown(size: int, nbytes: int) -> int:
    """Return how many bytes a tensor's field of ``size`` gains with so many in the place of none."""
    more = nbytes + _varint(nbytes) - _varint(0)
    return more + _varint(size + more) - _varint(size)


def _varint(number: int) -> int:
    """Bytes that a length takes in a message."""
    return max(1, -(-number.bit_length() // 7))


def fits_inline(graph: ir.Model) -> bool:
    """Whether all tensors fit into one message."""
    return sum(t.nbytes for t in walk.tensors(graph) if t.dtype != ir.DataType.STRING) <= INLINE_LIMIT


def sha256_of(*paths: Path) -> str:
    """Hash files, one after the other, without holding them in memory."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def mapped(path: Path) -> memoryview:
    """Map a file read-only; the mapping outlives a file that is replaced or removed."""
    with path.open("rb") as f:
        if os.fstat(f.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))


def _layout(graph: ir.Model) -> tuple[Layout, int]:
    """Place the large initializers; also give the data file's size in bytes.

    Tensors that share their memory (tied weights of one data file) are stored once.
    """
    layout: Layout = {}
    regions: dict[tuple[int, int], int] = {}
    end = 0
    for tensor in walk.initializers(graph):
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes < EXTERNAL_FROM or id(tensor) in layout:
            continue
        region = (_address(tensor), tensor.nbytes)
        if region not in regions:
            regions[region] = -(-end // ALIGNMENT) * ALIGNMENT
            end = regions[region] + tensor.nbytes
        layout[id(tensor)] = (regions[region], tensor.nbytes)
    return layout, end


def _address(tensor: ir.TensorProtocol) -> int:
    """Where a tensor's bytes lie in memory; something unique where it makes them anew each time."""
    raw = getattr(tensor, "raw", None)
    return int(raw.ctypes.data) if isinstance(raw, np.ndarray) and raw.flags.c_contiguous else -id(tensor)


def _reference(tensor: ir.TensorProtocol, location: str, offset: int, length: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
