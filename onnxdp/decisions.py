"""Outputs that say nothing of small changes, and the tensors that decide them, which do.

Numbers decide how many detections NonMaxSuppression leaves: one box more or less, and two such outputs cannot
be compared. Classes that ArgMax names stay what they are, or become quite others. Sequences and maps are no
tensors. What can be compared are the floats before the first operator that selects, decides or bundles.

What comes after a selection can be compared where both networks select the same: in a copy that is only
measured the original's selection is fed to the other network, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxdp import walk
from onnxdp.records import Array

SELECTING = frozenset(("Compress", "NonMaxSuppression", "NonZero", "Unique"))
"""Operators whose output has the shape that their inputs' values give."""

_FROM = {"ConstantOfShape": 0, "Range": 0} | dict.fromkeys(
    ("Expand", "Pad", "Reshape", "Resize", "Slice", "Tile", "TopK"), 1
)
"""Operators of which the values of some inputs give the output's shape: those from this one on."""

_BUNDLING = frozenset(("Optional", "SequenceConstruct", "SequenceInsert", "SplitToSequence", "ZipMap"))
"""Operators that make of tensors what is none: sequences, and scikit-learn's maps of probabilities."""

_DECIDING = frozenset(
    (
        *("ArgMax", "ArgMin", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "LabelEncoder", "Less"),
        *("LessOrEqual", "QuantizeLinear", "Round", "Sign", "TopK"),
    )
)
"""Operators whose output does not follow small changes of what they read."""

_CARRYING = frozenset(
    (
        *("And", "ArrayFeatureExtractor", "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Not"),
        *("Or", "Reshape", "Slice", "Softmax", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
        "Xor",
    )
)
"""Operators that are looked through on the way to what decides: they move values, or keep their order."""

_UNASKED = frozenset(
    TensorProto.DataType.Value(t) for t in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "UNDEFINED")
)
"""Types of outputs that say something of small changes, and of those that are no tensors."""

MOST = 256_000_000
"""Bytes of what decides an output, for all feeds, up to which it is looked at: maps of classes are large."""


class Instead(NamedTuple):
    """The tensors that are looked at in an output's place, where it turns out to say little.

    ``inner`` are those that are no outputs; ``behind`` says that the output lies behind what is held, and so
    says as much as they do of all that comes after.
    """

    tensors: tuple[str, ...]
    inner: tuple[str, ...]
    behind: bool = False


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a network decides by its numbers.

    Attributes
    ----------
    outputs : mapping of str to Instead
        What decides the outputs that may say little.
    held : tuple of str
        Selections of the outermost graph. Fed to another form of the network, they keep rows comparable.
    shown : set of str
        Those of them that are outputs.
    """

    outputs: Mapping[str, Instead] = field(default_factory=lambda: MappingProxyType({}))
    held: tuple[str, ...] = ()
    shown: Set[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Every tensor to be given beside the outputs, once."""
        inner = (name for instead in self.outputs.values() for name in instead.inner)
        return list(dict.fromkeys((*inner, *(n for n in self.held if n not in self.shown))))


def decisions(model: ModelProto) -> Decisions:
    """Find what decides each output that is no float, or lies behind an operator that selects by value.

    What follows from sizes alone (NonZero of a ConstantOfShape counts up, in old exports) selects nothing.
    """
    graph = model.graph
    reads = [walk.reads(node) for node in graph.node]
    moved = {v.name for v in graph.input} - {t.name for t in graph.initializer}  # follow from the inputs
    made: dict[str, int] = {}
    loose: set[str] = set()  # of a shape that values decide
    for i, node in enumerate(graph.node):
        names = dict.fromkeys((name for name in node.output if name), i)
        made |= names
        if node.op_type in ("Shape", "Size") or not reads[i] & moved:
            continue
        moved |= names.keys()
        if reads[i] & loose or _selects(node, moved):
            loose |= names.keys()
    asked = [
        o.name
        for o in graph.output
        if o.name in loose or (o.name in moved & made.keys() and o.type.tensor_type.elem_type not in _UNASKED)
    ]
    if not asked:
        return Decisions()
    firm = moved & made.keys() - loose
    way = _Way(graph.node, reads, made, firm, loose, walk.types(model), walk.opset(model))
    own = {o.name for o in graph.output}
    found, held = {}, way.held()
    for name in asked:
        roots = way.roots(way.behind(name) if name in loose else {name})
        if roots - {name}:
            behind = name in loose and bool(held)
            found[name] = Instead(tuple(sorted(roots)), tuple(sorted(roots - own)), behind)
    return Decisions(found, held, own.intersection(held))


@dataclass(frozen=True, slots=True)
class _Way:
    """The nodes of a graph, gone back along: what each reads, and which makes a tensor."""

    nodes: Sequence[NodeProto]
    reads: Sequence[Set[str]]
    made: Mapping[str, int]
    firm: Set[str]
    """Tensors that follow from the inputs, of a shape that no value decides."""
    loose: Set[str]
    types: Mapping[str, int]
    opset: int
    """GatherElements, which tells a TopK its rows, is of 11."""

    def _back(
        self, names: Iterable[str], among: Set[str], through: Callable[[str], bool] = lambda name: True
    ) -> Iterator[str]:
        """Give tensors, and those ``among`` which the way back leads as far as it goes ``through`` them."""
        waiting = list(names)
        seen = set(waiting)
        while waiting:
            here = waiting.pop()
            yield here
            more = (self.reads[self.made[here]] & among) - seen if through(here) else set()
            seen |= more
            waiting += more

    def _follows(self, name: str) -> bool:
        """Whether a tensor is looked through: it decides by what its node reads, or only passes that on."""
        whole = self.types.get(name, TensorProto.FLOAT) not in _UNASKED
        return whole or self.nodes[self.made[name]].op_type in _DECIDING | _CARRYING

    def behind(self, output: str) -> set[str]:
        """Name the firm tensors that the nodes of loose ones read, on any way to an output."""
        return {n for o in self._back({output}, self.loose) for n in self.reads[self.made[o]] & self.firm}

    def roots(self, names: Set[str]) -> set[str]:
        """Name the tensors that decide firm ones: themselves where no decision lies right before them."""
        return {n for n in self._back(names, self.firm, self._follows) if not self._follows(n)}

    def held(self) -> tuple[str, ...]:
        """Name what selects by numbers that weights have a part in, and sorts what is selected from."""
        before = {n for name in self.loose for n in self.reads[self.made[name]] & self.firm}
        first = {self.made[n] for n in self._back(before, self.firm)}  # nodes before any selection
        told: list[str] = []
        worked_out: set[str] = set()  # tensors that have roots
        for i, node in enumerate(self.nodes):
            by_numbers = not self.reads[i].isdisjoint(worked_out)
            worked_out |= {n for n in node.output if n in self.loose}
            worked_out |= {n for n in node.output if n in self.firm and (by_numbers or not self._follows(n))}
            if by_numbers:
                told += (n for n in self._told(node, sorts=i in first) if n in self.firm or n in self.loose)
        return tuple(dict.fromkeys(told))

    def _told(self, node: NodeProto, *, sorts: bool) -> Sequence[str]:
        """Name the tensors by which a node selects, or tells others what to."""
        if node.domain:
            return ()
        if node.op_type in ("NonMaxSuppression", "NonZero"):
            return tuple(node.output)
        if node.op_type == "Compress":
            return tuple(node.input[1:])
        if node.op_type == "TopK" and sorts and self.opset >= 11:
            return tuple(node.output[1:])
        inner = (n.op_type for n in walk.deep([node]) if n is not node)
        whole = (n for n in node.output if self.types.get(n) == TensorProto.INT64)
        return tuple(whole) if not SELECTING.isdisjoint(inner) else ()


def _selects(node: NodeProto, moved: Set[str]) -> bool:
    """Whether values that follow from the inputs decide how large an output is, or it is no tensor."""
    sized = not moved.isdisjoint(node.input[_FROM.get(node.op_type, len(node.input)) :])
    return sized or any(n.op_type in SELECTING | _BUNDLING for n in walk.deep([node]))


def given(name: str) -> str:
    """Name the input by which a selection is told."""
    return f"{name}/held"


def hold(model: ModelProto, names: Iterable[str]) -> None:
    """Let all that reads these selections read inputs of their own; the network still makes its own."""
    graph, wanted = model.graph, set(names)
    made = {name: node for node in graph.node for name in node.output if name in wanted}
    if not made:
        return
    renamed = {name: given(name) for name in made}
    nodes: list[NodeProto] = []
    for node in graph.node:
        for inner in walk.deep([node]):
            inner.input[:] = [renamed.get(name, name) for name in inner.input]
        nodes.append(node)
        if node.op_type != "TopK" or node.output[1] not in made:
            continue
        values, axis = node.output[0], next((a.i for a in node.attribute if a.name == "axis"), -1)
        rows = [node.input[0], given(node.output[1])]  # its values are those of the rows that are told
        nodes.append(helper.make_node("GatherElements", rows, [given(values)], axis=axis))
        renamed[values] = given(values)
    del graph.node[:]
    graph.node.extend(nodes)
    conditions = {n for node in walk.deep(nodes) if node.op_type == "Compress" for n in node.input[1:]}
    for name in map(given, made):
        kind = TensorProto.BOOL if name in conditions else TensorProto.INT64
        graph.input.append(helper.make_tensor_value_info(name, kind, None))


def few(found: Decisions, answer: Mapping[str, Array], feeds: int) -> Decisions:
    """Return those that are there, and small enough to be kept for so many feeds, by one feed's answer."""
    there = {o: i for o, i in found.outputs.items() if answer.keys() >= set(i.tensors)}
    kept = {o: i for o, i in there.items() if feeds * sum(answer[n].nbytes for n in i.tensors) <= MOST}
    return replace(found, outputs=kept)


def replaced(
    name: str, found: Decisions, answers: Sequence[Mapping[str, Array]], *, unlike: bool = False
) -> tuple[str, ...]:
    """Name what to look at: the output, or in its place the floats that decide it, if there are any.

    ``unlike`` says that another network gave another shape.
    """
    instead = found.outputs.get(name)
    if instead is None:
        return (name,)
    floating = all(is_floating(a[name]) for a in answers)
    alike = floating and not unlike and len({a[name].shape for a in answers}) == 1
    if alike and not instead.behind and all(a[name].size for a in answers):
        return (name,)
    whole = [n for n in instead.tensors if all(n in a and is_floating(a[n]) for a in answers)]
    floats = [n for n in whole if all(a[n].size for a in answers)]
    own = len(whole) < len(instead.tensors) or (instead.behind and floating and not unlike)
    return tuple(dict.fromkeys((*((name,) if own else ()), *floats))) or (name,)


def is_floating(output: object) -> bool:
    """Whether what a session gave is an array of floats: no integers, texts, sequences or maps."""
    return isinstance(output, np.ndarray) and output.dtype.kind == "f"
