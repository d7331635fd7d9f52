"""FoldNormalisation: a BatchNormalization that only a Conv feeds goes into the Conv's weight and bias.

    g (W x + c - m) + b = (g W) x + (b + g (c - m)),    g = scale / sqrt(variance + epsilon)

Runtimes do that when they load a file. Done before weights are rounded, a channel needs a step and a bias
instead of these and three numbers more, errors of channels compare as the next layer sees them, and a Conv
stands right before the Add of a residual join, whose other branch its weight can make up for.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx_ir as ir

from onnxdp.build import Builder, Paper
from onnxdp.channels import source
from onnxdp.passes.lift import forget, store
from onnxdp.records import Array
from onnxdp.weights import constant

SINCE = 7
"""Operator set from which a BatchNormalization in training can be told from any other."""


class FoldNormalisation(ir.passes.InPlacePass):
    """Fold what follows each Conv whose weight is its own.

    Parameters
    ----------
    spared : set of ir.Value
        Weights that stay as they are.

    Attributes
    ----------
    folded : int
        After a call: how many nodes went.
    """

    def __init__(self, spared: Set[ir.Value] = frozenset()) -> None:
        super().__init__()
        self._spared = spared
        self.folded = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return whether anything was folded."""
        self.folded = 0
        if model.opset_imports.get("", 1) >= SINCE:
            paper = Paper(model)
            nodes = [node for graph in model.graphs() for node in graph]
            self.folded = sum(self._folds(node, paper) for node in nodes)
        return ir.passes.PassResult(model, modified=self.folded > 0)

    def _folds(self, node: ir.Node, paper: Paper) -> bool:
        """Fold one node where that can be done; returns whether it went."""
        conv = _before(node)
        if conv is None or conv.inputs[1] in self._spared:
            return False
        held = [_numbers(v) for v in (*conv.inputs[1:3], *node.inputs[1:]) if v is not None]
        if any(array is None for array in held):
            return False
        weight, *bias, scale, shift, mean, variance = (a.astype(np.float64) for a in held if a is not None)
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        with np.errstate(all="ignore"):
            gain = scale / np.sqrt(variance + epsilon)
            made = (shift + gain * (sum(bias) - mean)).astype(np.float32)
            weight = (weight * gain.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        if not (np.isfinite(weight).all() and np.isfinite(made).all()):
            return False
        _give(conv, weight, made, paper)
        read = node.inputs[1:]
        _rename(conv.outputs[0], node.outputs[0])
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]  # it lies in a graph
        for value in read:
            forget(value)
        return True


def _before(node: ir.Node) -> ir.Node | None:
    """Return the Conv that feeds a BatchNormalization and nothing else, where the two can be one."""
    if node.op_type != "BatchNormalization" or node.domain:
        return None
    usual = {"training_mode": 0, "spatial": 1}
    if any(k in node.attributes and node.attributes[k].as_int() != n for k, n in usual.items()):
        return None
    between = node.inputs[0]
    conv = None if between is None else between.producer()
    if between is None or conv is None or (conv.op_type, conv.domain, conv.graph) != ("Conv", "", node.graph):
        return None
    if len(list(between.uses())) > 1 or between.is_graph_output():
        return None
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None
    weight = conv.inputs[1]
    alone = weight is not None and source(weight) is weight and len(list(weight.uses())) == 1
    return conv if alone else None


def _numbers(value: ir.Value) -> Array | None:
    """Return a float32 constant that nobody can feed or read."""
    held = source(value)
    tensor = constant(held)
    if held is None or tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    return None if held.is_graph_input() or held.is_graph_output() else tensor.numpy()


def _give(conv: ir.Node, weight: Array, bias: Array, paper: Paper) -> None:
    """Put another weight and another bias into a Conv."""
    held = conv.inputs[1]
    assert held is not None
    store(held, weight)
    old = conv.inputs[2] if len(conv.inputs) > 2 else None
    conv.resize_inputs(3)
    conv.replace_input_with(2, Builder(paper.graph, held.name or "", paper).constant("bias", bias))
    forget(old)


def _rename(value: ir.Value, after: ir.Value) -> None:
    """Let a value be what another was, name and all: readers and outputs of the graph see no change."""
    after.replace_all_uses_with(value, replace_graph_outputs=True)
    name, after.name = after.name, None
    value.name, value.type, value.shape = name, after.type, after.shape
    value.doc_string = after.doc_string
    value.meta.update(after.meta)
    value.metadata_props.clear()
    value.metadata_props.update(after.metadata_props)
