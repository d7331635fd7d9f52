"""LiftWeights: weights become graph inputs, so that one session can measure any replacement of them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

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
