"""Round one weight to so many levels, or to so many bits: what is minimised, and steps that give these.

References
----------
method.md 1.3 (the target that makes up for what earlier weights lost), 4.2 and 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from onnxdp import arrays
from onnxdp.build import half_of
from onnxdp.methods import layout, packing
from onnxdp.methods.codes import Code, Stage, bits_of, code_for, least_bits
from onnxdp.methods.escapes import Coded
from onnxdp.methods.form import Task
from onnxdp.methods.packing import Packing
from onnxdp.methods.rounding import Curvature, Lattice, Rounded, round_weights
from onnxdp.records import Array, Encoded, Params, Weight

NAME = "quant"

DAMPING = (0.1, 0.3)
"""Added to the diagonal of H, over its mean: a + b * inputs / samples; made-up inputs are not real ones."""
ALPHA = 1.0
"""Share of the way that a weight moves towards what its outputs lack."""
MOST_INPUTS = 6144
"""Rows of a matrix whose second moment is formed whole; longer ones feed errors back within parts."""
OPSET = 17
"""Operator set that bytes are counted for; a file's own may pack a little worse."""

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
class Problem:
    """What rounding one weight minimises, factored once for all numbers of levels."""

    curvature: Curvature
    parts: int

    @classmethod
    def of(cls, task: Task, device: str) -> Problem:
        """Form the second moment of what the weight sees; without samples, the plain norm."""
        if task.samples is None or not layout.is_matrix(task.weight):
            inputs = task.weight.size // layout.columns(task.weight)
            return cls(Curvature.flat(inputs, arrays.to_device(np.zeros(1, np.float32), device)), 1)
        groups, rows, inputs = task.samples.shape
        parts = next(p for p in range(1, inputs + 1) if inputs % p == 0 and inputs // p <= MOST_INPUTS)
        x = task.samples.reshape(groups, rows, parts, inputs // parts).swapaxes(1, 2)
        x = arrays.to_device(x.reshape(groups * parts, rows, inputs // parts), device)
        xp = arrays.namespace(x)
        moment = [arrays.gram(x)]
        mean = xp.mean(xp.linalg.diagonal(moment[0]), axis=-1)
        mean = xp.where(mean > 0, mean, xp.ones_like(mean))
        share = DAMPING[0] + DAMPING[1] * min(1.0, inputs / parts / rows)
        return cls(Curvature.of(moment.pop(), share * mean), parts)  # large: not held here meanwhile

    @property
    def nbytes(self) -> int:
        """Bytes of what was factored, about."""
        return 8 * int(math.prod(self.curvature.moment.shape))

    def encoded(self, task: Task, params: Params, *, quick: bool, device: str) -> Encoded:
        """Round and pack; quickly, where that is only to be measured."""
        if "bits" in params:
            bits = float(params["bits"])
            integers, scale, error = self._within(task, bits, quick=quick, device=device)
            scale /= np.float32(code_for(bits).unit)  # the steps of what is coded
            made = words_of(integers, params) | {"scale": kept(scale, 1.0)}
        else:
            levels = int(params["levels"])
            digits, scale, error = self._rounded(task, levels, quick=quick, device=device)
            flat = layout.tensor(task.weight, digits).reshape(-1)
            words = Packing.best(levels, flat.size, OPSET).pack(flat)
            made = {"words": words, "scale": kept(scale, packing.unit(levels))}
        return Encoded(task.weight.name, NAME, dict(params), made, error)

    def _rounded(self, task: Task, levels: int, *, quick: bool, device: str) -> tuple[Array, Array, float]:
        """Round the weight, pieces side by side; returns digits (stack, rows, outputs), steps and error."""
        tries, sweeps = (1, 0) if quick else (3, 3)
        given = _Given.of(task)

        def some(w: arrays.Array) -> Rounded:
            return round_weights(w, self.curvature, levels, parts=self.parts, tries=tries, sweeps=sweeps)

        moved = list(self._pieces(task, given, device))
        return self._joined(task, list(arrays.side_by_side(some, moved)), given.unit)

    def _within(self, task: Task, bits: float, *, quick: bool, device: str) -> tuple[Array, Array, float]:
        """Round the weight so that its code takes no more bits; returns integers (size,), steps and error.

        All steps are moved by one factor until the bits are near, however often that takes.
        """
        code = code_for(bits)
        bits = max(bits + task.spare, min(bits, least_bits(code)))
        given = task.once("given", partial(_Given.of, task))
        lattices = task.once("lattices", partial(self._lattices, task, given, device))
        moved = task.once("moved", lambda: _Moved.start(given, task.weight, code, lattices, bits))
        moved.aim(bits)
        far = moved.near * (_FARTHER if quick and task.lack is None else _FAR)
        for _ in range(_ROUNDS):
            if abs(moved.got - bits) > far:
                moved.correct(Lattice.round)
        if moved.plain:
            moved.plainly = moved.factor, moved.slope
        how, sweeps = (Lattice.sweep, _SWEEPS if moved.plain else 0) if bits <= _SWEPT else (Lattice.round, 0)
        for done in range(0 if quick else sweeps + _CORRECTED):
            if done >= sweeps and moved.got <= bits and (moved.got >= bits - moved.near or moved.least):
                break
            moved.correct(how)
        least = moved.near / moved.slope / 4
        while not quick and moved.got > bits and least < 1:
            moved.correct(how, least)
            least *= 2
        if not quick and (moved.got > bits or moved.factor > _ASTRAY * moved.plainly[0]):
            moved.slope, least = moved.plainly[1], moved.near / moved.plainly[1] / 4
            moved.go(Lattice.round, moved.plainly[0])  # larger steps took more bits
            while moved.got > bits and moved.integers.any():
                moved.correct(Lattice.round, least)
                least = min(2 * least, 1.0)
        if not quick and (how is Lattice.round or self.curvature.plain) and moved.got < moved.nearest[0]:
            moved.go(Lattice.round, moved.nearest[1])  # nothing of what came between is kept
        _, scale, error = self._joined(task, [each.rounded() for each in lattices], given.unit)
        foretold = quick and not moved.least
        return moved.integers, scale, error * 2 ** (moved.got - bits) if foretold else error

    def _joined(self, task: Task, made: Sequence[Rounded], unit: float) -> tuple[Array, Array, float]:
        """Put pieces together: digits (stack, rows, outputs), steps and the relative error."""
        digits, scales, errors, energies = (
            np.concatenate([arrays.to_host(getattr(m, part)) for m in made], axis=-1)
            for part in ("digits", "scale", "error", "energy")
        )
        outputs = digits.shape[-1]
        digits = digits.reshape(len(digits) // self.parts, -1, outputs)
        scale = scales.reshape(-1, self.parts, outputs)[:, 0].reshape(-1) * np.float32(unit)
        lost, whole = (float(np.sum(a, dtype=np.float64)) for a in (errors, energies))
        return digits, scale, (max(lost, 0.0) / (max(whole, 0.0) or 1.0)) ** 0.5

    def _lattices(self, task: Task, given: _Given, device: str) -> list[Lattice]:
        steps = given.steps(self.parts, device)
        return [
            Lattice(w, self.curvature, own, parts=self.parts)
            for w, own in zip(self._pieces(task, given, device), steps, strict=True)
        ]

    def _pieces(self, task: Task, given: _Given, device: str) -> Iterator[arrays.Array]:
        """Give the weight's pieces on the device, moved to where they give what the outputs lack."""
        stack, inputs, _ = given.shape

        def some(columns: slice) -> arrays.Array:
            host = np.ascontiguousarray(given.host[:, :, columns])
            host = host.reshape(stack * self.parts, inputs // self.parts, -1)
            moved = self._moved(arrays.to_device(host, device), task, columns, device)
            return moved if given.unit == 1 else moved / given.unit

        return arrays.side_by_side(some, given.columns)

    def target(self, task: Task, device: str) -> arrays.Array:
        """Return W moved to where it gives what the outputs lack, (1, inputs, outputs), on the device."""
        host = layout.matrix(task.weight, task.tensor).astype(np.float32, copy=False)
        w = arrays.to_device(host.reshape(host.shape[0] * self.parts, -1, host.shape[2]), device)
        moved = self._moved(w, task, slice(None), device)
        return arrays.namespace(moved).reshape(moved, host.shape)

    def _moved(self, w: arrays.Array, task: Task, columns: slice, device: str) -> arrays.Array:
        """Return some columns of W moved to where they give what the outputs lack (method.md 1.3)."""
        if task.lack is None or task.samples is None or self.curvature.plain:
            return w
        x, y = (arrays.to_device(a, device) for a in (task.samples, task.lack[:, :, columns]))
        xp = arrays.namespace(w)
        pull = xp.matrix_transpose(x) @ y
        return w + ALPHA * self.curvature.solve(xp.reshape(pull, w.shape))


@dataclass(frozen=True, slots=True)
class _Given:
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
    def of(cls, task: Task) -> _Given:
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
class _Moved:
    """A weight's lattices, whose steps are moved until its code takes so many bits.

    Attributes
    ----------
    given : _Given
    weight : Weight
    code : Code
    lattices : list of Lattice
        Of its pieces.
    factor, slope, floor : float
        Of the steps now; bits that twice as large ones save; and where they are too small.
    integers : ndarray of shape (size,)
    got, bits, near : float
        What a number takes, what it may take, and how much less is near enough.
    plain : bool
        Whether every number was rounded as if for the first time, the last time.
    plainly : (float, float)
        Factor and slope when it last was.
    nearest : (float, float)
        What a number took of its bits at most, and the factor that gave this.
    """

    given: _Given
    weight: Weight
    code: Code
    lattices: list[Lattice]
    factor: float
    slope: float
    floor: float
    integers: Array = field(default_factory=lambda: np.empty(0, np.int8))
    got: float = math.inf
    bits: float = 0.0
    near: float = 0.0
    plain: bool = True
    plainly: tuple[float, float] = (0.0, 1.0)
    nearest: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def start(cls, given: _Given, weight: Weight, code: Code, lattices: list[Lattice], bits: float) -> _Moved:
        """Round with the steps at which plainly rounded numbers take so many bits."""
        made = cls(given, weight, code, lattices, *given.start(weight, code, bits))
        made.go(Lattice.round, made.factor)
        return made

    def aim(self, bits: float) -> None:
        """Say how many bits a number may take."""
        self.bits, self.near = bits, max(_NEAR * bits, _FEW / self.weight.size)
        self.nearest = (self.got, self.factor) if self.got <= bits else (0.0, self.factor)

    @property
    def least(self) -> bool:
        """Whether smaller steps would lose more."""
        return self.factor == self.floor

    def go(self, how: Callable[[Lattice, float, int], None], factor: float) -> None:
        """Round all pieces with other steps, and count."""
        self.factor, self.plain = factor, how is Lattice.round
        list(arrays.side_by_side(lambda each: how(each, factor, self.code.most), self.lattices))
        made = np.concatenate([arrays.to_host(each.integers) for each in self.lattices], axis=-1)
        made = layout.tensor(self.weight, made.reshape(self.given.shape)).reshape(-1)
        self.integers = made.astype(self.code.kind)
        self.got = bits_of(self.integers, self.code) / self.integers.size
        if self.nearest[0] < self.got <= self.bits:
            self.nearest = self.got, factor

    def correct(self, how: Callable[[Lattice, float, int], None], least: float = -1.0) -> None:
        """Move the steps so that the bits should be near; learn how many fewer they really take.

        Numbers rounded once more hardly follow small moves: what they do not follow counts, too.
        """
        foreseen = (self.got - self.bits + self.near / 2) / self.slope
        doubled, before = max(float(np.clip(foreseen, -1, 1)), least), self.got
        self.go(how, max(self.factor * 2**doubled, self.floor))
        saved = before - self.got
        if max(abs(saved), abs(doubled) * self.slope) > self.near:
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


def kept(scale: Array, unit: float) -> Array:
    """Round so that float16 holds the steps and the units that are drawn; float32 where it cannot."""
    half = half_of(scale * np.float32(unit), additive=True)
    with np.errstate(over="ignore"):
        kept = None if half is None else half / np.float16(unit)
    return kept if kept is not None and np.isfinite(kept).all() else scale


def words_of(integers: Array, params: Params) -> dict[str, Array]:
    """Return the arrays that hold coded integers."""
    coded = Coded.of(integers, code_for(float(params["bits"])))
    words = coded.words()
    named = {f"words{k}": w for k, w in enumerate(words)}
    return {"code": np.array(coded.code.stages, np.uint8)} | named


def coded_of(weight: Weight, encoded: Encoded) -> Coded:
    """Undo :func:`words_of`."""
    most = code_for(float(encoded.params["bits"]))
    told = encoded.arrays["code"]
    stages = tuple(Stage(int(c), int(r), bool(last)) for c, r, last in told.reshape(-1, 3))
    code = most._replace(stages=stages)
    begun = stages[:-1] if stages and stages[-1].last else stages
    if not stages or begun != most.stages[: len(begun)] or any(stage.last for stage in begun):
        raise ValueError(f"{code} is no {most} cut off.")
    return Coded.unpacked(code, [encoded.arrays[f"words{k}"] for k in range(code.arrays)], weight.size)
