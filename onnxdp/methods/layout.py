"""How the numbers of a weight lie while it is rounded: columns that have one step each."""

from __future__ import annotations

import numpy as np

from onnxdp import weights
from onnxdp.records import Array, Weight

MOST_INPUTS = 6144
"""Rows of a matrix whose second moment is formed whole; longer ones feed errors back within parts."""
_BLOCK = 64
"""Rows of a column, at most, that share a step where there are several: a quarter of a bit a number."""
_BLOCKED = 255
"""Levels from which there are: the largest number of a whole column would cost a bit or two of eight."""
_PER_ROW = {"Gather": (0,), "ConvTranspose": (1,), "LSTM": (0, 1), "GRU": (0, 1), "RNN": (0, 1)} | (
    dict.fromkeys(weights.TABLES, (-1,))  # channels differ in size, as sines of positions do
)
"""Axes along which weights that are no matrix of one product have steps of their own; the first elsewhere."""


def is_matrix(weight: Weight) -> bool:
    """Whether each output has inputs of its own that are added up."""
    return weight.inputs > 1 or weight.op in ("Conv", "Gemm", "MatMul")


def _axes(weight: Weight) -> tuple[int, ...]:
    """Return the axes along which a weight that is no matrix has steps of its own."""
    axes = _PER_ROW.get(weight.op, (0,))
    axes = tuple(a % len(weight.shape) for a in axes)
    return axes if len(weight.shape) > len(axes) else ()


def parts(inputs: int) -> int:
    """Into how many a matrix is cut between its rows, so that none has too many."""
    return next(p for p in range(1, inputs + 1) if inputs % p == 0 and inputs // p <= MOST_INPUTS)


def blocks(weight: Weight, levels: int) -> int:
    """Count the steps of a column: of many levels one for a block of rows (blocked quantisation of ONNX)."""
    if levels < _BLOCKED or not is_matrix(weight):
        return 1
    inputs = weight.inputs // parts(weight.inputs)
    size = next(size for size in range(min(_BLOCK, inputs), 0, -1) if inputs % size == 0)
    return weight.inputs // size if 2 * size > _BLOCK else 1


def columns(weight: Weight) -> int:
    """Count the columns, each with a step, or several."""
    if is_matrix(weight):
        return weight.groups * weight.outputs
    return int(np.prod([weight.shape[a] for a in _axes(weight)], dtype=np.int64))


def matrix(weight: Weight, tensor: Array) -> Array:
    """Return (stack, inputs, outputs): a column for every step."""
    if is_matrix(weight):
        return weights.blocks(weight, tensor)
    axes = _axes(weight)
    return np.moveaxis(tensor, axes, range(-len(axes), 0)).reshape(1, -1, columns(weight))


def tensor(weight: Weight, stack: Array) -> Array:
    """Undo :func:`matrix`."""
    if is_matrix(weight):
        return weights.unblocks(weight, stack)
    axes = _axes(weight)
    rest = [d for a, d in enumerate(weight.shape) if a not in axes]
    moved = stack.reshape(*rest, *(weight.shape[a] for a in axes))
    return np.moveaxis(moved, range(-len(axes), 0), axes)


def stored(weight: Weight, blocks: int = 1) -> tuple[int, ...]:
    """Return a shape of the stored numbers in which the steps lie along axes."""
    if not is_matrix(weight):
        return weight.shape
    rows = weight.groups * weight.outputs
    if weight.transposed and blocks > 1:
        return (rows * blocks, weight.inputs // blocks)
    if weight.transposed:
        return weight.shape if weight.shape[0] == rows else (rows, weight.inputs)
    return (
        (blocks, weight.inputs // blocks, weight.outputs) if blocks > 1 else (weight.inputs, weight.outputs)
    )


def flat(weight: Weight, scale: Array) -> Array:
    """Return steps (stack, blocks, outputs) in the order in which :func:`beside` takes them."""
    return (scale.swapaxes(1, 2) if weight.transposed else scale).reshape(-1)


def beside(weight: Weight, scale: Array) -> Array:
    """Shape the steps so that they meet their numbers, as they lie in :func:`stored`."""
    blocks = scale.size // columns(weight)
    if blocks > 1:
        return scale.reshape((-1, 1) if weight.transposed else (blocks, 1, -1))
    if is_matrix(weight):
        axes: tuple[int, ...] = (0,) if weight.transposed else (1,)
    else:
        axes = _axes(weight)
    return scale.reshape([d if a in axes else 1 for a, d in enumerate(stored(weight))])
