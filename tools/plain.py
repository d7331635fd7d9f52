"""Make plain baselines of a classifier: rounding to nearest, k-means tables, float16 storage.

Rounding is per output channel, at any number of levels, scales by the largest value or by least squares;
k-means has one table a layer. The model that is written holds the rounded numbers as float32, to be judged.
What it would take is counted as if onnxdp had packed it: digits in words, scales as float16, decoding nodes,
and the rest of the file as it is. So a baseline is not worse for want of a container.

    python tools/plain.py rounding IN OUT --levels 16 --scale mse
    python tools/plain.py tables IN OUT --entries 8
    python tools/plain.py float16 IN OUT
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

LEVELS = (2, 3, 4, 5, 6, 7, 9, 11, 16, 23, 40, 84, 127, 255)
"""The most levels for each number of digits that a word holds: the others waste bits."""
TINY = 2.0**-24
"""The smallest float16, the scale of a channel of zeros."""
STEPS = 60
"""Bytes of the node that multiplies by the scales, and around these."""
SHARES = np.linspace(0.3, 1.0, 36)
"""Scales tried by least squares, as shares of the largest value's."""

Floats = NDArray[np.float32]


def weights(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, int]]:
    """Yield the float32 weights of convolutions and matrix products, and their axis of output channels."""
    tensors = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
            continue
        tensor = tensors.pop(node.input[1], None)
        if tensor is None or len(tensor.dims) < 2:
            continue
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        yield tensor, 0 if node.op_type == "Conv" or turned else len(tensor.dims) - 1


def nearest(rows: Floats, levels: int, scale: str) -> tuple[Floats, int]:
    """Round each row to ``levels`` equal steps around 0; return it with the numbers that its scales take."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    step = 2 * largest / np.float32(levels - 1)
    best, least = np.zeros_like(rows), np.full((len(rows), 1), np.inf)
    for share in SHARES if scale == "mse" else (1.0,):
        # Scales are stored as float16: what is evaluated has to be what would be stored.
        size = np.maximum(step * np.float32(share), TINY).astype(np.float16).astype(np.float32)
        half = (levels - 1) / 2
        digits = np.clip(np.round(rows / size + half), 0, levels - 1)
        rounded = ((digits - half) * size).astype(np.float32)
        error = np.square(rows - rounded, dtype=np.float64).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, rounded, best), np.minimum(error, least)
    return best, len(rows)


def table(rows: Floats, entries: int) -> tuple[Floats, int]:
    """Replace numbers by the nearest of ``entries`` means (Lloyd, from quantiles)."""
    flat = np.sort(rows.reshape(-1).astype(np.float64))
    total = np.concatenate([[0.0], np.cumsum(flat)])
    means = np.quantile(flat, (np.arange(entries) + 0.5) / entries)
    for _ in range(100):
        cuts = np.concatenate([[0], np.searchsorted(flat, (means[1:] + means[:-1]) / 2), [len(flat)]])
        count = np.diff(cuts)
        moved = np.where(count > 0, np.diff(total[cuts]) / np.maximum(count, 1), means)
        if np.allclose(moved, means, rtol=0, atol=1e-9):
            break
        means = moved
    stored = means.astype(np.float16).astype(np.float32)
    return stored[np.searchsorted((stored[1:] + stored[:-1]) / 2, rows)], entries


def counted(model: onnx.ModelProto, levels: int, scales: Callable[[tuple[int, ...], int], int]) -> int:
    """Return the whole file's bytes with every weight packed that gains by it."""
    from onnxdp.methods.packing import Packing  # here: what makes a baseline should not pay for it

    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    total, first = model.ByteSize(), True
    for tensor, axis in weights(model.graph):
        shape = tuple(tensor.dims)
        size = math.prod(shape)
        packing = Packing.best(levels, size, opset, first=first)
        small = packing.cost(size, opset, first=first) + 2 * scales(shape, axis) + STEPS
        if small < 4 * size:
            total, first = total - 4 * size + small, False
    return total


def table_bytes(model: onnx.ModelProto, entries: int) -> int:
    """Return the bytes of a file with a table of float16 means a layer."""
    return counted(model, entries, lambda shape, axis: entries)


def rounding_bytes(model: onnx.ModelProto, levels: int) -> int:
    """Return the bytes of a file rounded per channel."""
    return counted(model, levels, lambda shape, axis: shape[axis])


def most_levels(path: Path, budget: int) -> int | None:
    """Return the most levels whose file is within the budget; None where 2 do not fit."""
    model = onnx.load(str(path))
    return max((n for n in LEVELS if rounding_bytes(model, n) <= budget), default=None)


def replace(model: onnx.ModelProto, change: Callable[[Floats], tuple[Floats, int]]) -> None:
    """Change every weight, seen as (output channels, the rest)."""
    for tensor, axis in weights(model.graph):
        whole = np.moveaxis(numpy_helper.to_array(tensor), axis, 0)
        changed, _ = change(whole.reshape(len(whole), -1))
        back = np.moveaxis(changed.reshape(whole.shape), 0, axis)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(back), tensor.name))


def store_half(model: onnx.ModelProto) -> None:
    """Store every weight as float16 behind a Cast."""
    casts = []
    for tensor, _ in list(weights(model.graph)):
        half, name = numpy_helper.to_array(tensor).astype(np.float16), tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def main() -> int:
    """Write one baseline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("method", choices=("rounding", "tables", "float16"))
    add("source", type=Path, metavar="IN")
    add("out", type=Path, metavar="OUT")
    add("--levels", type=int, default=16, help="of rounding; default: %(default)s")
    add("--scale", choices=("max", "mse"), default="mse", help="of rounding; default: %(default)s")
    add("--entries", type=int, default=16, help="of a layer's table; default: %(default)s")
    asked = parser.parse_args()
    model = onnx.load(str(asked.source))
    if asked.method == "float16":
        store_half(model)
    elif asked.method == "rounding":
        replace(model, lambda rows: nearest(rows, asked.levels, asked.scale))
    else:
        replace(model, lambda rows: table(rows, asked.entries))
    onnx.save(model, str(asked.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
