"""Solvers of the dictionary pair: W ~ D C with few atoms, plain or weighted by a second moment.

    min over D (m, r), C (r, n) of  tr((W - D C)^T H (W - D C)),      H = X^T X + ridge I,  or I

`exact` factors once and gives every rank, `randomized` finds a range by power iteration, `dpl` is the paper's
iteration. All take stacks (..., m, n) of any array API namespace; random numbers come in as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnxdp.arrays import Array, double, eye, namespace, zeros
from onnxdp.errors import MethodError
from onnxdp.methods.linear import Rows, cholesky, chunks, cross, solve_gram, spectrum, squares, trace


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """The second moment H = X^T X + ridge I of a weight's input, never formed unless asked.

    Attributes
    ----------
    samples : array of shape (..., s, m)
        Rows x of the input, centred and divided by sqrt(s); (s, m) is one moment for a stack of weights.
    ridge : float or array of shape (...,)
        Absolute, in units of H.
    """

    samples: Array
    ridge: float | Array = 0.0

    def apply(self, w: Array) -> Array:
        """Return H w, shape and dtype of w (..., m, n)."""
        xp = namespace(w)
        x = xp.astype(self.samples, w.dtype, copy=False)
        return xp.matrix_transpose(x) @ (x @ w) + xp.astype(self._ridge(w), w.dtype, copy=False) * w

    def gram(self, w: Array) -> Array:
        """Return w^T H w, (..., n, n) float64."""
        return self.cross(w, w)

    def cross(self, a: Array, b: Array) -> Array:
        """Return a^T H b, (..., p, q) float64, for a (..., m, p) and b (..., m, q)."""
        left = self._project(a)
        right = left if a is b else self._project(b)
        gram = namespace(a).matrix_transpose(left) @ right
        if isinstance(self.ridge, int | float) and self.ridge == 0:
            return gram
        return gram + self._ridge(a) * cross(a, b)

    def energy(self, rows: Rows, like: Array) -> Array:
        """Return tr(w^T H w), (...,) float64, of a w like `like` given by its rows."""
        xp = namespace(like)
        seen = zeros(self._seen(like), like)
        plain = zeros(like.shape[:-2], like)
        for part in chunks(like):
            w = double(rows(part))
            seen += double(self.samples[..., :, part]) @ w
            plain += xp.sum(w * w, axis=(-2, -1))
        return xp.sum(seen * seen, axis=(-2, -1)) + self._ridge(like)[..., 0, 0] * plain

    def dense(self) -> Array:
        """Return H, (..., m, m) float64."""
        x = double(self.samples)
        return namespace(x).matrix_transpose(x) @ x + self._ridge(x) * eye(x.shape[-1], x)

    def _project(self, w: Array) -> Array:
        """Return X w, (..., s, n) float64.

        Factors in float32 are multiplied as such: of what is rounded so the singular values are good to eps32
        of the first. A Gram matrix formed so would have them good to its root only.
        """
        return double(self.samples @ w if self.samples.dtype == w.dtype else self.samples @ double(w))

    def _seen(self, w: Array) -> tuple[int, ...]:
        """Return the shape of X w."""
        stack = max(w.shape[:-2], self.samples.shape[:-2], key=len)
        return (*stack, self.samples.shape[-2], w.shape[-1])

    def _ridge(self, like: Array) -> Array:
        """Return the ridge as float64, (1, 1) or (..., 1, 1)."""
        if isinstance(self.ridge, int | float):
            return zeros((1, 1), like) + float(self.ridge)
        return double(self.ridge)[..., None, None]


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """One factorisation: every rank for free.

    Either the codes' basis is kept (`right`: atoms = W V, codes = V^T) or the atoms' (`left`, `dual`: atoms =
    left, codes = dual^T W), whichever side is smaller.

    Attributes
    ----------
    energies : array of shape (..., k), float64
        Descending; the squared (weighted) error that atom i removes.
    total : array of shape (...,), float64
        tr(W^T H W), the squared error of no atoms.
    complete : bool
        Whether the energies are all there are, so that their sum is the total.
    right : array of shape (..., n, k), of W's dtype, or None
    left, dual : arrays of shape (..., m, k), of W's dtype, or None
    """

    energies: Array
    total: Array
    complete: bool
    right: Array | None = None
    left: Array | None = None
    dual: Array | None = None

    def tail(self, rank: int) -> Array:
        """Return the squared error that `rank` atoms leave, (...,) float64."""
        xp = namespace(self.energies)
        if self.complete:  # a sum of small numbers: nothing cancels
            return xp.sum(self.energies[..., rank:], axis=-1)
        left = self.total - xp.sum(self.energies[..., :rank], axis=-1)
        return xp.where(left > 0, left, xp.zeros_like(left))

    def pair(self, w: Array, rank: int) -> tuple[Array, Array]:
        """Return atoms (..., m, rank), codes (..., rank, n) in w's dtype, atom i and code i of equal norm."""
        xp = namespace(w)
        if rank > self.energies.shape[-1]:
            raise MethodError(
                f"{rank} atoms were asked of a factorisation that holds {self.energies.shape[-1]}; "
                "ask for fewer, or factor with a higher rank."
            )
        if self.right is not None:
            basis = self.right[..., :rank]
            return balance(w @ basis, xp.matrix_transpose(basis))
        assert self.left is not None and self.dual is not None
        return balance(self.left[..., :rank], xp.matrix_transpose(self.dual[..., :rank]) @ w)


def exact(w: Array, moment: Moment | None = None, *, rank: int | None = None) -> Factored:
    """Factor once through the Gram matrix of the smaller side, in float64.

    With n <= m the eigenvectors V of W^T H W give D = W V_r, C = V_r^T (no inverse, any H).
    Otherwise H = S S^T and the eigenvectors U of S^T W W^T S give D = S^-T U_r, C = U_r^T S^T W.

    Parameters
    ----------
    w : array of shape (..., m, n), float32 or float64
    moment : Moment, optional
        Weighs the error; None is the plain Frobenius norm.
    rank : int, optional
        The most atoms that will be asked for; None keeps all. A small rank of a large matrix is found by
        `linear.leading` to the bound stated there.

    Raises
    ------
    UsageError
        If H has no Cholesky factor even with a ridge.

    References
    ----------
    C. Eckart, G. Young, 1936; P. Chen, H.-F. Yu, I. Dhillon, C.-J. Hsieh, "DRONE", 2021.
    """
    xp = namespace(w)
    if w.shape[-1] <= w.shape[-2]:
        gram = cross(w, w) if moment is None else moment.gram(w)
        energies, basis = spectrum(gram, rank)
        return Factored(energies, trace(gram), energies.shape[-1] == w.shape[-1], right=_like(basis, w))
    gram = cross(xp.matrix_transpose(w), xp.matrix_transpose(w))
    if moment is None:
        energies, basis = spectrum(gram, rank)
        basis = _like(basis, w)
        return Factored(energies, trace(gram), energies.shape[-1] == w.shape[-2], left=basis, dual=basis)
    root = cholesky(moment.dense())
    gram = xp.matrix_transpose(root) @ gram @ root
    energies, basis = spectrum(gram, rank)
    left = xp.linalg.solve(xp.broadcast_to(xp.matrix_transpose(root), gram.shape), basis)
    complete = energies.shape[-1] == w.shape[-2]
    return Factored(energies, trace(gram), complete, left=_like(left, w), dual=_like(root @ basis, w))


def _like(basis: Array, w: Array) -> Array:
    """Return a basis in W's dtype, which is all that :meth:`Factored.pair` looks at: half the memory or less.

    A copy: the eigenvectors that are not wanted can go.
    """
    return namespace(w).astype(basis, w.dtype, copy=True)


def randomized(
    w: Array, rank: int, *, start: Array, moment: Moment | None = None, power: int = 2
) -> Factored:
    """Factor by a randomized range finder for the rows of W, with power iterations.

    Parameters
    ----------
    w : array of shape (..., m, n)
    rank : int
        The most atoms that will be asked for.
    start : array of shape (..., n, rank + p)
        Standard normal numbers; p = 8 is a good oversampling.
    power : int
        Rounds q. With G = W^T H W the range of G^(q+1) start is kept; before it is cut to `rank` its expected
        spectral error is at most (1 + sqrt(r/(p-1)) + e sqrt(r+p)/p sqrt(n-r))^(1/(2q+2)) sigma_(r+1).

    References
    ----------
    N. Halko, P.-G. Martinsson, J. Tropp, "Finding structure with randomness", 2011, corollary 10.10.
    """
    xp = namespace(w)
    basis = xp.astype(start, w.dtype, copy=False)[..., : min(start.shape[-1], w.shape[-1])]
    for _ in range(power + 1):
        basis = xp.linalg.qr(basis).Q  # without it float32 loses the small directions
        image = w @ basis
        basis = xp.matrix_transpose(w) @ (image if moment is None else moment.apply(image))
    basis = xp.linalg.qr(basis).Q
    image = w @ basis
    energies, turn = spectrum(cross(image, image) if moment is None else moment.gram(image))
    rank = min(rank, *w.shape[-2:])
    total = _energy(w, lambda rows: w[..., rows, :], moment)
    return Factored(energies[..., :rank], total, False, right=_like(double(basis) @ turn[..., :rank], w))


def dpl(
    w: Array,
    rank: int,
    *,
    start: Array,
    moment: Moment | None = None,
    iterations: int = 20,
    tau: float = 0.05,
    admm: bool = False,
) -> tuple[Array, Array]:
    """Run the published iteration of dictionary pair learning, then refit the codes.

    Alternates, on W scaled to unit spectral norm,

        A <- (D^T D + tau I)^-1 (D^T W + tau P W)
        P <- tau A W^T (tau W W^T + gamma I)^-1            gamma = 1e-3 tau sigma_r^2
        D <- argmin ||W - D A||^2                          columns normalised, or at most 1 by ADMM

    Only P W is needed, so P is never formed. A second moment is met by a plain problem of equal error: R with
    R^T R = W^T H W where n <= m, S^T W with S S^T = H otherwise.

    Parameters
    ----------
    w : array of shape (..., m, n)
    start : array of shape (..., m, rank)
        Random first atoms.
    admm : bool
        Hold the columns of D to norm 1 by ADMM, as published, with a relative rho.

    Returns
    -------
    atoms : array of shape (..., m, rank)
    codes : array of shape (..., rank, n)

    References
    ----------
    S. Gu, L. Zhang, W. Zuo, X. Feng, "Projective dictionary pair learning", 2014, equations 5 to 12.
    """
    xp = namespace(w)
    start = xp.astype(start, w.dtype, copy=False)[..., :rank]
    update = _admm_atoms if admm else _least_squares_atoms
    if moment is None:
        atoms = _iterate(w, start, iterations, tau, update)
        return balance(atoms, refit_codes(w, atoms))
    if w.shape[-1] <= w.shape[-2]:
        target = xp.astype(xp.matrix_transpose(cholesky(moment.gram(w))), w.dtype, copy=False)
        start = target @ (xp.matrix_transpose(w) @ start)
        codes = refit_codes(target, _iterate(target, start, iterations, tau, update))
        return balance(refit_atoms(w, codes), codes)
    root = cholesky(moment.dense())
    root_t = xp.astype(xp.matrix_transpose(root), w.dtype, copy=False)
    target = root_t @ w
    start = root_t @ start
    whitened = _iterate(target, start, iterations, tau, update)
    root_t = xp.broadcast_to(xp.matrix_transpose(root), (*w.shape[:-2], *root.shape[-2:]))
    atoms = xp.astype(xp.linalg.solve(root_t, double(whitened)), w.dtype, copy=False)
    return balance(atoms, refit_codes(w, atoms, moment))


def refit_codes(w: Array, atoms: Array, moment: Moment | None = None) -> Array:
    """Return the best codes for given atoms, C = (D^T H D)^+ D^T H W, (..., r, n) in w's dtype."""
    if moment is None:
        gram, right = cross(atoms, atoms), cross(atoms, w)
    else:
        gram, right = moment.gram(atoms), moment.cross(atoms, w)
    return namespace(w).astype(solve_gram(gram, right), w.dtype, copy=False)


def refit_atoms(w: Array, codes: Array) -> Array:
    """Return the best atoms for given codes, D = W C^T (C C^T)^+, (..., m, r) in w's dtype, whatever H is."""
    xp = namespace(w)
    rows = xp.matrix_transpose(codes)
    gram = cross(rows, rows)
    inverse = solve_gram(gram, xp.broadcast_to(eye(gram.shape[-1], gram), gram.shape))
    return w @ xp.astype(double(rows) @ inverse, w.dtype, copy=False)


def error(w: Array, approximation: Array, moment: Moment | None = None) -> Array:
    """Return the relative error sqrt(tr(E^T H E) / tr(W^T H W)), E = W - approximation, (...,) float64.

    A zero W gives 0 where the approximation is zero too, infinity otherwise.
    """
    return _relative_error(w, lambda rows: w[..., rows, :] - approximation[..., rows, :], moment)


def pair_error(w: Array, atoms: Array, codes: Array, moment: Moment | None = None) -> Array:
    """Return `error` of the pair's product, which is formed a few rows at a time, (...,) float64."""
    return _relative_error(w, lambda rows: w[..., rows, :] - atoms[..., rows, :] @ codes, moment)


def balance(atoms: Array, codes: Array) -> tuple[Array, Array]:
    """Scale atom i and code i to equal norm; the product stays, and both fit float16 best."""
    xp = namespace(atoms)
    a = xp.sqrt(xp.sum(atoms * atoms, axis=-2))
    c = xp.sqrt(xp.sum(codes * codes, axis=-1))
    live = (a > 0) & (c > 0)
    one = xp.ones_like(a)
    scale = xp.sqrt(xp.where(live, c, one) / xp.where(live, a, one))
    mask = xp.astype(live, a.dtype)
    return atoms * (scale * mask)[..., None, :], codes * (mask / scale)[..., :, None]


def _relative_error(w: Array, residual: Rows, moment: Moment | None) -> Array:
    xp = namespace(w)
    left, total = _energy(w, residual, moment), _energy(w, lambda rows: w[..., rows, :], moment)
    some = total > 0
    ratio = xp.sqrt(left / xp.where(some, total, xp.ones_like(total)))
    return xp.where(some | (left == 0), ratio, xp.full_like(ratio, float("inf")))


def _energy(like: Array, rows: Rows, moment: Moment | None) -> Array:
    """Return the squared (weighted) norm of a matrix given by its rows, (...,) float64."""
    return squares(like, rows) if moment is None else moment.energy(rows, like)


def _iterate(
    w: Array, start: Array, iterations: int, tau: float, update: Callable[[Array, Array, Array, Array], Array]
) -> Array:
    """Alternate codes, analysis and atoms; return the atoms (..., m, r)."""
    xp = namespace(w)
    wide = w.shape[-2] < w.shape[-1]
    side = xp.matrix_transpose(w) if wide else w
    values, vectors = spectrum(cross(side, side))
    rank = start.shape[-1]
    top = xp.where(values[..., :1] > 0, values[..., :1], xp.ones_like(values[..., :1]))
    w = w / xp.astype(xp.sqrt(top), w.dtype, copy=False)[..., None]
    values = values / top
    smallest = values[..., min(rank, values.shape[-1]) - 1][..., None]
    smallest = xp.where(smallest > 1e-12, smallest, xp.full_like(smallest, 1e-12))
    # P W = A W^T K W = A M: K and M from the one eigendecomposition, of the smaller side
    shrink = tau / (tau * values + 1e-3 * tau * smallest) * (1.0 if wide else values)
    kernel = xp.astype((vectors * shrink[..., None, :]) @ xp.matrix_transpose(vectors), w.dtype, copy=False)
    atoms, _ = _unit_columns(start)
    analysed = xp.zeros_like(xp.matrix_transpose(atoms) @ w)
    for _ in range(iterations):
        left = cross(atoms, atoms) + tau * eye(rank, w)
        right = double(xp.matrix_transpose(atoms) @ w + tau * analysed)
        codes = xp.astype(xp.linalg.solve(left, right), w.dtype, copy=False)
        atoms = update(w, codes, atoms, smallest)
        atoms, norms = _unit_columns(atoms)
        codes = codes * norms[..., :, None]
        analysed = ((codes @ xp.matrix_transpose(w)) @ kernel) @ w if wide else codes @ kernel
    return atoms


def _least_squares_atoms(w: Array, codes: Array, atoms: Array, smallest: Array) -> Array:
    """D = W A^T (A A^T + eps I)^-1, eps = 1e-8 of the mean diagonal."""
    xp = namespace(w)
    rows = double(xp.matrix_transpose(codes))
    gram = xp.matrix_transpose(rows) @ rows
    eps = 1e-8 * trace(gram) / gram.shape[-1]
    eps = xp.where(eps > 0, eps, xp.ones_like(eps))[..., None, None]
    right = xp.matrix_transpose(
        xp.linalg.solve(gram + eps * eye(gram.shape[-1], w), xp.matrix_transpose(rows))
    )
    return w @ xp.astype(right, w.dtype, copy=False)


def _admm_atoms(w: Array, codes: Array, atoms: Array, smallest: Array) -> Array:
    """ADMM for min ||W - D A||^2, columns of norm at most 1; rho grows by 1.2 from 0.1 sigma_r^2."""
    xp = namespace(w)
    rows = xp.matrix_transpose(codes)
    gram, target = cross(rows, rows), double(w @ rows)
    unit = eye(gram.shape[-1], w)
    rho = 0.1 * smallest[..., None]
    d = s = double(atoms)
    t = xp.zeros_like(s)
    done = zeros((*w.shape[:-2], 1, 1), w) > 0
    for _ in range(100):
        right = xp.matrix_transpose(target + rho * (s - t))
        new = xp.matrix_transpose(xp.linalg.solve(gram + rho * unit, right))
        clipped = new + t
        norms = xp.sqrt(xp.sum(clipped * clipped, axis=-2, keepdims=True))
        clipped = clipped / xp.where(norms > 1, norms, xp.ones_like(norms))
        change = xp.mean((new - d) ** 2, axis=(-2, -1), keepdims=True)
        # a matrix of the stack that has converged stands still, so a stack does what a loop would
        s, t, d = xp.where(done, s, clipped), xp.where(done, t, t + new - clipped), xp.where(done, d, new)
        done = done | (change < 1e-8)
        if bool(xp.all(done)):
            break
        rho = 1.2 * rho
    return xp.astype(d, w.dtype, copy=False)


def _unit_columns(d: Array) -> tuple[Array, Array]:
    """Return d with columns of norm 1 (or 0), and the norms (..., r)."""
    xp = namespace(d)
    norms = xp.sqrt(xp.sum(d * d, axis=-2))
    return d / xp.where(norms > 0, norms, xp.ones_like(norms))[..., None, :], norms
