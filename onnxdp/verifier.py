"""Compare two models on the same samples, in ONNX Runtime sessions made from the files themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxdp import runtime
from onnxdp.errors import ModelError, UsageError, VerifyError
from onnxdp.probes import Probes
from onnxdp.records import OutputDifference, Verification


def check_file(path: Path) -> None:
    """Let onnx.checker look at a written model, external data included.

    Raises
    ------
    VerifyError
        It finds the model invalid: the rewriting was wrong.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as e:
        reason = " ".join(str(e).split())
        raise VerifyError(
            f"The result is no valid model ({reason[:300]}) and was not written; please report this."
        ) from e


def compare(a: Any, b: Any, probes: Probes, *, tolerance: float | None = None) -> Verification:
    """Run two sessions on the same samples.

    Parameters
    ----------
    a, b : InferenceSession
        ``a`` is the reference.
    probes : Probes
    tolerance : float, optional
        Largest relative error that passes; None passes whatever is finite.

    Raises
    ------
    UsageError
        The tolerance is negative, or no number.
    ModelError
        The models do not have the same inputs and outputs.
    """
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"--tolerance is a relative error of 0 or more, not {tolerance:g}; try 0.03.")
    _same_interface(a, b)
    names = [o.name for o in a.get_outputs()]
    tallies = {n: _Tally() for n in names}
    for feed in probes.feeds:
        left, right = runtime.run(a, feed), runtime.run(b, feed)
        for name in names:
            tallies[name].add(left[name], right[name])
    outputs = tuple(t.result(n) for n, t in tallies.items() if t.seen)
    finite = all(np.isfinite(o.relative) for o in outputs)
    worst = max((o.relative for o in outputs), default=0.0)
    passed = finite and (tolerance is None or worst <= tolerance)
    return Verification(probes.samples, probes.seed, outputs, tolerance, passed)


class _Tally:
    """Sums over feeds, in float64."""

    def __init__(self) -> None:
        self.seen = 0
        self._max = self._sum = self._apart = self._size = 0.0
        self._same = self._rows = self._finite = 0

    def add(self, a: Any, b: Any) -> None:
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fiub" or not a.size:
            return
        if not isinstance(b, np.ndarray) or a.shape != b.shape:
            self.seen += a.size
            self._apart = float("inf")
            return
        x, y = a.astype(np.float64), b.astype(np.float64)
        alike, finite = (x == y) | (np.isnan(x) & np.isnan(y)), np.isfinite(x)
        with np.errstate(invalid="ignore"):  # inf - inf, which counts as no difference
            apart = np.where(alike, 0.0, np.abs(x - y))
        self.seen += a.size
        self._finite += int(finite.sum())
        self._max = max(self._max, float(apart.max()))
        self._sum += float(apart.sum())
        self._apart += float(np.square(apart).sum())
        self._size += float(np.square(np.where(finite, x, 0.0)).sum())
        if a.ndim and a.shape[-1] > 1 and a.dtype.kind == "f":
            same = x.argmax(-1) == y.argmax(-1)
            self._same += int(same.sum())
            self._rows += same.size

    def result(self, name: str) -> OutputDifference:
        # Two models that give nothing but NaN have not been compared.
        relative = (self._apart / (self._size or 1.0)) ** 0.5 if self._finite else float("nan")
        same = self._same / self._rows if self._rows else None
        return OutputDifference(name, self._max, self._sum / self.seen, relative, same)


def _same_interface(a: Any, b: Any) -> None:
    for kind in ("inputs", "outputs"):
        mine, other = (getattr(s, f"get_{kind}")() for s in (a, b))
        if len(mine) != len(other) or not all(map(_alike, mine, other)):
            raise ModelError(
                f"The two models have different {kind} ({_shown(mine)} against {_shown(other)}); "
                "compare a model with its own compressed form."
            )


def _alike(a: Any, b: Any) -> bool:
    """Whether two inputs (or outputs) have one name and type, and shapes that one array can have."""
    both = [(m, n) for m, n in zip(a.shape or (), b.shape or (), strict=False) if {type(m), type(n)} == {int}]
    ranks = not a.shape or not b.shape or len(a.shape) == len(b.shape)
    return (a.name, a.type) == (b.name, b.type) and ranks and all(m == n for m, n in both)


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(f"{v.name} {v.type} {v.shape}" for v in values) or "none"
