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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxdp import weights
from onnxdp.build import Builder
from onnxdp.errors import PlanError
from onnxdp.methods import dictionary, emission, roundings
from onnxdp.methods.form import Solved, Task
from onnxdp.methods.pairing import FACTORS, NAME, Pairing, apart, cut, factors, joined
from onnxdp.methods.quantized import Quantized
from onnxdp.records import Array, Candidate, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader

_LEVELS = roundings.LEVELS[1:-2]
"""Numbers of levels of either factor; with two, a pair is worse than fewer atoms."""
_TRIED = (4, 16)
"""Numbers of levels whose errors are measured; those of the others lie on a line in logarithms."""
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

    name = NAME
    sequential = True
    near = 1.5

    def supports(self, weight: Weight) -> str | None:
        """Refuse what has no matrix, or one too thin, and a grouped Conv."""
        if weight.groups > 1:
            return "rounded pairs rebuild weights of one group"
        return dictionary.DictionaryPair().supports(weight)

    def cost(self, weight: Weight, params: Params) -> int:
        """Bytes of words and steps of both factors."""
        return sum(Quantized().cost(f, p) for f, p in factors(weight, params))

    def macs(self, weight: Weight, params: Params) -> float:
        """Return the multiply-accumulates over those of the weight as it was."""
        if params["run"] == "fold":
            return 1.0
        m, n = cut(weight, str(params["taps"]))
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
        most = min(cut(weight, str(params["taps"])))
        if not isinstance(params["atoms"], int) or not 1 <= params["atoms"] <= most:
            raise PlanError(
                f"{weight.name}: atoms is {params['atoms']!r} and must lie between 1 and {most}; correct it."
            )
        for factor, own in factors(weight, params):
            Quantized().check(factor, own)

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return arrays of the right shapes and types."""
        return joined(weight, params, [Quantized().outline(f, p) for f, p in factors(weight, params)], 0.0)

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
        problem = Pairing(task, str(params["taps"]), int(params["atoms"]), settings.seed, device)
        return problem.encoded(params, quick=task.quick)

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Multiply the factors, in float32."""
        m, n = cut(weight, str(encoded.params["taps"]))
        atoms, codes = (weights.blocks(f, Quantized().decode(f, e)) for f, e in apart(weight, encoded))
        product = atoms.reshape(m, -1) @ codes.reshape(-1, n)
        return weights.unblocks(weight, product.reshape(1, weight.inputs, weight.outputs))

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Draw two operators in place of the reader, or the product of the factors."""
        split = reader is not None and encoded.params["run"] == "split"
        parts = apart(
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
            problem = Pairing(task, taps, ranks[-1], seed, device)
            self._lost |= {(taps, r): lost for r, lost in problem.lost(ranks).items()}
            middle = ranks[len(ranks) // 2]
            noise = []
            for levels in _TRIED:
                pair = taps, middle, levels, levels
                self._made[pair] = made = problem.encoded(self._params(pair), quick=True)
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
            problem = Pairing(tasks[0], pair[0], pair[1], self._seed, self._device)
            self._made[pair] = problem.encoded(params[0], quick=True)
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
        nbytes = sum(self._nbytes(f, int(p["levels"])) for f, p in factors(self._weight, params))
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
        steps, noise = np.log(_TRIED), self._noise[taps]
        rounding = sum(math.exp(2 * roundings.along(math.log(n), steps, noise)) for n in levels)
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
    m, n = cut(weight, taps)
    most = min(int(share * weight.size / (m + n)), m, n)
    ranks = list(range(step, most + 1, step))
    chosen = np.linspace(0, len(ranks) - 1, min(len(ranks), _RANKS)).round().astype(int)
    return [ranks[i] for i in chosen]
