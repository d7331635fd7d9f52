"""The pencil that forms draw with: what several weights share is drawn once, and decoding costs few bytes.

What a form stores is named after its weight. What only decodes (it reads constants, so ONNX Runtime computes
it once, when the session is made) is named as briefly as can be: names are a tenth of a small model's bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import helper, numpy_helper

from onnxdp import walk
from onnxdp.records import Array

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "float64": ir.DataType.DOUBLE,
    "bfloat16": ir.DataType.BFLOAT16,
    "int16": ir.DataType.INT16,
}

TERSE = "dp"
"""Starts the names of what only decodes; a number follows."""
_COPIED = 1 << 16
"""Numbers up to which copying them takes less time than the operators around it."""


@dataclass(frozen=True, slots=True)
class _Vector:
    """Numbers that wait for the pool: the value that readers got already, and where they came from."""

    value: ir.Value
    weight: str
    role: str
    half: Array


class Paper:
    """What all weights of one model have in common while it is rewritten.

    Parameters
    ----------
    model : ir.Model
        Its names are taken; new ones never collide with them.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 1)
        self.drawn: dict[tuple[int, str], ir.Value] = {}
        self.decoded: set[ir.Value] = set()
        self.decoding: dict[ir.Graph, list[ir.Node]] = {}
        self.pools: dict[tuple[int, tuple[int, ...]], list[_Vector]] = {}
        self.waiting: dict[str, tuple[Callable[[Builder, list[Any]], None], list[Any]]] = {}
        self.rows: dict[int, tuple[ir.Value, int]] = {}
        self._taken: set[str] = set()
        self._terse = 0
        for graph in (model.graph, *model.graph.subgraphs()):
            self._taken.update(v.name or "" for v in (*graph.inputs, *graph.initializers.values()))
            for node in graph:
                self._taken.add(node.name or "")
                self._taken.update(v.name or "" for v in node.outputs)

    def fresh(self, wanted: str) -> str:
        """Return ``wanted``, with a number behind it where it is taken."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}.{count}"
        self._taken.add(name)
        return name

    def terse(self) -> str:
        """Return a name as short as can be."""
        while True:
            self._terse += 1
            if (name := f"{TERSE}{self._terse}") not in self._taken:
                return self.fresh(name)

    def finish(self) -> None:
        """Put what reads new constants only at the start of its graph, where every reader comes after it."""
        before, self.decoding = self.decoding, {}
        for draw, items in self.waiting.values():
            draw(Builder(self.graph, TERSE, self), items)
        for graph, nodes in before.items():
            self.decoding.setdefault(graph, []).extend(nodes)
        poured: list[ir.Node] = []
        for (axis, _), vectors in self.pools.items():
            read = [v for v in vectors if v.value.uses() or v.value.is_graph_output()]
            poured += _pour(self, axis, read) if read else []
        for row, count in self.rows.values():
            ends = [Builder(self.graph, TERSE, self).integers(np.array(n, np.int32)) for n in (0, count, 1)]
            poured.append(ir.node("Range", ends, outputs=[row], name=""))
        if poured:
            self.decoding[self.graph] = poured + self.decoding.get(self.graph, [])
        for graph, nodes in self.decoding.items():
            graph.insert_before(graph[0], nodes)


class Builder:
    """Draw the nodes of one weight into the graph that owns it.

    Parameters
    ----------
    graph : ir.Graph
        Where initializers are registered and nodes will be inserted.
    weight : str
        Its name starts every new name, so that each new node says where it came from.
    paper : Paper

    Attributes
    ----------
    nodes : list of ir.Node
        Those that read more than what was stored here, in order.
    """

    def __init__(self, graph: ir.Graph, weight: str, paper: Paper) -> None:
        self.graph = graph
        self.weight = weight
        self.nodes: list[ir.Node] = []
        self._paper = paper

    @property
    def opset(self) -> int:
        """Version of the default operator set that the model imports."""
        return self._paper.opset

    @property
    def outer(self) -> Builder:
        """Builder on the outermost graph, which every other graph can read."""
        return Builder(self._paper.graph, self.weight, self._paper)

    def constant(self, role: str, array: Array, shared: str | None = None) -> ir.Value:
        """Register an initializer ``<weight>.<role>``, or return the one already shared under ``shared``.

        What is shared lies in the outermost graph, where every other graph can read it.
        """
        if shared is None:
            return self._registered(self.graph, f"{self.weight}.{role}", array)
        outer, name = self._paper.graph, f"{shared}.{role}"
        return self._once(outer, f"initializer {name}", lambda: self._registered(outer, name, array))

    def vector(
        self, role: str, array: Array, shape: Sequence[int], *, additive: bool | None = False
    ) -> ir.Value:
        """Return a small float32 constant of ``shape`` (scales, a bias), as :func:`half_of` rounds it.

        All vectors of a model that lie along the same axis are stored in one float16 initializer, poured out
        by :meth:`Paper.finish`; where float16 does not hold the numbers they are a constant as any other.
        Until then the value carries its numbers as an initializer does.
        """
        half = half_of(array, additive=additive)
        if half is None or not shape or not array.size:
            return self.constant(role, array.reshape(shape))
        half = half.reshape(shape)
        axis = next((i for i, n in enumerate(half.shape) if n > 1), 0)
        name = self._paper.terse()
        tensor = ir.Tensor(half.astype(np.float32), name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(half.shape)
        )
        self._paper.decoded.add(value)
        place = axis, (*half.shape[:axis], -1, *half.shape[axis + 1 :])
        self._paper.pools.setdefault(place, []).append(_Vector(value, self.weight, role, half))
        return value

    def later(self, key: str, item: Any, draw: Callable[[Builder, list[Any]], None]) -> None:
        """Let ``draw`` have all items of one key, and a builder on the outermost graph, at the very end.

        What it draws comes before everything else that only decodes.
        """
        self._paper.waiting.setdefault(key, (draw, []))[1].append(item)

    def promise(self, value: ir.Value) -> None:
        """Count a value that :meth:`later` draws among what only decodes, and so what reads it alone."""
        self._paper.decoded.add(value)

    def named(self, weight: str) -> Builder:
        """Builder on the same graph for another weight."""
        return Builder(self.graph, weight, self._paper)

    def terse(self) -> str:
        """Return a new name as short as can be."""
        return self._paper.terse()

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """Return an int64 vector (a shape), stored once for all weights."""
        return self.integers(np.array(numbers, np.int64))

    def integers(self, array: Array) -> ir.Value:
        """Return integers of 32 or 64 bits that decoding needs, stored once for all weights."""
        outer, paper = self._paper.graph, self._paper
        key = f"integers {array.dtype} {array.shape} {array.tolist()}"
        return self._once(outer, key, lambda: self._kept(outer, briefly(array, paper.terse())))

    def counted(self, count: int) -> ir.Value:
        """Return 0, 1, ... in int32, ``count`` of them or more, drawn once for all that are about as many.

        ONNX Runtime copies what a node reads before it folds the node: one row for all would be copied whole
        for each of them.
        """
        about = max(count, _COPIED).bit_length()
        row, most = self._paper.rows.get(about) or (ir.Value(name=self._paper.terse()), 0)
        self.promise(row)
        self._paper.rows[about] = row, max(most, count)
        return row

    def zero(self, dtype: str) -> ir.Value:
        """Return one zero (the bias that Gemm must have before opset 11), stored once for all weights."""
        outer, array = self._paper.graph, np.zeros(1, DTYPES[dtype].numpy())
        return self._once(
            outer, f"zero {dtype}", lambda: self._registered(outer, f"{self.weight}.zero", array)
        )

    def once(self, key: str, draw: Callable[[], ir.Value]) -> ir.Value:
        """Return what ``draw`` adds to this graph, or what was drawn there before under the same key."""
        return self._once(self.graph, key, draw)

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        role: str,
        into: ir.Value | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node of the default domain and return its one output, ``into`` where that is given.

        Both are named ``<weight>.<role>``; a node that only decodes has no name, and its output a terse one.
        """
        decodes = all(v is None or v in self._paper.decoded for v in inputs)
        if into is None:
            name = self._paper.terse() if decodes else self._paper.fresh(f"{self.weight}.{role}")
            into = ir.Value(name=name)
        name = "" if decodes else into.name or ""
        self._added(ir.node(op, list(inputs), attributes, outputs=[into], name=name), decodes=decodes)
        return into

    def split(
        self, value: ir.Value, sizes: Sequence[int], into: Sequence[ir.Value] | None = None, axis: int = 0
    ) -> Sequence[ir.Value]:
        """Cut what only decodes along an axis; returns the pieces, ``into`` where that is given."""
        pieces = into or [ir.Value(name=self._paper.terse()) for _ in sizes]
        self._added(_split(self, value, sizes, pieces, axis), decodes=True)
        return pieces

    def _added(self, node: ir.Node, *, decodes: bool) -> None:
        if decodes:
            self._paper.decoded.update(node.outputs)
            self._paper.decoding.setdefault(self.graph, []).append(node)
        else:
            self.nodes.append(node)

    def tell(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int]) -> None:
        """Let the file say the type and shape of a value in the outermost graph: no one could infer it."""
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        value.meta[walk.TOLD] = True

    def cast(self, value: ir.Value, dtype: str, role: str) -> ir.Value:
        """Cast to ``dtype``; nothing is added where the value is an initializer of that type already."""
        if value.const_value is not None and value.const_value.dtype == DTYPES[dtype]:
            return value
        to = int(DTYPES[dtype])
        return self.once(f"cast {value.name} {dtype}", lambda: self.node("Cast", [value], role, to=to))

    def reshape(self, value: ir.Value, shape: Sequence[int], role: str) -> ir.Value:
        """Reshape to fixed dimensions."""
        return self.node("Reshape", [value, self.ints(shape)], role)

    def _registered(self, graph: ir.Graph, wanted: str, array: Array) -> ir.Value:
        name = self._paper.fresh(wanted)
        return self._kept(graph, ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name))

    def _kept(self, graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
        )
        graph.register_initializer(value)
        self._paper.decoded.add(value)
        return value

    def _once(self, graph: ir.Graph, key: str, draw: Callable[[], ir.Value]) -> ir.Value:
        place = (id(graph), key)
        if place not in self._paper.drawn:
            self._paper.drawn[place] = draw()
        return self._paper.drawn[place]


def half_of(array: Array, *, additive: bool | None = False) -> Array | None:
    """Round float32 numbers to float16; None where one of them would change by more than 2^-10 of itself.

    Parameters
    ----------
    array : ndarray
        None is the answer for any type but float32, too.
    additive : bool or None
        Compare the change with the largest number instead, because what is added to an output counts beside
        its neighbours; None asks only that no number overflows.

    Returns
    -------
    ndarray of the same shape, float16, or None
        What :meth:`Builder.vector` stores; where it is None, ``array`` is stored as it is.
    """
    if array.dtype != np.float32 or not np.isfinite(array).all():
        return None
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    wide = array.astype(np.float64)
    if additive is None or not array.size:
        return half if np.isfinite(half).all() else None
    size = np.abs(wide).max() if additive else np.abs(wide)
    return half if np.all(np.abs(half - wide) <= 2.0**-10 * size) else None


def unlike_others(array: Array, name: str, below: int = 128) -> Array:
    """Put numbers at the front of an array that no other name's has: equal small constants are stored once.

    They are integers from 0 to ``below`` - 1, the same for a name every time.
    """
    head = array.reshape(-1)[:64]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    head[:] = rng.integers(0, below, head.size).astype(array.dtype)
    return array


def nbytes(opset: int, draw: Callable[[Builder], object]) -> int:
    """Count the bytes that a drawing adds to a model file, by drawing it on a blank one."""
    return _blank_with(opset, draw) - _blank(opset)


@cache
def _blank(opset: int) -> int:
    return _blank_with(opset, lambda build: None)


def _blank_with(opset: int, draw: Callable[[Builder], object]) -> int:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[ir.node("Identity", [x], name="")], opset_imports={"": opset}, name="g")
    model = ir.Model(graph, ir_version=3)
    paper = Paper(model)
    draw(Builder(graph, "w", paper))
    paper.finish()
    proto = ir.serde.serialize_model(model)
    walk.keep_value_infos(proto, walk.told(model))  # onnx-ir adds the others, and the file does not get them
    return int(proto.ByteSize())


def _pour(paper: Paper, axis: int, vectors: Sequence[_Vector]) -> list[ir.Node]:
    """Store vectors, together or each on its own, whichever is smaller; returns the nodes of the former."""

    def apart(build: Builder) -> None:
        for v in vectors:
            Builder(build.graph, v.weight, build._paper).constant(v.role, v.half.astype(np.float32))

    def together(build: Builder) -> None:
        likes = [ir.Value(name=v.value.name) for v in vectors]
        build.graph.extend(_pooled(build, axis, vectors, likes))

    longer = sum(  # every reader names the vector
        len(v.value.uses()) * (len(f"{v.weight}.{v.role}") - len(v.value.name or "")) for v in vectors
    )
    if nbytes(paper.opset, together) < nbytes(paper.opset, apart) + longer:
        for v in vectors:
            v.value.const_value = None
        return _pooled(Builder(paper.graph, "", paper), axis, vectors, [v.value for v in vectors])
    for v in vectors:
        v.value.name = paper.fresh(f"{v.weight}.{v.role}")
        paper.graph.register_initializer(v.value)
    return []


def _pooled(build: Builder, axis: int, vectors: Sequence[_Vector], outputs: list[ir.Value]) -> list[ir.Node]:
    """Cast one initializer, and split it into ``outputs``."""
    joined = np.concatenate([v.half for v in vectors], axis)
    held = build._registered(build.graph, f"{TERSE}.vectors", joined)
    to = {"to": int(DTYPES["float32"])}
    if len(vectors) == 1:
        return [ir.node("Cast", [held], to, outputs=outputs, name="")]
    wide = ir.node("Cast", [held], to, name="")
    wide.outputs[0].name = build._paper.terse()
    sizes = [v.half.shape[axis] for v in vectors]
    return [wide, _split(build, wide.outputs[0], sizes, outputs, axis)]


def _split(
    build: Builder, value: ir.Value, sizes: Sequence[int], outputs: Sequence[ir.Value], axis: int
) -> ir.Node:
    attributes: dict[str, Any] = {"axis": axis} if axis else {}
    inputs = [value]
    if build.opset < 13:
        attributes["split"] = list(sizes)
    else:
        inputs.append(build.ints(sizes))
    return ir.node("Split", inputs, attributes, outputs=list(outputs), name="")


def briefly(array: Array, name: str) -> ir.TensorProtocol:
    """Give integers as varints where these are fewer bytes than the raw numbers; uint32 always raw.

    OpenVINO (2026.4) takes every 64-bit varint of a uint32 tensor for two numbers: 1 7056 is read as 1 0.
    """
    raw = numpy_helper.from_array(array, name)
    if array.dtype == np.uint32:
        return ir.serde.TensorProtoTensor(raw)
    brief = helper.make_tensor(name, raw.data_type, array.shape, array.reshape(-1).tolist())
    return ir.serde.TensorProtoTensor(min(brief, raw, key=lambda t: t.ByteSize()))
