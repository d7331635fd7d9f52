"""ShortenNames: what runs the same without it goes, and what only the graph reads is named briefly.

In a file of some ten kilobytes path-like names and attributes at their defaults are a quarter of all bytes.
The inputs and outputs of the outermost graph, what describes the model as a whole, and the bodies of
model-local functions stay as they are; a note on the graph goes where it names what has another name now.

References
----------
onnx/docs/IR.md: a name is visible in nested graphs, and node names and value_info are optional.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence, Set

import onnx
import onnx_ir as ir

from onnxdp.decisions import SELECTING

_PER_AXIS = {  # onnx/docs/Operators.md: "defaults to 1 (pads: 0) along start and end of each spatial axis"
    op: {"dilations": 1, "strides": 1, "pads": 0, "output_padding": 0}
    for op in ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool")
}
_EXPORTER = "pkg.torch."
"""Starts the keys under which PyTorch's exporter keeps its own names of everything, 22 kB for 60 weights."""
_QUANTISED = "quant_parameter_tensor_names"
"""Where onnx-ir keeps a quantization_annotation, which names tensors."""


class ShortenNames(ir.passes.InPlacePass):
    """Drop names of nodes, default attributes and notes; rename what lies inside, most read first.

    Names stay unique over the graph and all bodies of If, Loop and Scan, so that no scope hides another's.

    Parameters
    ----------
    value_info : set of (str, str)
        Scopes and names of the values whose type the file tells, as in :class:`onnxdp.model.Model`.
    kept : collection of str
        Names that values of the outermost graph keep.

    Attributes
    ----------
    value_info : frozenset of (str, str)
        After a call: what is left of them, under the new names. ONNX Runtime infers the others.
    saved : int
        After a call: about the bytes of file that it saved.
    """

    KEY = "saved by short names"
    """Of an entry in the model's ``meta``, which no file holds: the bytes that were saved, about."""

    def __init__(self, value_info: Set[tuple[str, str]] = frozenset(), kept: Collection[str] = ()) -> None:
        super().__init__()
        self.value_info = frozenset(value_info)
        self._kept = frozenset(kept)
        self.saved = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return whether anything was shortened."""
        told = [
            (graph, value)
            for scope, graph in scopes(model.graph)
            for value in _values(graph)
            if (scope, value.name or "") in self.value_info and _is_untold(value)
        ]
        self.saved = 24 * (len(self.value_info) - len(told))  # a type, and about two dimensions
        for graph in model.graphs():
            if graph is not model.graph:
                self.saved += _bare(graph)
            for node in graph:
                self.saved += _bare_node(node, model.opset_imports)
        self.saved += _rename(model, {value for _, value in told}, self._kept)
        scope_of = {graph: scope for scope, graph in scopes(model.graph)}
        self.value_info = frozenset((scope_of[graph], value.name or "") for graph, value in told)
        model.meta[self.KEY] = self.saved
        return ir.passes.PassResult(model, modified=self.saved > 0)


def scopes(graph: ir.Graph, scope: str = "") -> Iterator[tuple[str, ir.Graph]]:
    """Give the graph and all nested ones, with scopes as :func:`onnxdp.walk.value_infos` spells them."""
    yield scope, graph
    for node in graph:
        name = (node.outputs[0].name if node.outputs else node.name) or ""
        for attribute in node.attributes.values():
            for i, inner in enumerate(_bodies(attribute)):
                yield from scopes(inner, f"{scope}/{name}.{attribute.name}{i}")


def defaults(node: ir.Node, version: int) -> list[str]:
    """Name the attributes that say what holds without them, by the operator's schema of that opset."""
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return []
    per_axis: Mapping[str, int] = _PER_AXIS.get(node.op_type, {}) if not node.domain else {}
    padded = node.attributes.get_string("auto_pad", "NOTSET")
    if padded != "NOTSET" or "output_shape" in node.attributes:  # pads have another meaning there
        per_axis = {k: v for k, v in per_axis.items() if k in ("dilations", "strides")}
    found = []
    for name, attribute in node.attributes.items():
        known = schema.attributes.get(name)
        if known is None or known.required or attribute.is_ref():
            continue
        if known.default_value.name:
            told = _same(attribute, known.default_value)
        else:
            told = name in per_axis and set(attribute.as_ints()) <= {per_axis[name]}
        if told or (name == "kernel_shape" and list(attribute.as_ints()) == _kernel(node)):
            found.append(name)
    return found


def _kernel(node: ir.Node) -> list[int] | None:
    """Return the kernel that a Conv has by its weight's shape, where that is known."""
    weight = node.inputs[1] if node.op_type in ("Conv", "ConvTranspose") and not node.domain else None
    if weight is None or weight.shape is None:
        return None
    return [d for d in weight.shape[2:] if isinstance(d, int)]


def _same(attribute: ir.Attr, default: onnx.AttributeProto) -> bool:
    given, wanted = ir.serde.serialize_attribute(attribute), onnx.AttributeProto()
    wanted.CopyFrom(default)
    for proto in (given, wanted):
        proto.ClearField("doc_string")
    return bool(given == wanted)


def _bodies(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Give what a graph defines, in order; an initializer that can be fed comes once."""
    named = itertools.chain(
        graph.inputs, graph.initializers.values(), (v for node in graph for v in node.outputs)
    )
    yield from dict.fromkeys(named)


def _is_untold(value: ir.Value) -> bool:
    """Whether the value has the shape that its value_info tells, and no shape without it."""
    node = value.producer()
    return node is not None and (node.domain != "" or node.op_type in SELECTING)


def _bare(graph: ir.Graph) -> int:
    """Take the notes off a body; returns about the bytes that were saved."""
    saved = len(graph.doc_string or "") + _noted(graph.metadata_props) + len(graph.name or "") - 1
    graph.doc_string = None
    graph.metadata_props.clear()
    graph.name = "g"  # a graph must have one
    return saved


def _bare_node(node: ir.Node, opsets: Mapping[str, int]) -> int:
    """Take name, notes and defaults off a node; returns about the bytes that were saved."""
    notes = (node.name or "", node.doc_string or "")
    saved = sum(len(n.encode()) + 2 for n in notes if n) + _noted(node.metadata_props)
    node.name = None
    node.doc_string = None
    node.metadata_props.clear()
    for name in defaults(node, opsets.get(node.domain, 1)):
        saved += ir.serde.serialize_attribute(node.attributes.pop(name)).ByteSize() + 2
    return saved


def _noted(props: Mapping[str, str]) -> int:
    return sum(len(k) + len(v.encode()) + 6 for k, v in props.items())


def _rename(model: ir.Model, told: Set[ir.Value], kept: Set[str]) -> int:
    """Give all values inside the shortest names; returns about the bytes that were saved."""
    fixed = {*model.graph.inputs, *model.graph.outputs}
    if kept:
        fixed |= {v for v in _values(model.graph) if v.name in kept}
    taken = {value.name or "" for value in fixed}
    inside = [v for g in model.graphs() for v in _values(g) if v not in fixed and v.name]
    counts = {v: 1 + len(v.uses()) + (v in told) + 2 * v.is_graph_output() for v in inside}
    names = (n for n in _names() if n not in taken)
    chosen = dict(zip(sorted(inside, key=lambda v: -counts[v]), names, strict=False))
    old = {v: v.name or "" for v in inside}
    for i, value in enumerate(inside):  # at first to names that none has: initializers may not meet on one
        value.name = f" {i}"
    for value in inside:
        value.name = chosen[value]
        value.doc_string = None
        value.metadata_props.clear()
    new = {old[v]: name for v, name in chosen.items()}
    notes = model.graph.metadata_props.items()
    stale = [k for k, text in notes if k.startswith(_EXPORTER) or not new.keys().isdisjoint(_words(text))]
    gone = _noted({k: model.graph.metadata_props.pop(k) for k in stale})
    for value in (*inside, *fixed):
        if annotation := value.meta.get(_QUANTISED):
            value.meta[_QUANTISED] = {k: new.get(name, name) for k, name in annotation.items()}
    return gone + sum(counts[v] * (len(old[v].encode()) - len(chosen[v])) for v in inside)


def _words(text: str) -> list[str]:
    """Return what may be a name in a note, such as the signature that PyTorch's exporter leaves."""
    return re.findall(r"[\w.:/]+", text)


def _names() -> Iterator[str]:
    """Give all identifiers, short ones first."""
    for more in itertools.count():
        for first in string.ascii_letters:
            for rest in itertools.product(string.ascii_letters + string.digits, repeat=more):
                yield first + "".join(rest)
