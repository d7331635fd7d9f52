"""Rounded weights: whole numbers and a step per output, packed into words, decoded when a session is made.

    W' = s q,    s in float16, one per output

The whole numbers q are as few ``bits`` each as wanted, frequent ones fewer than others
(:mod:`onnxdp.methods.escapes`); or, for models whose operators cannot undo that, for factors and for many
bits, digits of so many ``levels``, W' = s (k - (L - 1) / 2), k = 0 .. L - 1.

References
----------
prototype.md: what rounding with error feedback keeps at 2 to 5 bits. runtime.md section 2: packing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxdp import arrays, weights
from onnxdp.build import Builder, half_of, unlike_others
from onnxdp.errors import PlanError
from onnxdp.methods import escapes, packing, streams
from onnxdp.methods.escapes import Code, Coded, bits_of, code_for
from onnxdp.methods.form import Solved, Task
from onnxdp.methods.packing import Packing
from onnxdp.methods.rounding import Curvature, Lattice, Rounded, round_weights
from onnxdp.methods.streams import Part
from onnxdp.records import Array, Candidate, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader

LEVELS = (2, 3, 4, 5, 6, 7, 9, 11, 16, 23, 40, 84, 127, 255, 1625)
"""The most levels for each number of digits that a word of 8, 16 or 32 bits holds: any other wastes bits."""

RATES = tuple(k / 8 for k in range(3, 49))
"""Bits of a number that are offered where frequent ones take fewer."""

FINE = (255, 1625)
"""Numbers of levels that are offered beside these, for more bits."""

DAMPING = (0.1, 0.3)
"""Added to the diagonal of H, over its mean: a + b * inputs / samples; made-up inputs are not real ones."""

ALPHA = 1.0
"""Share of the way that a weight moves towards what its outputs lack."""
_SWEEPS = 3
"""Times that every number is rounded again."""
_ROUNDS = 2
"""Times that steps are corrected before, every number rounded as if for the first time ..."""
_FAR = 8
"""... where the bits are so many times further off than they may be."""
_MANY = 256
"""Columns from which the halves are rounded side by side: with fewer, threads wait for one another."""
MOST_INPUTS = 6144
"""Rows of a matrix whose second moment is formed whole; longer ones feed errors back within parts."""

_SLOPES = (-1.0, -0.5)
"""Of the logarithm of an error over that of the levels: even numbers have -1, normal ones -.83."""
_WORTH = 8192
"""Bytes of rounded weights from which codes are worth their operators, some 600 bytes each."""
_NEAR = 0.001
"""Share of its bits that a weight may leave over, or some ..."""
_FEW = 4
"""... bits in all."""
_CORRECTED = 12
"""Times that steps are corrected, after the sweeps, so that the bits are near."""
_LOOKED = 1 << 14
"""Numbers, about, whose bits tell where to start."""

_TAKEN_APART = 10
"""Operator set from which words of 32 bits are taken apart: Mod is that old, and 1625 levels need it."""

_KEPT = 3_000_000
"""Bytes of a problem that stays for alphabets asked about later; larger ones are formed again."""

OPSET = 17
"""Operator set that bytes are counted for; a file's own may pack a little worse."""

_PER_ROW = {"Gather": (0,), "ConvTranspose": (1,), "LSTM": (0, 1), "GRU": (0, 1), "RNN": (0, 1)}
"""Axes along which weights that are no matrix of one product have steps of their own; the first elsewhere."""


class Quantized:
    """Few levels, packed."""

    name = "quant"
    sequential = True
    near = 3.0

    def supports(self, weight: Weight) -> str | None:
        """Refuse nothing: every weight has numbers."""
        return None

    def cost(self, weight: Weight, params: Params) -> int:
        """Bytes of the words and of the steps; with ``bits``, at most."""
        steps = 2 * _columns(weight)
        if "bits" in params:
            return math.ceil(float(params["bits"]) * weight.size / 8) + steps
        return Packing.best(int(params["levels"]), weight.size, OPSET).nbytes(weight.size) + steps

    def check(self, weight: Weight, params: Params) -> None:
        """Refuse what is no number of levels, and no number of bits."""
        if set(params) == {"levels"} and params["levels"] in LEVELS:
            return
        if set(params) != {"bits"} or params["bits"] not in RATES:
            raise PlanError(
                f"{weight.name}: quant takes levels, one of {', '.join(map(str, LEVELS))}, "
                f"or bits, {RATES[0]} to {RATES[-1]} in steps of {RATES[1] - RATES[0]}."
            )

    def groups(
        self, weights: Sequence[Weight], sources: Mapping[str, str], *, everywhere: bool
    ) -> Sequence[tuple[str, ...]]:
        """Share nothing but tables."""
        return ()

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return arrays of the right shapes and types, or that take the bits there are."""
        scale = unlike_others(np.ones(_columns(weight), np.float16), weight.name)
        if "bits" in params:
            made = _words(escapes.like(weight.name, weight.size, float(params["bits"])), params)
        else:
            levels = int(params["levels"])
            digits = unlike_others(np.zeros(weight.size, packing.digit_type(levels)), weight.name, levels)
            made = {"words": Packing.best(levels, digits.size, OPSET).pack(digits)}
        return Encoded(weight.name, self.name, dict(params), made | {"scale": scale}, 0.0)

    def solve(self, tasks: Sequence[Task], settings: Settings, *, device: str) -> Solved:
        """Round to a few numbers of levels; what the others lose lies between."""
        made = _Roundings(tasks[0], device)
        made.complete(tasks[0])
        return made

    def restored(
        self, task: Task, kept: Sequence[Encoded], settings: Settings, *, device: str
    ) -> Solved | None:
        """Take up what an earlier run rounded, if it is all that the task's targets try."""
        made = _Roundings(task, device, kept=kept)
        return None if made.missing(task) else made

    def fits(self, weight: Weight, encoded: Encoded) -> bool:
        """Compare shapes with an outline's; the words of a code have to be as many as its digits take."""
        made, like = encoded.arrays, self.outline(weight, encoded.params).arrays
        if "bits" not in encoded.params:
            return {n: a.shape for n, a in made.items()} == {n: a.shape for n, a in like.items()}
        try:
            coded = _coded(weight, encoded)
        except (ValueError, KeyError):
            return False
        roles = {"code", "scale", *(f"words{k}" for k in range(len(coded.streams)))}
        return set(made) == roles and made["scale"].shape == like["scale"].shape

    def encode(self, task: Task, params: Params, settings: Settings, *, device: str) -> Encoded:
        """Round with care."""
        return Problem.of(task, device).encoded(task, params, quick=task.quick, device=device)

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Unpack and multiply by the steps."""
        if "bits" in encoded.params:
            value = _coded(weight, encoded).integers().astype(np.float32)
        else:
            levels = int(encoded.params["levels"])
            packed = Packing.best(levels, weight.size, OPSET)
            value = packed.unpack(encoded.arrays["words"], weight.size).astype(np.float32)
            value -= (levels - 1) / 2
        value = value.reshape(_stored(weight))
        value *= _beside(weight, encoded.arrays["scale"].astype(np.float32))
        return value.reshape(weight.shape)

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Draw the whole numbers times the steps, in float32, gone when the session is made."""
        scale = encoded.arrays["scale"]
        half, unit = scale.dtype == np.float16, 1.0
        code: Packing | Code
        words: Array | Coded
        if "bits" in encoded.params:
            if build.opset < escapes.SINCE:
                raise PlanError(
                    f"{weight.name}: bits need operator set {escapes.SINCE}, the model has {build.opset}; "
                    "take levels instead."
                )
            code, words = code_for(float(encoded.params["bits"])), _coded(weight, encoded)
        else:
            levels, words = int(encoded.params["levels"]), encoded.arrays["words"]
            packed, code = (Packing.best(levels, weight.size, o) for o in (OPSET, build.opset))
            unit = packing.unit(levels)
            if code != packed:
                words = code.pack(packed.unpack(words, weight.size))
        steps = _beside(weight, scale.astype(np.float32) * np.float32(unit))
        return streams.draw(build, Part(weight, code, words, _stored(weight), steps, half))


@dataclass(frozen=True, slots=True)
class Problem:
    """What rounding one weight minimises, factored once for all numbers of levels."""

    curvature: Curvature
    parts: int

    @classmethod
    def of(cls, task: Task, device: str) -> Problem:
        """Form the second moment of what the weight sees; without samples, the plain norm."""
        if task.samples is None or not _is_matrix(task.weight):
            inputs = task.weight.size // _columns(task.weight)
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
            integers, scale, error = self._within(task, float(params["bits"]), quick=quick, device=device)
            made = _words(integers, params) | {"scale": kept(scale, 1.0)}
        else:
            levels = int(params["levels"])
            digits, scale, error = self._rounded(task, levels, quick=quick, device=device)
            flat = _tensor(task.weight, digits).reshape(-1)
            words = Packing.best(levels, flat.size, OPSET).pack(flat)
            made = {"words": words, "scale": kept(scale, packing.unit(levels))}
        return Encoded(task.weight.name, Quantized.name, dict(params), made, error)

    def _rounded(self, task: Task, levels: int, *, quick: bool, device: str) -> tuple[Array, Array, float]:
        """Round the weight, halves side by side; returns digits (stack, rows, outputs), steps and error."""
        tries, sweeps = (1, 0) if quick else (3, 3)
        given = self._given(task, device)

        def some(w: arrays.Array) -> Rounded:
            return round_weights(w, self.curvature, levels, parts=self.parts, tries=tries, sweeps=sweeps)

        return self._joined(task, list(arrays.side_by_side(some, given.halves)), given.unit)

    def _within(self, task: Task, bits: float, *, quick: bool, device: str) -> tuple[Array, Array, float]:
        """Round the weight so that its code takes no more bits; returns integers (size,), steps and error.

        All steps are moved by one factor until the bits are near, however often that takes.
        """
        weight, code = task.weight, code_for(bits)
        bits = max(bits + task.spare, min(bits, escapes.least_bits(code)))
        given = self._given(task, device)
        lattices = [
            Lattice(w, self.curvature, steps, parts=self.parts, most=escapes.MOST)
            for w, steps in zip(given.halves, given.steps(self.parts, device), strict=True)
        ]
        flat = np.empty(0, np.int8)

        def measured() -> float:
            nonlocal flat
            made = np.concatenate([arrays.to_host(each.integers) for each in lattices], axis=-1)
            flat = _tensor(weight, made.reshape(given.shape)).reshape(-1)
            return bits_of(flat, code) / flat.size

        def go(how: Callable[[Lattice, float], None], factor: float) -> float:
            list(arrays.side_by_side(lambda each: how(each, factor), lattices))
            return measured()

        factor, slope, floor = given.start(weight, code, bits)
        near = max(_NEAR * bits, _FEW / weight.size)
        got = go(Lattice.round, factor)

        def correct(how: Callable[[Lattice, float], None], least: float = -1.0) -> None:
            """Move the steps so that the bits should be near; learn how many fewer they really take."""
            nonlocal factor, slope, got
            doubled = max(float(np.clip((got - bits + near / 2) / slope, -1, 1)), least)
            factor = max(factor * 2**doubled, floor)
            before, got = got, go(how, factor)
            if abs(before - got) > near:
                slope = float(np.clip((before - got) / doubled, slope / 2, slope * 2))

        for _ in range(_ROUNDS):
            if abs(got - bits) > _FAR * near:
                correct(Lattice.round)
        for done in range(0 if quick else _SWEEPS + _CORRECTED):
            if done >= _SWEEPS and got <= bits and (got >= bits - near or factor == floor):
                break
            correct(Lattice.sweep)
        least = near / slope / 4
        while not quick and got > bits and flat.any():
            correct(Lattice.sweep if least < 1 else Lattice.round, least)  # sweeps may stick
            least = min(2 * least, 1.0)
        _, scale, error = self._joined(task, [each.rounded() for each in lattices], given.unit)
        return flat, scale, error * 2 ** (got - bits) if quick and factor > floor else error

    def _joined(self, task: Task, made: Sequence[Rounded], unit: float) -> tuple[Array, Array, float]:
        """Put halves together: digits (stack, rows, outputs), steps and the relative error."""
        digits, scales, errors, energies = (
            np.concatenate([arrays.to_host(getattr(m, part)) for m in made], axis=-1)
            for part in ("digits", "scale", "error", "energy")
        )
        outputs = digits.shape[-1]
        digits = digits.reshape(len(digits) // self.parts, -1, outputs)
        scale = scales.reshape(-1, self.parts, outputs)[:, 0].reshape(-1) * np.float32(unit)
        lost, whole = (float(np.sum(a, dtype=np.float64)) for a in (errors, energies))
        return digits, scale, (max(lost, 0.0) / (max(whole, 0.0) or 1.0)) ** 0.5

    def _given(self, task: Task, device: str) -> _Given:
        """Return the weight on the device, moved to where it gives what the outputs lack."""
        host = _matrix(task.weight, task.tensor).astype(np.float32, copy=False)
        stack, inputs, outputs = host.shape
        unit = near_one(host)

        def some(columns: slice) -> arrays.Array:
            w = np.ascontiguousarray(host[:, :, columns]).reshape(
                stack * self.parts, inputs // self.parts, -1
            )
            on_device = self._moved(arrays.to_device(w, device), task, columns, device)
            return on_device if unit == 1 else on_device / unit

        halves = arrays.halves(outputs, _MANY)
        return _Given(host / unit, unit, list(arrays.side_by_side(some, halves)), halves)

    def target(self, task: Task, device: str) -> arrays.Array:
        """Return W moved to where it gives what the outputs lack, (1, inputs, outputs), on the device."""
        host = _matrix(task.weight, task.tensor).astype(np.float32, copy=False)
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
        As it was, over ``unit``.
    unit : float
    halves : list of array of shape (stack x parts, inputs / parts, columns), float32
        Moved to where it gives what the outputs lack.
    columns : list of slice
        Of the halves.
    """

    host: Array
    unit: float
    halves: list[arrays.Array]
    columns: list[slice]

    @property
    def shape(self) -> tuple[int, ...]:
        """Stack, inputs, outputs."""
        return self.host.shape

    def sizes(self) -> Array:
        """Return what steps are in proportion to, (stack, outputs).

        Columns of the same size would all take the same bits, columns of the same step lose the same: between
        the two little is lost by either.
        """
        own = np.sqrt(np.mean(self.host * self.host, axis=1))
        own = np.sqrt(own * np.sqrt(np.mean(own * own)))
        return np.where(own > 0, own, np.float32(1))

    def steps(self, parts: int, device: str) -> list[arrays.Array]:
        """Return these for each half."""
        sizes = np.repeat(self.sizes(), parts, axis=0)
        return [arrays.to_device(np.ascontiguousarray(sizes[:, c]), device) for c in self.columns]

    def start(self, weight: Weight, code: Code, bits: float) -> tuple[float, float, float]:
        """Return the factor of the steps at which plainly rounded numbers take so many bits.

        Also how many bits fewer they take where it doubles, and the least factor: with a smaller one more is
        lost, because so many steps do not reach the largest numbers (where most numbers are zero).
        """
        unit = self.host / self.sizes()[:, None, :]
        stack, _, outputs = self.shape
        stride = max(1, unit.size // _LOOKED)
        few = unit[:, :, ::stride] if outputs > stride else unit[::stride] if stack > stride else unit
        flat = (few.swapaxes(1, 2) if weight.transposed else few).reshape(-1)

        def taken(factor: float) -> float:
            near = np.rint(np.clip(flat / np.float32(factor), -escapes.MOST, escapes.MOST))
            return bits_of(near.astype(np.int8), code) / flat.size

        low, high = -8.0, 6.0
        for _ in range(10):
            middle = (low + high) / 2
            if taken(2.0**middle) > bits:
                low = middle
            else:
                high = middle
        slope = (taken(2.0 ** (high - 0.2)) - taken(2.0 ** (high + 0.2))) / 0.4
        factor, peak = 2.0**high, float(np.abs(unit).max())
        floor = peak / escapes.MOST
        if floor > factor:
            floor = min((floor / 2 ** (k / 2) for k in range(40)), key=partial(_clipped, unit.reshape(-1)))
        return max(factor, floor), max(slope, 0.3), floor


def _clipped(numbers: Array, factor: float) -> float:
    """Return the squared error of numbers rounded to so large steps, as many as there may be."""
    near = np.rint(np.clip(numbers / np.float32(factor), -escapes.MOST, escapes.MOST))
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


class _Roundings:
    """One weight, rounded in some ways."""

    def __init__(self, task: Task, device: str, *, kept: Sequence[Encoded] = ()) -> None:
        self._weight = task.weight
        self._device = device
        self._opset = task.opset
        self._total = task.total
        self._problem: Problem | None = None
        self._made = {_way(e.params): e for e in kept}
        self._bits = task.bits

    def missing(self, task: Task) -> list[_Way]:
        """Return the ways that the task's targets try and that were not."""
        tried = {way for bits in (task.bits, *task.also) for way in self._scan(bits)}
        return sorted(tried - set(self._made))

    def complete(self, task: Task) -> None:
        """Try what is missing."""
        problem = Problem.of(task, self._device)
        self._made |= {way: self._quick(task, way, problem) for way in self.missing(task)}
        if problem.nbytes <= _KEPT:
            self._problem = problem

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
                slopes = _SLOPES if len(tried) > 1 else (-1.0, -1.0)
                for way in ((kind, n) for n in offered if kind == "bits" or n in self._levels):
                    error = np.exp(along(_log_levels(way), xs, errors, slopes))
                    found.append(self._candidate(way, float(error)))
        return [(c,) for c in found]

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        """Return those that were tried: errors of the others do the same damage."""
        ways = self._scan(self._bits)
        return [(self._candidate(way, self._made[way].error),) for way in ways if way[0] == ways[0][0]]

    def ready(self, params: Sequence[Params]) -> bool:
        return self._problem is not None or _way(params[0]) in self._made

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        way = _way(params[0])
        if way not in self._made:
            problem = self._problem or Problem.of(tasks[0], self._device)
            self._made[way] = self._quick(tasks[0], way, problem)
        return (self._made[way],)

    @property
    def _levels(self) -> tuple[int, ...]:
        """Numbers of levels that are offered."""
        if self._is_coded(self._bits):
            return FINE
        return tuple(n for n in LEVELS if self._opset >= _TAKEN_APART or not packing.is_wide(n))

    def _scan(self, bits: float) -> tuple[_Way, ...]:
        """Return what to try for the bits that a target leaves each number."""
        if self._is_coded(bits):
            rates = (3.0, 4.5) if bits >= 5 else (2.0, 3.5) if bits >= 3.2 else (1.25, 2.5)
            fine = (("levels", FINE[0]),) if bits >= 3.2 else ()
            return (*(("bits", b) for b in rates), *fine)
        levels = (6, 16) if bits >= 5 else (3, 7) if bits >= 3.2 else (2, 5)
        return tuple(("levels", n) for n in levels)

    def _is_coded(self, bits: float) -> bool:
        """Whether frequent numbers take fewer bits: all weights together are worth what decodes them."""
        return self._opset >= escapes.SINCE and bits * self._total >= 8 * _WORTH

    def _quick(self, task: Task, way: _Way, problem: Problem) -> Encoded:
        return problem.encoded(task, dict([way]), quick=True, device=self._device)

    def _candidate(self, way: _Way, error: float) -> Candidate:
        params: Params = dict([way])
        return Candidate(
            self._weight.name, Quantized.name, params, Quantized().cost(self._weight, params), error
        )


_Way: TypeAlias = tuple[str, float]
"""Name and value of the one parameter that there is: levels or bits."""


def _way(params: Params) -> _Way:
    ((name, value),) = params.items()
    assert not isinstance(value, str)
    return name, value


def _log_levels(way: _Way) -> float:
    """Return the logarithm of a number of levels, or of what bits are as good as."""
    return math.log(way[1]) if way[0] == "levels" else way[1] * math.log(2)


def _words(integers: Array, params: Params) -> dict[str, Array]:
    """Return the arrays that hold coded integers."""
    coded = Coded.of(integers, code_for(float(params["bits"])))
    words = coded.words()
    named = {f"words{k}": w for k, w in enumerate(words)}
    return {"code": np.array([coded.code.run, *coded.code.levels], np.uint8)} | named


def _coded(weight: Weight, encoded: Encoded) -> Coded:
    """Undo :func:`_words`."""
    run, *levels = encoded.arrays["code"].tolist()
    code, most = Code(run, tuple(levels)), code_for(float(encoded.params["bits"]))
    if run != most.run or not levels or code.levels[:-1] != most.levels[: len(levels) - 1]:
        raise ValueError(f"{code} is no {most} cut off.")
    return Coded.unpacked(code, [encoded.arrays[f"words{k}"] for k in range(len(levels))], weight.size)


def along(x: float, xs: Array, ys: Array, slopes: tuple[float, float] = _SLOPES) -> float:
    """Interpolate; beyond the ends, the slope between them goes on, as far as errors of levels have such."""
    slope = slopes[0]
    if len(xs) > 1:
        slope = float(np.clip((ys[-1] - ys[0]) / (xs[-1] - xs[0]), *slopes))
    if x < xs[0]:
        return float(ys[0] + slope * (x - xs[0]))
    return float(ys[-1] + slope * (x - xs[-1])) if x > xs[-1] else float(np.interp(x, xs, ys))


def _is_matrix(weight: Weight) -> bool:
    return weight.inputs > 1 or weight.op in ("Conv", "Gemm", "MatMul")


def _axes(weight: Weight) -> tuple[int, ...]:
    """Return the axes along which a weight that is no matrix has steps of its own."""
    axes = _PER_ROW.get(weight.op, (0,))
    return axes if len(weight.shape) > len(axes) else ()


def _columns(weight: Weight) -> int:
    """Count the steps."""
    if _is_matrix(weight):
        return weight.groups * weight.outputs
    return int(np.prod([weight.shape[a] for a in _axes(weight)], dtype=np.int64))


def _matrix(weight: Weight, tensor: Array) -> Array:
    """Return (stack, inputs, outputs): a column for every step."""
    if _is_matrix(weight):
        return weights.blocks(weight, tensor)
    axes = _axes(weight)
    return np.moveaxis(tensor, axes, range(-len(axes), 0)).reshape(1, -1, _columns(weight))


def _tensor(weight: Weight, stack: Array) -> Array:
    """Undo :func:`_matrix`."""
    if _is_matrix(weight):
        return weights.unblocks(weight, stack)
    axes = _axes(weight)
    rest = [d for a, d in enumerate(weight.shape) if a not in axes]
    moved = stack.reshape(*rest, *(weight.shape[a] for a in axes))
    return np.moveaxis(moved, range(-len(axes), 0), axes)


def _stored(weight: Weight) -> tuple[int, ...]:
    """Return a shape of the stored numbers in which the steps lie along axes."""
    if not _is_matrix(weight):
        return weight.shape
    rows = weight.groups * weight.outputs
    if weight.transposed:
        return weight.shape if weight.shape[0] == rows else (rows, weight.inputs)
    return (weight.inputs, weight.outputs)


def _beside(weight: Weight, scale: Array) -> Array:
    """Shape the steps so that they meet their numbers."""
    stored = _stored(weight)
    if _is_matrix(weight):
        axes: tuple[int, ...] = (0,) if weight.transposed else (1,)
    else:
        axes = _axes(weight)
    return scale.reshape([d if a in axes else 1 for a, d in enumerate(stored)])
