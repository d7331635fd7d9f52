"""Read and write model files: external data, sizes, hashes, and nothing half written.

The graph that passes edit is an ``onnx_ir.Model``. What onnx-ir would lose is refused at the door
(:mod:`onnxdp.guard`); what it would add on the way out (a value_info for every value whose type is known,
each tensor's metadata a second time) is taken off again, so that reading and writing without an edit changes
only

- the order of value_info and metadata entries, and value_info of graph outputs or of values that do not
  exist, which goes;
- empty strings (domains, doc strings, names), empty types and a model_version of 0, which become absent, as
  does ``ai.onnx`` on a node; a trailing empty output name goes;
- external data, which moves into one file of ours.

Every tensor stays as it was, byte for byte, typed fields (float_data) included.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped]  # protobuf ships no types
    DecodeError,
    EncodeError,
)
from onnx import ModelProto, TensorProto

from onnxdp import guard, place, walk
from onnxdp.draft import Draft, fits_inline, mapped
from onnxdp.errors import ModelError, UsageError
from onnxdp.records import File

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    Source: TypeAlias = str | os.PathLike[str] | ModelProto | ir.Model | gs.Graph

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes one protobuf message may have."""


@dataclass(slots=True)
class Model:
    """A model and where it came from.

    Attributes
    ----------
    ir : onnx_ir.Model
        What passes edit in place.
    path : Path or None
        As given; None for a model that came from memory.
    nbytes : int
        Bytes of the model file and of each data file that it names.
    sha256 : str
        Over the model file, then its data files in the order of their names; over the serialized bytes for a
        model that came from memory.
    original_value_info : frozenset of (str, str)
        Scopes and names of the values that had a value_info; all others are taken off again on the way out.
    external : bool
        Whether the source kept tensors in data files.
    target : Path or None
        Where it is to be written, where that is known.
    """

    ir: ir.Model
    path: Path | None
    nbytes: int
    sha256: str
    original_value_info: frozenset[tuple[str, str]]
    external: bool = False
    target: Path | None = None


def read(source: Source) -> Model:
    """Read a model from a path or from memory; external data is mapped, not loaded.

    Parameters
    ----------
    source : path, ModelProto, onnx_ir.Model or onnx_graphsurgeon.Graph
        Never changed. A Graph has already lost metadata and doc strings of its file.

    Raises
    ------
    ModelError
        The file cannot be read, is unsound, or holds something that would be lost.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(source))
    folders: tuple[Path, ...] = ()
    if isinstance(source, ModelProto):
        proto = ModelProto()
        proto.CopyFrom(source)
    elif isinstance(source, ir.Model):
        folders = tuple({Path(t.base_dir) for t in walk.tensors(source) if isinstance(t, ir.ExternalTensor)})
        if len(folders) > 1:
            raise ModelError(
                "The model's external data lies in several folders; save it into one and pass its path."
            )
        proto = ir.serde.serialize_model(source)
        walk.drop_initializer_infos(proto)
    else:
        proto = _from_graphsurgeon(source)
    try:
        content = proto.SerializeToString(deterministic=True)
    except EncodeError as e:
        raise ModelError(
            "The model is over 2 GB; save it with external data and pass the path of its file."
        ) from e
    return _build(proto, hashlib.sha256(content), len(content), None, folders)


def copy(model: Model) -> Model:
    """Give an independent graph; tensors are shared."""
    return replace(model, ir=model.ir.clone())


def serialize(model: Model) -> ModelProto:
    """Give the model as one message, external data included.

    Raises
    ------
    ModelError
        It would be over 2 GB.
    """
    if not fits_inline(model.ir):
        raise ModelError(
            "The result is over 2 GB and does not fit into one message; write it to a file instead."
        )
    return Draft.of(model.ir, model.original_value_info, external=False).proto()


def give_back(model: Model, like: Source) -> ModelProto | ir.Model | gs.Graph:
    """Give the model in the type of ``like``: a ModelProto for a ModelProto or a path."""
    if isinstance(like, ir.Model):
        return model.ir
    proto = serialize(model)
    if isinstance(like, str | os.PathLike | ModelProto):
        return proto
    import onnx_graphsurgeon as gs

    return gs.import_onnx(proto)


def output_size(model: Model, target: Path | None = None) -> int:
    """Count the bytes that :func:`write` would produce, data file included.

    Parameters
    ----------
    target : Path, optional
        Matters only where there is a data file, because every tensor repeats that file's name; default:
        the model's own target, or the name of the source.
    """
    name = (target or model.target or model.path or Path("model.onnx")).name
    return _draft(model).nbytes(name)


def write(
    model: Model, target: Path, *, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> File:
    """Write the model whole or not at all.

    Large tensors go into ``<target name>.<8 hex digits of its hash>.data`` where the source kept them so or
    the file would be over 2 GB. How an interruption leaves no mixture is told in :mod:`onnxdp.place`.

    Parameters
    ----------
    target : Path
    overwrite : bool
        Whether an existing file may be replaced; it may be the model's own source.
    check : callable, optional
        Given the path of the temporary model before it takes its name; what it raises leaves no file behind.

    Raises
    ------
    UsageError
        ``target`` exists and may not be replaced.
    ModelError
        ``target`` is no place for a file.
    SetupError
        The disk is full, or the folder cannot be written.
    """
    room = place.room(target)
    with place.disk(target):
        place.refuse(target, overwrite)
        place.sweep(target, _data_files)
    try:
        with place.disk(target):
            room.mkdir(mode=0o700)
        with place.lock(room):
            with place.disk(target):
                draft, data, file = _draft(model).write(room, target.name)
            if check is not None:
                check(draft)
            with place.disk(target):
                place.put(draft, data, target, _data_files)
    finally:
        try:
            place.settle(room, target, _data_files)
        finally:  # Ctrl-C may fall into the removal itself
            place.settle(room, target, _data_files)
    return replace(file, path=os.fspath(target))


# Reading


def _read_file(path: Path) -> Model:
    """Parse the file from a mapping of it, so that its bytes are in memory once."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path} is a folder; name the .onnx file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file; copy the model into one.")
        if status.st_size == 0:
            raise ModelError(f"{path} is empty; export or download the model again.")
        if status.st_size > PROTOBUF_LIMIT:
            raise ModelError(f"{path} is over 2 GB, which no ONNX file can be; save it with external data.")
        content = mapped(path)
    except FileNotFoundError as e:
        raise ModelError(f"{path} does not exist; check the path.") from e
    except OSError as e:
        raise ModelError(f"{path} cannot be read ({e.strerror}); check the path and its permissions.") from e
    digest = hashlib.sha256(content)
    try:
        proto = ModelProto.FromString(content)
    except DecodeError as e:
        raise ModelError(
            f"{path} is not an ONNX model, or only a part of one; export or download it again."
        ) from e
    folders = tuple(dict.fromkeys((path.parent, path.resolve().parent)))
    return _build(proto, digest, len(content), path, folders)


def _build(
    proto: ModelProto, digest: hashlib._Hash, nbytes: int, path: Path | None, folders: tuple[Path, ...]
) -> Model:
    """Check a message and turn it into a Model."""
    name = str(path or "The model")
    external = guard.check(proto, name, folders)
    maps = {real: mapped(real) for real in dict.fromkeys(external.files.values())}
    buffers = {location: maps[external.files[location]] for location in sorted(external.files)}
    for buffer in buffers.values():
        digest.update(buffer)
    maps_out = [o for o in proto.graph.output if walk.holds_map(o.type)]
    try:
        model = ir.serde.deserialize_model(_without_maps(proto) if maps_out else proto)
    except ir.serde.SerdeError as e:
        raise ModelError(
            f"{name} holds something that cannot be carried over: {_root(e)}; simplify it."
        ) from e
    walk.each_tensor(model, lambda t: _mapped(t, buffers))
    types = {o.name: o.type.SerializeToString() for o in maps_out}
    for value in model.graph.outputs:
        if value.name in types:
            value.meta[walk.TYPE] = types[value.name]
    return Model(
        ir=model,
        path=path,
        nbytes=nbytes + sum(len(m) for m in maps.values()),
        sha256=digest.hexdigest(),
        original_value_info=frozenset((s, v.name) for s, infos in walk.value_infos(proto) for v in infos),
        external=bool(maps),
    )


def _without_maps(proto: ModelProto) -> ModelProto:
    """Return a copy whose outputs do not say that they are maps, which onnx-ir does not know."""
    made = ModelProto()
    made.CopyFrom(proto)
    for value in (*made.graph.output, *made.graph.value_info):
        if walk.holds_map(value.type):
            value.ClearField("type")
    return made


def _root(error: BaseException) -> str:
    """Give the first line of what an error was raised for in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _mapped(tensor: ir.TensorProtocol, buffers: Mapping[str, memoryview]) -> ir.TensorProtocol:
    """Give an external tensor as a view of its mapped file (onnx-ir would map the file once per tensor).

    A tensor inside the message becomes one of its own, so that the message, and each of its copies, can go.
    """
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        return _owned(tensor)
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    buffer = buffers[os.fspath(tensor.location)]
    raw = np.frombuffer(buffer[tensor.offset or 0 :][: tensor.nbytes], dtype=np.uint8)
    if tensor.dtype.bitwidth < 8:
        mapped: ir.TensorProtocol = ir.PackedTensor(raw, tensor.dtype, shape=tensor.shape, name=tensor.name)
    else:
        array = raw.view(np.dtype(tensor.dtype.numpy()).newbyteorder("<")).reshape(tensor.shape.numpy())
        mapped = ir.Tensor(array, tensor.dtype, name=tensor.name)
    mapped.doc_string = tensor.doc_string
    mapped.metadata_props.update(tensor.metadata_props)
    return mapped


_SMALL = 1024


def _owned(tensor: ir.serde.TensorProtoTensor) -> ir.TensorProtocol:
    """Give a tensor that keeps no message alive but one of its own (odd types, typed fields, empty names)."""
    raw = tensor.raw
    odd = tensor.dtype.bitwidth < 8 or (raw.HasField("name") and not raw.name)  # an ir.Tensor would lose it
    if tensor.nbytes < _SMALL or not raw.HasField("raw_data") or odd:
        own = TensorProto()
        own.CopyFrom(raw)
        return ir.serde.TensorProtoTensor(own)
    made = ir.Tensor(tensor.numpy(), tensor.dtype, name=tensor.name or None)
    made.doc_string = tensor.doc_string
    made.metadata_props.update(tensor.metadata_props)
    return made


def _from_graphsurgeon(graph: gs.Graph) -> ModelProto:
    """Export a Graph; without an IR version of its own it gets the lowest that its opsets allow."""
    import onnx_graphsurgeon as gs

    if not isinstance(graph, gs.Graph):
        raise UsageError(
            f"A {type(graph).__name__} is no model; pass a path, an onnx.ModelProto, an onnx_ir.Model "
            "or an onnx_graphsurgeon.Graph."
        )
    proto: ModelProto = gs.export_onnx(graph)
    if graph.ir_version is None:
        proto.ir_version = onnx.helper.find_min_ir_version_for(list(proto.opset_import), ignore_unknown=True)
    return proto


# Writing


def _draft(model: Model) -> Draft:
    return Draft.of(model.ir, model.original_value_info, external=model.external)


def _data_files(path: Path) -> set[str]:
    """Name the data files that the model at ``path`` refers to; none where there is no model to be read."""
    try:
        proto = ModelProto.FromString(mapped(path))
    except (FileNotFoundError, DecodeError):
        return set()
    entries = (e for t in walk.tensor_protos(proto) for e in t.external_data)
    return {e.value for e in entries if e.key == "location"}
