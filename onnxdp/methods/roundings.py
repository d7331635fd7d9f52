"""Numbers of bits and of levels that a weight may be rounded to: some are tried, the others lie between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from onnxdp.methods import codes, layout, packing
from onnxdp.methods.form import Task
from onnxdp.methods.packing import Packing
from onnxdp.methods.problem import NAME, OPSET, Problem, factored, kept
from onnxdp.records import Array, Candidate, Encoded, Params, Weight

LEVELS = (2, 3, 4, 5, 6, 7, 9, 11, 16, 23, 40, 84, 127, 255, 1625)
"""The most levels for each number of digits that a word of 8, 16 or 32 bits holds: any other wastes bits."""
_EARLY = range(int(16 * codes.SURE) + 3, int(16 * codes.EARLY[-1][0]) + 1, 2)
RATES = tuple(
    sorted([*(k / 8 for k in range(3, int(8 * codes.CODES[-1][0]) + 1)), *(k / 16 for k in _EARLY)])
)
"""Bits of a number that are offered where frequent ones take fewer: eighths; sixteenths for early raw bits.

The first of these, just above what never has any, would save nothing.
"""
FINE = (255, 1625)
"""Numbers of levels that are offered instead of raw bits ..."""
_MANY = 1 << 23
"""... to models of more numbers: raw bits take some 50 bytes each while a session is made, others 25."""
_SMALL = 1 << 21
"""Numbers of a model up to which some have raw bits early: a tenth of a second more to load, at most."""

_SLOPES = (-1.0, -0.5)
"""Of the logarithm of an error over that of the levels: even numbers have -1, normal ones -.83."""
_STEEP = (-2.0, -0.5)
"""Of that over what bits are as good as: where most numbers are zero, few bits more tell the others ..."""
_MORE = -1.03
"""... and beyond what was tried: another bit halves an error, and codes come nearer to the entropy."""
_SPARSE = 1.75
"""Bits that a target leaves each number below which some weights get so few that lines do not reach them."""
_WORTH = 8192
"""Bytes of rounded weights from which codes are worth their operators, some 600 bytes each."""
_TAKEN_APART = 10
"""Operator set from which words of 32 bits are taken apart: Mod is that old, and 1625 levels need it."""
_KEPT = 3_000_000
"""Bytes of a problem that stays for what is asked about later; larger ones are formed again."""


Way: TypeAlias = tuple[str, float]
"""Name and value of the one parameter that there is: levels or bits."""


class Roundings:
    """One weight, rounded in some ways."""

    def __init__(self, task: Task, device: str, *, kept: Sequence[Encoded] = ()) -> None:
        self._weight = task.weight
        self._device = device
        self._opset = task.opset
        self._total = task.total
        self._problem: Problem | None = None
        self._made = {_way(e.params): e for e in kept}
        self._bits = task.bits

    def missing(self, task: Task) -> list[Way]:
        """Return the ways that the task's targets try and that were not."""
        tried = {way for bits in (task.bits, *task.also) for way in self._scan(bits)}
        return sorted(tried - set(self._made))

    def complete(self, task: Task) -> None:
        """Try what is missing."""
        problem = Problem.of(task, self._device)
        self._made |= {way: self._quick(task, way, problem) for way in self.missing(task)}
        if self.holds:
            self._problem = problem

    @property
    def holds(self) -> bool:
        """Whether what it takes to try more ways stays."""
        return factored(self._weight) <= _KEPT

    def kept(self) -> Sequence[Encoded]:
        """Return what was rounded."""
        return list(self._made.values())

    def aim(self, bits: float) -> None:
        """Let the ways that another target tries speak for the others."""
        self._bits = bits

    def candidates(self) -> Sequence[tuple[Candidate, ...]]:
        """Return one per number of bits or levels.

        Errors of those between the ones tried lie on a line, in logarithms.
        """
        found = []
        ways = self._scan(self._bits)
        for kind, offered in (("bits", RATES), ("levels", LEVELS)):
            tried = [way for way in ways if way[0] == kind]
            if tried:
                xs = np.array([_log_levels(way) for way in tried])
                errors = np.log([max(self._made[way].error, 1e-12) for way in tried])
                slopes, more = (_SLOPES, None) if kind == "levels" else (_STEEP, _MORE)
                for way in ((kind, n) for n in offered if self._is_offered(kind, n)):
                    error = np.exp(along(_log_levels(way), xs, errors, slopes, more))
                    found.append(self._candidate(way, float(error)))
        return [(c,) for c in found]

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        """Return those that were tried: errors of the others do the same damage."""
        ways = self._scan(self._bits)
        return [(self._candidate(way, self._made[way].error),) for way in ways if way[0] == ways[0][0]]

    def foreseen(self, outline: Encoded) -> Encoded:
        """Return an outline with steps in float32 where float16 does not hold such steps.

        They are as many times smaller than those of the nearest way that was tried as there are more levels.
        """
        way = _way(outline.params)
        near = min(self._scan(self._bits), key=lambda tried: abs(_log_levels(tried) - _log_levels(way)))
        steps = self._made[near].arrays["scale"].astype(np.float32) * np.float32(_unit(near) / _unit(way))
        largest = np.abs(steps).max() * np.exp(np.float32(_log_levels(near) - _log_levels(way)))
        unit = packing.unit(int(way[1])) if way[0] == "levels" else 1.0
        kind = kept(largest.reshape(1), unit).dtype
        return replace(outline, arrays={**outline.arrays, "scale": outline.arrays["scale"].astype(kind)})

    def ready(self, params: Sequence[Params]) -> bool:
        """Return whether it was tried, or what it takes to try it is still there."""
        return self._problem is not None or _way(params[0]) in self._made

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        """Round quickly, where that was not done yet."""
        way = _way(params[0])
        if way not in self._made:
            problem = self._problem or Problem.of(tasks[0], self._device)
            self._made[way] = self._quick(tasks[0], way, problem)
        return (self._made[way],)

    def _is_offered(self, kind: str, number: float) -> bool:
        """Whether so many bits or levels are."""
        if kind == "bits":
            if codes.SURE < number <= codes.PLAIN:
                return codes.is_early(number) == (self._total <= _SMALL)
            return number <= codes.PLAIN or self._total <= _MANY
        if self._is_coded(self._bits):
            return number in FINE
        return self._opset >= _TAKEN_APART or not packing.is_wide(int(number))

    def _scan(self, bits: float) -> tuple[Way, ...]:
        """Return what to try for the bits that a target leaves each number."""
        if self._is_coded(bits):
            few = (1.25, 2.5) if bits >= _SPARSE else (0.5, 1.25, 2.5)
            rates = (3.0, 5.0) if bits >= 5 else (2.0, 3.5) if bits >= 3.2 else few
            fine = (("levels", FINE[0]),) if bits >= 3.2 and self._total > _MANY else ()
            offered = [b for b in RATES if self._is_offered("bits", b)]
            return (*(("bits", min(offered, key=lambda b: (abs(b - rate), -b))) for rate in rates), *fine)
        levels = (6, 16) if bits >= 5 else (3, 7) if bits >= 3.2 else (2, 5)
        return tuple(("levels", n) for n in levels)

    def _is_coded(self, bits: float) -> bool:
        """Whether frequent numbers take fewer bits: all weights together are worth what decodes them."""
        return self._opset >= codes.SINCE and bits * self._total >= 8 * _WORTH

    def _quick(self, task: Task, way: Way, problem: Problem) -> Encoded:
        return problem.encoded(task, dict([way]), quick=True, device=self._device)

    def _candidate(self, way: Way, error: float) -> Candidate:
        params: Params = dict([way])
        return Candidate(self._weight.name, NAME, params, cost(self._weight, params), error)


def cost(weight: Weight, params: Params) -> int:
    """Bytes of the words and of the steps; with ``bits``, at most."""
    steps = 2 * layout.columns(weight)
    if "bits" in params:
        return math.ceil(float(params["bits"]) * weight.size / 8) + steps
    levels = int(params["levels"])
    return Packing.best(levels, weight.size, OPSET).nbytes(weight.size) + steps * layout.blocks(
        weight, levels
    )


def _way(params: Params) -> Way:
    ((name, value),) = params.items()
    assert not isinstance(value, str)
    return name, value


def _log_levels(way: Way) -> float:
    """Return the logarithm of a number of levels, or of what bits are as good as."""
    return math.log(way[1]) if way[0] == "levels" else way[1] * math.log(2)


def _unit(way: Way) -> float:
    """Return what steps that are kept are multiplied by to be those between whole numbers."""
    return codes.code_for(way[1]).unit if way[0] == "bits" else 1.0


def along(
    x: float, xs: Array, ys: Array, slopes: tuple[float, float] = _SLOPES, more: float | None = None
) -> float:
    """Interpolate; beyond the ends, the slope between them goes on, as far as errors of levels have such.

    Beyond the last it is ``more``, where that is given.
    """
    slope = -1.0
    if len(xs) > 1:
        slope = float(np.clip((ys[-1] - ys[0]) / (xs[-1] - xs[0]), *slopes))
    if x < xs[0]:
        return float(ys[0] + slope * (x - xs[0]))
    if x > xs[-1]:
        return float(ys[-1] + (slope if more is None else more) * (x - xs[-1]))
    return float(np.interp(x, xs, ys))
