"""ReplaceWeights: each planned weight becomes its form's operators.

W -> emit(form, encoded); where the mean was centred away, b -> b + mean^T (W - W').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxdp.build import Builder, Paper, half_of
from onnxdp.methods.form import Form
from onnxdp.passes.lift import drop
from onnxdp.passes.narrow import narrow
from onnxdp.records import Array, Encoded, Weight
from onnxdp.weights import Found, Reader, constant


class ReplaceWeights(ir.passes.InPlacePass):
    """Rewrite the readers of every encoded weight.

    Parameters
    ----------
    found : Found
        Weights of the very model that the pass is called on.
    encoded : sequence of Encoded
    forms : mapping of str to Form
        By method name.
    shifts : mapping of str to ndarray of shape (outputs,)
        What the bias behind a weight gains; a weight without an entry keeps its bias.
    provenance : str
        Entry written into the model's metadata.
    narrowed : bool
        Whether small vectors of other operators may become float16, too.
    """

    KEY = "onnxdp"
    """Of the provenance entry in the model's metadata."""

    def __init__(
        self,
        found: Found,
        encoded: Sequence[Encoded],
        forms: Mapping[str, Form],
        shifts: Mapping[str, Array],
        provenance: str,
        *,
        narrowed: bool = True,
    ) -> None:
        super().__init__()
        self._found = found
        self._encoded = encoded
        self._forms = forms
        self._shifts = shifts
        self._provenance = provenance
        self._narrowed = narrowed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return whether there was a weight to replace."""
        paper = Paper(model)
        weights = {w.name: w for w in self._found.weights}
        nodes = (n for graph in (model.graph, *model.graph.subgraphs()) for n in graph)
        order = {node: i for i, node in enumerate(nodes)}
        readers = self._found.readers

        def place(encoded: Encoded) -> int:  # what several weights share must come before the first of them
            return min(order[r.node] for r in readers[encoded.weight])

        pooled = any(self._forms[e.method].sequential for e in self._encoded)
        for encoded in sorted(self._encoded, key=place):
            self._replace(weights[encoded.weight], encoded, paper, pooled=pooled)
        if pooled and self._narrowed:
            narrow(model, self._found, paper)
        paper.finish()
        if self._encoded:
            model.metadata_props[self.KEY] = self._provenance
        return ir.passes.PassResult(model, modified=bool(self._encoded))

    def _replace(self, weight: Weight, encoded: Encoded, paper: Paper, *, pooled: bool) -> None:
        value = self._found.values[weight.name]
        readers = self._found.readers[weight.name]
        graph = value.graph
        assert graph is not None
        build = Builder(graph, value.name or weight.name, paper)
        alone = readers[0] if single(readers) and readers[0].node.graph is graph else None
        if alone is not None and alone.node.inputs[alone.index] is not value:
            alone = None  # the other operand was a weight too, and its form has moved this one
        if weight.name in self._shifts:
            shift_bias(readers[0].node, self._shifts[weight.name], build, pooled=pooled)
        new = self._forms[encoded.method].emit(build, weight, encoded, alone)
        if new is not None:
            value.replace_all_uses_with(new)
        graph.insert_before(alone.node if alone else graph[0], build.nodes)
        drop(value)


def single(readers: Sequence[Reader]) -> bool:
    """Whether one operator reads the weight, and nothing lies between."""
    return len(readers) == 1 and readers[0].direct


def shift_bias(node: ir.Node, shift: Array, build: Builder, *, pooled: bool = False) -> None:
    """Add ``shift`` (outputs,) to what the node puts out: to a bias, or to the mean of what normalises it.

    Where ``pooled``, the sum goes into the pool of vectors if what was there could; the shift has no say,
    so that a file's size does not depend on it.
    """
    alpha, beta = (node.attributes[k].as_float() if k in node.attributes else 1.0 for k in ("alpha", "beta"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        normalise = _following_normalisation(node)
        if normalise is not None:  # (y + shift) - mean = y - (mean - shift)
            mean = normalise.inputs[3]
            _replace_constant(normalise, 3, mean, _array(mean) - alpha * shift, build, pooled=pooled)
            return
        node.resize_inputs(3)
        made = _like(alpha * shift, node.inputs[1])
        fresh = build.vector("bias", made, made.shape, additive=None) if pooled else None
        node.replace_input_with(2, fresh or build.constant("bias", made))
        if "beta" in node.attributes:
            del node.attributes["beta"]
        return
    if beta == 0:
        return
    _replace_constant(node, 2, bias, _array(bias) + alpha / beta * shift, build, pooled=pooled)


def _replace_constant(
    node: ir.Node, index: int, old: ir.Value | None, new: Array, build: Builder, *, pooled: bool
) -> None:
    assert old is not None
    role, made = "bias" if index == 2 else "mean", _like(new, old)
    if pooled and half_of(_like(_array(old), old), additive=True) is not None:
        fresh = build.vector(role, made, made.shape, additive=None)
    else:
        fresh = build.constant(role, made)
    node.replace_input_with(index, fresh)
    if not old.uses() and not old.is_graph_output():
        drop(old)


def _following_normalisation(node: ir.Node) -> ir.Node | None:
    """Return the BatchNormalization that alone reads the node, with a constant mean of its own."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output():
        return None
    after, index = uses[0]
    if after.op_type != "BatchNormalization" or index != 0 or len(after.outputs) > 1:
        return None
    mean = after.inputs[3]
    return after if mean is not None and constant(mean) is not None and not mean.is_graph_input() else None


def _array(value: ir.Value | None) -> Array:
    assert value is not None
    tensor = constant(value)
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


def _like(array: Array, value: ir.Value | None) -> Array:
    """Cast to the type of an existing constant."""
    tensor = constant(value)
    return array.astype(np.float32 if tensor is None else tensor.numpy().dtype)
