"""Going through models: all graphs, nodes and tensors of an ``onnx_ir.Model`` or of a message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import onnx_ir as ir
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    shape_inference,
)


def deep(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Give all nodes, those of subgraphs included."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from deep(attribute.g.node)
            for graph in attribute.graphs:
                yield from deep(graph.node)


def reads(node: NodeProto) -> set[str]:
    """Names that a node reads, and that its subgraphs take from outside (over-counted, harmlessly)."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names.update(o.name for o in graph.output)
            for inner in graph.node:
                names |= reads(inner)
    return names


STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""


def opset(holder: ModelProto | FunctionProto) -> int:
    """Return the version of ONNX's own operators that a model or a function imports."""
    return max((o.version for o in holder.opset_import if o.domain in STANDARD), default=1)


def constant(node: NodeProto) -> TensorProto | None:
    """Return the tensor that a Constant node gives, None for every other node."""
    held = node.attribute[0] if node.op_type == "Constant" and node.attribute else None
    return held.t if held is not None and held.HasField("t") else None


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Give all graphs: the main one, function bodies, and what is nested in them."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def each_tensor(model: ir.Model, change: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Put ``change(tensor)`` in the place of every initializer and of every tensor in an attribute."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = change(value.const_value)
        for node in graph:
            for name, attr in list(node.attributes.items()):
                if attr.is_ref() or attr.type not in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
                    continue
                one = attr.type == ir.AttributeType.TENSOR
                old = (attr.value,) if one else tuple(attr.value)
                new = tuple(change(t) for t in old)
                if any(a is not b for a, b in zip(old, new, strict=True)):
                    node.attributes[name] = ir.Attr(
                        name, attr.type, new[0] if one else new, doc_string=attr.doc_string
                    )


def tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """Give every tensor, those in attributes included."""
    found: list[ir.TensorProtocol] = []

    def note(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        found.append(tensor)
        return tensor

    each_tensor(model, note)
    return found


def initializers(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Give the tensors of all initializers."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


TYPE = "type"
"""Key in the meta of an output whose type, serialized, onnx-ir does not know."""


def holds_map(kind: TypeProto) -> bool:
    """Whether values of this type are maps, or sequences of them: scikit-learn's probabilities."""
    if kind.HasField("sequence_type"):
        return holds_map(kind.sequence_type.elem_type)
    return bool(kind.HasField("map_type"))


def types(model: ModelProto) -> dict[str, int]:
    """Infer the element types of the tensors of the outermost graph, as far as ONNX knows; nothing is run."""
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = "g"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    fed = {v.name for v in graph.input}
    graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, None)
        for t in model.graph.initializer
        if t.name not in fed
    )
    graph.output.extend(ValueInfoProto(name=o.name) for o in model.graph.output)
    try:
        found = shape_inference.infer_shapes(light).graph
    except (shape_inference.InferenceError, RuntimeError, ValueError):  # what it cannot take
        return {}
    known = ((v.name, v.type.tensor_type.elem_type) for v in (*found.input, *found.value_info, *found.output))
    return {name: kind for name, kind in known if kind}


TOLD = "told"
"""Key in the meta of values of the outermost graph whose type and shape the file has to say."""


def told(model: ir.Model) -> set[tuple[str, str]]:
    """Give scope and name of the values that are marked so, as :func:`value_infos` spells them."""
    return {("", v.name or "") for node in model.graph for v in node.outputs if TOLD in v.meta}


def value_infos(proto: ModelProto) -> Iterator[tuple[str, Any]]:
    """Give the value_info lists of all graphs and functions, each with a name of its scope."""
    yield "", proto.graph.value_info
    yield from _nested(proto.graph.node, "")
    for function in proto.functions:
        scope = f"{function.domain}:{function.name}:{function.overload}"
        yield scope, function.value_info
        yield from _nested(function.node, scope)


def _nested(nodes: Iterable[NodeProto], scope: str) -> Iterator[tuple[str, Any]]:
    for node in nodes:
        for attribute in node.attribute:
            one = attribute.type == AttributeProto.GRAPH
            for i, graph in enumerate((attribute.g,) if one else attribute.graphs):
                inner = f"{scope}/{node.output[0] if node.output else node.name}.{attribute.name}{i}"
                yield inner, graph.value_info
                yield from _nested(graph.node, inner)


def keep_value_infos(proto: ModelProto, names: Set[tuple[str, str]]) -> None:
    """Take off every value_info but those of ``names``: pairs of a scope and a name."""
    for scope, infos in value_infos(proto):
        kept = [v for v in infos if (scope, v.name) in names]
        del infos[:]
        infos.extend(kept)


def drop_initializer_infos(proto: ModelProto) -> None:
    """Take off the value_info that onnx-ir adds for every initializer when it serializes."""
    for graph in (proto.graph, *subgraphs(top_nodes(proto))):
        weights = {t.name for t in graph.initializer}
        kept = [v for v in graph.value_info if v.name not in weights]
        del graph.value_info[:]
        graph.value_info.extend(kept)


def tensor_protos(proto: ModelProto) -> Iterator[TensorProto]:
    """Give every TensorProto of a message."""
    yield from proto.graph.initializer
    for node in deep(top_nodes(proto)):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
    for graph in subgraphs(top_nodes(proto)):
        yield from graph.initializer


def top_nodes(proto: ModelProto) -> Iterator[NodeProto]:
    """Give the nodes of the main graph and of all functions, without what is nested in them."""
    yield from proto.graph.node
    for function in proto.functions:
        yield from function.node


def subgraphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Give all graphs nested in the attributes of nodes."""
    for node in deep(nodes):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs
