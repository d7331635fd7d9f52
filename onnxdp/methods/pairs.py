"""Rounded pairs: W ~ D C with few atoms, run as two small operators, both factors rounded and packed.

    D     atoms, the best of their number for what the weight sees, then rounded in that metric
    C     codes, fitted to what the rounded atoms give, then rounded

Each factor is a rounded weight of its own, with its own number of levels. D and C are turned by one rotation,
which costs nothing, because (D R)(R^T C) = D C: without it a step serves atoms of very different weight.

The kernel of a Conv goes to either factor, or its first axis to the atoms and the rest to the codes: then the
matrix that is factored has rows (channels x taps of the atoms) and columns (taps of the codes x outputs). On
the VGG the outputs' error at half the operations is half as large so as with all taps in the atoms.

References
----------
prototype.md section 5: direct rounding beats rounded pairs at equal bytes; what pairs give is fewer
operations. Jaderberg, Vedaldi, Zisserman 2014: separable kernels. Chee et al. 2023 (QuIP): what random
rotations give rounding with error feedback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxdp import arrays, weights
from onnxdp.build import Builder
from onnxdp.errors import PlanError
from onnxdp.methods import dictionary, emission, quantized, solvers
from onnxdp.methods.form import Solved, Task
from onnxdp.methods.quantized import Problem, Quantized
from onnxdp.records import Array, Candidate, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader

FACTORS = ("atoms", "codes")
_LEVELS = quantized.LEVELS[1:-1]
"""Numbers of levels of either factor; with two, a pair is worse than fewer atoms."""
_TRIED = (4, 16)
"""Numbers of levels whose errors are measured; those of the others lie on a line in logarithms."""
RIDGE = 0.3
"""Of fitted codes, over that of a dictionary pair: on real pictures a hundredth less error than with 1."""
_ROUNDS = 2
_STEPS = 6
"""Rounds of fitting atoms to codes, and steps of each: 3 % less error, on real inputs, too."""
_RANKS = 16
"""Most ranks of a weight that are candidates."""

LANES = 8
"""Atoms are a multiple of this: others drop the second Conv out of ONNX Runtime's layout (runtime.md 4)."""

TAPS = ("atoms", "both", "codes")
"""Who has the kernel of a Conv; for a matrix it is the atoms."""

Pair: TypeAlias = tuple[str, int, int, int]
"""Who has the taps, the number of atoms, and the levels of atoms and codes."""


class RoundedPair:
    """W ~ D C, both rounded."""

    name = "pair"
    sequential = True
    near = 1.5

    def supports(self, weight: Weight) -> str | None:
        """Refuse what has no matrix, or one too thin, and a grouped Conv."""
        if weight.groups > 1:
            return "rounded pairs rebuild weights of one group"
        return dictionary.DictionaryPair().supports(weight)

    def cost(self, weight: Weight, params: Params) -> int:
        """Bytes of words and steps of both factors."""
        return sum(Quantized().cost(f, p) for f, p in _factors(weight, params))

    def macs(self, weight: Weight, params: Params) -> float:
        """Return the multiply-accumulates over those of the weight as it was."""
        if params["run"] == "fold":
            return 1.0
        m, n = _cut(weight, str(params["taps"]))
        return int(params["atoms"]) * (m + n) / weight.size

    def check(self, weight: Weight, params: Params) -> None:
        """Refuse params that are no pair of this weight."""
        missing = sorted({"taps", "atoms", "levels", "code_levels", "run"} ^ set(params))
        if missing:
            raise PlanError(
                f"{weight.name}: pair takes taps, atoms, levels, code_levels and run, and {missing[0]!r} is "
                "missing or unknown; write the plan again."
            )
        if params["run"] not in ("fold", "split") or params["taps"] not in TAPS:
            raise PlanError(f"{weight.name}: run is fold or split, taps {', '.join(TAPS)}; correct them.")
        if params["taps"] != "atoms" and weight.op != "Conv":
            raise PlanError(
                f"{weight.name}: only a Conv has taps to share, so they are the atoms'; correct taps."
            )
        most = min(_cut(weight, str(params["taps"])))
        if not isinstance(params["atoms"], int) or not 1 <= params["atoms"] <= most:
            raise PlanError(
                f"{weight.name}: atoms is {params['atoms']!r} and must lie between 1 and {most}; correct it."
            )
        for factor, own in _factors(weight, params):
            Quantized().check(factor, own)

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return arrays of the right shapes and types."""
        return _joined(weight, params, [Quantized().outline(f, p) for f, p in _factors(weight, params)], 0.0)

    def groups(
        self, weights: Sequence[Weight], sources: Mapping[str, str], *, everywhere: bool
    ) -> Sequence[tuple[str, ...]]:
        """Share nothing."""
        return ()

    def solve(self, tasks: Sequence[Task], settings: Settings, *, device: str) -> Solved:
        """Factor once, and round a pair of middle rank to few and to many levels."""
        return _Pairs(tasks[0], settings.seed, device)

    def encode(self, task: Task, params: Params, settings: Settings, *, device: str) -> Encoded:
        """Round with care."""
        problem = _Problem(task, str(params["taps"]), int(params["atoms"]), settings.seed, device)
        return problem.encoded(params, tries=1 if task.quick else 3, sweeps=0 if task.quick else 3)

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Multiply the factors, in float32."""
        m, n = _cut(weight, str(encoded.params["taps"]))
        atoms, codes = (weights.blocks(f, Quantized().decode(f, e)) for f, e in _apart(weight, encoded))
        product = atoms.reshape(m, -1) @ codes.reshape(-1, n)
        return weights.unblocks(weight, product.reshape(1, weight.inputs, weight.outputs))

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Draw two operators in place of the reader, or the product of the factors."""
        split = reader is not None and encoded.params["run"] == "split"
        parts = _apart(
            weight, encoded if split else replace(encoded, params={**encoded.params, "run": "fold"})
        )

        def drawn(index: int) -> ir.Value:
            factor, own = parts[index]
            value = Quantized().emit(build.named(f"{build.weight}.{FACTORS[index]}"), factor, own, None)
            assert value is not None
            return value

        if reader is not None and split:
            first = len(parts[0][0].shape) - 2 if encoded.params["taps"] == "atoms" else 0
            first = 1 if encoded.params["taps"] == "both" else first
            emission.in_two(build, weight, reader, lambda: drawn(0), lambda: drawn(1), held=first)
            return None
        if weight.op != "Conv":
            return emission.product(build, weight, drawn(0), drawn(1))
        return _kernel(build, weight, drawn(0), drawn(1), int(encoded.params["atoms"]))


def _kernel(build: Builder, weight: Weight, atoms: ir.Value, codes: ir.Value, rank: int) -> ir.Value:
    """Multiply kernels, (rank, channels, taps of the atoms) and (outputs, rank, taps of the codes)."""
    flat = build.reshape(atoms, (rank, -1), "atoms.flat")
    turned = build.reshape(codes, (weight.outputs, rank, -1), "codes.flat")
    value = build.node("Transpose", [turned], "codes.turned", perm=[0, 2, 1])
    value = build.node("MatMul", [value, flat], "product")
    value = build.node("Transpose", [value], "order", perm=[0, 2, 1])
    value = build.reshape(value, weight.shape, "weight")
    return build.cast(value, weight.dtype, "type") if weight.dtype != "float32" else value


def _kernels(weight: Weight, taps: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the kernels of atoms and codes."""
    kernel = weight.shape[2:] if weight.op == "Conv" else ()
    held = {"atoms": len(kernel), "both": 1, "codes": 0}[taps]
    ones = (1,) * len(kernel)
    return kernel[:held] + ones[held:], ones[:held] + kernel[held:]


def _cut(weight: Weight, taps: str) -> tuple[int, int]:
    """Return rows and columns of the matrix that is factored."""
    rows = weight.channels * math.prod(_kernels(weight, taps)[0]) if weight.op == "Conv" else weight.inputs
    return rows, weight.size // rows


def _factors(weight: Weight, params: Params) -> list[tuple[Weight, Params]]:
    """Return atoms and codes as weights: kernels of a Conv, otherwise matrices; each with its params."""
    r, taps = int(params["atoms"]), str(params["taps"])
    m, n = _cut(weight, taps)
    shapes: list[tuple[int, ...]] = [(r, m), (n, r)] if weight.transposed else [(m, r), (r, n)]
    sizes, own_taps = [(m, r), (r, n)], [1, 1]
    if weight.op == "Conv":
        first, second = _kernels(weight, taps)
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


def _joined(weight: Weight, params: Params, parts: Sequence[Encoded], error: float) -> Encoded:
    """Return the arrays of both factors as those of one weight."""
    held = {
        f"{role}.{kind}": array
        for role, part in zip(FACTORS, parts, strict=True)
        for kind, array in part.arrays.items()
    }
    return Encoded(weight.name, RoundedPair.name, dict(params), held, error)


def _apart(weight: Weight, encoded: Encoded) -> list[tuple[Weight, Encoded]]:
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
        for role, (factor, own) in zip(FACTORS, _factors(weight, encoded.params), strict=True)
    ]


class _Problem:
    """One weight, moved to where it gives what its outputs lack, and factored one way."""

    def __init__(self, task: Task, taps: str, most: int, seed: int, device: str) -> None:
        self._task, self._taps, self._device, self._seed = task, taps, device, seed
        self._cut = rows, columns = _cut(task.weight, taps)
        w = weights.blocks(task.weight, task.tensor).astype(np.float32, copy=False)
        if task.lack is not None:
            w = arrays.to_host(Problem.of(task, device).target(task, device))
        seen = self._one_by_one(task.samples)
        like = replace(task, samples=seen)
        stack = arrays.to_device(np.ascontiguousarray(w.reshape(1, rows, columns)), device)
        factored = solvers.exact(stack, dictionary.moment_of([like], "rows", 1, device), rank=most)
        atoms, codes = (arrays.to_host(f) for f in factored.pair(stack, min(most, rows, columns)))
        norms = np.linalg.norm(codes, axis=2, keepdims=True)
        norms[norms == 0] = 1
        self._seen, self._atoms, self._codes = seen, atoms * norms.swapaxes(1, 2), codes / norms
        self._wanted = w if task.samples is None else task.samples @ w
        if task.lack is not None and task.samples is not None:
            given = weights.blocks(task.weight, task.tensor).astype(np.float32, copy=False)
            self._wanted = task.samples @ given + task.lack
        self._matrix = w.reshape(rows, columns)

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

    def encoded(self, params: Params, *, tries: int, sweeps: int) -> Encoded:
        """Round the atoms, then the codes fitted to what these give."""
        weight, rank, how = self._task.weight, int(params["atoms"]), {"tries": tries, "sweeps": sweeps}
        (atoms_of, _), (codes_of, _) = _factors(weight, params)
        found = self._atoms[:, :, :rank]
        found = self._improved(found) if sweeps else found
        atoms = weights.unblocks(atoms_of, found @ _turn(rank, self._seed))
        first = Task(atoms_of, atoms, self._seen, False)
        rounded = self._rounded(first, int(params["levels"]), **how)
        kept = weights.blocks(atoms_of, Quantized().decode(atoms_of, rounded))
        x = self._given(kept)
        codes = self._normal(x, kept).codes(slice(None))[None].astype(np.float32)
        second = Task(codes_of, weights.unblocks(codes_of, codes), x, False)
        fitted = self._rounded(second, int(params["code_levels"]), **how)
        lost = self._wanted - x @ weights.blocks(codes_of, Quantized().decode(codes_of, fitted))
        error = float(np.linalg.norm(lost) / (np.linalg.norm(self._wanted) or 1.0))
        return _joined(weight, params, [rounded, fitted], error)

    def _improved(self, atoms: Array) -> Array:
        """Return atoms (1, rows, rank) fitted to their fitted codes, a few times.

        Their factorisation took every tap of the codes by itself; where there is one, nothing is better.
        """
        if self._seen is None or self._cut[0] == self._task.weight.inputs:
            return atoms
        d = atoms[0]
        for _ in range(_ROUNDS):
            d = self._nearer(d)
        # rows of the codes alike, as rounding wants them
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
            return np.asarray(seen.T @ given.reshape(-1, rank))

        def curve(step: Array) -> Array:
            return back(self._given(step[None])[0] @ codes) + np.asarray(step @ square)

        return _conjugate(curve, back(self._wanted[0]) + ridge * (self._matrix @ flat.T), d)

    def _rounded(self, task: Task, levels: int, *, tries: int, sweeps: int) -> Encoded:
        problem = Problem.of(task, self._device)
        return problem.encoded(task, levels, tries=tries, sweeps=sweeps, device=self._device)

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


class _Pairs:
    """Rounded pairs of one weight.

    Some are made, of middle rank with few and with many levels; what rounding the others loses follows from
    these. What is made later changes no candidate: further targets see what the first saw.
    """

    def __init__(self, task: Task, seed: int, device: str) -> None:
        self._weight = task.weight
        self._device, self._seed = device, seed
        self._run, ways = _ways(task)
        self._lost: dict[tuple[str, int], float] = {}
        self._noise: dict[str, Array] = {}
        self._made: dict[Pair, Encoded] = {}
        self._costs: dict[tuple[tuple[int, ...], int], int] = {}
        for taps, ranks in ways.items():
            problem = _Problem(task, taps, ranks[-1], seed, device)
            self._lost |= {(taps, r): lost for r, lost in problem.lost(ranks).items()}
            middle = ranks[len(ranks) // 2]
            noise = []
            for levels in _TRIED:
                pair = taps, middle, levels, levels
                self._made[pair] = made = problem.encoded(self._params(pair), tries=1, sweeps=0)
                noise.append(math.log(max((made.error**2 - self._lost[taps, middle]) / 2, 1e-12)) / 2)
            self._noise[taps] = np.array(noise)
        self._tried = {pair: made.error for pair, made in self._made.items()}

    def candidates(self) -> Sequence[tuple[Candidate, ...]]:
        """Return the ways that no other of the same atoms beats in bytes and error."""
        return [(c,) for taps, rank in self._lost for c in self._alike(taps, rank)]

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        return [(self._candidate(pair),) for pair in self._tried]

    def ready(self, params: Sequence[Params]) -> bool:
        return _pair(params[0]) in self._made

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        pair = _pair(params[0])
        if pair not in self._made:
            problem = _Problem(tasks[0], pair[0], pair[1], self._seed, self._device)
            self._made[pair] = problem.encoded(params[0], tries=1, sweeps=0)
        return (self._made[pair],)

    def _params(self, pair: Pair) -> Params:
        taps, atoms, levels, code_levels = pair
        return {"taps": taps, "atoms": atoms, "levels": levels, "code_levels": code_levels, "run": self._run}

    def _alike(self, taps: str, rank: int) -> list[Candidate]:
        pairs = [(taps, rank, a, c) for a in _LEVELS for c in _LEVELS]
        kept: list[Candidate] = []
        for c in sorted(map(self._candidate, pairs), key=lambda c: (c.nbytes, c.error)):
            if not kept or c.error < kept[-1].error or _pair(c.params) in self._tried:
                kept.append(c)
        return kept

    def _candidate(self, pair: Pair) -> Candidate:
        params = self._params(pair)
        nbytes = sum(self._nbytes(f, int(p["levels"])) for f, p in _factors(self._weight, params))
        return Candidate(self._weight.name, RoundedPair.name, params, nbytes, self._error(pair))

    def _nbytes(self, factor: Weight, levels: int) -> int:
        """Return what one factor costs, counted once: that takes milliseconds."""
        key = factor.shape, levels
        if key not in self._costs:
            self._costs[key] = Quantized().cost(factor, {"levels": levels})
        return self._costs[key]

    def _error(self, pair: Pair) -> float:
        """Return the error of a pair: of what its atoms leave, and of rounding either factor."""
        if pair in self._tried:
            return self._tried[pair]
        taps, rank, *levels = pair
        steps, noise = np.log([n - 1 for n in _TRIED]), self._noise[taps]
        rounding = sum(math.exp(2 * quantized.along(math.log(n - 1), steps, noise)) for n in levels)
        return math.sqrt(self._lost[taps, rank] + rounding)


def _pair(params: Params) -> Pair:
    return str(params["taps"]), int(params["atoms"]), int(params["levels"]), int(params["code_levels"])


def _ways(task: Task) -> tuple[str, dict[str, list[int]]]:
    """Return how pairs of a weight run, and numbers of atoms for each way to share its taps.

    As two operators where that pays; otherwise pairs may save bytes, and all taps are the atoms'.
    """
    weight = task.weight
    if task.splittable:
        ways = TAPS if weight.op == "Conv" and weight.tap > 1 and task.even else TAPS[:1]
        ranks = {taps: _ranks(weight, taps, LANES, dictionary.MAX_MACS) for taps in ways}
        if found := {taps: own for taps, own in ranks.items() if own}:
            return "split", found
    ranks = {"atoms": _ranks(weight, "atoms", 1, 1.0)}
    return "fold", {taps: own for taps, own in ranks.items() if own}


def _ranks(weight: Weight, taps: str, step: int, share: float) -> list[int]:
    """Return multiples of ``step`` whose factors hold at most ``share`` of the numbers, some where many."""
    m, n = _cut(weight, taps)
    most = min(int(share * weight.size / (m + n)), m, n)
    ranks = list(range(step, most + 1, step))
    chosen = np.linspace(0, len(ranks) - 1, min(len(ranks), _RANKS)).round().astype(int)
    return [ranks[i] for i in chosen]
