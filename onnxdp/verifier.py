"""Compare two models on the same samples, in ONNX Runtime sessions made from the files themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from onnxdp import decisions, runtime
from onnxdp.decisions import Decisions
from onnxdp.errors import ModelError, UsageError, VerifyError
from onnxdp.probes import Probes
from onnxdp.records import OutputDifference, Verification

_NONE = Decisions()
_ALIKE = 1e-5
"""Relative error that is rounding."""


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


def opened(model: ModelProto | Path, found: Decisions, *, noisy: bool) -> Any:
    """Make a session that gives, beside the outputs, what decides them where the model makes it.

    What a ``noisy`` model draws is the same in every run, and in every session.
    """
    return runtime.session(model, also=found.names, noisy=noisy)


def followed(model: ModelProto | Path, found: Decisions, *, noisy: bool) -> Any:
    """Make a session as :func:`opened` does, which takes what the network is to select as inputs."""
    return runtime.session(model, also=found.names, held=found.held, noisy=noisy)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model answers to the probes, and its interface; its session need not be kept.

    Where the numbers decide of what shape an output is, ``decisions`` name the tensors that decide it, which
    both sessions may give beside the outputs, and what is selected, which the other session may take.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    answers: tuple[Mapping[str, Any], ...]
    decisions: Decisions

    @classmethod
    def of(cls, session: Any, probes: Probes, found: Decisions = _NONE) -> Reference:
        """Run a session on every feed."""
        outputs = tuple(o for o in session.get_outputs() if o.name not in found.names)
        own, answers = {o.name for o in outputs}, []
        for feed in probes.feeds:
            answer = runtime.run(session, feed)
            kept = own.union(decisions.few(found, answer, len(probes.feeds)).names)
            answers.append({n: a for n, a in answer.items() if n in kept})
        return cls(tuple(session.get_inputs()), outputs, tuple(answers), found)


def compare(a: Reference, b: Any, probes: Probes, *, tolerance: float | None = None) -> Verification:
    """Run a session on the samples that the reference answered.

    Parameters
    ----------
    a : Reference
    b : InferenceSession
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
    given = {o.name: o for o in b.get_outputs()}
    takes = {i.name: i for i in b.get_inputs()}
    told = {i: n for n in a.decisions.held if (i := decisions.given(n)) in takes}
    own = [i for n, i in takes.items() if n not in told]
    _same_interface(a, own, [o for n, o in given.items() if n not in a.decisions.names])
    tallies = {n: _Tally() for n in a.answers[0] if n in given}
    for feed, left in zip(probes.feeds, a.answers, strict=True):
        right = runtime.run(b, {**feed, **{i: left[n] for i, n in told.items()}})
        for name in tallies:
            tallies[name].add(left[name], right[name])
    shown: dict[str, None] = {}
    for name in (o.name for o in a.outputs):
        instead = decisions.replaced(name, a.decisions, a.answers, unlike=tallies[name].unlike)
        shown |= dict.fromkeys(instead if tallies.keys() >= set(instead) else (name,))
    found = {n: t.result(n) for n, t in tallies.items() if t.seen}
    if all(found[n].relative <= _ALIKE for n in shown if n in found):  # then they have to decide alike, too
        shown |= {n: None for n in found if not found[n].relative <= _ALIKE}
    outputs = tuple(found[n] for n in shown if n in found)
    finite = all(np.isfinite(o.relative) for o in outputs)
    worst = max((o.relative for o in outputs), default=0.0)
    passed = finite and (tolerance is None or worst <= tolerance)
    return Verification(probes.samples, probes.seed, outputs, tolerance, passed)


class _Tally:
    """Sums over feeds, in float64."""

    def __init__(self) -> None:
        self.seen, self.unlike = 0, False
        self._max = self._sum = self._apart = self._size = 0.0
        self._same = self._rows = self._finite = 0

    def add(self, a: Any, b: Any) -> None:
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fiub" or not a.size:
            return
        if not isinstance(b, np.ndarray) or a.shape != b.shape:
            self.seen += a.size
            self.unlike = True
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
        alone = float("inf") if self.unlike else float("nan")
        relative = (self._apart / (self._size or 1.0)) ** 0.5 if self._finite else alone
        same = self._same / self._rows if self._rows else None
        return OutputDifference(name, self._max, self._sum / self.seen, relative, same)


def _same_interface(a: Reference, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    pairs = {"inputs": (a.inputs, inputs), "outputs": (a.outputs, outputs)}
    for kind, (mine, other) in pairs.items():
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
