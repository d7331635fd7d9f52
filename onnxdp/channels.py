"""Find the channels that can be taken out of a network: who makes, passes on and reads them.

A chain starts at a weight whose outputs can go, runs through operators that treat every channel by itself,
and ends at weights whose inputs can go. Whatever is not understood on the way (a residual join, a graph
output, a constant that may not be touched) leaves the whole chain as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_ir as ir

from onnxdp.records import Array, Weight
from onnxdp.weights import Found, constant

Shapes = Mapping[str, tuple[int | None, ...]]
"""Shape of every tensor that inference knows, by name; None where a dimension is free."""

_ALONE = frozenset(
    (
        "Abs",
        "Celu",
        "Clip",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Mish",
        "Neg",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    )
)
"""Operators that change every number by itself; further inputs hold one number for all."""
_BESIDE = frozenset(
    (
        "Add",
        "Div",
        "Max",
        "Min",
        "Mul",
        "PRelu",
        "Sub",
    )
)
"""Operators between two tensors: the chain's own, or a constant."""
_POOLS = frozenset(
    (
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "LpPool",
        "MaxPool",
    )
)
_REDUCTIONS = frozenset(
    (
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
    )
)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a chain's channels lie in a tensor: ``repeat`` entries each, along ``axis``."""

    axis: int
    rank: int
    offset: int
    repeat: int
    total: int

    def places(self, channels: Sequence[int]) -> Array:
        """Return the entries of some channels, (channels, repeat)."""
        return np.asarray(
            self.offset + self.repeat * np.asarray(channels, int)[:, None] + np.arange(self.repeat)
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A constant that loses entries along an axis with the channels: an input of a node."""

    node: ir.Node
    index: int
    axis: int
    span: Span


@dataclass(frozen=True, slots=True)
class End:
    """A weight that reads a chain: its inputs go, and the others can make up for them."""

    weight: str
    span: Span


@dataclass(slots=True)
class Chain:
    """The channels that one weight makes, and all that goes with them.

    Attributes
    ----------
    weight : str
        Name of the weight that makes them.
    channels : int
    cuts : list of Cut
        Producer, consumers and all between.
    ends : list of End
    groups : list of ir.Node
        Depthwise convolutions on the way, whose ``group`` shrinks.
    sizes : list of (ir.Node, int, Span)
        Shapes of Reshape that name the size of the channels' axis at a place.
    spans : dict of ir.Value to Span
        The tensors that shrink.
    """

    weight: str
    channels: int
    cuts: list[Cut] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    groups: list[ir.Node] = field(default_factory=list)
    sizes: list[tuple[ir.Node, int, Span]] = field(default_factory=list)
    spans: dict[ir.Value | None, Span] = field(default_factory=dict)


def shapes_of(proto: onnx.ModelProto) -> Shapes:
    """Infer the shapes of a network's tensors; its weights may be inputs."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # whatever onnx raises for an operator that it has no rule for: nothing is known
        graph = proto.graph
    found: dict[str, tuple[int | None, ...]] = {}
    for info in (*graph.value_info, *graph.input, *graph.output):
        kind = info.type.tensor_type
        if info.type.HasField("tensor_type") and kind.HasField("shape"):
            found[info.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return found


def chains(found: Found, shapes: Shapes) -> tuple[Chain, ...]:
    """Return the chains of a network whose channels may go, in the order of the weights that make them.

    Parameters
    ----------
    found : Found
        Those of ``found.weights`` may change; of what else is a weight nothing may.
    shapes : mapping
        See :func:`shapes_of`.
    """
    order = {node: i for i, node in enumerate(found.graph)}
    every = (_Walk(found, shapes, order, weight).chain() for weight in found.weights)
    return tuple(chain for chain in every if chain is not None)


def source(value: ir.Value | None) -> ir.Value | None:
    """Return the constant behind a value, Identity looked through; None where there is none."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = node.inputs[0]
    return value if value is not None and constant(value) is not None else None


class _UntouchableError(Exception):
    """Something on the way is not understood, or may not change."""


def _must(condition: object) -> None:
    if not condition:
        raise _UntouchableError


class _Walk:
    """One weight's outputs, followed through the graph."""

    def __init__(self, found: Found, shapes: Shapes, order: Mapping[ir.Node, int], weight: Weight) -> None:
        self._found = found
        self._shapes = shapes
        self._order = order
        self._weight = weight
        self._mine = {id(found.values[w.name]): w for w in found.weights}
        self._foreign = {id(v) for v in found.values.values()} - set(self._mine)
        self._queue: list[tuple[int, ir.Node]] = []
        self._chain = Chain(weight.name, weight.outputs)
        self._spans: dict[ir.Value | None, Span] = self._chain.spans

    def chain(self) -> Chain | None:
        """Return the chain of the weight's outputs; None where they cannot go."""
        try:
            self._start()
            seen: set[ir.Node] = set()
            while self._queue:
                _, node = heapq.heappop(self._queue)
                if node not in seen:
                    seen.add(node)
                    self._step(node)
        except _UntouchableError:
            return None
        return self._chain if self._chain.ends and self._chain.channels > 1 else None

    def _start(self) -> None:
        node = self._only_reader(self._weight)
        rank = self._rank(node)
        axis = rank - 1 if node.op_type == "MatMul" else 1
        span = Span(axis, rank, 0, 1, self._weight.outputs)
        self._cut(node, 1, 0 if self._weight.transposed else 1, span)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self._cut_beside(node, 2, span)
        self._passes(node, span)

    def _only_reader(self, weight: Weight) -> ir.Node:
        """Return the node that alone multiplies by a weight, from the right and not in groups."""
        readers = self._found.readers[weight.name]
        _must(weight.op in ("Conv", "Gemm", "MatMul") and weight.groups == 1 and len(readers) == 1)
        reader, value = readers[0], self._found.values[weight.name]
        _must(reader.direct and reader.index == 1 and reader.node.graph is self._found.graph)
        _must(len(list(value.uses())) == 1 and not value.is_graph_input() and not value.is_graph_output())
        return reader.node

    def _rank(self, node: ir.Node) -> int:
        if node.op_type == "Conv":
            return len(self._weight.shape)
        if node.op_type == "Gemm":
            return 2
        return len(self._shape(node.outputs[0]))

    def _shape(self, value: ir.Value | None) -> tuple[int | None, ...]:
        shape = self._shapes.get(value.name or "") if value is not None else None
        _must(shape is not None)
        assert shape is not None
        return shape

    def _passes(self, node: ir.Node, span: Span) -> None:
        """Note where the channels lie in what a node gives, and who reads that."""
        value, *others = node.outputs
        _must(not value.is_graph_output())
        _must(not any(o.uses() or o.is_graph_output() for o in others))
        self._spans[value] = span
        for reader, _ in value.uses():
            _must(reader in self._order)  # not in a body
            heapq.heappush(self._queue, (self._order[reader], reader))

    def _step(self, node: ir.Node) -> None:
        _must(not node.domain)
        op = node.op_type
        held = [i for i, v in enumerate(node.inputs) if v in self._spans]
        span = self._spans[node.inputs[held[0]]]
        if op in _BESIDE:
            self._beside(node, held)
        elif op in _RULES:
            _must(held == [0])
            _RULES[op](self, node, span)
        elif op == "Concat":
            self._concat(node, held, span)
        elif op in _ALONE:
            _must(held == [0] and all(v is None or self._is_one_number(v) for v in node.inputs[1:]))
            self._passes(node, span)
        elif op in _POOLS:
            _must(span.axis == 1 and span.rank > 2)
            self._passes(node, span)
        else:
            _must(op in _REDUCTIONS)
            self._reduced(node, span)

    def _is_one_number(self, value: ir.Value) -> bool:
        held = constant(source(value))
        return held is not None and held.size <= 1

    def _beside(self, node: ir.Node, held: Sequence[int]) -> None:
        first = self._spans[node.inputs[held[0]]]
        _must(all(self._spans[node.inputs[i]] == first for i in held))
        for index in set(range(len(node.inputs))) - set(held):
            self._cut_beside(node, index, first)
        self._passes(node, first)

    def _cut_beside(self, node: ir.Node, index: int, span: Span) -> None:
        """Cut a constant that is broadcast against the channels' tensor."""
        held = constant(source(node.inputs[index]))
        _must(held is not None)
        assert held is not None
        shape = tuple(int(d) for d in held.shape.numpy())
        if node.op_type == "Conv":  # a bias is not broadcast
            shape, span = (*shape, 1), replace(span, rank=3, axis=1)
            _must(shape[0] == span.total)
        back = span.rank - span.axis
        _must(len(shape) <= max(span.rank, 1))
        if len(shape) < back or shape[-back] == 1:
            return
        _must(shape[-back] == span.total)
        self._cut(node, index, len(shape) - back, span)

    def _cut(self, node: ir.Node, index: int, axis: int, span: Span) -> None:
        value = node.inputs[index]
        held = source(value)
        _must(held is not None and not held.is_graph_input() and not held.is_graph_output())
        _must(id(held) not in self._foreign)
        alone = held is value and len(list(value.uses() if value else ())) == 1
        _must(alone or id(held) not in self._mine)
        self._chain.cuts.append(Cut(node, index, axis, span))

    def _conv(self, node: ir.Node, span: Span) -> None:
        _must(span.axis == 1 and span.rank > 2)
        held = constant(node.inputs[1])
        _must(held is not None)
        assert held is not None
        groups = node.attributes.get_int("group", 1)
        if groups == 1:
            self._end(node, 1, span)
            return
        shape = held.shape.numpy()
        _must(groups == span.total == shape[0] and shape[1] == 1 and span.repeat == 1)
        self._cut(node, 1, 0, span)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self._cut_beside(node, 2, span)
        self._chain.groups.append(node)
        self._passes(node, span)

    def _gemm(self, node: ir.Node, span: Span) -> None:
        _must(span.axis == 1 and span.rank == 2 and not node.attributes.get_int("transA", 0))
        self._end(node, node.attributes.get_int("transB", 0), span)

    def _matmul(self, node: ir.Node, span: Span) -> None:
        _must(span.axis == span.rank - 1)
        self._end(node, 0, span)

    def _end(self, node: ir.Node, axis: int, span: Span) -> None:
        weight = self._mine.get(id(node.inputs[1]))
        _must(weight is not None)
        assert weight is not None
        _must(self._only_reader(weight) is node and weight.channels == span.total)
        _must(weight.shape[axis] == span.total)
        self._cut(node, 1, axis, span)
        self._chain.ends.append(End(weight.name, span))

    def _normalised(self, node: ir.Node, span: Span) -> None:
        _must(span.axis == 1 and not node.attributes.get_int("training_mode", 0))
        for index in range(1, 5):
            held = constant(source(node.inputs[index]))
            _must(held is not None and held.size == span.total)
            self._cut(node, index, 0, span)
        self._passes(node, span)

    def _concat(self, node: ir.Node, held: Sequence[int], span: Span) -> None:
        axis = node.attributes["axis"].as_int()
        _must(len(held) == 1 and axis % span.rank == span.axis)
        parts = [self._shape(v)[span.axis] for v in node.inputs]
        _must(all(parts) and parts[held[0]] == span.total)
        before, total = (sum(p or 0 for p in some) for some in (parts[: held[0]], parts))
        self._passes(node, replace(span, offset=before + span.offset, total=total))

    def _padded(self, node: ir.Node, span: Span) -> None:
        pads = node.attributes.get_ints("pads")
        if pads is None:
            tensor = constant(source(node.inputs[1])) if len(node.inputs) > 1 else None
            _must(tensor is not None and (len(node.inputs) < 4 or node.inputs[3] is None))
            assert tensor is not None
            pads = [int(p) for p in tensor.numpy()]
        _must(len(pads) == 2 * span.rank and not pads[span.axis] and not pads[span.axis + span.rank])
        self._passes(node, span)

    def _axes(self, node: ir.Node, rank: int) -> list[int]:
        axes = node.attributes.get_ints("axes")
        if axes is None:
            tensor = constant(source(node.inputs[1])) if len(node.inputs) > 1 else None
            _must(tensor is not None)
            assert tensor is not None
            axes = [int(a) for a in np.atleast_1d(tensor.numpy())]
        return [a % rank for a in axes]

    def _reduced(self, node: ir.Node, span: Span) -> None:
        axes = self._axes(node, span.rank)
        _must(axes and min(axes) > span.axis == 1)
        kept = node.attributes.get_int("keepdims", 1)
        self._passes(node, span if kept else replace(span, rank=span.rank - len(axes)))

    def _squeezed(self, node: ir.Node, span: Span) -> None:
        axes = self._axes(node, span.rank)
        _must(axes and min(axes) > span.axis == 1)
        self._passes(node, replace(span, rank=span.rank - len(axes)))

    def _flattened(self, node: ir.Node, span: Span) -> None:
        _must(node.attributes.get_int("axis", 1) % span.rank == span.axis == 1)
        self._passes(node, self._flat(node, span))

    def _flat(self, node: ir.Node, span: Span) -> Span:
        """Return the channels' span once all axes behind theirs are one with it."""
        shape = self._shape(node.inputs[0])
        _must(len(shape) == span.rank and all(shape[2:]))
        each = int(np.prod([d or 0 for d in shape[2:]], dtype=np.int64))
        return Span(1, 2, span.offset * each, span.repeat * each, span.total * each)

    def _reshaped(self, node: ir.Node, span: Span) -> None:
        """Understand (samples, channels, ...) -> (samples, channels * ...), whatever way that is written."""
        _must(span.axis == 1)
        flat = self._flat(node, span)
        made, batch = self._shape(node.outputs[0]), self._shape(node.inputs[0])[0]
        _must(len(made) == 2)
        target = constant(source(node.inputs[1]))
        if target is None:  # worked out from the input's own shape: only with the size known to be free
            _must(_frees_last(node.inputs[1]) and made[1] in (None, flat.total))
        else:
            rows, wide = (int(d) for d in target.numpy())
            _must(rows == -1 or rows == batch or (rows == 0 and not node.attributes.get_int("allowzero", 0)))
            _must(wide in (-1, flat.total) and (rows, wide) != (-1, -1))
            if wide != -1:
                self._chain.sizes.append((node, 1, flat))
        self._passes(node, flat)


def _frees_last(shape: ir.Value | None) -> bool:
    """Whether a shape is a Concat that ends in a constant -1."""
    node = None if shape is None else shape.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return False
    last = constant(source(node.inputs[1]))
    return last is not None and [int(d) for d in np.atleast_1d(last.numpy())] == [-1]


_RULES: dict[str, Callable[[_Walk, ir.Node, Span], None]] = {
    "Conv": _Walk._conv,
    "Gemm": _Walk._gemm,
    "MatMul": _Walk._matmul,
    "BatchNormalization": _Walk._normalised,
    "Pad": _Walk._padded,
    "Squeeze": _Walk._squeezed,
    "Flatten": _Walk._flattened,
    "Reshape": _Walk._reshaped,
}
