"""GatherConstants: small constants are stored once, as briefly as can be, and integers are worked out.

Exporters give every shape a Constant node of its own (45 bytes, of which 8 to 32 are numbers) and leave the
arithmetic of paddings in the graph. Every runtime does the same when it loads a file.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnxdp.build import briefly
from onnxdp.passes.lift import drop
from onnxdp.records import Array
from onnxdp.weights import constant

_SMALL = 1024
"""Bytes of a constant below which it is gathered ..."""
_INDICES = 8_000_000
"""... and of integers below which they are stored in fewer bytes: 64 bits each mostly fit one byte."""
_SHORT = 64
"""Numbers that an operator may give to be worked out here."""
_MOVING = frozenset(
    (
        "Concat",
        "Reshape",
        "Slice",
        "Transpose",
        "Cast",
        "ConstantOfShape",
        "Gather",
        "Squeeze",
        "Unsqueeze",
        "Shape",
    )
)
"""Operators that give integers without any arithmetic that runtimes could differ in."""
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


class GatherConstants(ir.passes.InPlacePass):
    """Move small constants of all graphs into the outermost one, equal ones together.

    Attributes
    ----------
    saved : int
        After a call: about the bytes of file that it saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return whether anything was gathered; not below IR 4, where initializers are inputs."""
        if model.ir_version < 4:
            return ir.passes.PassResult(model, modified=False)
        names = {v.name for g in model.graphs() for n in g for v in n.outputs}
        names |= {n for g in model.graphs() for n in (*g.initializers, *(v.name for v in g.inputs))}
        held: dict[object, ir.Value] = {}
        for graph in list(model.graphs()):
            for value in list(graph.initializers.values()):
                self._gather(model, value, held, names)
            for node in list(graph):
                if node.op_type == "Constant" and not node.domain:
                    self._gather(model, node.outputs[0], held, names)
                elif (array := _worked_out(node, model.opset_imports.get("", 1))) is not None:
                    self.saved += ir.serde.serialize_node(node).ByteSize() + 2
                    new = self._kept(model, ir.tensor(array), held, names)
                    node.outputs[0].replace_all_uses_with(new)
                    graph.remove(node, safe=True)
        for value in [v for v in held.values() if not v.uses()]:  # what was only worked with
            self.saved += 15
            drop(value)
        return ir.passes.PassResult(model, modified=bool(held) or self.saved > 0)

    def _gather(
        self, model: ir.Model, value: ir.Value, held: dict[object, ir.Value], names: set[str | None]
    ) -> None:
        tensor = constant(value)
        if tensor is None or value.is_graph_input() or value.is_graph_output():
            return
        if tensor.nbytes >= _SMALL:
            if tensor.dtype in _INTEGERS and tensor.nbytes < _INDICES and value.producer() is None:
                self._shortened(value, tensor)
            return
        if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:  # texts have no width
            return
        self.saved += 30 if value.producer() else 0
        new = self._kept(model, tensor, held, names)
        value.replace_all_uses_with(new)
        drop(value)

    def _shortened(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Store integers where they are, each in as few bytes as it needs."""
        brief = briefly(tensor.numpy(), value.name or "")
        self.saved += max(0, tensor.nbytes - ir.serde.serialize_tensor(brief).ByteSize())
        value.const_value = brief

    def _kept(
        self, model: ir.Model, tensor: ir.TensorProtocol, held: dict[object, ir.Value], names: set[str | None]
    ) -> ir.Value:
        """Return the one constant of these numbers."""
        key = tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
        if key in held:
            self.saved += tensor.nbytes + 15
            return held[key]
        name = next(n for i in range(len(names), 2 * len(names) + 1) if (n := f"constant.{i}") not in names)
        names.add(name)
        array = tensor.numpy()
        brief = briefly(array, name) if tensor.dtype in _INTEGERS else _copied(tensor, name)
        shape = ir.Shape(tensor.shape.numpy())
        held[key] = ir.Value(name=name, const_value=brief, type=ir.TensorType(tensor.dtype), shape=shape)
        model.graph.register_initializer(held[key])
        return held[key]


def _copied(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    proto = onnx.TensorProto()
    proto.CopyFrom(ir.serde.serialize_tensor(tensor))
    proto.name = name
    proto.ClearField("doc_string")
    return ir.serde.TensorProtoTensor(proto)


def _worked_out(node: ir.Node, opset: int) -> Array | None:
    """Return what a node gives that moves constant integers about; None for every other."""
    if node.domain or node.op_type not in _MOVING or len(node.outputs) != 1 or not node.inputs:
        return None
    if node.outputs[0].is_graph_output():
        return None
    fed: dict[str, Array] = {}
    for value in node.inputs:
        tensor = constant(value)
        if value is None:
            continue
        if tensor is None or value.is_graph_input() or tensor.dtype not in _INTEGERS or tensor.size > _SHORT:
            return None
        fed[value.name or ""] = tensor.numpy()
    if node.op_type == "ConstantOfShape" and next(iter(fed.values())).prod() > _SHORT:
        return None
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for a in fed.values()]
    inputs = [onnx.helper.make_tensor_value_info(n, k, None) for n, k in zip(fed, kinds, strict=True)]
    proto = ir.serde.serialize_node(node)
    graph = onnx.helper.make_graph([proto], "g", inputs, [onnx.ValueInfoProto(name=proto.output[0])])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        (given,) = list(ReferenceEvaluator(made).run(None, {**fed}))
        array = np.asarray(given)
    except Exception:  # whatever it raises for an operator it lacks, or in a branch that never runs
        return None
    return array if array.dtype in (np.int64, np.int32) and array.size <= _SHORT else None
