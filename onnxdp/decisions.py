"""Outputs that say nothing of small changes, and the tensors that decide them, which do.

Numbers decide how many detections NonMaxSuppression leaves: one box more or less, and two such outputs cannot
be compared. Classes that ArgMax names stay what they are, or become quite others. Sequences and maps are no
tensors. What can be compared are the floats before the first operator that selects, decides or bundles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple, TypeAlias

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto

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
    """The tensors that are looked at in an output's place, where it turns out to say little or ``always``.

    ``inner`` are those that are no outputs.
    """

    tensors: tuple[str, ...]
    inner: tuple[str, ...]
    always: bool = False


Deciders: TypeAlias = Mapping[str, Instead]
"""By output."""


def deciders(graph: GraphProto) -> dict[str, Instead]:
    """Name what decides each output that is no float, or lies behind an operator that selects by value.

    What follows from sizes alone (NonZero of a ConstantOfShape counts up, in old exports) selects nothing.
    NonMaxSuppression sorts what it leaves: as many boxes may still be others, row by row.
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
    found = {}
    for output in graph.output:
        behind, sorted_ = {output.name}, False
        if output.name in loose:
            behind, sorted_ = _behind(output.name, loose, firm)
        elif output.name not in firm or output.type.tensor_type.elem_type in _UNASKED:
            continue
        roots = {root for name in behind for root in _roots(name, made, firm)}
        if roots - {output.name}:
            inner = roots - {o.name for o in graph.output}
            found[output.name] = Instead(tuple(sorted(roots)), tuple(sorted(inner)), sorted_)
    return found


def _selects(node: NodeProto, moved: Set[str]) -> bool:
    """Whether values that follow from the inputs decide how large an output is, or it is no tensor."""
    sized = not moved.isdisjoint(node.input[_FROM.get(node.op_type, len(node.input)) :])
    return sized or any(n.op_type in SELECTING | _BUNDLING for n in walk.deep([node]))


def _behind(output: str, loose: Mapping[str, NodeProto], firm: Set[str]) -> tuple[set[str], bool]:
    """Name the firm tensors that the nodes of loose ones read, on any way to an output.

    Says, too, whether one of these nodes sorts what it leaves.
    """
    found: set[str] = set()
    sorts = False
    waiting, seen = [output], {output}
    while waiting:
        node = loose[waiting.pop()]
        sorts = sorts or any(n.op_type == "NonMaxSuppression" for n in walk.deep([node]))
        reads = walk.reads(node)
        found |= reads & firm
        waiting += (reads & loose.keys()) - seen
        seen |= reads
    return found, sorts


def _roots(name: str, made: Mapping[str, NodeProto], firm: Set[str]) -> set[str]:
    """Name the tensors that decide a firm one, itself where no decision lies right before it."""
    found: set[str] = set()
    waiting, seen = [name], {name}
    while waiting:
        here = waiting.pop()
        if made[here].op_type in _DECIDING | _CARRYING:
            reads = walk.reads(made[here]) & firm
            waiting += reads - seen
            seen |= reads
        else:
            found.add(here)
    return found


def all_of(found: Deciders) -> list[str]:
    """Name every tensor that decides an output and is none, once."""
    return list(dict.fromkeys(name for instead in found.values() for name in instead.inner))


def few(found: Deciders, answer: Mapping[str, Array], feeds: int) -> Deciders:
    """Return those that are there, and small enough to be kept for so many feeds, by one feed's answer."""
    there = {o: i for o, i in found.items() if answer.keys() >= set(i.tensors)}
    return {o: i for o, i in there.items() if feeds * sum(answer[n].nbytes for n in i.tensors) <= MOST}


def replaced(
    name: str, found: Deciders, answers: Sequence[Mapping[str, Array]], *, unlike: bool = False
) -> tuple[str, ...]:
    """Name what to look at: the output, or in its place the floats that decide it, if there are any.

    ``unlike`` says that another network gave another shape.
    """
    if name not in found or not (found[name].always or unlike or _says_little(name, answers)):
        return (name,)
    tensors = found[name].tensors
    floats = [n for n in tensors if all(n in a and is_floating(a[n]) and a[n].size for a in answers)]
    return tuple(floats) or (name,)


def is_floating(output: object) -> bool:
    """Whether what a session gave is an array of floats: no integers, texts, sequences or maps."""
    return isinstance(output, np.ndarray) and output.dtype.kind == "f"


def _says_little(name: str, answers: Sequence[Mapping[str, Array]]) -> bool:
    """Whether an output is no array of floats, or of another shape from feed to feed, or empty."""
    if not all(is_floating(a[name]) for a in answers):
        return True
    shapes = {a[name].shape for a in answers}
    return len(shapes) > 1 or any(0 in shape for shape in shapes)
