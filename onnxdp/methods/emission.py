"""Draw a dictionary pair: fold its product into a constant, or split its reader into two operators.

References
----------
runtime.md section 4: what ONNX Runtime computes once, when the session is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir

from onnxdp.build import Builder
from onnxdp.records import Array, Encoded, Params, Weight
from onnxdp.weights import Reader

Attributes: TypeAlias = Mapping[str, ir.Attr]
Drawn: TypeAlias = Callable[[], ir.Value]


def can_split(weight: Weight, params: Params) -> bool:
    """Whether two operators can do what the pair says: one block, or row blocks of a Conv, as groups."""
    if weight.groups > 1:
        return False
    return int(params["parts"]) == 1 or (weight.op == "Conv" and params["axis"] == "rows")


def fold(build: Builder, weight: Weight, encoded: Encoded) -> ir.Value:
    """W' as a product of constants, in the stored orientation, so that only blocks need a Transpose."""
    axis, parts = str(encoded.params["axis"]), int(encoded.params["parts"])
    return product(build, weight, *_factors(build, weight, encoded, "float32"), axis=axis, parts=parts)


def product(
    build: Builder, weight: Weight, atoms: ir.Value, codes: ir.Value, *, axis: str = "rows", parts: int = 1
) -> ir.Value:
    """Multiply stored factors, float32, and give the product the weight's shape and type."""
    value = build.node("MatMul", [codes, atoms] if weight.transposed else [atoms, codes], "product")
    g, m, n = weight.groups, weight.inputs, weight.outputs
    if parts > 1 and (axis == "rows") == weight.transposed:
        # Blocks lie along the last axis of the stored matrix: bring them there.
        stored = (g, parts, n, m // parts) if weight.transposed else (g, parts, m, n // parts)
        value = build.reshape(value, stored, "blocks")
        value = build.node("Transpose", [value], "order", perm=[0, 2, 1, 3])
    elif weight.shape == ((n, m) if weight.transposed else (m, n)) and g * parts == 1:
        return build.cast(value, weight.dtype, "type") if weight.dtype != "float32" else value
    value = build.reshape(value, weight.shape, "weight")
    return build.cast(value, weight.dtype, "type") if weight.dtype != "float32" else value


def _factors(build: Builder, weight: Weight, encoded: Encoded, dtype: str) -> tuple[ir.Value, ir.Value]:
    """Register atoms and codes, in the stored orientation, and cast them to ``dtype``."""
    atoms, codes = (_oriented(encoded.arrays[r], weight.transposed) for r in ("atoms", "codes"))
    shared = encoded.shared.get("atoms")
    return (
        build.cast(build.constant("atoms", atoms, shared and f"{shared}.shared"), dtype, "atoms.cast"),
        build.cast(build.constant("codes", codes), dtype, "codes.cast"),
    )


def _oriented(stack: Array, transposed: bool) -> Array:
    stack = stack.swapaxes(-1, -2) if transposed else stack
    return stack[0] if len(stack) == 1 else stack


def split(build: Builder, weight: Weight, encoded: Encoded, reader: Reader) -> None:
    """Run a stored pair as two operators."""
    shared = encoded.shared.get("atoms")
    if weight.op != "Conv":
        atoms, codes = _factors(build, weight, encoded, weight.dtype)
        in_two(build, weight, reader, lambda: atoms, lambda: codes, shared=shared)
        return
    parts, rank = int(encoded.params["parts"]), int(encoded.params["atoms"])
    kernel = (parts * rank, weight.shape[1] // parts, *weight.shape[2:])
    ones = [1] * (len(weight.shape) - 2)

    def drawn() -> ir.Value:
        if shared:
            stored = build.constant("atoms", _oriented(encoded.arrays["atoms"], True), f"{shared}.shared")
            return build.reshape(build.cast(stored, weight.dtype, "atoms.cast"), kernel, "atoms.kernel")
        stored = build.constant("atoms", encoded.arrays["atoms"].swapaxes(-1, -2).reshape(kernel))
        return build.cast(stored, weight.dtype, "atoms.cast")

    flat = encoded.arrays["codes"].reshape(parts * rank, weight.outputs).T

    def code() -> ir.Value:
        stored = build.constant("codes", flat.reshape(weight.outputs, parts * rank, *ones))
        return build.cast(stored, weight.dtype, "codes.cast")

    in_two(build, weight, reader, drawn, code, parts=parts, shared=shared)


def in_two(
    build: Builder,
    weight: Weight,
    reader: Reader,
    atoms: Drawn,
    codes: Drawn,
    *,
    parts: int = 1,
    held: int | None = None,
    shared: str | None = None,
) -> None:
    """Put an atoms operator before the node, which becomes the codes operator under its old name.

    Parameters
    ----------
    build : Builder
    weight : Weight
    reader : Reader
    atoms, codes : callable
        Draw the factors: of a Conv the kernels (atoms, channels, ...) and (outputs, atoms, ...), otherwise
        matrices in the orientation of the weight. Shared atoms are drawn for their first reader only.
    parts : int
        Groups of the Conv of the atoms.
    held : int, optional
        Leading axes along which the atoms hold the kernel of a Conv, the codes the others; all where None.
    shared : str, optional
        Name of the atoms where several weights have them in common.
    """
    if weight.op == "Conv":
        _conv_in_two(build, weight, reader.node, atoms, codes, parts, held, shared)
    else:
        _product_in_two(build, weight, reader, atoms, codes, shared)


def _conv_in_two(
    build: Builder,
    weight: Weight,
    node: ir.Node,
    atoms: Drawn,
    codes: Drawn,
    parts: int,
    held: int | None,
    shared: str | None,
) -> None:
    """Conv of the atoms, grouped where the rows are in blocks, then Conv of the codes with the bias."""
    x = node.inputs[0]
    axes = len(weight.shape) - 2
    held = axes if held is None else held
    geometry = {k: a for k, a in node.attributes.items() if k != "group"}
    first, second = (_along(geometry, weight, own) for own in (range(held), range(held, axes)))

    def draw() -> ir.Value:
        group: dict[str, Any] = {"group": parts} if parts > 1 else {}
        return _with(build.node("Conv", [x, atoms()], "atoms.conv", **group), first)

    between = _atoms_once(build, shared, x, first, draw)
    node.attributes.clear()
    node.attributes.update(second)
    node.replace_input_with(0, between)
    node.replace_input_with(1, codes())


def _along(geometry: Attributes, weight: Weight, own: Sequence[int]) -> dict[str, ir.Attr]:
    """Return the geometry of a Conv along some of its axes; along the others it does not move."""
    kernel = list(weight.shape[2:])
    axes = len(kernel)
    if len(own) == axes:
        return dict(geometry)
    if not own:
        return {"kernel_shape": ir.AttrInt64s("kernel_shape", [1] * axes)}
    made = {k: a for k, a in geometry.items() if k == "auto_pad"}
    for name, still in (("strides", 1), ("dilations", 1), ("pads", 0)):
        if name in geometry:
            numbers = [n if i % axes in own else still for i, n in enumerate(geometry[name].as_ints())]
            made[name] = ir.AttrInt64s(name, numbers)
    made["kernel_shape"] = ir.AttrInt64s("kernel_shape", [k if i in own else 1 for i, k in enumerate(kernel)])
    return made


def _product_in_two(
    build: Builder, weight: Weight, reader: Reader, atoms: Drawn, codes: Drawn, shared: str | None
) -> None:
    """Turn x W into (x D) C, and W^T x into C^T (D^T x)."""
    node, left = reader.node, reader.index == 0
    x = node.inputs[1 - reader.index]
    flags = {k: a for k, a in node.attributes.items() if k in ("transA", "transB")}

    def draw() -> ir.Value:
        first = atoms()
        operands = [first, x] if left else [x, first]
        if node.op_type == "Gemm" and build.opset < 11:  # where Gemm must have a bias
            operands.append(build.zero(weight.dtype))
        return _with(build.node(node.op_type, operands, "atoms.product"), flags)

    between = _atoms_once(build, shared, x, flags, draw)
    # The activations are turned once, in the first operator.
    node.attributes.pop("transB" if left else "transA", None)
    node.replace_input_with(1 - reader.index, between)
    node.replace_input_with(reader.index, codes())


def _atoms_once(
    build: Builder, shared: str | None, x: ir.Value | None, geometry: Attributes, draw: Drawn
) -> ir.Value:
    """Draw the atoms operator, once where several weights share them and read one tensor alike."""
    if shared is None:
        return draw()
    assert x is not None
    how = sorted(f"{k}={a.value}" for k, a in geometry.items() if k != "kernel_shape")
    return build.once(f"atoms of {shared} on {x.name} {' '.join(how)}", draw)


def _with(value: ir.Value, attributes: Attributes) -> ir.Value:
    """Give the node behind a value the attributes of another."""
    producer = value.producer()
    assert producer is not None
    producer.attributes.update(attributes)
    return value
