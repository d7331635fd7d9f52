"""Small vectors of float32 (biases, what normalises) that move into the model's float16 pool.

They are rounded to 11 bits, where the weights beside them have a few: a byte counts the same wherever it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxdp.build import Builder, Paper, half_of
from onnxdp.passes.lift import drop
from onnxdp.weights import Found, constant

_ADDED = {
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "BatchNormalization": (2, 3),
    "InstanceNormalization": (2,),
    "LayerNormalization": (2,),
    "LSTM": (3,),
    "GRU": (3,),
    "RNN": (3,),
}
"""Operators that add the inputs at these places: a small number beside a large one may lose digits."""

_MULTIPLIED = {
    "BatchNormalization": (1, 4),
    "InstanceNormalization": (1,),
    "LayerNormalization": (1,),
    "PRelu": (1,),
}
"""Operators for which every number of the inputs at these places counts by itself."""


def narrow(model: ir.Model, found: Found, paper: Paper) -> None:
    """Pool the vectors of operators that hold no weight, or one of ``found.weights``.

    What was not selected stays exact; where something was not, so do operators without weights.
    """
    chosen = {w.name for w in found.weights}
    spared = {r.node for name, readers in found.readers.items() if name not in chosen for r in readers}
    for value in list(_vectors(model)):
        uses = list(value.uses())
        added = [_is_added(node, index) for node, index in uses]
        if any(a is None or node in spared for a, (node, _) in zip(added, uses, strict=True)):
            continue
        if spared and any(node.op_type not in ("Conv", "ConvTranspose", "Gemm") for node, _ in uses):
            continue
        tensor = constant(value)
        assert tensor is not None
        array = tensor.numpy()
        if half_of(array, additive=all(added)) is not None:
            build = Builder(model.graph, value.name or "", paper)
            value.replace_all_uses_with(build.vector("half", array, array.shape, additive=all(added)))
            drop(value)


def _vectors(model: ir.Model) -> Iterator[ir.Value]:
    """Give the float32 constants that nothing but nodes can read."""
    for graph in model.graphs():
        held = [*graph.initializers.values(), *(n.outputs[0] for n in graph if n.op_type == "Constant")]
        for value in held:
            tensor = constant(value)
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 2 or not value.uses():
                continue
            if not value.is_graph_input() and not value.is_graph_output():
                yield value


def _is_added(node: ir.Node, index: int) -> bool | None:
    """Whether a node adds this input, or multiplies by it; None for all other operators."""
    if node.domain or (node.op_type == "BatchNormalization" and len(node.outputs) > 1):
        return None
    if node.op_type == "Add":
        other = node.inputs[1 - index]
        before = None if other is None else other.producer()
        return True if before is not None and before.op_type in ("MatMul", "Conv", "Gemm") else None
    if index in _ADDED.get(node.op_type, ()):
        return True
    return False if index in _MULTIPLIED.get(node.op_type, ()) else None
