"""LiftWeights: weights become graph inputs, so that one session can measure any replacement of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxdp.records import Array
from onnxdp.weights import constant


class LiftWeights(ir.passes.InPlacePass):
    """Turn weights, and the biases behind them, into inputs of the outermost graph.

    Parameters
    ----------
    weights : mapping of str to ir.Value
        New input name -> the weight's value (initializer or output of a Constant node, in any subgraph).
    biases : mapping of str to ir.Node
        New input name -> the Conv or Gemm whose bias, a vector of float32, it becomes.
    """

    def __init__(self, weights: Mapping[str, ir.Value], biases: Mapping[str, ir.Node]) -> None:
        super().__init__()
        self._weights = weights
        self._biases = biases

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return whether there was anything to lift."""
        for name, node in self._biases.items():
            weight = constant(node.inputs[1])
            assert weight is not None
            fed = ir.Value(name=name, type=ir.TensorType(weight.dtype))
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, fed)
            model.graph.inputs.append(fed)
        for name, value in self._weights.items():
            tensor = constant(value)
            assert tensor is not None
            fed = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
            value.replace_all_uses_with(fed)
            drop(value)
            model.graph.inputs.append(fed)
        return ir.passes.PassResult(model, modified=bool(self._weights or self._biases))


def drop(value: ir.Value) -> None:
    """Remove an initializer or a Constant node that nothing reads any more."""
    node = value.producer()
    if node is not None and node.graph is not None:
        node.graph.remove(node, safe=True)
    elif value.graph is not None:
        del value.graph.initializers[value.name]  # type: ignore[arg-type]  # an initializer has a name


def forget(value: ir.Value | None) -> None:
    """Drop a constant that nothing reads any more, and every Identity that passed it on."""
    while value is not None and not value.uses() and not value.is_graph_output():
        producer = value.producer()
        if producer is None or producer.op_type != "Identity":
            drop(value)
            return
        value = producer.inputs[0]
        producer.graph.remove(producer, safe=True)  # type: ignore[union-attr]  # it lies in a graph


def store(value: ir.Value, array: Array) -> None:
    """Put another array into a constant, in the type of the old one."""
    old = constant(value)
    assert old is not None
    tensor = ir.tensor(np.ascontiguousarray(array.astype(old.numpy().dtype, copy=False)), name=value.name)
    node = value.producer()
    if node is not None:
        node.attributes["value"] = ir.AttrTensor("value", tensor)
    if node is None or value.const_value is not None:
        value.const_value = tensor
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
