"""The pencil that forms draw with: names derived from the weight's, initializers shared by several readers."""

from __future__ import annotations

from collections.abc import Sequence
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


class Names:
    """Names taken in one model; new ones are derived and never collide."""

    def __init__(self, model: ir.Model) -> None:
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


class Builder:
    """Draw the nodes of one weight into the graph that owns it.

    Parameters
    ----------
    graph : ir.Graph
        Where initializers are registered and nodes will be inserted.
    weight : str
        Its name starts every new name, so that each new node says where it came from.
    names : Names
    store : dict
        Initializers that several weights share, by (graph, shared name); lives as long as the rewriting.
    """

    def __init__(self, graph: ir.Graph, weight: str, names: Names, store: dict[tuple[int, str], ir.Value]) -> None:
        self.graph = graph
        self.weight = weight
        self.nodes: list[ir.Node] = []
        self._names = names
        self._store = store

    def constant(self, role: str, array: Array, shared: str | None = None) -> ir.Value:
        """Register an initializer named ``<weight>.<role>``, or return the one already shared under ``shared``."""
        key = (id(self.graph), shared or "")
        if shared is not None and key in self._store:
            return self._store[key]
        base = self.weight if shared is None else shared
        name = self._names.fresh(f"{base}.{role}")
        value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        value.type = ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]  # set one line above
        value.shape = ir.Shape(array.shape)
        self.graph.register_initializer(value)
        if shared is not None:
            self._store[key] = value
        return value

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """Return an int64 vector (a shape), stored once per graph."""
        key = (id(self.graph), "shape " + "x".join(map(str, numbers)))
        if key not in self._store:
            name = self._names.fresh("onnxdp." + "x".join(map(str, numbers)))
            value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
            self.graph.register_initializer(value)
            self._store[key] = value
        return self._store[key]

    def node(self, op: str, inputs: Sequence[ir.Value | None], role: str, **attributes: Any) -> ir.Value:
        """Add a node of the default domain; returns its one output, named like the node ``<weight>.<role>``."""
        name = self._names.fresh(f"{self.weight}.{role}")
        node = ir.node(op, inputs=list(inputs), attributes=attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: str, role: str) -> ir.Value:
        """Cast to ``dtype``; nothing is added where the value is an initializer of that type already."""
        if value.const_value is not None and value.const_value.dtype == DTYPES[dtype]:
            return value
        key = (id(self.graph), f"cast {value.name} {dtype}")
        if key not in self._store:
            self._store[key] = self.node("Cast", [value], role, to=int(DTYPES[dtype]))
        return self._store[key]

    def reshape(self, value: ir.Value, shape: Sequence[int], role: str) -> ir.Value:
        """Reshape to fixed dimensions."""
        return self.node("Reshape", [value, self.ints(shape)], role)
