"""How the numbers of a weight lie while it is rounded: columns that have one step each."""

from __future__ import annotations

import numpy as np

from onnxdp import weights
from onnxdp.records import Array, Weight

_PER_ROW = {"Gather": (0,), "ConvTranspose": (1,), "LSTM": (0, 1), "GRU": (0, 1), "RNN": (0, 1)}
"""Axes along which weights that are no matrix of one product have steps of their own; the first elsewhere."""


def is_matrix(weight: Weight) -> bool:
    """Whether each output has inputs of its own that are added up."""
    return weight.inputs > 1 or weight.op in ("Conv", "Gemm", "MatMul")


def _axes(weight: Weight) -> tuple[int, ...]:
    """Return the axes along which a weight that is no matrix has steps of its own."""
    axes = _PER_ROW.get(weight.op, (0,))
    return axes if len(weight.shape) > len(axes) else ()


def columns(weight: Weight) -> int:
    """Count the steps."""
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


def stored(weight: Weight) -> tuple[int, ...]:
    """Return a shape of the stored numbers in which the steps lie along axes."""
    if not is_matrix(weight):
        return weight.shape
    rows = weight.groups * weight.outputs
    if weight.transposed:
        return weight.shape if weight.shape[0] == rows else (rows, weight.inputs)
    return (weight.inputs, weight.outputs)


def beside(weight: Weight, scale: Array) -> Array:
    """Shape the steps so that they meet their numbers."""
    shape = stored(weight)
    if is_matrix(weight):
        axes: tuple[int, ...] = (0,) if weight.transposed else (1,)
    else:
        axes = _axes(weight)
    return scale.reshape([d if a in axes else 1 for a, d in enumerate(shape)])
