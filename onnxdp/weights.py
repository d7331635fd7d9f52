"""Find the weights of a graph, and see each as the matrix its readers multiply by.

A weight is a floating-point constant (initializer or Constant node, in the graph or in an If/Loop body) whose
readers, looked at through Identity, Transpose, Reshape and the like, are operators that hold trained weights.
Every other constant is left alone, and the reason is kept for the report.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxdp.errors import UsageError
from onnxdp.records import Array, Kept, Weight

FLOATS = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.BFLOAT16: "bfloat16",
}
MIN_BYTES = 1024
"""Smaller constants are left alone: what decodes them would outweigh what they save."""

_THROUGH = frozenset(
    (
        "Identity",
        "Cast",
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Slice",
        "Concat",
        "Split",
    )
)
"""Operators that only move numbers about."""

_MATRIX = {"Conv": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}
"""Operators whose input at these places is a matrix that dictionary pairs can rebuild."""

TABLES = ("Add", "Sub")
"""Operators that take, every time, all of a table with a row for each place: positions, a mean picture."""

_STORED = {
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
    "Einsum": (0, 1),
    **dict.fromkeys(TABLES, (0, 1)),
}
"""Operators that hold trained weights in another shape: they may change their storage type only."""


_TABLE = 4096
"""Numbers of a table at least."""
_GRID = 4
"""Numbers for each distinct one from which they are a grid (anchors of boxes, a mask), to be kept exact."""


@dataclass(frozen=True, slots=True)
class Reader:
    """An operator that multiplies by a weight: the node and the place of the weight among its inputs."""

    node: ir.Node
    index: int
    direct: bool


@dataclass(frozen=True, slots=True)
class Found:
    """The weights of one model; ``values`` and ``readers`` are keyed by the weight's name."""

    graph: ir.Graph
    weights: tuple[Weight, ...]
    kept: tuple[Kept, ...]
    values: dict[str, ir.Value]
    readers: dict[str, tuple[Reader, ...]]


def find(model: ir.Model) -> Found:
    """Find every weight of the graph and its subgraphs.

    Parameters
    ----------
    model : ir.Model
        Not changed.

    Returns
    -------
    Found
        In graph order; a constant of at least 1 kB that is no weight appears in ``kept`` with the reason.
    """
    weights: list[Weight] = []
    kept: list[Kept] = []
    values: dict[str, ir.Value] = {}
    all_readers: dict[str, tuple[Reader, ...]] = {}
    node_names = _node_names(model)
    taken: set[str] = set()
    for value in _constants(model):
        tensor = constant(value)
        if tensor is None or tensor.nbytes < MIN_BYTES:
            continue
        whole = tensor.dtype.is_integer()
        if not whole and tensor.dtype not in FLOATS:
            continue
        name = _unique(value.name or "constant", taken)
        if whole:
            said = f"holds integers ({tensor.dtype.name.lower()}), quantized already or no weight"
            kept.append(Kept(name, said, tensor.nbytes))
            continue
        readers, refusal = _readers(value)
        weight = None if refusal else _view(name, tensor, readers, node_names)
        if value.is_graph_input():
            refusal = (
                "is also a graph input and can be fed; give --freeze-initializers to treat it as a constant"
            )
        elif value.is_graph_output():
            refusal = "is also a graph output"
        elif not refusal and any(r.node.op_type in TABLES for r in readers):
            refusal = _no_table(tensor, readers)
        if not refusal and _exceeds_float32(tensor):
            refusal = "holds numbers that float32 does not, in which weights are decoded"
        if refusal or weight is None:
            kept.append(Kept(name, refusal or "has no reader", tensor.nbytes))
            continue
        weights.append(weight)
        values[name] = value
        all_readers[name] = readers
    for function in model.functions.values():
        held = sum(_function_bytes(node) for node in function)
        if held >= MIN_BYTES:
            kept.append(
                Kept(f"function {function.name}", "its constants lie inside a model-local function", held)
            )
    return Found(model.graph, tuple(weights), tuple(kept), values, all_readers)


def select(found: Found, include: Sequence[str], exclude: Sequence[str]) -> Found:
    """Keep the weights that the patterns leave.

    A pattern is a weight's name, a node's name, an operator type, a glob over these, or ``re:EXPRESSION``.

    Raises
    ------
    UsageError
        A pattern matches nothing, or is no regular expression.
    """
    chosen = set(values := [w.name for w in found.weights])
    if include:
        chosen = {n for p in include for n in _matching(p, found, "--include")}
    dropped = {n for p in exclude for n in _matching(p, found, "--exclude")}
    kept = [
        Kept(
            w.name, "is excluded by --exclude" if w.name in dropped else "is not named by --include", w.nbytes
        )
        for w in found.weights
        if w.name not in chosen or w.name in dropped
    ]
    weights = tuple(w for w in found.weights if w.name in chosen and w.name not in dropped)
    assert len(weights) + len(kept) == len(values)
    return Found(found.graph, weights, (*found.kept, *kept), found.values, found.readers)


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or a Constant node as it is; onnx-ir's own helper renames it."""
    node = None if value is None else value.producer()
    held = None if node is None else node.attributes.get("value")
    if node is not None and node.op_type == "Constant" and node.domain == "" and held is not None:
        return None if held.is_ref() else held.value  # as_tensor asks each attribute of a protocol: slow
    return None if value is None else ir.convenience.get_const_tensor(value)


def tensor_of(found: Found, name: str) -> Array:
    """Read a weight as stored; float32 or float64 (narrower types are widened), of the weight's shape."""
    tensor = constant(found.values[name])
    assert tensor is not None
    array = tensor.numpy()
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def blocks(weight: Weight, tensor: Array, axis: str = "rows", parts: int = 1) -> Array:
    """Cut a stored tensor into the stack of matrices W (inputs x outputs) that are rebuilt one by one.

    Parameters
    ----------
    weight : Weight
    tensor : ndarray of shape ``weight.shape``
    axis : {"rows", "columns"}
        Cut the inputs or the outputs of every group.
    parts : int
        Number of equal pieces.

    Returns
    -------
    ndarray of shape (groups * parts, inputs, outputs / parts) or (groups * parts, inputs / parts, outputs)
        A view where the layout allows it.
    """
    g, m, n = weight.groups, weight.inputs, weight.outputs
    w = tensor.reshape(g, n, m).swapaxes(1, 2) if weight.transposed else tensor.reshape(g, m, n)
    if axis == "rows":
        return w.reshape(g * parts, m // parts, n)
    return w.reshape(g, m, parts, n // parts).swapaxes(1, 2).reshape(g * parts, m, n // parts)


def unblocks(weight: Weight, stack: Array, axis: str = "rows", parts: int = 1) -> Array:
    """Undo :func:`blocks`: the tensor of shape ``weight.shape``."""
    g, m, n = weight.groups, weight.inputs, weight.outputs
    if axis == "rows":
        w = stack.reshape(g, m, n)
    else:
        w = stack.reshape(g, parts, m, n // parts).swapaxes(1, 2).reshape(g, m, n)
    return (w.swapaxes(1, 2) if weight.transposed else w).reshape(weight.shape)


def even(node: ir.Node, weight: Weight) -> bool:
    """Whether a node is a Conv with as many output as input positions along every axis."""
    if node.op_type != "Conv":
        return False
    held = node.attributes
    kernel = weight.shape[2:]
    ones = [1] * len(kernel)
    strides, dilations = (list(held[k].as_ints()) if k in held else ones for k in ("strides", "dilations"))
    if any(s != 1 for s in strides):
        return False
    if "auto_pad" in held and held["auto_pad"].as_string() != "NOTSET":
        return held["auto_pad"].as_string() in ("SAME_UPPER", "SAME_LOWER")
    pads = list(held["pads"].as_ints()) if "pads" in held else [0] * (2 * len(kernel))
    return all(
        pads[i] + pads[i + len(kernel)] == (k - 1) * d
        for i, (k, d) in enumerate(zip(kernel, dilations, strict=True))
    )


def can_centre(found: Found, weight: Weight) -> bool:
    """Whether the mean's share of the output error can be put into a bias: one Conv or Gemm reads x W."""
    readers = found.readers[weight.name]
    return (
        len(readers) == 1
        and readers[0].direct
        and readers[0].node.op_type in ("Conv", "Gemm")
        and (readers[0].index == 1)
        and bias_is_constant(readers[0].node)
    )


def bias_is_constant(node: ir.Node) -> bool:
    """Whether the node has no bias, or one that is a constant."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    bias = node.inputs[2]
    tensor = constant(bias)
    if tensor is None or bias.is_graph_input():
        return False
    return all(d == 1 for d in tensor.shape.numpy()[:-1])


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer and every Constant node's output, outer graphs first."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.initializers.values()
        for node in graph:
            if node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
                yield node.outputs[0]


def _no_table(tensor: ir.TensorProtocol, readers: Sequence[Reader]) -> str | None:
    """Say why what is added, or subtracted, is no trained table."""
    op = next(r.node.op_type for r in readers if r.node.op_type in TABLES)
    if tensor.size < _TABLE or sum(d > 1 for d in tensor.shape.numpy()) < 2:
        return f"is read by {op}, and is no table of {_TABLE:,} numbers or more"
    values = tensor.numpy()
    if not np.isfinite(values).all():
        return f"is read by {op}, and masks by infinity"
    if np.unique(values).size * _GRID <= tensor.size:
        return f"is read by {op}, and holds few different numbers, as grids and masks do"
    return None


def _exceeds_float32(tensor: ir.TensorProtocol) -> bool:
    """Whether the largest of its numbers is too large or too small for float32."""
    if tensor.dtype != ir.DataType.DOUBLE:
        return False
    peak, known = float(np.abs(tensor.numpy()).max()), np.finfo(np.float32)
    return 0 < peak < float(known.tiny) or float(known.max) < peak < np.inf


def _function_bytes(node: ir.Node) -> int:
    value = node.attributes.get("value")
    if node.op_type != "Constant" or value is None or value.type != ir.AttributeType.TENSOR:
        return 0
    tensor = value.as_tensor()
    return tensor.nbytes if tensor.dtype in FLOATS else 0


def _readers(value: ir.Value) -> tuple[tuple[Reader, ...], str | None]:
    """Return the operators that use ``value``, looked at through data movement, or why it is left alone."""
    found: list[Reader] = []
    seen: set[int] = set()
    queue = [(value, True)]
    while queue:
        at, direct = queue.pop(0)
        if at is not value and at.is_graph_output():
            return (), "reaches a graph output through operators that only move it"
        for node, index in at.uses():
            key = id(node) * 64 + index
            if key in seen:
                continue
            seen.add(key)
            places = {**_MATRIX, **_STORED}.get(node.op_type, ()) if node.domain == "" else ()
            if index in places:
                found.append(Reader(node, index, direct))
            elif node.domain == "" and node.op_type in _THROUGH and (index == 0 or node.op_type == "Concat"):
                queue.extend((output, False) for output in node.outputs)
            else:
                return (), f"is read by {node.op_type}, which onnxdp does not rewrite"
    if not found:
        return (), "has no reader"
    return tuple(found), None


def _view(
    name: str, tensor: ir.TensorProtocol, readers: Sequence[Reader], names: dict[ir.Node, str]
) -> Weight:
    """Describe the matrix that the readers agree on; where they do not, one that is only stored."""
    shape = tuple(int(d) for d in tensor.shape.numpy())
    views = {_matrix_view(shape, r) for r in readers if r.node.op_type in _MATRIX}
    nodes = tuple(dict.fromkeys(names[r.node] for r in readers))
    common: dict[str, Any] = {
        "name": name, "nodes": nodes, "shape": shape, "dtype": FLOATS[tensor.dtype], "nbytes": tensor.nbytes
    }  # fmt: skip
    view = next(iter(views)) if len(views) == 1 else None
    mixed = [r for r in readers if r.node.op_type not in _MATRIX and not r.direct]
    if view is None or mixed:
        op = next((r.node.op_type for r in readers if r.node.op_type in _STORED), readers[0].node.op_type)
        size = int(np.prod(shape, dtype=np.int64))
        return Weight(op=f"{op}" if op in _STORED else f"{op} (stored)", inputs=1, outputs=size, **common)
    op = next(r.node.op_type for r in readers if r.node.op_type in _MATRIX)
    inputs, outputs, groups, tap, transposed = view
    return Weight(
        op=op, inputs=inputs, outputs=outputs, groups=groups, tap=tap, transposed=transposed, **common
    )


def _matrix_view(shape: tuple[int, ...], reader: Reader) -> tuple[int, int, int, int, bool] | None:
    """Give (inputs, outputs, groups, tap, transposed) as one reader sees the tensor, None where none."""
    node = reader.node
    if node.op_type == "Conv":
        group = node.attributes.get("group")
        groups = group.as_int() if group else 1
        moved = not reader.direct and not _only_passed(node.inputs[reader.index])
        if moved or len(shape) < 3 or groups < 1 or shape[0] % groups:
            return None
        tap = int(np.prod(shape[2:], dtype=np.int64))
        return shape[1] * tap, shape[0] // groups, groups, tap, True
    flipped = False
    value = node.inputs[reader.index]
    steps: list[ir.Node] = []
    while value is not None and (producer := value.producer()) is not None and producer.op_type != "Constant":
        steps.append(producer)
        value = producer.inputs[0]
    seen = shape
    for step in reversed(steps):
        if step.op_type in ("Identity", "Cast"):
            continue
        if step.op_type == "Transpose" and len(seen) == 2:
            flipped, seen = not flipped, (seen[1], seen[0])
        elif step.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") and not flipped:
            new = _shape_after(step, seen)
            if new is None:
                return None
            seen = new
        else:
            return None
    if len(seen) != 2:
        return None
    attribute = node.attributes.get("transB" if reader.index == 1 else "transA")
    if attribute is not None and attribute.as_int():
        flipped, seen = not flipped, (seen[1], seen[0])
    # On the right W is (inputs, outputs) as read; on the left the product is W^T x.
    inputs, outputs = seen if reader.index == 1 else (seen[1], seen[0])
    return inputs, outputs, 1, 1, flipped != (reader.index == 0)


def _only_passed(value: ir.Value | None) -> bool:
    """Whether only Identity and Cast lie between a constant and ``value``."""
    while (
        value is not None and (node := value.producer()) is not None and node.op_type in ("Identity", "Cast")
    ):
        value = node.inputs[0]
    return constant(value) is not None


def _shape_after(node: ir.Node, seen: tuple[int, ...]) -> tuple[int, ...] | None:
    if node.op_type != "Reshape" or node.inputs[1] is None:
        return None
    target = constant(node.inputs[1])
    if target is None:
        return None
    dims = [int(d) for d in target.numpy()]
    dims = [seen[i] if d == 0 and i < len(seen) else d for i, d in enumerate(dims)]
    size = int(np.prod(seen, dtype=np.int64))
    known = int(np.prod([d for d in dims if d != -1], dtype=np.int64))
    return tuple(size // max(known, 1) if d == -1 else d for d in dims)


def _node_names(model: ir.Model) -> dict[ir.Node, str]:
    """Name every node; ``OpType#index`` where it has no name of its own."""
    nodes = [n for graph in (model.graph, *model.graph.subgraphs()) for n in graph]
    return {node: node.name or f"{node.op_type}#{i}" for i, node in enumerate(nodes)}


def _unique(name: str, taken: set[str]) -> str:
    """Sibling If branches may use one name twice: number the later ones."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate


def _matching(pattern: str, found: Found, option: str) -> set[str]:
    """Names of the weights that a pattern means."""
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as e:
            raise UsageError(f"{option} {pattern!r} is no regular expression ({e}); correct it.") from e
        hit = {w.name for w in found.weights if any(expression.search(s) for s in (w.name, *w.nodes))}
    else:
        hit = {
            w.name
            for w in found.weights
            if any(s == pattern or fnmatch.fnmatchcase(s, pattern) for s in (w.name, *w.nodes, w.op))
        }
    if not hit:
        raise UsageError(
            f"{option} {pattern!r} matches no weight; 'onnxdp inspect' lists the names of weights and nodes."
        )
    return hit
