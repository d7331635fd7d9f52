"""Networks that draw random numbers, given the same ones every time: two draws cannot be compared.

A generator of ONNX Runtime goes on from run to run, whatever its seed. In copies that are only measured, what
it would give is worked out from the place of each number instead.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from onnxdp import walk

_DRAWING = frozenset(("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"))


def draws(model: ModelProto) -> bool:
    """Whether a network draws numbers that can be told beforehand."""
    return any(node.op_type in _DRAWING for node in walk.deep(walk.top_nodes(model)))


def settle(model: ModelProto) -> None:
    """Put in the place of what is drawn numbers of the same mean and deviation, the same in every run."""
    opset = max((o.version for o in model.opset_import if not o.domain or o.domain == "ai.onnx"), default=1)
    _settle(model.graph, opset)


def _settle(graph: GraphProto, opset: int) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _settle(inner, opset)
        nodes += _settled(node, opset) if node.op_type in _DRAWING else [node]
    if any(node.op_type in _DRAWING for node in graph.node):
        del graph.node[:]
        graph.node.extend(nodes)


def _settled(node: NodeProto, opset: int) -> list[NodeProto]:
    """Return nodes that spread numbers evenly: the fraction of a thousand times the sine of each place."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    low, high = given.get("low", 0.0), given.get("high", 1.0)
    if "Normal" in node.op_type:
        reach = math.sqrt(3.0) * given.get("scale", 1.0)
        low, high = given.get("mean", 0.0) - reach, given.get("mean", 0.0) + reach
    made: list[NodeProto] = []

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{node.output[0]}/{len(made)}"
        made.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(value: object, dtype: type = np.float32) -> str:
        return add("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    like = node.op_type.endswith("Like")
    shape = add("Shape", node.input[0]) if like else constant(given["shape"], np.int64)
    count = add("Size", node.input[0]) if like else constant(math.prod(given["shape"]), np.int64)
    places = add("Cast", add("Range", constant(0, np.int64), count, constant(1, np.int64)), to=1)
    far = add("Mul", add("Sin", add("Mul", places, constant(12.9898))), constant(1000.0))
    share = add("Sub", far, add("Floor", far))
    spread = add("Add", add("Mul", share, constant(high - low)), constant(low))
    shaped = add("Reshape", spread, shape)
    if like and "dtype" not in given and opset >= 15:
        add("CastLike", shaped, node.input[0])
    else:
        add("Cast", shaped, to=given.get("dtype", 1))
    made[-1].output[0] = node.output[0]
    return made
