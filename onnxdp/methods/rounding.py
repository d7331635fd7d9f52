"""Round weights to a few levels so that little is lost of what the weight puts out: arrays only.

Minimised, per column of W (inputs x outputs), is ``(w - q)^T H (w - q)`` over ``q = s (k - (L - 1) / 2)``,
``k = 0 .. L - 1``, with H the second moment of the inputs. All functions take stacks of matrices.

References
----------
Frantar et al. 2022 (GPTQ) in the inverse-free form of Chee et al. 2023 (LDLQ): with H = (I + V) D (I + V)^T,
V strictly upper, row i is rounded after ``V[:i, i]^T (w - q)[:i]`` was added to it. method.md 4.2, 4.3.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from onnxdp import arrays
from onnxdp.arrays import Array
from onnxdp.errors import UsageError

_MOST = 1e32
"""Largest second moment that leaves room for what is worked out with it in float32."""
_BLOCK = 96
"""Rows that are rounded before the rest is told by one matrix product, ..."""
_ROWS = 16
"""... and before the rest of these."""
_SOLVED = 256
"""Rows that are solved for together."""
_SCALES = 16
"""Steps tried for every column by itself, before any is tried with feedback."""
_SPREAD = 0.2
"""How far from the best step without feedback steps are tried with it: 1 +- this / sqrt(levels)."""
_ONE_AT_A_TIME = threading.Lock()
"""Rounding row by row is Python: two threads at it take four times as long as one after the other does.

Each has its products to do meanwhile.
"""


@dataclass(frozen=True, slots=True)
class Curvature:
    """The metric of a stack of problems, factored once for all numbers of levels.

    Attributes
    ----------
    moment : array of shape (stack, inputs, inputs), float32
        H with its damping, rows in processing order.
    feedback : array of shape (stack, inputs, inputs), float32
        V of ``H = (I + V) D (I + V)^T``, strictly upper.
    pivots : array of shape (stack, inputs), float32
        D: what an error in one row costs when the rows after it make up for it.
    order : array of shape (stack, inputs), int64
        Processing order: falling diagonal of H.
    damping : array of shape (stack,), float32
    """

    moment: Array
    feedback: Array
    pivots: Array
    order: Array
    damping: Array

    @classmethod
    def of(cls, moment: Array, damping: Array) -> Curvature:
        """Factor ``moment`` (stack, inputs, inputs), ``damping`` (stack,) added to its diagonal.

        Where that is not positive definite in its precision, damping grows until it is.

        Raises
        ------
        UsageError
            ``moment`` holds a value that is not a number, or too large to be worked with in float32.
        """
        xp = arrays.namespace(moment)
        if not bool(xp.max(xp.linalg.diagonal(moment)) < _MOST):  # no number is larger beside these
            raise UsageError(
                "What a weight is fed holds a value that is not a number, or one beyond float32's range; "
                "give real inputs with --inputs or --calibrate."
            )
        order = xp.argsort(-xp.linalg.diagonal(moment), axis=-1, stable=True)
        h = take(moment, order)
        del moment  # large: of every matrix here there is one
        h = take(h, order, axis=1)
        _raise_diagonal(h, damping)
        while (feedback := _upper(h)) is None:
            _raise_diagonal(h, 9 * damping)
            damping = 10 * damping
        roots = xp.linalg.diagonal(feedback) + 0.0
        feedback /= roots[:, None, :]
        _raise_diagonal(feedback, -xp.ones_like(damping))
        single = xp.float32
        return cls(
            xp.astype(h, single, copy=False),
            xp.astype(feedback, single, copy=False),
            xp.astype(roots**2, single),
            order,
            xp.astype(damping, single),
        )

    @classmethod
    def flat(cls, inputs: int, like: Array) -> Curvature:
        """Return the plain norm: all inputs alike and unrelated."""
        xp = arrays.namespace(like)
        one = xp.astype(arrays.zeros((1, inputs), like), xp.float32) + 1.0
        order = xp.argsort(one, axis=-1, stable=True)
        return cls(one[:, :0, None], one[:, :0, None], one, order, one[:, 0] * 0)

    def solve(self, b: Array) -> Array:
        """Return ``H^-1 b``, b (stack, inputs, columns) in the weight's own order of rows."""
        xp = arrays.namespace(b)
        y = take(b, self.order) + 0.0
        starts = range(0, y.shape[1], _SOLVED)
        for i in reversed(starts):  # (I + V) y = b
            j = min(i + _SOLVED, y.shape[1])
            if j < y.shape[1]:
                y[:, i:j] -= self.feedback[:, i:j, j:] @ y[:, j:]
            y[:, i:j] = xp.linalg.solve(self._unit(i, j), y[:, i:j])
        y = y / self.pivots[:, :, None]
        for i in starts:  # (I + V)^T x = D^-1 y
            j = min(i + _SOLVED, y.shape[1])
            if i:
                y[:, i:j] -= xp.matrix_transpose(self.feedback[:, :i, i:j]) @ y[:, :i]
            y[:, i:j] = xp.linalg.solve(xp.matrix_transpose(self._unit(i, j)), y[:, i:j])
        return take(y, xp.argsort(self.order, axis=-1))

    def _unit(self, i: int, j: int) -> Array:
        """Return the rows and columns i to j of I + V."""
        xp = arrays.namespace(self.feedback)
        part = self.feedback[:, i:j, i:j]
        return part + xp.astype(arrays.eye(j - i, part), part.dtype)[None, ...]

    @property
    def plain(self) -> bool:
        """Whether this is the plain norm."""
        return bool(self.moment.shape[1] == 0)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rounded matrices.

    Attributes
    ----------
    digits : array of shape (stack, inputs, outputs), uint8, or uint16 above 255 levels; int16 of a lattice
        k, or whole steps, in the weight's own order of rows.
    scale : array of shape (stack, outputs), float32; (stack, blocks, outputs) of blocks
        The same for all parts of one column, but for those of blocks.
    error : array of shape (stack, outputs), float32
        ``(w - q)^T H (w - q)``, without the damping's share.
    energy : array of shape (stack, outputs), float32
        ``w^T H w``, likewise.
    """

    digits: Array
    scale: Array
    error: Array
    energy: Array


def round_weights(
    w: Array,
    curvature: Curvature,
    levels: int,
    *,
    parts: int = 1,
    tries: int = 3,
    sweeps: int = 3,
    blocks: int = 1,
) -> Rounded:
    """Round each column with a scale of its own, or one for each block of its rows.

    Parameters
    ----------
    w : array of shape (stack, inputs, outputs), float32
    curvature : Curvature
    levels : int
    parts : int
        Consecutive matrices of the stack that are one matrix, cut between its rows: their columns share a
        scale, and errors are fed back within a part only.
    tries : int
        Scales for which the whole column is rounded, an odd number; the best is kept, once refitted.
    sweeps : int
        Rounds of coordinate descent and of refitting the scales.
    blocks : int
        Consecutive, equal runs of rows in each matrix: their scales are chosen one by one, and refitted by a
        factor for the whole column.

    Returns
    -------
    Rounded
    """
    xp = arrays.namespace(w)
    half = (levels - 1) / 2
    own_steps = _block_scales(w, curvature, levels, blocks) if blocks > 1 else None
    grid = None if own_steps is None else _spread_out(own_steps, w, curvature)
    w = take(w, curvature.order)
    white = w if curvature.plain else whitened(w, curvature.feedback)
    first = xp.ones_like(w[:, 0, :])
    if grid is None:
        first = _first_scale(w, curvature.pivots, levels, parts)
    wide = _SPREAD / levels**0.5
    factors = [1 + wide * (2 * t / (tries - 1) - 1) for t in range(tries)] if tries > 1 else [1.0]
    scale, q, least, own = first, w, xp.full_like(first, float("inf")), first
    for factor in factors:
        step = first * factor
        unit = w / step[:, None, :]
        if curvature.plain:
            tried = _nearest(unit, half, grid)
            missed = unit - tried
        else:
            tried, missed = _feedback(unit, curvature.feedback, half, grid)
        more, error = fitted(white / step[:, None, :] - missed, missed, curvature.pivots, parts)
        more, error = step * more, step**2 * error
        whole = _joined(error, parts)
        hit = whole < least
        least, scale, own = (xp.where(hit, a, b) for a, b in ((whole, least), (more, scale), (error, own)))
        q = xp.where(hit[:, None, :], tried, q)
    if sweeps:
        q, scale, own = _swept(w, q, scale, curvature, half, parts, sweeps, grid)
    lost = w - q * scale[:, None, :]
    error = own - curvature.damping[:, None] * xp.sum(lost * lost, axis=1)
    energy = xp.sum(white * white * curvature.pivots[:, :, None], axis=1)
    energy -= curvature.damping[:, None] * xp.sum(w * w, axis=1)
    digits = q + half if grid is None else xp.round(q / grid + half)
    digits = take(digits, xp.argsort(curvature.order, axis=-1))
    scale = scale if own_steps is None else own_steps * scale[:, None, :]
    kind = xp.uint8 if levels <= 255 else xp.uint16
    return Rounded(xp.astype(digits, kind), scale, error, energy)


class Lattice:
    """A stack of matrices rounded to whole steps, however many, their steps moved by a common factor.

    Parameters
    ----------
    w : array of shape (stack, inputs, outputs), float32
    curvature : Curvature
    steps : array of shape (stack, outputs), float32
        The same for all parts of one column.
    parts : int
        As of :func:`round_weights`.
    """

    def __init__(self, w: Array, curvature: Curvature, steps: Array, *, parts: int) -> None:
        self._curvature, self._steps, self._parts = curvature, steps, parts
        self._w = take(w, curvature.order) / steps[:, None, :]
        self._hw: Array | None = None
        self._missed: Array | None = None
        self._q = self._w
        self._factor = 1.0

    def round(self, factor: float, most: int) -> None:
        """Round row after row with error feedback, at so many times the steps, at most so many from zero."""
        self._factor, unit = factor, self._w / factor
        if self._curvature.plain:
            self._q = _nearest(unit, most)
        else:
            self._q, self._missed = _feedback(unit, self._curvature.feedback, most)

    def sweep(self, factor: float, most: int) -> None:
        """Round every number once more, all others fixed (coordinate descent)."""
        if self._curvature.plain:
            return self.round(factor, most)
        self._missed = None  # large
        self._factor = factor
        _sweep(self._pull(), factor, self._q, self._curvature.moment, most)
        return None

    def _pull(self) -> Array:
        """Return ``H w``, in units of the steps: large, and the same whatever their factor."""
        if self._hw is None:
            self._hw = _times(self._curvature, self._w)
        return self._hw

    @property
    def integers(self) -> Array:
        """Whole steps, in the weight's own order of rows, (stack, inputs, outputs) int16."""
        xp = arrays.namespace(self._q)
        return xp.astype(take(self._q, xp.argsort(self._curvature.order, axis=-1)), xp.int16)

    def rounded(self) -> Rounded:
        """Fit the steps once more to the integers."""
        xp = arrays.namespace(self._q)
        scale, error, energy = self._swept() if self._missed is None else self._fed_back(self._missed)
        lost = self._w - self._q * scale[:, None, :]
        damping, square = self._curvature.damping[:, None], self._steps**2
        error = error - damping * xp.sum(lost * lost, axis=1)
        energy = energy - damping * xp.sum(self._w * self._w, axis=1)
        return Rounded(self.integers, scale * self._steps, error * square, energy * square)

    def _swept(self) -> tuple[Array, Array, Array]:
        """Return the best steps, in units of those given, and error and energy with the damping's share."""
        xp = arrays.namespace(self._q)
        hw, hq = self._pull(), _times(self._curvature, self._q)
        over, under = (_joined(xp.sum(self._q * x, axis=1), self._parts) for x in (hw, hq))
        scale = ratio(over, under, xp.full_like(over, self._factor))
        lost = self._w - self._q * scale[:, None, :]
        error = xp.sum(lost * (hw - hq * scale[:, None, :]), axis=1)
        return scale, error, xp.sum(self._w * hw, axis=1)

    def _fed_back(self, missed: Array) -> tuple[Array, Array, Array]:
        """Return the same from what feedback missed, a quarter of the products."""
        xp = arrays.namespace(self._q)
        white, pivots = whitened(self._w, self._curvature.feedback), self._curvature.pivots
        more, error = fitted(white / self._factor - missed, missed, pivots, self._parts)
        return (
            self._factor * more,
            self._factor**2 * error,
            xp.sum(white * white * pivots[:, :, None], axis=1),
        )


def _upper(h: Array) -> Array | None:
    """Return the upper triangular U of ``h = U U^T``, block column after block column from the last one."""
    xp = arrays.namespace(h)
    u = h + 0.0
    m = h.shape[-1]
    for i in reversed(range(0, m, _SOLVED)):
        j = min(i + _SOLVED, m)
        if j < m:
            u[:, :j, i:j] -= u[:, :j, j:] @ xp.matrix_transpose(u[:, i:j, j:])
        lower = arrays.try_cholesky(xp.flip(u[:, i:j, i:j], axis=(-2, -1)))
        if lower is None:
            return None
        corner = xp.flip(lower, axis=(-2, -1))
        if i:
            u[:, :i, i:j] = u[:, :i, i:j] @ xp.matrix_transpose(xp.linalg.inv(corner))
            u[:, i:j, :i] = 0.0
        u[:, i:j, i:j] = corner
    return u


def whitened(w: Array, feedback: Array) -> Array:
    """Return ``(I + V)^T w``, whose squares, times the pivots, add up to ``w^T H w``."""
    xp = arrays.namespace(w)
    white = w + 0.0
    for i in range(0, w.shape[1], _SOLVED):
        j = min(i + _SOLVED, w.shape[1])
        white[:, i:j, :] += xp.matrix_transpose(feedback[:, :j, i:j]) @ w[:, :j, :]
    return white


def fitted(q: Array, missed: Array, pivots: Array, parts: int = 1) -> tuple[Array, Array]:
    """Return the best scale for whitened levels, (stack, columns), and the error left, of each part.

    Parameters
    ----------
    q, missed : array of shape (stack, inputs, columns)
        The levels, and what a scale of 1 lacks, both whitened.
    pivots : array of shape (stack, inputs)
    parts : int
    """
    xp = arrays.namespace(q)
    d = pivots[:, :, None]
    over, under, error = (xp.sum(x * d, axis=1) for x in (q * missed, q * q, missed * missed))
    whole, size = _joined(over, parts), _joined(under, parts)
    fits = (size > 0) & (whole + size > 0)
    more = xp.where(fits, whole / xp.where(fits, size, xp.ones_like(size)), xp.zeros_like(size))
    return 1.0 + more, error - 2 * more * over + more**2 * under


def _swept(
    w: Array,
    q: Array,
    scale: Array,
    curvature: Curvature,
    half: float,
    parts: int,
    sweeps: int,
    grid: Array | None,
) -> tuple[Array, Array, Array]:
    """Return levels, scales and errors after rounds of coordinate descent and of refitting the scales."""
    xp = arrays.namespace(w)
    hw = hq = _times(curvature, w)
    for _ in range(sweeps):
        if curvature.plain:
            q = _nearest(w / scale[:, None, :], half, grid)
        else:
            _sweep(hw, scale[:, None, :], q, curvature.moment, half, grid)
        hq = _times(curvature, q)
        over, under = (_joined(xp.sum(q * x, axis=1), parts) for x in (hw, hq))
        scale = ratio(over, under, scale)
    step = scale[:, None, :]
    return q, scale, xp.sum((w - q * step) * (hw - hq * step), axis=1)


def _raise_diagonal(stack: Array, by: Array) -> None:
    """Add ``by`` (stack,) to the diagonals of (stack, m, m), in place."""
    xp = arrays.namespace(stack)
    m = stack.shape[-1]
    flat = xp.reshape(stack, (stack.shape[0], m * m), copy=False)
    flat[:, :: m + 1] += xp.astype(by, stack.dtype)[:, None]


def _feedback(w: Array, feedback: Array, half: float, grid: Array | None = None) -> tuple[Array, Array]:
    """Round row after row, each told the errors of those before it; all in units of the step.

    Levels are whole numbers and a half, or as many times the numbers of ``grid``, which is like ``w``.

    Returns
    -------
    array, array
        The levels, and what each row missed of its target: ``(I + V)^T (w - q)``.
    """
    xp = arrays.namespace(w)
    q, missed, lost = (xp.empty_like(w) for _ in range(3))
    inputs = w.shape[1]
    for i in range(0, inputs, _BLOCK):
        j = min(i + _BLOCK, inputs)
        given = w[:, i:j, :]
        target = given + 0.0
        if i:
            target += xp.matrix_transpose(feedback[:, :i, i:j]) @ lost[:, :i, :]
        part = None if grid is None else grid[:, i:j, :]
        q[:, i:j, :] = _in_turn(target, given, feedback[:, i:j, i:j], half, part)
        missed[:, i:j, :] = target - q[:, i:j, :]
        lost[:, i:j, :] = given - q[:, i:j, :]
    return q, missed


def _sweep(
    hw: Array, scale: Array | float, q: Array, moment: Array, half: float, grid: Array | None = None
) -> None:
    """Move every entry once to the level that is best with all others fixed (coordinate descent).

    Parameters
    ----------
    hw : array of shape (stack, inputs, columns)
        ``H w``.
    scale : array of shape (stack, 1, columns), or float
    q : array of the same shape as ``hw``
        The levels: changed in place, for they are large.
    moment : array of shape (stack, inputs, inputs)
        H.
    half : float
    grid : array of the same shape as ``hw``, or None
        As of :func:`_feedback`.
    """
    xp = arrays.namespace(q)
    diagonal = xp.linalg.diagonal(moment)[:, :, None]
    inputs = q.shape[1]
    for i in range(0, inputs, _BLOCK):
        j = min(i + _BLOCK, inputs)
        own, before = diagonal[:, i:j, :], q[:, i:j, :]
        pull = hw[:, i:j, :] / scale - moment[:, i:j, :] @ q  # no H q is kept up to date: that takes longer
        inner = xp.matrix_transpose(moment[:, i:j, i:j] / own)
        part = None if grid is None else grid[:, i:j, :]
        q[:, i:j, :] = _in_turn(before + pull / own, before, inner, half, part)


def _in_turn(aim: Array, given: Array, told: Array, half: float, grid: Array | None = None) -> Array:
    """Round row after row to the level nearest to its aim; what each lacks of ``given`` later ones are told.

    Parameters
    ----------
    aim : array of shape (stack, rows, columns)
        Changed in place, to what each row was rounded from.
    given : array of the same shape
    told : array of shape (stack, rows, rows)
        What rows (last axis) gain for what others before them lack.
    half : float
    grid : array of the same shape as ``aim``, or None

    Returns
    -------
    array of the same shape
    """
    xp = arrays.namespace(aim)
    low, high = _bounds(aim, half)
    q = xp.empty_like(aim)
    rows = aim.shape[1]
    with _ONE_AT_A_TIME:
        for i in range(0, rows, _ROWS):
            j = min(i + _ROWS, rows)
            for r in range(i, j):
                row = aim[:, r, :] if grid is None else aim[:, r, :] / grid[:, r, :]
                row = xp.minimum(xp.maximum(xp.round(row + half), low), high) - half
                q[:, r, :] = row if grid is None else row * grid[:, r, :]
                if r + 1 < j:
                    lost = given[:, r, :] - q[:, r, :]
                    aim[:, r + 1 : j, :] += told[:, r, r + 1 : j, None] * lost[:, None, :]
            if j < rows:
                lost = given[:, i:j, :] - q[:, i:j, :]
                aim[:, j:, :] += xp.matrix_transpose(told[:, i:j, j:]) @ lost
    return q


def _bounds(like: Array, half: float) -> tuple[Array, Array]:
    """Return the first and the last level's number, as arrays."""
    xp = arrays.namespace(like)
    zero = xp.astype(arrays.zeros((), like), like.dtype)
    return zero, zero + 2 * half


def _first_scale(w: Array, pivots: Array, levels: int, parts: int) -> Array:
    """Return for each column the step that rounds it best by itself, rows weighted by the pivots."""
    xp = arrays.namespace(w)
    half = (levels - 1) / 2
    top = _joined(xp.max(xp.abs(w), axis=1), parts, xp.max)
    top = xp.where(top > 0, top, xp.ones_like(top)) / half
    best, least = top, xp.full_like(top, float("inf"))
    low = 0.3 if levels < 32 else 0.6
    for c in range(_SCALES):
        scale = top * (low + (1.02 - low) * c / (_SCALES - 1))
        unit = w / scale[:, None, :]
        lost = unit - _nearest(unit, half)
        error = _joined(xp.sum(lost * lost * pivots[:, :, None], axis=1), parts) * scale**2
        hit = error < least
        best, least = xp.where(hit, scale, best), xp.where(hit, error, least)
    return best


def _block_scales(w: Array, curvature: Curvature, levels: int, blocks: int) -> Array:
    """Return the step for each block of rows that rounds it best by itself, (stack, blocks, outputs)."""
    xp = arrays.namespace(w)
    stack, inputs, outputs = w.shape
    pivots = take(curvature.pivots[:, :, None], xp.argsort(curvature.order, axis=-1))
    pivots = xp.broadcast_to(pivots[:, :, 0], (stack, inputs))
    cut = stack * blocks, inputs // blocks
    scales = _first_scale(xp.reshape(w, (*cut, outputs)), xp.reshape(pivots, cut), levels, 1)
    return xp.reshape(scales, (stack, blocks, outputs))


def _spread_out(steps: Array, w: Array, curvature: Curvature) -> Array:
    """Return the steps of blocks for every row, (stack, inputs, outputs), rows in processing order."""
    xp = arrays.namespace(w)
    return take(xp.repeat(steps, w.shape[1] // steps.shape[1], axis=1), curvature.order)


def _nearest(x: Array, half: float, grid: Array | None = None) -> Array:
    xp = arrays.namespace(x)
    low, high = _bounds(x, half)
    x = x if grid is None else x / grid
    x = xp.minimum(xp.maximum(xp.round(x + half), low), high) - half
    return x if grid is None else x * grid


def _times(curvature: Curvature, x: Array) -> Array:
    return x if curvature.plain else curvature.moment @ x


def _joined(x: Array, parts: int, how: Any = None) -> Array:
    """Sum (stack, columns) over the parts of each matrix (or what else ``how`` does), for every part."""
    xp = arrays.namespace(x)
    if parts == 1:
        return x
    together = xp.reshape(x, (-1, parts, x.shape[-1]))
    whole = (how or xp.sum)(together, axis=1)
    return xp.repeat(whole, parts, axis=0)


def ratio(over: Array, under: Array, otherwise: Array) -> Array:
    """Return ``over / under`` where both are positive, and ``otherwise`` elsewhere."""
    xp = arrays.namespace(over)
    fits = (under > 0) & (over > 0)
    return xp.where(fits, over / xp.where(fits, under, xp.ones_like(under)), otherwise)


def take(x: Array, order: Array, axis: int = 0) -> Array:
    """Permute the rows (or columns) of each matrix of a stack."""
    xp = arrays.namespace(x)
    last = order.shape[0] - 1
    if x.shape[0] == 1:  # large ones are
        return xp.take(x, order[0, :], axis=axis + 1)
    return xp.stack([xp.take(x[b, ...], order[min(b, last), :], axis=axis) for b in range(x.shape[0])])
