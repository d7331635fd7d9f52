"""DropChannels: channels of inner tensors go, with all entries of constants that belong to them.

No node is added or removed and the interface stays: every inner tensor of a chain becomes narrower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxdp.build import Builder, Paper
from onnxdp.channels import Chain, Shapes, chains, source
from onnxdp.passes.lift import forget, store
from onnxdp.passes.replace import shift_bias
from onnxdp.records import Array
from onnxdp.weights import Found, constant


class DropChannels(ir.passes.InPlacePass):
    """Take channels out of chains, once what reads them makes up for them.

    Parameters
    ----------
    found : Found
        Weights of the very model that the pass is called on.
    shapes : mapping
        See :func:`onnxdp.channels.shapes_of`.
    dropped : mapping of str to sequence of int
        Name of the weight that makes them -> channels.
    tensors : mapping of str to ndarray
        What weights become first, in their full shape; rows of dropped channels do not matter.
    shifts : mapping of str to ndarray of shape (outputs,)
        What the output behind a weight gains.
    """

    def __init__(
        self,
        found: Found,
        shapes: Shapes,
        dropped: Mapping[str, Sequence[int]],
        tensors: Mapping[str, Array],
        shifts: Mapping[str, Array],
    ) -> None:
        super().__init__()
        self._found = found
        self._shapes = shapes
        self._dropped = dropped
        self._tensors = tensors
        self._shifts = shifts

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return whether a channel went."""
        paper = Paper(model)
        for name, tensor in self._tensors.items():
            store(self._found.values[name], tensor)
        for name, shift in self._shifts.items():
            shift_bias(self._found.readers[name][0].node, shift, Builder(model.graph, name, paper))
        mine = [c for c in chains(self._found, self._shapes) if self._dropped.get(c.weight)]
        self._cut(mine, paper)
        for chain in mine:
            self._told(chain, paper)
        return ir.passes.PassResult(model, modified=bool(mine))

    def _cut(self, mine: Sequence[Chain], paper: Paper) -> None:
        """Cut every constant once, whatever chains it lies on."""
        places: dict[tuple[ir.Node, int], dict[int, list[Array]]] = defaultdict(lambda: defaultdict(list))
        for chain in mine:
            for cut in chain.cuts:
                gone = cut.span.places(self._dropped[chain.weight]).reshape(-1)
                places[cut.node, cut.index][cut.axis].append(gone)
        for (node, index), axes in places.items():
            held = constant(source(node.inputs[index]))
            assert held is not None
            array = held.numpy()
            for axis, gone_ in axes.items():
                array = np.delete(array, np.concatenate(gone_), axis)
            _put(node, index, array, paper)

    def _told(self, chain: Chain, paper: Paper) -> None:
        """Correct what names the number of channels: groups, shapes of Reshape, types of values."""
        gone = len(self._dropped[chain.weight])
        for node in chain.groups:
            node.attributes["group"] = ir.AttrInt64("group", node.attributes["group"].as_int() - gone)
        for node, place, span in chain.sizes:
            held = constant(source(node.inputs[1]))
            assert held is not None
            array = held.numpy().copy()
            array[place] -= gone * span.repeat
            _put(node, 1, array, paper)
        for value, span in chain.spans.items():
            if value is None or value.type is None or value.shape is None:
                continue  # constants have no type of their own, but onnx-ir gives them a shape
            if isinstance(size := value.shape[span.axis], int):
                dims = list(value.shape)
                dims[span.axis] = size - gone * span.repeat
                value.shape = ir.Shape(dims)


def _put(node: ir.Node, index: int, array: Array, paper: Paper) -> None:
    """Give a node another constant; others that read the old one keep it."""
    value = node.inputs[index]
    assert value is not None
    if source(value) is value and len(list(value.uses())) == 1:
        store(value, array)
        return
    node.replace_input_with(index, Builder(paper.graph, value.name or "", paper).constant("cut", array))
    forget(value)
