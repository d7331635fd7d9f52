"""Draw a dictionary pair: fold its product into a constant, or split its reader into two operators.

References
----------
runtime.md section 4: what ONNX Runtime computes once, when the session is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from onnxdp.build import Builder
from onnxdp.records import Array, Encoded, Params, Weight
from onnxdp.weights import Reader

Attributes = Mapping[str, ir.Attr]


def can_split(weight: Weight, params: Params) -> bool:
    """Whether two operators can do what the pair says: one block, or row blocks of a Conv, as groups."""
    if weight.groups > 1:
        return False
    return int(params["parts"]) == 1 or (weight.op == "Conv" and params["axis"] == "rows")


def fold(build: Builder, weight: Weight, encoded: Encoded) -> ir.Value:
    """W' as a product of constants, in the stored orientation, so that only blocks need a Transpose."""
    axis, parts = str(encoded.params["axis"]), int(encoded.params["parts"])
    atoms, codes = _factors(build, weight, encoded, "float32")
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
    """Put an atoms operator before the node, which becomes the codes operator under its old name."""
    if weight.op == "Conv":
        _split_conv(build, weight, encoded, reader.node)
    else:
        _split_product(build, weight, encoded, reader)


def _split_conv(build: Builder, weight: Weight, encoded: Encoded, node: ir.Node) -> None:
    """Conv k x k, grouped where the rows are in blocks, then Conv 1 x 1 with the bias."""
    parts, rank = int(encoded.params["parts"]), int(encoded.params["atoms"])
    ones = [1] * (len(weight.shape) - 2)
    atoms_shape = (parts * rank, weight.shape[1] // parts, *weight.shape[2:])
    codes = encoded.arrays["codes"].reshape(parts * rank, weight.outputs).T
    x, shared = node.inputs[0], encoded.shared.get("atoms")
    geometry = {k: a for k, a in node.attributes.items() if k != "group"}

    def draw() -> ir.Value:
        if shared:
            stored = build.constant("atoms", _oriented(encoded.arrays["atoms"], True), f"{shared}.shared")
            wide = build.cast(stored, weight.dtype, "atoms.cast")
            kernel = build.reshape(wide, atoms_shape, "atoms.kernel")
        else:
            stored = build.constant("atoms", encoded.arrays["atoms"].swapaxes(-1, -2).reshape(atoms_shape))
            kernel = build.cast(stored, weight.dtype, "atoms.cast")
        group: dict[str, Any] = {"group": parts} if parts > 1 else {}
        return _with(build.node("Conv", [x, kernel], "atoms.conv", **group), geometry)

    between = _atoms_once(build, encoded, x, geometry, draw)
    code = build.constant("codes", codes.reshape(weight.outputs, parts * rank, *ones))
    node.attributes.clear()
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", ones)
    node.replace_input_with(0, between)
    node.replace_input_with(1, build.cast(code, weight.dtype, "codes.cast"))


def _split_product(build: Builder, weight: Weight, encoded: Encoded, reader: Reader) -> None:
    """Turn x W into (x D) C, and W^T x into C^T (D^T x)."""
    node, left = reader.node, reader.index == 0
    atoms, codes = _factors(build, weight, encoded, weight.dtype)
    x = node.inputs[1 - reader.index]
    flags = {k: a for k, a in node.attributes.items() if k in ("transA", "transB")}

    def draw() -> ir.Value:
        operands = [atoms, x] if left else [x, atoms]
        if node.op_type == "Gemm" and build.opset < 11:  # where Gemm must have a bias
            operands.append(build.zero(weight.dtype))
        return _with(build.node(node.op_type, operands, "atoms.product"), flags)

    between = _atoms_once(build, encoded, x, flags, draw)
    # The activations are turned once, in the first operator.
    node.attributes.pop("transB" if left else "transA", None)
    node.replace_input_with(1 - reader.index, between)
    node.replace_input_with(reader.index, codes)


def _atoms_once(
    build: Builder, encoded: Encoded, x: ir.Value | None, geometry: Attributes, draw: Callable[[], ir.Value]
) -> ir.Value:
    """Draw the atoms operator, once where several weights share them and read one tensor alike."""
    shared = encoded.shared.get("atoms")
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
