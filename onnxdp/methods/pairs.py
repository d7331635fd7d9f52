"""Rounded pairs: W ~ D C with few atoms, run as two small operators, both factors rounded and packed.

    D C = the W whose outputs W X comes nearest to          atoms rounded to D', in the metric of the inputs
    C' = rounded (D'^T H D')^-1 D'^T H W                    codes fitted to what D' gives, then rounded

Each factor is a rounded weight of its own, with its own number of levels. D and C are turned by one rotation,
which costs nothing, because (D R)(R^T C) = D C: without it a step serves atoms of very different weight.

References
----------
prototype.md section 5: direct rounding beats rounded pairs at equal bytes; what pairs give is fewer
operations. Chee et al. 2023 (QuIP): what random rotations give rounding with error feedback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

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
_RANKS = 16
"""Most ranks of a weight that are candidates."""

_WHOLE: Params = {"axis": "rows", "parts": 1}
"""How a dictionary pair says that a matrix is not cut."""

Pair: TypeAlias = tuple[int, int, int]
"""Atoms, and the levels of atoms and codes."""


class RoundedPair:
    """W ~ D C, both rounded."""

    name = "pair"
    sequential = True
    near = 3.0

    def supports(self, weight: Weight) -> str | None:
        """Refuse what has no matrix, or one too thin; a grouped Conv, whose pair would be as many small ones."""
        if weight.groups > 1:
            return "rounded pairs rebuild weights of one group"
        return dictionary.DictionaryPair().supports(weight)

    def cost(self, weight: Weight, params: Params) -> int:
        """Bytes of words and steps of both factors."""
        return sum(Quantized().cost(f, p) for f, p in _factors(weight, params))

    def macs(self, weight: Weight, params: Params) -> float:
        """Return the multiply-accumulates over those of the weight as it was."""
        return dictionary.DictionaryPair().macs(weight, {**params, **_WHOLE})

    def check(self, weight: Weight, params: Params) -> None:
        """Refuse params that are no pair of this weight."""
        if set(params) != {"atoms", "run", "levels", "code_levels"}:
            raise PlanError(f"{weight.name}: pair takes atoms, levels, code_levels and run; write the plan again.")
        dictionary.DictionaryPair().check(
            weight, {**_WHOLE, "atoms": params["atoms"], "run": params["run"], "dtype": "float16"}
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
        problem = _Problem(task, settings.seed, device, int(params["atoms"]))
        return problem.encoded(params, tries=1 if task.quick else 3, sweeps=0 if task.quick else 3)

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Multiply the factors, in float32."""
        atoms, codes = (
            weights.blocks(f, Quantized().decode(f, e)) for f, e in _apart(weight, encoded)
        )
        return weights.unblocks(weight, atoms @ codes)

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Draw two operators in place of the reader, or the product of the factors."""
        params = dict(encoded.params)
        if reader is None:
            params["run"] = "fold"
        parts = _apart(weight, replace(encoded, params=params))

        def drawn(index: int) -> ir.Value:
            factor, own = parts[index]
            value = Quantized().emit(build.named(f"{build.weight}.{FACTORS[index]}"), factor, own, None)
            assert value is not None
            return value

        if params["run"] == "fold" or reader is None:
            return emission.product(build, weight, drawn(0), drawn(1))
        emission.in_two(build, weight, reader, lambda: drawn(0), lambda: drawn(1))
        return None



def _factors(weight: Weight, params: Params) -> list[tuple[Weight, Params]]:
    """Return atoms and codes as weights: of a split Conv kernels, otherwise matrices; each with its params."""
    m, n, r = weight.inputs, weight.outputs, int(params["atoms"])
    split = params["run"] == "split"
    shapes: list[tuple[int, ...]] = [(r, m), (n, r)] if weight.transposed else [(m, r), (r, n)]
    op, tap = "MatMul", 1
    if split and weight.op == "Conv":
        shapes = [(r, *weight.shape[1:]), (n, r, *[1] * (len(weight.shape) - 2))]
        op, tap = "Conv", weight.tap
    return [
        (
            Weight(
                f"{weight.name}.{role}",
                op,
                weight.nodes,
                shape,
                weight.dtype if split else "float32",
                0,
                inputs,
                outputs,
                tap=own_tap,
                transposed=weight.transposed,
            ),
            {"levels": params[key]},
        )
        for role, shape, inputs, outputs, own_tap, key in (
            (FACTORS[0], shapes[0], m, r, tap, "levels"),
            (FACTORS[1], shapes[1], r, n, 1, "code_levels"),
        )
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
                {k.removeprefix(f"{role}."): a for k, a in encoded.arrays.items() if k.startswith(f"{role}.")},
                0.0,
            ),
        )
        for role, (factor, own) in zip(FACTORS, _factors(weight, encoded.params), strict=True)
    ]


class _Problem:
    """One weight, moved to where it gives what its outputs lack, and factored."""

    def __init__(self, task: Task, seed: int, device: str, most: int) -> None:
        self.task = task
        self._device = device
        self._seed = seed
        self._problem = Problem.of(task, device)
        self.target = self._problem.target(task, device)
        moment = dictionary.moment_of([task], "rows", 1, device)
        self.factored = solvers.exact(self.target, moment, rank=most)

    def lost(self, ranks: Sequence[int]) -> dict[int, float]:
        """Return the share of the squared outputs that each number of atoms (ascending) leaves."""
        x = self.task.samples
        atoms, codes = (arrays.to_host(a) for a in self.factored.pair(self.target, max(ranks)))
        target = arrays.to_host(self.target)
        seen, left = (atoms, target) if x is None else (x @ atoms, x @ target)
        whole = float(np.vdot(left, left)) or 1.0
        found, start = {}, 0
        for rank in ranks:
            left = left - seen[:, :, start:rank] @ codes[:, start:rank]
            found[rank], start = float(np.vdot(left, left)) / whole, rank
        return found

    def encoded(self, params: Params, *, tries: int, sweeps: int) -> Encoded:
        """Round the atoms, then the codes to what these give."""
        task, device = self.task, self._device
        (atoms_of, _), (codes_of, _) = _factors(task.weight, params)
        atoms, codes = self._turned(int(params["atoms"]))
        first = Task(atoms_of, weights.unblocks(atoms_of, atoms), task.samples, False)
        rounded = self._problem.encoded(first, int(params["levels"]), tries=tries, sweeps=sweeps, device=device)
        target = arrays.to_host(self.target)
        basis = weights.blocks(atoms_of, Quantized().decode(atoms_of, rounded))
        x = task.samples
        seen, wanted = (basis, target) if x is None else (x @ basis, x @ target)
        second = Task(codes_of, weights.unblocks(codes_of, codes), seen, False, lack=wanted - seen @ codes)
        fitted = Problem.of(second, device).encoded(
            second, int(params["code_levels"]), tries=tries, sweeps=sweeps, device=device
        )
        got = seen @ weights.blocks(codes_of, Quantized().decode(codes_of, fitted))
        error = float(np.linalg.norm(wanted - got) / (np.linalg.norm(wanted) or 1.0))
        return _joined(task.weight, params, [rounded, fitted], error)

    def _turned(self, rank: int) -> tuple[Array, Array]:
        """Return atoms (1, inputs, rank) and codes, (1, rank, outputs), whose rows are alike."""
        atoms, codes = self.factored.pair(self.target, rank)
        xp = arrays.namespace(codes)
        norms = xp.sqrt(xp.sum(codes * codes, axis=2, keepdims=True))
        norms = xp.where(norms > 0, norms, xp.ones_like(norms))
        random = arrays.normal((rank, rank), self._seed, self.target)
        turn, _ = xp.linalg.qr(random)
        turn = xp.astype(turn, self.target.dtype)
        atoms = (atoms * xp.matrix_transpose(norms)) @ turn
        codes = xp.matrix_transpose(turn) @ (codes / norms)
        return arrays.to_host(atoms), arrays.to_host(codes)


class _Pairs:
    """Rounded pairs of one weight."""

    def __init__(self, task: Task, seed: int, device: str) -> None:
        self._weight = task.weight
        self._device, self._seed = device, seed
        self._run = {r: _run(task, r) for r in _ranks(task)}
        self._lost: dict[int, float] = {}
        self._made: dict[Pair, Encoded] = {}
        self._costs: dict[tuple[tuple[int, ...], int], int] = {}
        if not self._run:
            return
        ranks = sorted(self._run)
        problem = _Problem(task, seed, device, ranks[-1])
        self._lost = problem.lost(ranks)
        middle = ranks[len(ranks) // 2]
        for levels in _TRIED:
            self._made[middle, levels, levels] = problem.encoded(
                self._params((middle, levels, levels)), tries=1, sweeps=0
            )

    def candidates(self) -> Sequence[tuple[Candidate, ...]]:
        """Return the ways that no other of the same rank beats in bytes and error."""
        return [(c,) for rank in self._run for c in self._of_rank(rank)]

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        return [(self._candidate(pair),) for pair in self._made]

    def ready(self, params: Sequence[Params]) -> bool:
        return _pair(params[0]) in self._made

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        pair = _pair(params[0])
        if pair not in self._made:
            problem = _Problem(tasks[0], self._seed, self._device, pair[0])
            self._made[pair] = problem.encoded(params[0], tries=1, sweeps=0)
        return (self._made[pair],)

    def _params(self, pair: Pair) -> Params:
        atoms, levels, code_levels = pair
        return {"atoms": atoms, "levels": levels, "code_levels": code_levels, "run": self._run[atoms]}

    def _of_rank(self, rank: int) -> list[Candidate]:
        pairs = [(rank, a, c) for a in _LEVELS for c in _LEVELS]
        kept: list[Candidate] = []
        for c in sorted(map(self._candidate, pairs), key=lambda c: (c.nbytes, c.error)):
            if not kept or c.error < kept[-1].error or _pair(c.params) in self._made:
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
        if pair in self._made:
            return self._made[pair].error
        steps = np.log([n - 1 for n in _TRIED])
        lost = self._lost[pair[0]]
        noise = []
        for (rank, levels, _), made in self._made.items():
            rest = (made.error**2 - self._lost[rank]) / max(1 - self._lost[rank], 1e-12)
            noise.append(0.5 * math.log(max(rest / 2, 1e-12)))
        rounding = sum(
            math.exp(2 * quantized.along(math.log(n - 1), steps, np.array(noise))) for n in pair[1:]
        )
        return math.sqrt(lost + (1 - lost) * rounding)


def _pair(params: Params) -> Pair:
    return int(params["atoms"]), int(params["levels"]), int(params["code_levels"])


def _run(task: Task, rank: int) -> str:
    params = {**_WHOLE, "atoms": rank}
    return "split" if task.splittable and dictionary.pays_split(task.weight, params) else "fold"


def _ranks(task: Task) -> list[int]:
    """Return the ranks to try: where two operators may run, those that pay; otherwise some that save bytes."""
    m, n = task.weight.inputs, task.weight.outputs
    most = min((m * n - 1) // (m + n), m, n)
    every = range(1, most + 1)
    ranks = [r for r in every if _run(task, r) == "split"] or list(every)
    chosen = np.linspace(0, len(ranks) - 1, min(len(ranks), _RANKS)).round().astype(int)
    return [ranks[i] for i in chosen]
