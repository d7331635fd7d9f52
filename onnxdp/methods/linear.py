"""The float64 kernels under the solvers: Gram matrices in row chunks, their spectra, roots and solutions.

Stacks (..., m, n) of any array API namespace; a large W is never copied to float64 as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from onnxdp.arrays import Array, double, eye, namespace, normal, try_cholesky, zeros
from onnxdp.errors import UsageError

Rows: TypeAlias = Callable[[slice], Array]
"""A matrix given by its rows, for one too large to be held twice."""

_CHUNK = 1 << 22  # numbers cast to float64 at a time: 32 MiB
_KRYLOV_SIDE = (
    1500  # below, all eigenvectors take under a second (one thread: 1000 0.14 s, 2048 1.4 s, 4096 12.6 s)
)
_KRYLOV_SHARE = 8  # rank at most side / 8: 4096 and 512 atoms then take 5 s, 256 atoms 1.7 s
_KRYLOV_BLOCKS = 10  # more, smaller blocks converge faster for the same size of the space


def chunks(w: Array) -> Iterator[slice]:
    """Yield slices of the rows of w (..., m, n) that hold about 32 MiB of float64 each."""
    row = 1
    for size in (*w.shape[:-2], w.shape[-1]):
        row *= max(size, 1)
    step = max(1, _CHUNK // row)
    for first in range(0, w.shape[-2], step):
        yield slice(first, min(first + step, w.shape[-2]))


def cross(a: Array, b: Array) -> Array:
    """Return a^T b, (..., p, q) float64, for a (..., m, p) and b (..., m, q)."""
    xp = namespace(a)
    total = zeros((*a.shape[:-2], a.shape[-1], b.shape[-1]), a)
    for rows in chunks(a if a.shape[-1] >= b.shape[-1] else b):
        left = double(a[..., rows, :])
        right = left if a is b else double(b[..., rows, :])  # the same object lets BLAS do half the work
        total += xp.matrix_transpose(left) @ right
    return total


def squares(like: Array, rows: Rows) -> Array:
    """Return the sum of squares, (...,) float64, of a matrix like `like` given by its rows."""
    xp = namespace(like)
    total = zeros(like.shape[:-2], like)
    for part in chunks(like):
        w = double(rows(part))
        total += xp.sum(w * w, axis=(-2, -1))
    return total


def trace(matrix: Array) -> Array:
    """Return the trace of (..., k, k)."""
    xp = namespace(matrix)
    return xp.sum(xp.linalg.diagonal(matrix), axis=-1)


def spectrum(gram: Array, rank: int | None = None) -> tuple[Array, Array]:
    """Return the eigenvalues (..., k) descending, at least 0, and eigenvectors (..., n, k) of a Gram matrix.

    Where the side is large and few are wanted, a block Krylov space gives them, checked by their residuals.

    Raises
    ------
    UsageError
        If the matrix holds NaN or infinity.
    """
    xp = namespace(gram)
    if not bool(xp.all(xp.isfinite(gram))):
        raise UsageError(
            "a Gram matrix holds NaN or infinity, so nothing can be solved; check weights and inputs."
        )
    if rank is not None and gram.shape[-1] >= _KRYLOV_SIDE and rank <= gram.shape[-1] // _KRYLOV_SHARE:
        found = leading(gram, rank)
        if found is not None:
            return found
    values, vectors = xp.linalg.eigh(gram)
    values, vectors = xp.flip(values, axis=-1)[..., :rank], xp.flip(vectors, axis=-1)[..., :rank]
    return xp.where(values > 0, values, xp.zeros_like(values)), vectors


def leading(gram: Array, rank: int) -> tuple[Array, Array] | None:
    """Return the leading eigenvalues (..., rank) and -vectors (..., n, rank), or None if they did not settle.

    The space has 4 rank dimensions and is built in float32; the Rayleigh-Ritz step and the check are float64.
    Accepted where sum_i |G v_i - theta_i v_i|^2 <= 1e-4 theta_rank tail (+ rounding). Measured: 2e-8 to 4e-6
    of the tail is lost for sigma_i ~ i^-0.3 ... i^-0.8, at most ten times what that sum says.

    References
    ----------
    C. Musco, C. Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
    decomposition", 2015, algorithm 2.
    """
    xp = namespace(gram)
    total = trace(gram)
    scale = xp.where(total > 0, total, xp.ones_like(total))[..., None, None]
    space = _krylov(xp.astype(gram / scale, xp.float32), rank)
    image = xp.astype(gram / scale, xp.float32) @ space
    _, turn = xp.linalg.eigh(double(_symmetric(xp.matrix_transpose(space) @ image)))
    wide = double(space @ xp.astype(turn[..., -rank:], xp.float32))
    basis = xp.linalg.qr(wide).Q
    image = gram @ basis
    values, turn = xp.linalg.eigh(_symmetric(xp.matrix_transpose(basis) @ image))
    values, turn = xp.flip(values, axis=-1), xp.flip(turn, axis=-1)
    basis = basis @ turn
    residual = xp.sum((image @ turn - basis * values[..., None, :]) ** 2, axis=-2)
    lost = xp.sum(residual, axis=-1) / values[..., -1]
    tail = total - xp.sum(values, axis=-1)
    settled = (values[..., -1] > 0) & (lost <= 1e-4 * tail + 1e-12 * total)
    return (values, basis) if bool(xp.all(settled)) else None


def cholesky(h: Array) -> Array:
    """Return lower S with S S^T = h (..., k, k) float64, plus the smallest ridge that lets it exist.

    Raises
    ------
    UsageError
        If a ridge of a hundredth of the mean diagonal is not enough.
    """
    factor = try_cholesky(h)
    if factor is not None:
        return factor
    if h.ndim > 2:  # one matrix of a stack must not change the ridge of the others
        return namespace(h).stack([cholesky(h[i, ...]) for i in range(h.shape[0])])
    mean = float(trace(h)) / h.shape[-1]
    for exponent in range(-12, -1):
        factor = try_cholesky(h + (10.0**exponent * mean or 1.0) * eye(h.shape[-1], h))
        if factor is not None:
            return factor
    raise UsageError(
        f"a second moment of size {h.shape[-1]} is not positive definite even with a ridge of 1 % of its "
        "diagonal, so its numbers are broken; check the inputs for NaN and infinity."
    )


def solve_gram(gram: Array, right: Array) -> Array:
    """Return the least-norm x (..., k, q), float64, of gram @ x = right; the Gram matrix may be singular."""
    xp = namespace(gram)
    norms = xp.sqrt(xp.linalg.diagonal(gram))
    scale = _inverse(norms, norms > 0)
    values, vectors = spectrum(gram * scale[..., :, None] * scale[..., None, :])
    inverse = _inverse(values, values > values[..., :1] * (gram.shape[-1] * 2.0**-50))
    turned = xp.matrix_transpose(vectors) @ (scale[..., :, None] * right)
    return scale[..., :, None] * (vectors @ (inverse[..., :, None] * turned))


def _inverse(values: Array, live: Array) -> Array:
    """Return 1 / values where live, 0 elsewhere."""
    xp = namespace(values)
    return xp.astype(live, values.dtype) / xp.where(live, values, xp.ones_like(values))


def _symmetric(matrix: Array) -> Array:
    return (matrix + namespace(matrix).matrix_transpose(matrix)) / 2


def _krylov(gram: Array, rank: int) -> Array:
    """Return an orthonormal basis (..., n, about 4 rank) of the space of G^i start, float32."""
    xp = namespace(gram)
    width = -(-4 * rank // _KRYLOV_BLOCKS)
    block = xp.broadcast_to(normal((gram.shape[-1], width), 0, gram), (*gram.shape[:-1], width))
    space = block = xp.linalg.qr(block).Q
    for _ in range(_KRYLOV_BLOCKS - 1):
        block = gram @ block
        for _ in range(2):  # once is not enough: what is left is small beside what is taken away
            block = block - space @ (xp.matrix_transpose(space) @ block)
        block = xp.linalg.qr(block).Q
        block = xp.linalg.qr(block - space @ (xp.matrix_transpose(space) @ block)).Q
        space = xp.concat([space, block], axis=-1)
    return space
