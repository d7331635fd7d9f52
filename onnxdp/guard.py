"""The refusals at the door: what a model file may hold before any other library is given it.

onnx-ir and onnx.load accept much that later hangs, allocates terabytes or is silently dropped, so everything
here counts with Python integers and reads nothing but the protobuf and the sizes of files.

A data file is looked for in the folder of the model's path as given, then, where that path is a symbolic
link, in the folder of the file it leads to. Its real place must lie

- within that folder, or
- directly within ``blobs``, where the folder is ``CACHE/snapshots/REVISION[/...]``: the Hugging Face cache
  keeps all content there and links to it.

It must be a regular file with one name on disk (a hard link can smuggle in any file of the same disk).
"""

from __future__ import annotations

import graphlib
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx_ir as ir
from google.protobuf.message import Message  # type: ignore[import-untyped]  # protobuf ships no types
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from onnxdp import walk
from onnxdp.errors import ModelError

MAX_NODES = 1_000_000
"""Nodes a model may have once every function call is expanded; a function bomb has 2^24 and more."""

_ENTRIES = {  # numbers per element in the typed field of each data type
    **dict.fromkeys(("FLOAT", "INT32", "INT64", "DOUBLE", "UINT64", "UINT32", "STRING"), 1.0),
    **dict.fromkeys(("COMPLEX64", "COMPLEX128"), 2.0),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 0.5),
    **dict.fromkeys(("INT2", "UINT2"), 0.25),
}
_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


@dataclass(slots=True)
class External:
    """The data files of one model: ``folders`` to look in, real ``files`` by the location tensors name."""

    folders: tuple[Path, ...]
    files: dict[str, Path] = field(default_factory=dict)


def check(proto: ModelProto, name: str, folders: tuple[Path, ...]) -> External:
    """Refuse what is unsound or what onnx-ir would lose, and find the external data.

    Parameters
    ----------
    proto : ModelProto
    name : str
        How messages call the model.
    folders : tuple of Path
        Where external data may lie; empty for a model that came from memory.

    Raises
    ------
    ModelError
        Naming the tensor, node, function or file at fault.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        missing = "graph" if not proto.HasField("graph") else "opset_import"
        raise ModelError(
            f"{name} is not a whole ONNX model, it has no {missing}; export or download it again."
        )
    if proto.ir_version < 1:
        raise ModelError(f"{name} does not say its IR version; export it again.")
    if len(proto.training_info):
        raise ModelError(f"{name} holds training_info, which would be lost; export it for inference.")
    external = External(folders)
    _refuse_bytes(proto, name)
    _Walk(name, external).model(proto)
    _refuse_bombs(proto, name)
    return external


def finite(graph: ir.Model, weights: Mapping[int, str]) -> None:
    """Refuse NaN in any tensor, and infinity in a weight (elsewhere it may mask).

    Parameters
    ----------
    graph : onnx_ir.Model
    weights : mapping of int to str
        ``id(tensor)`` -> name of the weights.

    Raises
    ------
    ModelError
        Naming the tensor.
    """
    for tensor in walk.tensors(graph):
        if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16 or not tensor.size:
            continue
        values = tensor.numpy()
        low, high = float(values.min()), float(values.max())  # either is NaN where a value is
        if math.isnan(low) or (id(tensor) in weights and (math.isinf(low) or math.isinf(high))):
            raise ModelError(
                f"{weights.get(id(tensor), tensor.name)} holds NaN or infinity, with which no model "
                "computes; export or train it again."
            )


class _Walk:
    """One pass over all graphs in the order of their nodes."""

    def __init__(self, name: str, external: External) -> None:
        self.name = name
        self.external = external

    def refuse(self, what: str) -> ModelError:
        return ModelError(f"{self.name}: {what}.")

    def model(self, proto: ModelProto) -> None:
        self.graph(proto.graph, ())
        for function in proto.functions:
            scope = self.names(function.input, "function input")
            self.nodes(function.node, (scope,))
            for default in function.attribute_proto:
                self.attribute(default, function.name, ({*scope},))
                if default.t.data_location == TensorProto.EXTERNAL:
                    raise self.refuse(
                        f"a default of {function.name!r} is external data; store it in the file"
                    )
            self.outputs(function.output, scope, function.name)

    def graph(self, graph: GraphProto, outer: tuple[set[str], ...]) -> None:
        if len(graph.sparse_initializer):
            sparse = graph.sparse_initializer[0].values.name
            raise self.refuse(f"{sparse!r} is a sparse initializer, which would be lost; store it dense")
        scope = self.names((v.name for v in graph.input), "graph input")
        weights = self.names((t.name for t in graph.initializer), "initializer")
        if "" in weights:
            raise self.refuse("an initializer has no name; export the model again")
        for tensor in graph.initializer:
            self.tensor(tensor, tensor.name)
        scope |= weights
        self.nodes(graph.node, (*outer, scope))
        self.names({v.name for v in graph.value_info}, "value_info")
        self.outputs((v.name for v in graph.output), scope.union(*outer), graph.name)

    def names(self, names: Iterable[str], kind: str) -> set[str]:
        """Collect names that must all be different."""
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise self.refuse(f"the {kind} {name!r} is there twice; rename one")
            seen.add(name)
        return seen

    def outputs(self, names: Iterable[str], scope: set[str], where: str) -> None:
        for name in names:
            if name not in scope:
                raise self.refuse(
                    f"the output {name!r} of {where!r} is made by no node; export the model again"
                )

    def nodes(self, nodes: Iterable[NodeProto], scopes: tuple[set[str], ...]) -> None:
        """Hold every node to: inputs made before it, outputs made once."""
        here = scopes[-1]
        for i, node in enumerate(nodes):
            label = f"{node.op_type}#{i}" if not node.name else f"{node.name}"
            for value in node.input:
                if value and not any(value in scope for scope in scopes):
                    raise self.refuse(
                        f"node {label!r} reads {value!r}, which nothing before it makes (undefined, a cycle, "
                        "or nodes out of order); sort the nodes or export the model again"
                    )
            for attribute in node.attribute:
                self.attribute(attribute, label, scopes)
            for value in node.output:
                if value and value in here:
                    raise self.refuse(f"node {label!r} makes {value!r}, which is already made; rename one")
                here.add(value)

    def attribute(self, attribute: AttributeProto, label: str, scopes: tuple[set[str], ...]) -> None:
        if attribute.ref_attr_name:
            return
        kind = attribute.type
        if kind in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS):
            raise self.refuse(f"node {label!r} holds a sparse tensor, which would be lost; store it dense")
        if kind == AttributeProto.UNDEFINED:
            raise self.refuse(
                f"attribute {attribute.name!r} of node {label!r} has no type; export the model again"
            )
        for graph in (attribute.g,) if kind == AttributeProto.GRAPH else attribute.graphs:
            self.graph(graph, scopes)
        for tensor in (attribute.t,) if kind == AttributeProto.TENSOR else attribute.tensors:
            self.tensor(tensor, f"{label}.{attribute.name}")

    def tensor(self, tensor: TensorProto, label: str) -> None:
        """Compare what the dimensions promise with what is there, before anyone allocates it."""
        if any(d < 0 for d in tensor.dims):
            raise self.refuse(
                f"tensor {label!r} has a negative dimension: {list(tensor.dims)}; export the model again"
            )
        try:
            dtype = ir.DataType(tensor.data_type)
        except ValueError:
            dtype = ir.DataType.UNDEFINED
        if dtype == ir.DataType.UNDEFINED:
            raise self.refuse(
                f"tensor {label!r} has the unknown data type {tensor.data_type}; export the model again"
            )
        count = math.prod(tensor.dims)
        if tensor.data_location == TensorProto.EXTERNAL:
            if dtype == ir.DataType.STRING:
                raise self.refuse(f"tensor {label!r} keeps strings in external data; store them in the file")
            _find(tensor, label, nbytes(count, dtype), self)
            return
        if tensor.HasField("raw_data"):
            needed, found, unit = nbytes(count, dtype), len(tensor.raw_data), "bytes"
        else:
            needed, unit = math.ceil(count * _ENTRIES.get(dtype.name, 1.0)), "numbers"
            found = sum(len(getattr(tensor, f)) for f in _FIELDS)
        if needed != found:
            raise self.refuse(
                f"tensor {label!r} of shape {list(tensor.dims)} needs {needed} {unit} and has {found}; "
                "export or download the model again"
            )


def _refuse_bytes(message: Message, name: str) -> None:
    """Refuse text that is not UTF-8: protobuf hands it out as bytes, which nobody can write back."""
    for entry, value in message.ListFields():
        if entry.type == entry.TYPE_MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                _refuse_bytes(inner, name)
        elif entry.type == entry.TYPE_STRING:
            for text in (value,) if isinstance(value, str | bytes) else value:
                if not isinstance(text, str):
                    raise ModelError(
                        f"{name}: the text {text!r} ({entry.full_name}) is not UTF-8; export it again."
                    )


def nbytes(count: int, dtype: ir.DataType) -> int:
    """Bytes of ``count`` packed elements; 0 for strings."""
    return 0 if dtype == ir.DataType.STRING else -(-count * dtype.bitwidth // 8)


def _find(tensor: TensorProto, label: str, needed: int, visit: _Walk) -> None:
    """Find an external tensor's file, and hold its offset and length to the shape and to the file's size."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError:
        raise visit.refuse(
            f"the external data of {label!r} has an offset or length that is no number"
        ) from None
    if location not in visit.external.files:
        visit.external.files[location] = _data_file(location, label, visit)
    if length != needed:
        raise visit.refuse(
            f"the external data of {label!r} has {length} bytes and its shape {list(tensor.dims)} "
            f"needs {needed}; export or download the model again"
        )
    size = visit.external.files[location].stat().st_size
    if offset < 0 or offset + length > size:
        raise visit.refuse(
            f"the external data of {label!r} (bytes {offset} to {offset + length}) does not lie within "
            f"{location!r}, which has {size} bytes; download the model again"
        )


def _data_file(location: str, label: str, visit: _Walk) -> Path:
    """Resolve the name of a data file by the rule of this module."""
    where = f"the external data {location!r} of {label!r}"
    windows = PureWindowsPath(location)
    parts = {*PurePosixPath(location).parts, *windows.parts}
    if not location or "\0" in location or location.startswith("/") or windows.anchor or ".." in parts:
        raise visit.refuse(
            f"{where} is not a path inside the model's folder; put the data file beside the model"
        )
    folders = visit.external.folders
    if not folders:
        raise visit.refuse(
            f"{where} cannot be found for a model in memory; pass the path of its file instead"
        )
    for folder in folders:
        if os.path.lexists(folder / location):
            return _vet(folder, location, where, visit)
    raise visit.refuse(f"{where} is not in {folders[0]}; put the data file beside the model")


def _vet(folder: Path, location: str, where: str, visit: _Walk) -> Path:
    """Give the real place of a data file that is regular, inside and has one name."""
    try:
        real = (folder / location).resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop of links before Python 3.13
        raise visit.refuse(f"{where} cannot be read ({e}); put the data file beside the model") from e
    allowed = real.is_relative_to(folder.resolve()) or real.parent in _blobs(folder)
    if not allowed:
        raise visit.refuse(
            f"{where} is a link that leads out of the folder, to {real}; copy the file instead"
        )
    if not stat.S_ISREG(status.st_mode):
        raise visit.refuse(f"{where} is not a regular file; put the data file beside the model")
    if status.st_nlink > 1:
        raise visit.refuse(f"{where} is a hard link (it has {status.st_nlink} names); copy the file instead")
    return real


def _blobs(folder: Path) -> Iterator[Path]:
    """Give the content folder of a Hugging Face cache whose snapshot ``folder`` is; never through a link."""
    absolute = Path(os.path.abspath(folder))  # noqa: PTH100 - .resolve() would follow the links we reason about
    for parent in absolute.parents:
        if parent.name == "snapshots":
            yield parent.parent.resolve() / "blobs"


def _refuse_bombs(proto: ModelProto, name: str) -> None:
    """Refuse recursive functions, and calls that expand to more than ``MAX_NODES`` nodes."""
    bodies: dict[tuple[str, str, str], FunctionProto] = {}
    for f in proto.functions:
        if (key := (_domain(f.domain), f.name, f.overload)) in bodies:
            raise ModelError(f"{name}: the function {f.name!r} is defined twice; rename one.")
        bodies[key] = f
    calls = {k: [c for n in walk.deep(f.node) if (c := _callee(n)) in bodies] for k, f in bodies.items()}
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as e:
        raise ModelError(
            f"{name}: the function {e.args[1][0][1]!r} calls itself; export the model inlined."
        ) from e
    size: dict[tuple[str, str, str], int] = {}
    for key in order:
        size[key] = sum(1 for _ in walk.deep(bodies[key].node)) + sum(size[c] for c in calls[key])
    total = sum(1 + size.get(_callee(n), 0) for n in walk.deep(proto.graph.node))
    biggest = max([total, *size.values()])
    if biggest > MAX_NODES:
        raise ModelError(
            f"{name}: its functions expand to {biggest} nodes, over {MAX_NODES}; export it inlined."
        )


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _callee(node: NodeProto) -> tuple[str, str, str]:
    return _domain(node.domain), node.op_type, node.overload
