"""Compare two models on the same samples, in ONNX Runtime sessions made from the files themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxdp import runtime
from onnxdp.errors import ModelError, VerifyError
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
    ModelError
        The models do not have the same inputs and outputs.
    """
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
        self._same = self._rows = 0

    def add(self, a: Any, b: Any) -> None:
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fiub" or not a.size:
            return
        if not isinstance(b, np.ndarray) or a.shape != b.shape:
            self.seen += a.size
            self._apart = float("inf")
            return
        x, y = a.astype(np.float64), b.astype(np.float64)
        apart = np.abs(x - y)
        apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
        self.seen += a.size
        self._max = max(self._max, float(apart.max()))
        self._sum += float(apart.sum())
        self._apart += float(np.square(apart).sum())
        self._size += float(np.square(np.nan_to_num(x)).sum())
        if a.ndim and a.shape[-1] > 1 and a.dtype.kind == "f":
            same = x.argmax(-1) == y.argmax(-1)
            self._same += int(same.sum())
            self._rows += same.size

    def result(self, name: str) -> OutputDifference:
        relative = (self._apart / (self._size or 1.0)) ** 0.5
        same = self._same / self._rows if self._rows else None
        return OutputDifference(name, self._max, self._sum / self.seen, relative, same)


def _same_interface(a: Any, b: Any) -> None:
    for kind in ("inputs", "outputs"):
        mine, other = (_signature(getattr(s, f"get_{kind}")()) for s in (a, b))
        if mine != other:
            raise ModelError(
                f"The two models have different {kind} ({_shown(mine)} against {_shown(other)}); "
                "compare a model with its own compressed form."
            )


def _signature(values: Sequence[Any]) -> list[tuple[str, str]]:
    return [(v.name, v.type) for v in values]


def _shown(signature: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in signature) or "none"


