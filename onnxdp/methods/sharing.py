"""One dictionary for several weights: what each of them keeps of itself, for every number of atoms.

    W_i ~ D C_i,   C_i = (D^T H_i D)^-1 D^T H_i W_i

With D^T H_i D = L L^T and T = L^-1 D^T H_i W_i, atom j removes ||T_j||^2 of W_i's squared error, whatever
comes after it, because a Cholesky factor is nested: one factorisation gives every rank here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxdp.arrays import Array, namespace
from onnxdp.methods.linear import cholesky, cross
from onnxdp.methods.solvers import Moment


@dataclass(frozen=True, slots=True, eq=False)
class Projected:
    """A weight seen through a dictionary of R atoms.

    Attributes
    ----------
    root : array of shape (blocks, R, R), float64
        L, lower.
    coordinates : array of shape (blocks, R, outputs), float64
        T.
    total : float
        tr(W^T H W) over all blocks.
    """

    root: Array
    coordinates: Array
    total: float

    def error(self, rank: int) -> float:
        """Return the relative error that the first ``rank`` atoms leave."""
        xp = namespace(self.coordinates)
        kept = float(xp.sum(self.coordinates[:, :rank, :] ** 2))
        return math.sqrt(max(0.0, 1.0 - kept / (self.total or 1.0)))

    def codes(self, rank: int) -> Array:
        """Return the best codes for the first ``rank`` atoms, (blocks, rank, outputs) float64."""
        xp = namespace(self.root)
        return xp.linalg.solve(xp.matrix_transpose(self.root[:, :rank, :rank]), self.coordinates[:, :rank, :])


def project(w: Array, atoms: Array, moment: Moment | None) -> Projected:
    """See a weight (blocks, m, n) through atoms (blocks, m, R), weighted by its own moment.

    Raises
    ------
    MethodError
        The atoms have no usable Gram matrix.
    """
    xp = namespace(w)
    if moment is None:
        gram, inner = cross(atoms, atoms), cross(atoms, w)
        total = float(xp.sum(xp.astype(w, xp.float64) ** 2))
    else:
        gram, inner = moment.cross(atoms, atoms), moment.cross(atoms, w)
        total = float(xp.sum(moment.energy(lambda rows: w[..., rows, :], w)))
    root = cholesky(gram)
    return Projected(root, xp.linalg.solve(root, inner), total)
