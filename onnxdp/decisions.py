"""Outputs of which the numbers decide how many there are: detections that NonMaxSuppression leaves, say.

One box more or less, and two such outputs cannot be compared. What decides them can: the tensors before the
first operator that selects by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TypeAlias

from onnx import GraphProto, NodeProto

from onnxdp import walk
from onnxdp.records import Array

SELECTING = frozenset(("Compress", "NonMaxSuppression", "NonZero", "Unique"))
"""Operators whose output has the shape that their inputs' values give."""

_FROM = {"ConstantOfShape": 0, "Range": 0} | dict.fromkeys(
    ("Expand", "Pad", "Reshape", "Resize", "Slice", "Tile", "TopK"), 1
)
"""Operators of which the values of some inputs give the output's shape: those from this one on."""

Deciders: TypeAlias = Mapping[str, tuple[str, ...]]
"""Output -> the tensors that are looked at in its place where its shape turns out to vary."""


def deciders(graph: GraphProto) -> dict[str, tuple[str, ...]]:
    """Name what decides each output that lies behind an operator that selects by value; none for the others.

    What follows from sizes alone (NonZero of a ConstantOfShape counts up, in old exports) selects nothing.
    """
    moved = {v.name for v in graph.input} - {t.name for t in graph.initializer}  # follow from the inputs
    made: dict[str, NodeProto] = {}
    loose: dict[str, NodeProto] = {}  # of a shape that values decide, by the node that makes it
    for node in graph.node:
        names = {name: node for name in node.output if name}
        reads = walk.reads(node)
        made |= names
        if node.op_type in ("Shape", "Size") or not reads & moved:
            continue
        moved |= names.keys()
        if reads & loose.keys() or _selects(node, moved):
            loose |= names
    firm = moved & (made.keys() - loose.keys())
    found = {o.name: _behind(o.name, loose, firm) for o in graph.output if o.name in loose}
    return {name: tensors for name, tensors in found.items() if tensors}


def _selects(node: NodeProto, moved: Set[str]) -> bool:
    """Whether values that follow from the inputs decide how large an output of the node is."""
    sized = not moved.isdisjoint(node.input[_FROM.get(node.op_type, len(node.input)) :])
    return sized or any(n.op_type in SELECTING for n in walk.deep([node]))


def _behind(output: str, loose: Mapping[str, NodeProto], firm: Set[str]) -> tuple[str, ...]:
    """Name the firm tensors that the nodes of loose ones read, on any way to an output."""
    names: dict[str, None] = {}
    waiting, seen = [output], {output}
    while waiting:
        reads = walk.reads(loose[waiting.pop()])
        names |= dict.fromkeys(sorted(reads & firm))
        new = (reads & loose.keys()) - seen
        waiting += sorted(new)
        seen |= new
    return tuple(names)


def all_of(found: Deciders) -> list[str]:
    """Name every tensor that decides an output, once."""
    return list(dict.fromkeys(name for names in found.values() for name in names))


def replaced(
    name: str, found: Deciders, answers: Sequence[Mapping[str, Array]], *, unlike: bool = False
) -> tuple[str, ...]:
    """Name what to look at: the output, or in its place the floats that decide it, if there are any.

    ``unlike`` says that another network gave another shape.
    """
    if name not in found or not (unlike or _varies(name, answers)):
        return (name,)
    floats = [n for n in found[name] if all(n in a and a[n].dtype.kind == "f" and a[n].size for a in answers)]
    return tuple(floats) or (name,)


def _varies(name: str, answers: Sequence[Mapping[str, Array]]) -> bool:
    """Whether an output is of another shape from feed to feed, or of none at all."""
    shapes = {getattr(a[name], "shape", ()) for a in answers}  # a sequence has none
    return len(shapes) > 1 or any(0 in shape for shape in shapes)
