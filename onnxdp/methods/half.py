"""Float16: the weight as it is in half the bytes, and a Cast that folds away when the session is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxdp.build import Builder, unlike_others
from onnxdp.errors import PlanError
from onnxdp.methods.form import Solved, Task
from onnxdp.records import Array, Candidate, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader

_MAX = float(np.finfo(np.float16).max)
_PIECE = 1 << 20


class Float16:
    """The weight rounded to float16."""

    name = "float16"
    sequential = False
    near = 1.3

    def supports(self, weight: Weight) -> str | None:
        """Refuse what is that small already."""
        if weight.dtype in ("float16", "bfloat16"):
            return f"is stored as {weight.dtype} already"
        return None

    def cost(self, weight: Weight, params: Params) -> int:
        """Two bytes a number."""
        return 2 * weight.size

    def check(self, weight: Weight, params: Params) -> None:
        """There is nothing to choose."""
        if params:
            raise PlanError(f"{weight.name}: float16 takes no parameter, so {dict(params)} must go.")

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return an array of its shape."""
        half = unlike_others(np.zeros(weight.shape, np.float16), weight.name)
        return Encoded(weight.name, self.name, {}, {"half": half}, 0.0)

    def groups(
        self, weights: Sequence[Weight], sources: Mapping[str, str], *, everywhere: bool
    ) -> Sequence[tuple[str, ...]]:
        """Share nothing."""
        return ()

    def solve(self, tasks: Sequence[Task], settings: Settings, *, device: str) -> Solved:
        """Round."""
        return _Rounded(tasks[0])

    def restored(self, task: Task, kept: Sequence[Encoded], settings: Settings, *, device: str) -> Solved:
        """Round; nothing needs to be kept."""
        return _Rounded(task)

    def fits(self, weight: Weight, encoded: Encoded) -> bool:
        """Refuse everything: nothing is kept."""
        return False

    def encode(self, task: Task, params: Params, settings: Settings, *, device: str) -> Encoded:
        """Round."""
        return _Rounded(task).encode([task], [params])[0]

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Widen again."""
        return encoded.arrays["half"].astype(np.float32).reshape(weight.shape)

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Store float16, cast back."""
        half = build.constant("half", encoded.arrays["half"].reshape(weight.shape))
        return build.cast(half, weight.dtype, "cast")


class _Rounded:
    """The one candidate of a weight; none where a value leaves float16's range."""

    def __init__(self, task: Task) -> None:
        low, high = float(task.tensor.min(initial=0.0)), float(task.tensor.max(initial=0.0))
        self._candidates: tuple[tuple[Candidate, ...], ...] = ()
        if max(-low, high) <= _MAX:
            weight = task.weight
            error = _error(task.tensor.reshape(-1))
            self._candidates = ((Candidate(weight.name, "float16", {}, 2 * weight.size, error),),)

    def candidates(self) -> Sequence[tuple[Candidate, ...]]:
        return self._candidates

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        return self._candidates

    def ready(self, params: Sequence[Params]) -> bool:
        return True

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        if not self._candidates:
            raise PlanError(
                f"{tasks[0].weight.name} has values beyond float16's range; choose another method."
            )
        error = self._candidates[0][0].error
        half = tasks[0].tensor.astype(np.float16)
        return (Encoded(tasks[0].weight.name, "float16", {}, {"half": half}, error),)


def _error(flat: Array) -> float:
    """Return the relative error of rounding, piece by piece: a large weight is not held once more."""
    apart = whole = 0.0
    for first in range(0, len(flat), _PIECE):
        piece = flat[first : first + _PIECE].astype(np.float64)
        apart += float(np.square(piece - piece.astype(np.float16)).sum())
        whole += float(np.square(piece).sum())
    return float((apart / (whole or 1.0)) ** 0.5)
