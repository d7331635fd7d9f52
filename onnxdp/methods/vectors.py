"""Round a few consecutive rows at once to an entry of a table: arrays only.

Minimised is what :mod:`onnxdp.methods.rounding` minimises. An entry is chosen by the metric of its own rows,
once the errors of all rows before them were fed back.

References
----------
van Baalen et al. 2024 (GPTVQ): error feedback from one vector of rows to the next. method.md 4.4.
"""

from __future__ import annotations

from onnxdp import arrays
from onnxdp.arrays import Array
from onnxdp.methods.rounding import Curvature, Rounded, ratio, take

_BLOCK = 48
"""Rows after which the rest is told by one matrix product; whole vectors of 2, 3 and 4."""
_TRIES = (1.0, 0.88, 1.14)
"""Steps to try, over the one that is best without feedback."""
_FACTORS = (0.75, 0.85, 0.95, 1.05, 1.15, 1.25, 1.4, 1.6)
"""Steps looked at without feedback, over the one that gives entries and weights the same size."""
_LOOKED = 2048
"""Vectors, about, that are looked at."""


def round_vectors(
    w: Array, curvature: Curvature, entries: Array, *, tries: int = 3, sweeps: int = 3
) -> Rounded:
    """Round each run of rows of each column to an entry of the table, times a step per column.

    Parameters
    ----------
    w : array of shape (1, inputs, outputs), float32
    curvature : Curvature
        Of runs as long as the entries.
    entries : array of shape (K, d), float32
    tries : int
        Steps for which the whole column is rounded, up to 3; the best is kept.
    sweeps : int
        Rounds of coordinate descent over runs and of refitting the steps.

    Returns
    -------
    Rounded
        Its digits are entries' numbers, (1, inputs / d, outputs).
    """
    xp = arrays.namespace(w)
    dim = entries.shape[1]
    w = take(w, curvature.order)[0, ...]
    h, feedback, pivots = curvature.moment[0, ...], curvature.feedback[0, ...], curvature.pivots[0, ...]
    first = _first_step(w, entries)
    hw = h @ w
    least = xp.full_like(first, float("inf"))
    scale, numbers = first, xp.zeros((w.shape[0] // dim, w.shape[1]), dtype=xp.int64)
    for factor in _TRIES[:tries]:
        tried = _feedback(w / (first * factor), feedback, pivots, entries)
        q = _rows(tried, entries)
        fitted = _refit(q, hw, h, first * factor)
        lost = w - q * fitted
        error = xp.sum(lost * (h @ lost), axis=0)
        hit = error < least
        least, scale = xp.where(hit, error, least), xp.where(hit, fitted, scale)
        numbers = xp.where(hit[None, :], tried, numbers)
    for _ in range(sweeps):
        numbers = _sweep(w / scale, numbers, h, entries)
        scale = _refit(_rows(numbers, entries), hw, h, scale)
    lost = w - _rows(numbers, entries) * scale
    damping = curvature.damping[0]
    error = xp.sum(lost * (h @ lost), axis=0) - damping * xp.sum(lost * lost, axis=0)
    energy = xp.sum(w * hw, axis=0) - damping * xp.sum(w * w, axis=0)
    runs = curvature.order[:, ::dim] // dim
    digits = take(xp.astype(numbers, xp.uint8)[None, ...], xp.argsort(runs, axis=-1))
    return Rounded(digits, scale[None, ...], error[None, ...], energy[None, ...])


def _first_step(w: Array, entries: Array) -> Array:
    """Return a step for each column: as its size says, times what is best for all of them, plain."""
    xp = arrays.namespace(w)
    dim = entries.shape[1]
    first = xp.sqrt(xp.mean(w * w, axis=0) / xp.mean(entries * entries))
    first = xp.where(first > 0, first, xp.ones_like(first))
    stride = max(1, w.shape[0] // dim * w.shape[1] // _LOOKED)
    runs = xp.reshape(w / first, (w.shape[0] // dim, dim, w.shape[1]))
    runs = xp.reshape(xp.permute_dims(runs, (1, 0, 2)), (dim, -1))[:, ::stride]
    unit = xp.astype(arrays.eye(dim, w), w.dtype)
    lost = []
    for factor in _FACTORS:
        chosen = xp.take(entries, _nearest(runs / factor, unit, entries), axis=0)
        lost.append(float(xp.sum((runs - factor * xp.matrix_transpose(chosen)) ** 2)))
    return first * _FACTORS[lost.index(min(lost))]


def _feedback(w: Array, feedback: Array, pivots: Array, entries: Array) -> Array:
    """Choose entry after entry, each told the errors of those before it; all in units of the step."""
    xp = arrays.namespace(w)
    dim = entries.shape[1]
    unit = xp.astype(arrays.eye(dim, w), w.dtype)
    lost = w + 0.0
    chosen = []
    for i in range(0, w.shape[0], _BLOCK):
        j = min(i + _BLOCK, w.shape[0])
        target = w[i:j, :] + 0.0
        if i:
            target = target + xp.matrix_transpose(feedback[:i, i:j]) @ lost[:i, :]
        for a in range(i, j, dim):
            b = a + dim
            part = feedback[a:b, a:b] + unit
            metric = (part * pivots[a:b]) @ xp.matrix_transpose(part)
            numbers = _nearest(target[a - i : b - i, :], metric, entries)
            lost[a:b, :] = w[a:b, :] - xp.matrix_transpose(xp.take(entries, numbers, axis=0))
            if b < j:
                target[b - i :, :] += xp.matrix_transpose(feedback[a:b, b:j]) @ lost[a:b, :]
            chosen.append(numbers)
    return xp.stack(chosen)


def _sweep(w: Array, numbers: Array, h: Array, entries: Array) -> Array:
    """Choose every entry once more, all others fixed (coordinate descent)."""
    xp = arrays.namespace(w)
    dim = entries.shape[1]
    q = _rows(numbers, entries)
    pull = h @ (w - q)
    chosen = []
    for i in range(0, w.shape[0], _BLOCK):
        j = min(i + _BLOCK, w.shape[0])
        moved = xp.zeros_like(q[i:j, :])
        for a in range(i, j, dim):
            b = a + dim
            own = h[a:b, a:b]
            found = _nearest(q[a:b, :] + xp.linalg.solve(own, pull[a:b, :]), own, entries)
            moved[a - i : b - i, :] = xp.matrix_transpose(xp.take(entries, found, axis=0)) - q[a:b, :]
            if b < j:
                pull[b:j, :] -= h[b:j, a:b] @ moved[a - i : b - i, :]
            chosen.append(found)
        if j < w.shape[0]:
            pull[j:, :] -= h[j:, i:j] @ moved
    return xp.stack(chosen)


def _nearest(target: Array, metric: Array, entries: Array) -> Array:
    """Return the entry of least (t - c)^T M (t - c) for each column t of the target, (columns,)."""
    xp = arrays.namespace(target)
    pulled = entries @ metric
    cost = xp.sum(pulled * entries, axis=1) - 2 * (xp.matrix_transpose(target) @ xp.matrix_transpose(pulled))
    return xp.argmin(cost, axis=1)


def _rows(numbers: Array, entries: Array) -> Array:
    """Return the rows that the entries make, (inputs, outputs)."""
    xp = arrays.namespace(entries)
    runs, outputs = numbers.shape
    made = xp.reshape(xp.take(entries, xp.reshape(numbers, (-1,)), axis=0), (runs, outputs, entries.shape[1]))
    return xp.reshape(xp.permute_dims(made, (0, 2, 1)), (runs * entries.shape[1], outputs))


def _refit(q: Array, hw: Array, h: Array, scale: Array) -> Array:
    """Return the best step of each column for its entries, ``q^T H w / q^T H q``."""
    xp = arrays.namespace(hw)
    return ratio(xp.sum(q * hw, axis=0), xp.sum(q * (h @ q), axis=0), scale)
