"""Round one weight to so many levels, or to so many bits: what is minimised.

References
----------
method.md 1.3 (the target that makes up for what earlier weights lost), 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxdp import arrays
from onnxdp.build import half_of
from onnxdp.methods import layout, packing
from onnxdp.methods.codes import Stage, code_for, least_bits
from onnxdp.methods.escapes import Coded
from onnxdp.methods.form import Task
from onnxdp.methods.packing import Packing
from onnxdp.methods.rounding import Curvature, Lattice, Rounded, round_weights
from onnxdp.methods.steps import Given, Stepped
from onnxdp.records import Array, Encoded, Params, Weight

NAME = "quant"

DAMPING = (0.1, 0.3)
"""Added to the diagonal of H, over its mean: a + b * inputs / samples; made-up inputs are not real ones."""
_UNFED = float(np.finfo(np.float32).tiny / np.finfo(np.float32).eps)
"""Mean of the diagonal of H up to which a weight is fed nothing: a share of it may be no float32 any more."""
ALPHA = 1.0
"""Share of the way that a weight moves towards what its outputs lack."""
OPSET = 17
"""Operator set that bytes are counted for; a file's own may pack a little worse."""


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
        parts = layout.parts(inputs)
        x = task.samples.reshape(groups, rows, parts, inputs // parts).swapaxes(1, 2)
        x = arrays.to_device(x.reshape(groups * parts, rows, inputs // parts), device)
        xp = arrays.namespace(x)
        moment = [arrays.gram(x)]
        mean = xp.mean(xp.linalg.diagonal(moment[0]), axis=-1)
        mean = xp.where(mean > _UNFED, mean, xp.ones_like(mean))
        share = DAMPING[0] + DAMPING[1] * min(1.0, inputs / parts / rows)
        return cls(Curvature.of(moment.pop(), share * mean), parts)  # large: not held here meanwhile

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
        given = Given.of(task)

        ways = {"parts": self.parts, "tries": tries, "sweeps": sweeps}
        ways["blocks"] = layout.blocks(task.weight, levels) // self.parts or 1

        def some(w: arrays.Array) -> Rounded:
            return round_weights(w, self.curvature, levels, **ways)

        moved = list(self._pieces(task, given, device))
        return self._joined(task, list(arrays.side_by_side(some, moved)), given.unit)

    def _within(self, task: Task, bits: float, *, quick: bool, device: str) -> tuple[Array, Array, float]:
        """Round the weight so that its code takes no more bits; returns integers (size,), steps and error."""
        code = code_for(bits)
        bits = max(bits + task.spare, min(bits, least_bits(code)))
        given = task.once("given", partial(Given.of, task))
        lattices = task.once("lattices", partial(self._lattices, task, given, device))
        stepped = task.once(
            "stepped",
            lambda: Stepped.start(given, task.weight, code, lattices, bits, flat=self.curvature.plain),
        )
        if quick:
            stepped.near(bits, alone=task.lack is None)
        else:
            stepped.meet(bits)
        _, scale, error = self._joined(task, list(arrays.side_by_side(Lattice.rounded, lattices)), given.unit)
        foretold = quick and not stepped.at_floor
        return stepped.integers, scale, error * 2 ** (stepped.got - bits) if foretold else error

    def _joined(self, task: Task, made: Sequence[Rounded], unit: float) -> tuple[Array, Array, float]:
        """Put pieces together: digits (stack, rows, outputs), steps and the relative error."""
        digits, scales, errors, energies = (
            np.concatenate([arrays.to_host(getattr(m, part)) for m in made], axis=-1)
            for part in ("digits", "scale", "error", "energy")
        )
        outputs = digits.shape[-1]
        digits = digits.reshape(len(digits) // self.parts, -1, outputs)
        if scales.ndim == 3:  # of blocks
            scales = layout.flat(task.weight, scales.reshape(len(digits), -1, outputs))
        else:
            scales = scales.reshape(-1, self.parts, outputs)[:, 0].reshape(-1)
        lost, whole = (float(np.sum(a, dtype=np.float64)) for a in (errors, energies))
        return digits, scales * np.float32(unit), (max(lost, 0.0) / (max(whole, 0.0) or 1.0)) ** 0.5

    def _lattices(self, task: Task, given: Given, device: str) -> list[Lattice]:
        steps = given.steps(self.parts, device)
        return [
            Lattice(w, self.curvature, own, parts=self.parts)
            for w, own in zip(self._pieces(task, given, device), steps, strict=True)
        ]

    def _pieces(self, task: Task, given: Given, device: str) -> Iterator[arrays.Array]:
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


def factored(weight: Weight) -> int:
    """Return the bytes of what is factored for a weight whose inputs are known, about."""
    return 8 * weight.groups * weight.inputs**2 // layout.parts(weight.inputs)


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
