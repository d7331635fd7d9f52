"""Rounded weights: few levels and one step per output, packed into words and decoded when a session is made.

    W' = s (k - (L - 1) / 2),    k = 0 .. L - 1 packed as base-L digits,    s in float16, one per output

or, with less lost at most numbers of bits, a digit stands for a few consecutive numbers of a row: an entry
of a table that all weights and networks have in common (:mod:`onnxdp.methods.tables`).

References
----------
prototype.md: what rounding with error feedback keeps at 2 to 5 bits. runtime.md section 2: packing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxdp import arrays, weights
from onnxdp.build import Builder, half_of, unlike_others
from onnxdp.errors import PlanError
from onnxdp.methods import packing, streams
from onnxdp.methods.form import Solved, Task
from onnxdp.methods.packing import Packing
from onnxdp.methods.rounding import Curvature, Rounded, round_weights
from onnxdp.methods.streams import Part
from onnxdp.methods.tables import TABLES, Alphabet, coarseness, table
from onnxdp.methods.vectors import round_vectors
from onnxdp.records import Array, Candidate, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader

LEVELS = (2, 3, 4, 5, 6, 7, 9, 11, 16, 23, 40, 84, 127, 255, 1625)
"""The most levels for each number of digits that a word of 8, 16 or 32 bits holds: any other wastes bits."""

DAMPING = (0.1, 0.3)
"""Added to the diagonal of H, over its mean: a + b * inputs / samples; made-up inputs are not real ones."""

ALPHA = 1.0
"""Share of the way that a weight moves towards what its outputs lack."""
_LEAST = 8
"""Inputs of a weight from which tables are tried."""
_MANY = 256
"""Columns from which the halves are rounded side by side: with fewer, threads wait for one another."""
MOST_INPUTS = 6144
"""Rows of a matrix whose second moment is formed whole; longer ones feed errors back within parts."""

_SLOPES = (-1.0, -0.5)
"""Of the logarithm of an error over that of the levels: even numbers have -1, normal ones -.83."""
_APART = 0.8
"""Bits by which a table's may differ from those that the target leaves each number."""

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
        """Bytes of the words and of the steps; the table of a number of levels is all weights' together."""
        levels, dim = Alphabet.of(params)
        size = weight.size // dim
        return Packing.best(levels, size, OPSET).nbytes(size) + 2 * _columns(weight)

    def check(self, weight: Weight, params: Params) -> None:
        """Refuse what is no number of levels, and no table whose entries fill the weight's rows."""
        if set(params) == {"levels"} and params["levels"] in LEVELS:
            return
        known = _tables(weight)
        if set(params) != {"levels", "dim"} or (params["levels"], params["dim"]) not in known:
            named = ", or levels and dim of a table, one of " if known else ""
            named += ", ".join(f"{k} x {d}" for k, d in known)
            raise PlanError(
                f"{weight.name}: quant takes levels, one of {', '.join(map(str, LEVELS))}{named}."
            )

    def groups(
        self, weights: Sequence[Weight], sources: Mapping[str, str], *, everywhere: bool
    ) -> Sequence[tuple[str, ...]]:
        """Share nothing but tables."""
        return ()

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return arrays of the right shapes and types."""
        levels, dim = Alphabet.of(params)
        digits = unlike_others(np.zeros(weight.size // dim, packing.digit_type(levels)), weight.name, levels)
        words = Packing.best(levels, digits.size, OPSET).pack(digits)
        scale = unlike_others(np.ones(_columns(weight), np.float16), weight.name)
        return Encoded(weight.name, self.name, dict(params), {"words": words, "scale": scale}, 0.0)

    def solve(self, tasks: Sequence[Task], settings: Settings, *, device: str) -> Solved:
        """Round to a few numbers of levels; what the others lose lies between."""
        made = _Roundings(tasks[0], device, tables=settings.codebooks is not False)
        made.complete(tasks[0])
        return made

    def restored(
        self, task: Task, kept: Sequence[Encoded], settings: Settings, *, device: str
    ) -> Solved | None:
        """Take up what an earlier run rounded, if it is all that the task's targets try."""
        made = _Roundings(task, device, tables=settings.codebooks is not False, kept=kept)
        return None if made.missing(task) else made

    def encode(self, task: Task, params: Params, settings: Settings, *, device: str) -> Encoded:
        """Round with care."""
        tries, sweeps = (1, 0) if task.quick else (3, 3)
        return Problem.of(task, device).encoded(
            task, Alphabet.of(params), tries=tries, sweeps=sweeps, device=device
        )

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Unpack and multiply by the steps."""
        levels, dim = alphabet = Alphabet.of(encoded.params)
        size = weight.size // dim
        digits = Packing.best(levels, size, OPSET).unpack(encoded.arrays["words"], size)
        if dim > 1:
            value = table(alphabet).astype(np.float32)[digits].reshape(_stored(weight))
        else:
            value = digits.reshape(_stored(weight)).astype(np.float32)
            value -= (levels - 1) / 2
        value *= _beside(weight, encoded.arrays["scale"].astype(np.float32))
        return value.reshape(weight.shape)

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Draw the table's digits times the steps, in float32, gone when the session is made."""
        levels, dim = alphabet = Alphabet.of(encoded.params)
        size = weight.size // dim
        packed, here = (Packing.best(levels, size, o) for o in (OPSET, build.opset))
        words = encoded.arrays["words"]
        if here != packed:
            words = here.pack(packed.unpack(words, size))
        steps = _beside(weight, encoded.arrays["scale"].astype(np.float32) * np.float32(_unit(alphabet)))
        half = encoded.arrays["scale"].dtype == np.float16
        return streams.draw(build, Part(weight, here, dim, words, _stored(weight), steps, half))


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
        run = math.lcm(*{a.dim for a in _tables(task.weight)}) if parts == 1 else 1
        return cls(Curvature.of(moment.pop(), share * mean, run=run), parts)  # large: not held here meanwhile

    @property
    def nbytes(self) -> int:
        """Bytes of what was factored, about."""
        return 8 * int(math.prod(self.curvature.moment.shape))

    def encoded(self, task: Task, alphabet: Alphabet, *, tries: int, sweeps: int, device: str) -> Encoded:
        """Round and pack."""
        weight = task.weight
        digits, scale, error = self._rounded(task, alphabet, tries=tries, sweeps=sweeps, device=device)
        flat = (digits[0].T if alphabet.dim > 1 else _tensor(weight, digits)).reshape(-1)
        words = Packing.best(alphabet.levels, flat.size, OPSET).pack(flat)
        arrays_ = {"words": words, "scale": kept(scale, _unit(alphabet))}
        return Encoded(weight.name, Quantized.name, alphabet.params, arrays_, error)

    def _rounded(
        self, task: Task, alphabet: Alphabet, *, tries: int, sweeps: int, device: str
    ) -> tuple[Array, Array, float]:
        """Round the weight, halves side by side; returns digits (stack, rows, outputs), steps and error."""
        host = _matrix(task.weight, task.tensor).astype(np.float32, copy=False)
        stack, inputs, outputs = host.shape
        unit = near_one(host)
        curvature, entries = self.curvature, None
        if alphabet.dim > 1:
            entries = arrays.to_device(table(alphabet).astype(np.float32), device)
            if curvature.plain:  # vectors are chosen in a metric that is written out
                plain = arrays.eye(task.weight.inputs, entries)[None, ...]
                curvature = Curvature.of(plain, plain[:, 0, 0] * 0)

        def some(columns: slice) -> Rounded:
            w = np.ascontiguousarray(host[:, :, columns]).reshape(
                stack * self.parts, inputs // self.parts, -1
            )
            on_device = self._moved(arrays.to_device(w, device), task, columns, device)
            near = on_device if unit == 1 else on_device / unit
            if entries is not None:
                return round_vectors(near, curvature, entries, tries=tries, sweeps=sweeps)
            return round_weights(
                near, curvature, alphabet.levels, parts=self.parts, tries=tries, sweeps=sweeps
            )

        made = list(arrays.side_by_side(some, arrays.halves(outputs, _MANY)))
        digits, scales, errors, energies = (
            np.concatenate([arrays.to_host(getattr(m, part)) for m in made], axis=-1)
            for part in ("digits", "scale", "error", "energy")
        )
        digits = digits.reshape(stack, -1, outputs)
        scale = scales.reshape(stack, self.parts, outputs)[:, 0].reshape(-1) * np.float32(unit)
        lost, whole = (float(np.sum(a, dtype=np.float64)) for a in (errors, energies))
        return digits, scale, (max(lost, 0.0) / (max(whole, 0.0) or 1.0)) ** 0.5

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
    """One weight, rounded to some alphabets."""

    def __init__(self, task: Task, device: str, *, tables: bool, kept: Sequence[Encoded] = ()) -> None:
        self._weight = task.weight
        self._device = device
        self._opset = task.opset
        self._problem: Problem | None = None
        self._tables = tables
        self._made = {Alphabet.of(e.params): e for e in kept}
        self._steps, self._vectors = self._scan(task.bits)

    def missing(self, task: Task) -> list[Alphabet]:
        """Return the alphabets that the task's targets try and that were not."""
        tried = {a for bits in (task.bits, *task.also) for some in self._scan(bits) for a in some}
        return sorted(tried - set(self._made))

    def complete(self, task: Task) -> None:
        """Try what is missing."""
        problem = Problem.of(task, self._device)
        self._made |= {a: self._quick(task, a, problem) for a in self.missing(task)}
        if problem.nbytes <= _KEPT:
            self._problem = problem

    def kept(self) -> Sequence[Encoded]:
        """Return what was rounded."""
        return list(self._made.values())

    def aim(self, bits: float) -> None:
        """Let the alphabets that another target tries speak for the others."""
        self._steps, self._vectors = self._scan(bits)

    def candidates(self) -> Sequence[tuple[Candidate, ...]]:
        """Return one per alphabet.

        Errors of numbers of levels between those tried lie on a line in logarithms; those of tables compare
        as on the numbers that the tables were made for.
        """
        steps = np.log([a.levels for a in self._steps])
        errors = np.log([max(self._made[a].error, 1e-12) for a in self._steps])
        levels = [n for n in LEVELS if self._opset >= _TAKEN_APART or not packing.is_wide(n)]
        found = [self._candidate(Alphabet(n), float(np.exp(along(np.log(n), steps, errors)))) for n in levels]
        for tried in self._vectors:
            like = (a for a in _tables(self._weight) if a.dim == tried.dim)
            rate = self._made[tried].error / coarseness(tried) ** 0.5
            found += [self._candidate(a, rate * coarseness(a) ** 0.5) for a in like]
        return [(c,) for c in found]

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        """Return those that were tried with even steps: errors of the others do the same damage."""
        return [(self._candidate(a, self._made[a].error),) for a in self._steps]

    def ready(self, params: Sequence[Params]) -> bool:
        return self._problem is not None or Alphabet.of(params[0]) in self._made

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        alphabet = Alphabet.of(params[0])
        if alphabet not in self._made:
            problem = self._problem or Problem.of(tasks[0], self._device)
            self._made[alphabet] = self._quick(tasks[0], alphabet, problem)
        return (self._made[alphabet],)

    def _scan(self, bits: float) -> tuple[tuple[Alphabet, ...], tuple[Alphabet, ...]]:
        """Return what to try for the bits that a target leaves each number: even steps, and tables."""
        levels = (6, 16) if bits >= 5 else (3, 7) if bits >= 3.2 else (2, 5)
        near = [a for a in _tables(self._weight) if abs(a.bits - bits) <= _APART] if self._tables else []
        dims = sorted({a.dim for a in near})
        vectors = (min((a for a in near if a.dim == d), key=lambda a: abs(a.bits - bits)) for d in dims)
        return tuple(map(Alphabet, levels)), tuple(vectors)

    def _quick(self, task: Task, alphabet: Alphabet, problem: Problem) -> Encoded:
        return problem.encoded(task, alphabet, tries=1, sweeps=0, device=self._device)

    def _candidate(self, alphabet: Alphabet, error: float) -> Candidate:
        params = alphabet.params
        return Candidate(
            self._weight.name, Quantized.name, params, Quantized().cost(self._weight, params), error
        )


def _tables(weight: Weight) -> list[Alphabet]:
    """Return the tables for a weight that is one matrix, its numbers stored row by row of the outputs."""
    fits = weight.op in ("Conv", "Gemm", "MatMul") and weight.transposed and weight.groups == 1
    whole = fits and _LEAST <= weight.inputs <= MOST_INPUTS
    return [a for a in TABLES if whole and weight.inputs % a.dim == 0]


def _unit(alphabet: Alphabet) -> float:
    """Return the step in terms of the integers that a digit decodes to."""
    return packing.unit(alphabet.levels) if alphabet.dim == 1 else 1.0


def along(x: float, xs: Array, ys: Array) -> float:
    """Interpolate; beyond the ends, the slope between them goes on, as far as errors of levels have such."""
    slope = float(np.clip((ys[-1] - ys[0]) / (xs[-1] - xs[0]), *_SLOPES))
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
