"""The pencil that forms draw with: names derived from the weight's, what several weights share drawn once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxdp.records import Array

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "float64": ir.DataType.DOUBLE,
    "bfloat16": ir.DataType.BFLOAT16,
}


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
        self._taken: set[str] = set()
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

    def finish(self) -> None:
        """Put what reads new constants only at the start of its graph, where every reader comes after it."""
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

    def constant(self, role: str, array: Array, shared: str | None = None) -> ir.Value:
        """Register an initializer ``<weight>.<role>``, or return the one already shared under ``shared``.

        What is shared lies in the outermost graph, where every other graph can read it.
        """
        if shared is None:
            return self._registered(self.graph, f"{self.weight}.{role}", array)
        outer, name = self._paper.graph, f"{shared}.{role}"
        return self._once(outer, f"initializer {name}", lambda: self._registered(outer, name, array))

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """Return an int64 vector (a shape), stored once for all weights."""
        outer, vector = self._paper.graph, np.array(numbers, np.int64)
        return self._once(
            outer, f"shape {list(numbers)}", lambda: self._registered(outer, f"{self.weight}.shape", vector)
        )

    def zero(self, dtype: str) -> ir.Value:
        """Return one zero (the bias that Gemm must have before opset 11), stored once for all weights."""
        outer, array = self._paper.graph, np.zeros(1, DTYPES[dtype].numpy())
        return self._once(
            outer, f"zero {dtype}", lambda: self._registered(outer, f"{self.weight}.zero", array)
        )

    def once(self, key: str, draw: Callable[[], ir.Value]) -> ir.Value:
        """Return what ``draw`` adds to this graph, or what was drawn there before under the same key."""
        return self._once(self.graph, key, draw)

    def node(self, op: str, inputs: Sequence[ir.Value | None], role: str, **attributes: Any) -> ir.Value:
        """Add a node of the default domain; returns its one output, both named ``<weight>.<role>``."""
        name = self._paper.fresh(f"{self.weight}.{role}")
        node = ir.node(op, inputs=list(inputs), attributes=attributes, name=name)
        output = node.outputs[0]
        output.name = name
        if all(v is None or v in self._paper.decoded for v in inputs):
            self._paper.decoded.add(output)
            self._paper.decoding.setdefault(self.graph, []).append(node)
        else:
            self.nodes.append(node)
        return output

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
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
        )
        graph.register_initializer(value)
        self._paper.decoded.add(value)
        return value

    def _once(self, graph: ir.Graph, key: str, draw: Callable[[], ir.Value]) -> ir.Value:
        place = (id(graph), key)
        if place not in self._paper.drawn:
            self._paper.drawn[place] = draw()
        return self._paper.drawn[place]
