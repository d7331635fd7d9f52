"""Networks that draw random numbers, given the same ones every time: two draws cannot be compared.

A generator of ONNX Runtime goes on from run to run, whatever its seed. In copies that are only measured, what
it would give is worked out from the place of each number instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from onnxdp import walk

_DRAWING = frozenset(("Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"))
_LARGEST = 1 << 31
"""Numbers of one draw from which it is left to ONNX Runtime, which refuses it."""
_APART = 389
"""Places between where one draw starts and the next."""
_OPEN = 1e-6
"""What numbers keep away from either end of their range: their logarithm may be taken."""


def draws(model: ModelProto) -> bool:
    """Whether a network draws numbers that can be told beforehand."""
    return any(_draws(node) for node in walk.deep(walk.top_nodes(model)))


def settle(model: ModelProto) -> None:
    """Put in the place of what is drawn numbers of the same mean and deviation, the same in every run.

    What is no draw that ONNX knows is left as it is.
    """
    if not draws(model):
        return
    numbers = itertools.count()  # names would not do: a compressed form has others
    _settle(model.graph, walk.opset(model), walk.types(model), numbers)
    for function in model.functions:
        _settle(function, walk.opset(function), {}, numbers)


def _draws(node: NodeProto) -> bool:
    return node.op_type in _DRAWING and node.domain in walk.STANDARD


def _settle(
    holder: GraphProto | FunctionProto, opset: int, types: Mapping[str, int], numbers: Iterator[int]
) -> None:
    nodes: list[NodeProto] = []
    for node in holder.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _settle(inner, opset, {}, numbers)
        nodes += (_settled(node, opset, types, next(numbers)) if _draws(node) else None) or [node]
    if len(nodes) > len(holder.node):
        del holder.node[:]
        holder.node.extend(nodes)


def _settled(node: NodeProto, opset: int, types: Mapping[str, int], number: int) -> list[NodeProto] | None:
    """Return nodes that spread numbers evenly: the fraction of a thousand times the sine of each place.

    Every draw of a network starts at a place of its own. None where an attribute, or the type, is not known.
    """
    try:
        told = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        low, high = float(told.get("low", 0.0)), float(told.get("high", 1.0))
        mean, deviation = float(told.get("mean", 0.0)), float(told.get("scale", 1.0))
        given = [int(d) for d in told.get("shape", ())]
    except (TypeError, ValueError):  # a reference to an attribute of a function, or of another type
        return None
    if "Normal" in node.op_type:
        low, high = mean - math.sqrt(3.0) * deviation, mean + math.sqrt(3.0) * deviation
    alone = node.op_type in ("RandomNormal", "RandomUniform")
    like = "" if alone or not node.input else node.input[0]
    kind = told.get("dtype", 1 if alone else types.get(like, 0))
    if opset < 11 or not (kind or opset >= 15):  # Range is of 11, CastLike of 15
        return None
    if math.prod(given) >= _LARGEST or not ("shape" in told if alone else like):
        return None
    made: list[NodeProto] = []

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"drawn for {node.output[0]}/{len(made)}"
        made.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(value: object, dtype: type = np.float32) -> str:
        return add("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    shape = add("Shape", like) if like else constant(given, np.int64)
    count = add("Size", like) if like else constant(math.prod(given), np.int64)
    counted = add("Range", constant(0, np.int64), count, constant(1, np.int64))
    places = add("Add", add("Cast", counted, to=1), constant(1 + number * _APART % 997))
    far = add("Mul", add("Sin", add("Mul", places, constant(12.9898))), constant(1000.0))
    share = add("Sub", far, add("Floor", far))
    inner = _OPEN * (high - low)
    spread = add("Add", add("Mul", share, constant(high - low - 2 * inner)), constant(low + inner))
    shaped = add("Reshape", spread, shape)
    if node.op_type == "Bernoulli":
        shaped = add("Less", shaped, add("Cast", like, to=1))
    _ = add("Cast", shaped, to=kind) if kind else add("CastLike", shaped, like)
    made[-1].output[0] = node.output[0]
    return made
