"""Round a few consecutive rows at once to an entry of a table: arrays only.

Minimised is what :mod:`onnxdp.methods.rounding` minimises. An entry is chosen by the metric of its own rows,
once the errors of all rows before them were fed back.

References
----------
van Baalen et al. 2024 (GPTVQ): error feedback from one vector of rows to the next. method.md 4.4.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxdp import arrays
from onnxdp.arrays import Array
from onnxdp.methods.rounding import Curvature, Rounded, fitted, ratio, take, whitened

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
    w = take(w, curvature.order)
    white = whitened(w, curvature.feedback)
    first = _first_step(w[0, ...], entries)
    parts = _corners(curvature.feedback[0, ...], dim) + xp.astype(arrays.eye(dim, w), w.dtype)
    costs = xp.reshape(curvature.pivots[0, :], (-1, 1, dim))
    nearest = Nearest.of((parts * costs) @ xp.matrix_transpose(parts), entries)
    least = xp.full_like(first, float("inf"))
    scale, numbers = first, xp.zeros((w.shape[1] // dim, w.shape[2]), dtype=xp.int64)
    for factor in _TRIES[:tries]:
        step = first * factor
        tried, missed = _feedback(w[0, ...] / step, curvature.feedback[0, ...], parts, nearest)
        missed = missed[None, ...]
        more, error = fitted(white / step - missed, missed, curvature.pivots)
        more, error = (step * more)[0, :], (step**2 * error)[0, :]
        hit = error < least
        least, scale = xp.where(hit, error, least), xp.where(hit, more, scale)
        numbers = xp.where(hit[None, :], tried, numbers)
    if sweeps:
        numbers, scale, least = _swept(w[0, ...], numbers, scale, curvature.moment[0, ...], entries, sweeps)
    lost = w[0, ...] - _rows(numbers, entries) * scale
    error = least - curvature.damping[0] * xp.sum(lost * lost, axis=0)
    energy = xp.sum(white * white * curvature.pivots[:, :, None], axis=1)
    energy -= curvature.damping[:, None] * xp.sum(w * w, axis=1)
    runs = curvature.order[:, ::dim] // dim
    digits = take(xp.astype(numbers, xp.uint8)[None, ...], xp.argsort(runs, axis=-1))
    return Rounded(digits, scale[None, ...], error[None, ...], energy)


@dataclass(frozen=True, slots=True)
class Nearest:
    """Finds the entry of least (t - c)^T M (t - c), each run of rows having an M of its own.

    Attributes
    ----------
    entries : array of shape (K, d), float32
    pulled : array of shape (runs, d, K), float32
        -2 M c.
    own : array of shape (runs, 1, K), float32
        c^T M c.
    """

    entries: Array
    pulled: Array
    own: Array

    @classmethod
    def of(cls, metrics: Array, entries: Array) -> Nearest:
        """Prepare for metrics (runs, d, d)."""
        xp = arrays.namespace(metrics)
        pulled = metrics @ xp.matrix_transpose(entries)
        own = xp.sum(pulled * xp.matrix_transpose(entries), axis=1, keepdims=True)
        return cls(entries, -2 * pulled, own)

    def __call__(self, run: int, target: Array) -> tuple[Array, Array]:
        """Return the number of the best entry for each column t of a target (d, columns), and its rows."""
        xp = arrays.namespace(target)
        cost = xp.matrix_transpose(target) @ self.pulled[run, ...]
        cost += self.own[run, ...]
        numbers = xp.argmin(cost, axis=1)
        return numbers, xp.matrix_transpose(xp.take(self.entries, numbers, axis=0))


def _corners(h: Array, dim: int) -> Array:
    """Return the (d, d) blocks along the diagonal of a matrix."""
    xp = arrays.namespace(h)
    return xp.stack([h[a : a + dim, a : a + dim] for a in range(0, h.shape[0], dim)])


def _first_step(w: Array, entries: Array) -> Array:
    """Return a step for each column: as its size says, times what is best for all of them, plain."""
    xp = arrays.namespace(w)
    dim = entries.shape[1]
    first = xp.sqrt(xp.mean(w * w, axis=0) / xp.mean(entries * entries))
    first = xp.where(first > 0, first, xp.ones_like(first))
    stride = max(1, w.shape[0] // dim * w.shape[1] // _LOOKED)
    runs = xp.reshape(w / first, (w.shape[0] // dim, dim, w.shape[1]))
    runs = xp.reshape(xp.permute_dims(runs, (1, 0, 2)), (dim, -1))[:, ::stride]
    nearest = Nearest.of(xp.astype(arrays.eye(dim, w), w.dtype)[None, ...], entries)
    lost = [float(xp.sum((runs - f * nearest(0, runs / f)[1]) ** 2)) for f in _FACTORS]
    return first * _FACTORS[lost.index(min(lost))]


def _feedback(w: Array, feedback: Array, parts: Array, nearest: Nearest) -> tuple[Array, Array]:
    """Choose entry after entry, each told the errors of those before it; all in units of the step.

    Parameters
    ----------
    w : array of shape (inputs, columns)
    feedback : array of shape (inputs, inputs)
        V.
    parts : array of shape (runs, d, d)
        Blocks along the diagonal of I + V.
    nearest : Nearest
        By what errors in each run cost when the rows after them make up for them.

    Returns
    -------
    array, array
        The entries' numbers, and what each row missed of its target: ``(I + V)^T (w - q)``.
    """
    xp = arrays.namespace(w)
    dim = nearest.entries.shape[1]
    through, back = xp.matrix_transpose(parts), xp.matrix_transpose(xp.linalg.inv(parts))
    lost, missed = xp.empty_like(w), xp.empty_like(w)
    chosen = []
    for i in range(0, w.shape[0], _BLOCK):
        j = min(i + _BLOCK, w.shape[0])
        target = w[i:j, :] + 0.0
        if i:
            target += xp.matrix_transpose(feedback[:i, i:j]) @ lost[:i, :]
        for a in range(i, j, dim):
            b, run = a + dim, a // dim
            told = target[a - i : b - i, :] - w[a:b, :]
            aim = w[a:b, :] + back[run, ...] @ told  # what a row of the run loses, the next is told of
            numbers, q = nearest(run, aim)
            lost[a:b, :], missed[a:b, :] = w[a:b, :] - q, through[run, ...] @ (aim - q)
            if b < j:
                target[b - i :, :] += xp.matrix_transpose(feedback[a:b, b:j]) @ lost[a:b, :]
            chosen.append(numbers)
    return xp.stack(chosen), missed


def _swept(
    w: Array, numbers: Array, scale: Array, h: Array, entries: Array, sweeps: int
) -> tuple[Array, Array, Array]:
    """Return numbers, steps and errors after rounds of coordinate descent and of refitting the steps."""
    xp = arrays.namespace(w)
    corners = _corners(h, entries.shape[1])
    nearest, inverses = Nearest.of(corners, entries), xp.linalg.inv(corners)
    q = _rows(numbers, entries)
    hw, hq = h @ w, h @ q
    for _ in range(sweeps):
        numbers, q, hq = _sweep(hw / scale, q, hq, h, nearest, inverses)
        scale = ratio(xp.sum(q * hw, axis=0), xp.sum(q * hq, axis=0), scale)
    return numbers, scale, xp.sum((w - q * scale) * (hw - hq * scale), axis=0)


def _sweep(
    hw: Array, q: Array, hq: Array, h: Array, nearest: Nearest, inverses: Array
) -> tuple[Array, Array, Array]:
    """Choose every entry once more, all others fixed (coordinate descent).

    Parameters
    ----------
    hw : array of shape (inputs, columns)
        ``H w``, in units of the step.
    q, hq : array of the same shape
        The rows that the entries make, and ``H q``.
    h : array of shape (inputs, inputs)
        H.
    nearest : Nearest
        By the blocks along the diagonal of H ...
    inverses : array of shape (runs, d, d)
        ... whose inverses these are.

    Returns
    -------
    array, array, array
        The entries' numbers, their rows, and ``H q`` of these.
    """
    xp = arrays.namespace(q)
    dim = inverses.shape[-1]
    after, hq = xp.empty_like(q), hq + 0.0
    chosen = []
    for i in range(0, q.shape[0], _BLOCK):
        j = min(i + _BLOCK, q.shape[0])
        pull = hw[i:j, :] - hq[i:j, :]
        for a in range(i, j, dim):
            b, own = a + dim, pull[a - i : a - i + dim, :]
            numbers, after[a:b, :] = nearest(a // dim, q[a:b, :] + inverses[a // dim, ...] @ own)
            if b < j:
                pull[b - i :, :] -= h[b:j, a:b] @ (after[a:b, :] - q[a:b, :])
            chosen.append(numbers)
        hq += h[:, i:j] @ (after[i:j, :] - q[i:j, :])
    return xp.stack(chosen), after, hq


def _rows(numbers: Array, entries: Array) -> Array:
    """Return the rows that the entries make, (inputs, outputs)."""
    xp = arrays.namespace(entries)
    runs, outputs = numbers.shape
    made = xp.reshape(xp.take(entries, xp.reshape(numbers, (-1,)), axis=0), (runs, outputs, entries.shape[1]))
    return xp.reshape(xp.permute_dims(made, (0, 2, 1)), (runs * entries.shape[1], outputs))
