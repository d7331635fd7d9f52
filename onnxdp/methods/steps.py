"""Steps at which a weight's code takes so many bits: all are moved by one factor, as often as that takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from onnxdp import arrays
from onnxdp.methods import layout
from onnxdp.methods.codes import Code, bits_of
from onnxdp.methods.form import Task
from onnxdp.methods.rounding import Lattice
from onnxdp.records import Array, Weight

_SWEEPS = 3
"""Times that every number is rounded again ..."""
_SWEPT = 4.5
"""... up to so many bits: integers are so large beyond that one by one they do not follow steps that move."""
_ROUNDS = 2
"""Times that steps are corrected before, every number rounded as if for the first time ..."""
_FAR = 8
"""... where the bits are so many times further off than they may be ..."""
_FARTHER = 40
"""... or so many, where a weight is tried alone: its error is told for the bits that were wanted."""
_CORRECTED = 12
"""Times that steps are corrected, after the sweeps, so that the bits are near."""
_NEAR = 0.001
"""Share of its bits that a weight may leave over, or some ..."""
_FEW = 4
"""... bits in all."""
_ASTRAY = 2
"""Times the steps of plain feedback from which sweeps have led astray, or have got stuck."""
_LOOKED = 1 << 14
"""Numbers, about, whose bits tell where to start."""
_MANY = 256
"""Columns from which halves are rounded side by side: with fewer, threads wait for one another."""


@dataclass(frozen=True, slots=True)
class Given:
    """A weight that is to be rounded.

    Attributes
    ----------
    host : ndarray of shape (stack, inputs, outputs), float32
    unit : float
        What its numbers are divided by.
    columns : list of slice
        That are rounded side by side.
    """

    host: Array
    unit: float
    columns: list[slice]

    @classmethod
    def of(cls, task: Task) -> Given:
        """Look at the weight of a task."""
        host = layout.matrix(task.weight, task.tensor).astype(np.float32, copy=False)
        stack, inputs, outputs = host.shape
        return cls(host, near_one(host), arrays.pieces(outputs, _MANY, rows=stack * inputs))

    @property
    def shape(self) -> tuple[int, ...]:
        """Stack, inputs, outputs."""
        return self.host.shape

    @property
    def numbers(self) -> Array:
        """Its numbers over ``unit``, (stack, inputs, outputs), float32."""
        return self.host if self.unit == 1 else self.host / self.unit

    def sizes(self) -> Array:
        """Return what steps are in proportion to, (stack, outputs).

        Columns of the same size would all take the same bits, columns of the same step lose the same: between
        the two little is lost by either.
        """
        own = self.numbers
        own = np.sqrt(np.mean(own * own, axis=1))
        own = np.sqrt(own * np.sqrt(np.mean(own * own)))
        return np.where(own > 0, own, np.float32(1))

    def steps(self, parts: int, device: str) -> list[arrays.Array]:
        """Return these for each piece."""
        sizes = np.repeat(self.sizes(), parts, axis=0)
        return [arrays.to_device(np.ascontiguousarray(sizes[:, c]), device) for c in self.columns]

    def start(self, weight: Weight, code: Code, bits: float) -> tuple[float, float, float]:
        """Return the factor of the steps at which plainly rounded numbers take so many bits.

        Also how many bits fewer they take where it doubles, and the least factor: with a smaller one more is
        lost, because so many steps do not reach the largest numbers (where most numbers are zero).
        """
        numbers, sizes = self.numbers, self.sizes()[:, None, :]
        stack, _, outputs = self.shape
        stride = max(1, numbers.size // _LOOKED)
        if outputs > stride:
            few = numbers[:, :, ::stride] / sizes[:, :, ::stride]
        else:
            few = numbers[::stride] / sizes[::stride] if stack > stride else numbers / sizes
        flat = (few.swapaxes(1, 2) if weight.transposed else few).reshape(-1)

        def taken(factor: float) -> float:
            near = np.rint(np.clip(flat / np.float32(factor), -code.most, code.most))
            return bits_of(near.astype(code.kind), code) / flat.size

        low, high = -12.0, 6.0
        for _ in range(10):
            middle = (low + high) / 2
            if taken(2.0**middle) > bits:
                low = middle
            else:
                high = middle
        slope = (taken(2.0 ** (high - 0.2)) - taken(2.0 ** (high + 0.2))) / 0.4
        factor = 2.0**high
        peaks = np.maximum(numbers.max(axis=1, keepdims=True), -numbers.min(axis=1, keepdims=True)) / sizes
        floor = float(peaks.max()) / code.most
        if floor > factor:
            lost = partial(_clipped, (numbers / sizes).reshape(-1), code.most)
            floor = min((floor / 2 ** (k / 2) for k in range(40)), key=lost)
        return max(factor, floor), max(slope, 0.3), floor


@dataclass(slots=True)
class Stepped:
    """A weight's lattices, whose steps are moved until its code takes so many bits.

    It goes on from where it is: a weight that is asked for a few more bits is not rounded anew.

    Attributes
    ----------
    given : Given
    weight : Weight
    code : Code
    lattices : list of Lattice
        Of its pieces.
    flat : bool
        Whether rounding once more is rounding anew, because no number is told of the others.
    factor, slope, floor : float
        Of the steps now; bits that twice as large ones save; and where they are too small.
    integers : ndarray of shape (size,)
    got, bits, within : float
        What a number takes, what it may take, and how much less is near enough.
    anew : bool
        Whether every number was rounded as if for the first time, the last time.
    plainly : (float, float)
        Factor and slope when it last was.
    nearest : (float, float)
        What a number took of its bits at most, and the factor that gave this.
    """

    given: Given
    weight: Weight
    code: Code
    lattices: list[Lattice]
    flat: bool
    factor: float
    slope: float
    floor: float
    integers: Array = field(default_factory=lambda: np.empty(0, np.int8))
    got: float = math.inf
    bits: float = 0.0
    within: float = 0.0
    anew: bool = True
    plainly: tuple[float, float] = (0.0, 1.0)
    nearest: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def start(
        cls, given: Given, weight: Weight, code: Code, lattices: list[Lattice], bits: float, *, flat: bool
    ) -> Stepped:
        """Round with the steps at which plainly rounded numbers take so many bits."""
        made = cls(given, weight, code, lattices, flat, *given.start(weight, code, bits))
        made._go(Lattice.round, made.factor)
        return made

    @property
    def at_floor(self) -> bool:
        """Whether smaller steps would lose more."""
        return self.factor == self.floor

    def near(self, bits: float, *, alone: bool) -> None:
        """Come near so many bits, every number rounded as if for the first time, or not, if they are near."""
        self.bits, self.within = bits, max(_NEAR * bits, _FEW / self.weight.size)
        self.nearest = (self.got, self.factor) if self.got <= bits else (0.0, self.factor)
        far = self.within * (_FARTHER if alone else _FAR)
        for _ in range(_ROUNDS):
            if abs(self.got - bits) > far:
                self._correct(Lattice.round)
        if self.anew:
            self.plainly = self.factor, self.slope

    def meet(self, bits: float) -> None:
        """Take at most so many bits, and as few less as can be found; sweep where that loses less."""
        self.near(bits, alone=False)
        how, sweeps = (Lattice.sweep, _SWEEPS if self.anew else 0) if bits <= _SWEPT else (Lattice.round, 0)
        for done in range(sweeps + _CORRECTED):
            met = self.got <= bits and (self.got >= bits - self.within or self.at_floor)
            if done >= sweeps and met:
                break
            self._correct(how)
        least = self.within / self.slope / 4
        while self.got > bits and least < 1:
            self._correct(how, least)
            least *= 2
        if self.got > bits or self.factor > _ASTRAY * self.plainly[0]:  # larger steps took more bits
            self.slope, least = self.plainly[1], self.within / self.plainly[1] / 4
            self._go(Lattice.round, self.plainly[0])
            while self.got > bits and self.integers.any():
                self._correct(Lattice.round, least)
                least = min(2 * least, 1.0)
        if (self.flat or how is Lattice.round) and self.got < self.nearest[0]:
            self._go(Lattice.round, self.nearest[1])  # nothing of what came between is kept

    def _go(self, how: Callable[[Lattice, float, int], None], factor: float) -> None:
        """Round all pieces with other steps, and count."""
        self.factor, self.anew = factor, how is Lattice.round
        list(arrays.side_by_side(lambda each: how(each, factor, self.code.most), self.lattices))
        made = np.concatenate([arrays.to_host(each.integers) for each in self.lattices], axis=-1)
        made = layout.tensor(self.weight, made.reshape(self.given.shape)).reshape(-1)
        self.integers = made.astype(self.code.kind)
        self.got = bits_of(self.integers, self.code) / self.integers.size
        if self.nearest[0] < self.got <= self.bits:
            self.nearest = self.got, factor

    def _correct(self, how: Callable[[Lattice, float, int], None], least: float = -1.0) -> None:
        """Move the steps so that the bits should be near; learn how many fewer they really take.

        Numbers rounded once more hardly follow small moves: what they do not follow counts, too.
        """
        foreseen = (self.got - self.bits + self.within / 2) / self.slope
        doubled, before = max(float(np.clip(foreseen, -1, 1)), least), self.got
        self._go(how, max(self.factor * 2**doubled, self.floor))
        saved = before - self.got
        if max(abs(saved), abs(doubled) * self.slope) > self.within:
            self.slope = float(np.clip(saved / doubled, self.slope / 2, self.slope * 2))


def _clipped(numbers: Array, most: int, factor: float) -> float:
    """Return the squared error of numbers rounded to so large steps, as many as there may be."""
    near = np.rint(np.clip(numbers / np.float32(factor), -most, most))
    lost = numbers - near * np.float32(factor)
    return float(lost @ lost)


def near_one(host: Array) -> float:
    """Return 1, or a power of two to divide numbers by whose squares float32 does not hold (masks)."""
    peak = max(float(host.max(initial=0.0)), -float(host.min(initial=0.0)))
    return 1.0 if not peak or 2.0**-30 < peak < 2.0**30 else 2.0 ** math.floor(math.log2(peak))
