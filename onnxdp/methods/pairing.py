"""Find the two factors of a rounded pair: atoms and codes fitted to one another, then rounded.

    min over D (rows, r), C (r, columns) of  |Y - X D C|^2 + ridge |W - D C|^2

Y is what the outputs should be, W itself speaks for the inputs that no probe shows, and X shows the atoms
once to every tap of the codes. A factorisation that takes these taps one by one is the start.

References
----------
method.md 1.3; Chee et al. 2023 (QuIP): what random rotations give rounding with error feedback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxdp import arrays, weights
from onnxdp.methods import dictionary, solvers
from onnxdp.methods.form import Task
from onnxdp.methods.problem import Problem
from onnxdp.methods.quantized import Quantized
from onnxdp.records import Array, Encoded, Params, Weight

NAME = "pair"
FACTORS = ("atoms", "codes")
RIDGE = 0.3
"""Of fitted codes, over that of a dictionary pair: on real pictures a hundredth less error than with 1."""
_ROUNDS = 2
_STEPS = 6
"""Rounds of fitting atoms to codes, and steps of each: 3 % less error, on real inputs, too."""


def kernels(weight: Weight, taps: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the kernels of atoms and codes."""
    kernel = weight.shape[2:] if weight.op == "Conv" else ()
    held = {"atoms": len(kernel), "both": 1, "codes": 0}[taps]
    ones = (1,) * len(kernel)
    return kernel[:held] + ones[held:], ones[:held] + kernel[held:]


def cut(weight: Weight, taps: str) -> tuple[int, int]:
    """Return rows and columns of the matrix that is factored."""
    rows = weight.channels * math.prod(kernels(weight, taps)[0]) if weight.op == "Conv" else weight.inputs
    return rows, weight.size // rows


def factors(weight: Weight, params: Params) -> list[tuple[Weight, Params]]:
    """Return atoms and codes as weights: kernels of a Conv, otherwise matrices; each with its params."""
    r, taps = int(params["atoms"]), str(params["taps"])
    m, n = cut(weight, taps)
    shapes: list[tuple[int, ...]] = [(r, m), (n, r)] if weight.transposed else [(m, r), (r, n)]
    sizes, own_taps = [(m, r), (r, n)], [1, 1]
    if weight.op == "Conv":
        first, second = kernels(weight, taps)
        shapes = [(r, weight.channels, *first), (weight.outputs, r, *second)]
        own_taps = [math.prod(first), math.prod(second)]
        sizes = [(m, r), (r * own_taps[1], weight.outputs)]
    return [
        (
            Weight(
                f"{weight.name}.{FACTORS[i]}",
                weight.op,
                weight.nodes,
                shapes[i],
                weight.dtype if params["run"] == "split" else "float32",
                0,
                *sizes[i],
                tap=own_taps[i],
                transposed=weight.transposed,
            ),
            {"levels": params[key]},
        )
        for i, key in enumerate(("levels", "code_levels"))
    ]


def joined(weight: Weight, params: Params, parts: Sequence[Encoded], error: float) -> Encoded:
    """Return the arrays of both factors as those of one weight."""
    held = {
        f"{role}.{kind}": array
        for role, part in zip(FACTORS, parts, strict=True)
        for kind, array in part.arrays.items()
    }
    return Encoded(weight.name, NAME, dict(params), held, error)


def apart(weight: Weight, encoded: Encoded) -> list[tuple[Weight, Encoded]]:
    """Undo :func:`_joined`."""
    return [
        (
            factor,
            Encoded(
                factor.name,
                Quantized.name,
                own,
                {
                    k.removeprefix(f"{role}."): a
                    for k, a in encoded.arrays.items()
                    if k.startswith(f"{role}.")
                },
                0.0,
            ),
        )
        for role, (factor, own) in zip(FACTORS, factors(weight, encoded.params), strict=True)
    ]


class Pairing:
    """One weight, moved to where it gives what its outputs lack, and factored one way."""

    def __init__(self, task: Task, taps: str, most: int, seed: int, device: str) -> None:
        self._task, self._device, self._seed = task, device, seed
        self._cut = rows, columns = cut(task.weight, taps)
        w = given = weights.blocks(task.weight, task.tensor).astype(np.float32, copy=False)
        if task.lack is not None:
            w = arrays.to_host(Problem.of(task, device).target(task, device))
        seen = self._one_by_one(task.samples)
        like = replace(task, samples=seen)
        stack = arrays.to_device(np.ascontiguousarray(w.reshape(1, rows, columns)), device)
        factored = solvers.exact(stack, dictionary.moment_of([like], "rows", 1, device), rank=most)
        atoms, codes = (arrays.to_host(f) for f in factored.pair(stack, min(most, rows, columns)))
        norms = np.linalg.norm(codes, axis=2, keepdims=True)
        norms[norms == 0] = 1
        self._seen, self._matrix = seen, w.reshape(rows, columns)
        self._atoms = atoms * norms.swapaxes(1, 2)  # rows of the codes alike, as rounding wants them
        self._wanted = given if task.samples is None else task.samples @ given
        if task.lack is not None and task.samples is not None:
            self._wanted = self._wanted + task.lack

    def lost(self, ranks: Sequence[int]) -> dict[int, float]:
        """Return the share of the squared outputs that each number of atoms leaves, codes fitted."""
        normal = self._normal(self._given(self._atoms), self._atoms)
        whole = float(np.vdot(self._wanted, self._wanted)) or 1.0
        found = {}
        for rank in ranks:
            own = slice(None, rank * (len(normal.gram) // self._atoms.shape[2]))
            codes = normal.codes(own)
            rest = np.vdot(codes, normal.gram[own, own] @ codes - 2 * normal.pull[own])
            found[rank] = max(1 + float(rest) / whole, 1e-12)
        return found

    def encoded(self, params: Params, *, quick: bool) -> Encoded:
        """Round the atoms, then the codes fitted to what these give."""
        weight, rank = self._task.weight, int(params["atoms"])
        (atoms_of, _), (codes_of, _) = factors(weight, params)
        found = self._atoms[:, :, :rank]
        found = found if quick else self._improved(found)
        atoms = weights.unblocks(atoms_of, found @ _turn(rank, self._seed))
        first = Task(atoms_of, atoms, self._seen, False)
        rounded = self._rounded(first, int(params["levels"]), quick=quick)
        kept = weights.blocks(atoms_of, Quantized().decode(atoms_of, rounded))
        x = self._given(kept)
        codes = self._normal(x, kept).codes(slice(None))[None].astype(np.float32)
        second = Task(codes_of, weights.unblocks(codes_of, codes), x, False)
        fitted = self._rounded(second, int(params["code_levels"]), quick=quick)
        lost = self._wanted - x @ weights.blocks(codes_of, Quantized().decode(codes_of, fitted))
        error = float(np.linalg.norm(lost) / (np.linalg.norm(self._wanted) or 1.0))
        return joined(weight, params, [rounded, fitted], error)

    def _improved(self, atoms: Array) -> Array:
        """Return atoms (1, rows, rank) fitted to their fitted codes, a few times.

        Their factorisation took every tap of the codes by itself; where there is one, nothing is better.
        """
        if self._seen is None or self._cut[0] == self._task.weight.inputs:
            return atoms
        d = atoms[0]
        for _ in range(_ROUNDS):
            d = self._nearer(d)
        codes = self._normal(self._given(d[None]), d[None]).codes(slice(None)).reshape(d.shape[1], -1)
        return np.asarray(d @ np.linalg.qr(codes.T).R.T.astype(np.float32))[None]

    def _nearer(self, d: Array) -> Array:
        """Move atoms (rows, rank) towards the best for the codes that are the best for them."""
        assert self._seen is not None
        seen, rank = self._seen[0], d.shape[1]
        normal = self._normal(self._given(d[None]), d[None])
        codes = normal.codes(slice(None)).astype(np.float32)
        flat, ridge = codes.reshape(rank, -1), np.float32(normal.ridge)
        square = ridge * (flat @ flat.T)

        def back(outputs: Array) -> Array:
            given = (outputs @ codes.T).reshape(-1, rank, codes.shape[0] // rank).swapaxes(1, 2)
            return np.asarray(seen.T @ given.reshape(-1, rank), np.float32)

        def curve(step: Array) -> Array:
            bent: Array = back(self._given(step[None])[0] @ codes) + step @ square
            return bent

        return _conjugate(curve, back(self._wanted[0]) + ridge * (self._matrix @ flat.T), d)

    def _rounded(self, task: Task, levels: int, *, quick: bool) -> Encoded:
        problem = Problem.of(task, self._device)
        return problem.encoded(task, {"levels": levels}, quick=quick, device=self._device)

    def _one_by_one(self, samples: Array | None) -> Array | None:
        """Return what the atoms see, (1, samples x taps of the codes, rows); None without samples."""
        if samples is None:
            return None
        rows = self._cut[0]
        return samples.reshape(1, samples.shape[1], rows, -1).swapaxes(2, 3).reshape(1, -1, rows)

    def _given(self, atoms: Array) -> Array:
        """Return what atoms (1, rows, rank) give to the codes, (1, samples, rank x taps of the codes)."""
        rank, inputs = atoms.shape[2], self._task.weight.inputs
        taps = inputs // self._cut[0]
        seen = self._seen
        if seen is None:
            seen = self._one_by_one(np.eye(inputs, dtype=np.float32)[None])
        assert seen is not None
        return (seen @ atoms).reshape(1, -1, taps, rank).swapaxes(2, 3).reshape(1, -1, rank * taps)

    def _normal(self, x: Array, atoms: Array) -> _Normal:
        """Return the equations of the codes of some atoms, which give them ``x``."""
        seen, wanted = (arrays.to_device(a, self._device) for a in (x, self._wanted))
        gram = arrays.gram(seen)
        pull = arrays.namespace(seen).matrix_transpose(seen) @ wanted
        d = atoms[0].astype(np.float64)
        taps = x.shape[2] // d.shape[1]
        prior = np.kron(d.T @ d, np.eye(taps)), (d.T @ self._matrix).reshape(x.shape[2], -1)
        ridge = 0.0
        if (samples := self._task.samples) is not None:
            _, rows, inputs = samples.shape
            mean = float(np.vdot(samples, samples)) / inputs
            share = dictionary.RIDGE[0] + dictionary.RIDGE[1] * min(1.0, inputs / rows)
            ridge = RIDGE * share * mean
        shown, told = (arrays.to_host(a)[0].astype(np.float64) for a in (gram, pull))
        return _Normal(shown, told, *prior, ridge)


@dataclass(frozen=True, slots=True)
class _Normal:
    """The normal equations of codes: of what the probes show, and of W itself, which speaks for all inputs.

    Attributes
    ----------
    gram, plain_gram : ndarray of shape (inputs, inputs), float64
    pull, plain_pull : ndarray of shape (inputs, outputs), float64
    ridge : float
        What the plain ones count.
    """

    gram: Array
    pull: Array
    plain_gram: Array
    plain_pull: Array
    ridge: float

    def codes(self, own: slice) -> Array:
        """Return the codes of some of the atoms."""
        gram = self.gram[own, own] + self.ridge * self.plain_gram[own, own]
        size = len(gram)
        floor = 1e-6 * (np.trace(gram) / size or 1.0)  # atoms that rounding made alike
        return np.linalg.solve(
            gram + floor * np.eye(size), self.pull[own] + self.ridge * self.plain_pull[own]
        )


def _conjugate(curve: Callable[[Array], Array], pull: Array, start: Array) -> Array:
    """Return a step of conjugate gradients towards the x of ``curve(x) = pull``, float32."""
    x = start
    rest = pull - curve(x)
    way, size = rest, float(np.vdot(rest, rest))
    for _ in range(_STEPS):
        if size == 0:
            break
        bent = curve(way)
        length = np.float32(size / float(np.vdot(way, bent)))
        x, rest = x + length * way, rest - length * bent
        now = float(np.vdot(rest, rest))
        way, size = rest + np.float32(now / size) * way, now
    return x


def _turn(rank: int, seed: int) -> Array:
    """Return a rotation, (rank, rank) float32, the same for a seed."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((rank, rank)))
    return turn.astype(np.float32)
