"""Rounded weights: whole numbers and a step per output, packed into words, decoded when a session is made.

    W' = s q,    s in float16, one per output (from 255 levels on, one for a block of rows of each)

The whole numbers q are as few ``bits`` each as wanted, frequent ones fewer than others
(:mod:`onnxdp.methods.codes`); or, for models whose operators cannot undo that, for factors and for many
bits, digits of so many ``levels``, W' = s (k - (L - 1) / 2), k = 0 .. L - 1.

References
----------
prototype.md: what rounding with error feedback keeps at 2 to 5 bits. runtime.md section 2: packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from onnxdp.build import Builder, unlike_others
from onnxdp.errors import PlanError
from onnxdp.methods import codes, layout, packing, streams
from onnxdp.methods.codes import Code, code_for
from onnxdp.methods.escapes import Coded
from onnxdp.methods.form import Solved, Task
from onnxdp.methods.packing import Packing
from onnxdp.methods.problem import NAME, OPSET, Problem, coded_of, words_of
from onnxdp.methods.roundings import LEVELS, RATES, Roundings, cost
from onnxdp.methods.streams import Part
from onnxdp.records import Array, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader


class Quantized:
    """Whole steps of few bits, packed."""

    name = NAME
    sequential = True
    near = 3.0

    def supports(self, weight: Weight) -> str | None:
        """Refuse nothing: every weight has numbers."""
        return None

    def cost(self, weight: Weight, params: Params) -> int:
        """Bytes of the words and of the steps; with ``bits``, at most."""
        return cost(weight, params)

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
        """Share nothing but what decodes."""
        return ()

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return arrays of the right shapes and types, or that take the bits there are."""
        steps = _steps(weight, params)
        scale = unlike_others(np.ones(layout.columns(weight) * steps, np.float16), weight.name)
        if "bits" in params:
            made = words_of(codes.like(weight.name, weight.size, float(params["bits"])), params)
        else:
            levels = int(params["levels"])
            digits = unlike_others(np.zeros(weight.size, packing.digit_type(levels)), weight.name, levels)
            made = {"words": Packing.best(levels, digits.size, OPSET).pack(digits)}
        return Encoded(weight.name, self.name, dict(params), made | {"scale": scale}, 0.0)

    def solve(self, tasks: Sequence[Task], settings: Settings, *, device: str) -> Solved:
        """Round to a few numbers of levels; what the others lose lies between."""
        made = Roundings(tasks[0], device)
        made.complete(tasks[0])
        return made

    def restored(
        self, task: Task, kept: Sequence[Encoded], settings: Settings, *, device: str
    ) -> Solved | None:
        """Take up what an earlier run rounded, if it is all that the task's targets try."""
        made = Roundings(task, device, kept=kept)
        return None if made.missing(task) else made

    def fits(self, weight: Weight, encoded: Encoded) -> bool:
        """Compare shapes with an outline's; the words of a code have to be as many as its digits take."""
        made = encoded.arrays
        scale = made.get("scale")
        steps = layout.columns(weight) * _steps(weight, encoded.params)
        if scale is None or scale.dtype.kind != "f" or scale.shape != (steps,):
            return False
        if "bits" not in encoded.params:
            like = self.outline(weight, encoded.params).arrays
            return {n: a.shape for n, a in made.items()} == {n: a.shape for n, a in like.items()}
        try:
            coded = coded_of(weight, encoded)
        except (ValueError, KeyError, TypeError):
            return False
        roles = {"code", "scale", *(f"words{k}" for k in range(coded.code.arrays))}
        return set(made) == roles

    def encode(self, task: Task, params: Params, settings: Settings, *, device: str) -> Encoded:
        """Round with care."""
        problem = task.once("problem", partial(Problem.of, task, device))
        return problem.encoded(task, params, quick=task.quick, device=device)

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Unpack and multiply by the steps."""
        if "bits" in encoded.params:
            value = coded_of(weight, encoded).numbers()
        else:
            levels = int(encoded.params["levels"])
            packed = Packing.best(levels, weight.size, OPSET)
            value = packed.unpack(encoded.arrays["words"], weight.size).astype(np.float32)
            value -= (levels - 1) / 2
        value = value.reshape(layout.stored(weight, _steps(weight, encoded.params)))
        value *= layout.beside(weight, encoded.arrays["scale"].astype(np.float32))
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
            if build.opset < codes.SINCE:
                raise PlanError(
                    f"{weight.name}: bits need operator set {codes.SINCE}, the model has {build.opset}; "
                    "take levels instead."
                )
            code, words = code_for(float(encoded.params["bits"])), coded_of(weight, encoded)
        else:
            levels, words = int(encoded.params["levels"]), encoded.arrays["words"]
            packed, code = (Packing.best(levels, weight.size, o) for o in (OPSET, build.opset))
            unit = packing.unit(levels)
            if code != packed:
                words = code.pack(packed.unpack(words, weight.size))
        steps = layout.beside(weight, scale.astype(np.float32) * np.float32(unit))
        stored = layout.stored(weight, _steps(weight, encoded.params))
        return streams.draw(build, Part(weight, code, words, stored, steps, half))


def _steps(weight: Weight, params: Params) -> int:
    """Count the steps of a column."""
    return 1 if "bits" in params else layout.blocks(weight, int(params["levels"]))
