"""Reach an error: find the smallest choice whose outputs stay within it.

What weights lose together is not the sum of what they lose alone, so every bound that a search moves along is
checked by a measurement of all changes at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from onnxdp import model as model_file
from onnxdp import runtime, verifier
from onnxdp.damage import Search
from onnxdp.errors import TargetError
from onnxdp.model import Model
from onnxdp.planner import Choice
from onnxdp.probes import Probes
from onnxdp.records import Array, Encoded, Made
from onnxdp.result import LARGE, Rewriter

_TIMES = {False: (4, 8), True: (2, 4)}
"""Times that a choice is encoded on the way to an error, quickly and as the file will have it; if costly."""

_NEARLY = {False: 0.85, True: 0.7}
"""Share of the allowed error from which a choice is good enough (to half a bit where it is costly) ..."""
_AIM = 0.93
"""... and the one that the next aims at."""

_APART = 4.0
"""By how much the next allowed damage differs where all before it lie on one side, and ratios say nothing."""

_MOVES = 24
"""Times that the allowed damage is moved where it gives a choice whose error is known ..."""
_ALIKE = 1.1
"""... and the ratio of two damages between which nothing else is looked for."""

NARROW_SHARE = 0.1
"""Share of the allowed output error that small vectors in float16 may take: they save a percent or two."""

log = logging.getLogger(__name__)

Measure: TypeAlias = Callable[[list[Encoded], dict[str, Array]], float]
"""Gives the relative output error of encoded weights and of what biases gain."""


class Encode(Protocol):
    """Makes the arrays of a choice."""

    def __call__(self, choice: Choice, *, quick: bool) -> Made:
        """Make them; quickly, where they are only to be measured."""
        ...


def within_error(search: Search, limit: float, evaluations: int = 10) -> Choice:
    """Return the smallest choice found whose outputs, all weights changed at once, stay within ``limit``.

    Parameters
    ----------
    search : Search
    limit : float
        Relative output error (amplitude).
    evaluations : int
        Joint measurements to spend.

    Raises
    ------
    TargetError
        Not even the mildest choice stays within the limit.
    """
    low, high = -60.0, 0.0  # log of damage per byte
    best: Choice | None = None
    for number in range(evaluations):
        middle = (low + high) / 2
        choice = search.settled(middle, number)
        _, error = search.together(choice)
        log.info("price %.3g: %d bytes, output error %.4g", middle, choice.nbytes, error)
        if error <= limit:
            best = choice if best is None or choice.nbytes <= best.nbytes else best
            low = middle
        else:
            high = middle
    if best is None:
        raise TargetError("out of reach")
    return best


def within_error_encoded(
    search: Search, limit: float, encode: Encode, measure: Measure
) -> tuple[Choice, Made]:
    """Return the smallest choice found whose outputs, once encoded layer by layer, stay within ``limit``.

    What layers make up for one another is not foreseen: a choice is encoded, its error measured, and the
    damage allowed to the next is corrected by the ratio, or lies between what fitted and what did not.
    First quickly, and every change is weighed within the whole; then as the file will have it.

    Parameters
    ----------
    search : Search
    limit : float
        Relative output error (amplitude).
    encode : callable
        Gives the arrays of a choice, and what biases gain.
    measure : callable
        Gives the relative output error of these, as the file will have it.

    Returns
    -------
    Choice, (list of Encoded, dict of str to ndarray)
        Where none that was tried stays within the limit, what is free; where even that does not, the choice
        that changes nothing.
    """
    nothing, items = search.untouched(), search.items
    quick, full = _TIMES[search.costly]
    hunt = _Hunt(search, limit, encode, measure)
    hunt.near(limit**2, quick, quick=True)
    best = hunt.near(hunt.next(), full, quick=False)
    search.items = items  # what was held back is asked about again
    if best is None:  # errors that hardly fall with the damage allowed
        free = search.free()
        if free.nbytes < nothing.nbytes and search.light_enough(free):
            encoded = encode(free, quick=False)
            best = (free, encoded) if measure(*encoded) <= limit else None
    return best or (nothing, ([], {}))


@dataclass(slots=True)
class _Hunt:
    """Choices encoded one after the other, each allowed the damage that the errors before it suggest."""

    search: Search
    limit: float
    encode: Encode
    measure: Measure
    known: list[tuple[Choice, float]] = field(default_factory=list)
    """Choices and their errors, the latest last."""

    @property
    def _nearly(self) -> float:
        return _NEARLY[self.search.costly] * self.limit

    def near(self, allowed: float, times: int, *, quick: bool) -> tuple[Choice, Made] | None:
        """Return the smallest choice that stays within the limit, of so many that are encoded."""
        least = self.search.smallest().candidates
        best: tuple[Choice, Made] | None = None
        tried: list[Choice] = []
        for number in range(times):
            choice = self._untried(allowed, tried, final=not quick)
            if choice is None:
                break
            made = self.encode(choice, quick=quick)
            error = self.measure(*made)
            log.info("allowed damage %.3g: %d bytes, output error %.4g", allowed, choice.nbytes, error)
            fits = error <= self.limit
            if fits and (best is None or choice.nbytes < best[0].nbytes):
                best = choice, made
            self._learn(choice, error, tried)
            tried.append(choice)
            weighed = quick and number == 0 and self.search.light and self.search.reweighed(choice, *made)
            if fits and not weighed and (error >= self._nearly or choice.candidates == least):
                break
            allowed = self.next()
        return best

    def _learn(self, choice: Choice, error: float, tried: Sequence[Choice]) -> None:
        """Note an error; what care gains for one choice, made quickly before, it will for those not tried."""
        before = next((e for c, e in self.known if c.candidates == choice.candidates), 0.0)
        gain = error / before if 0 < before < math.inf and math.isfinite(error) else 1.0
        sure = [c.candidates for c in tried]
        self.known = [
            (c, e if c.candidates in sure else gain * e)
            for c, e in self.known
            if c.candidates != choice.candidates
        ]
        self.known.append((choice, error))

    def _untried(self, allowed: float, tried: Sequence[Choice], *, final: bool) -> Choice | None:
        """Return the choice of an allowed damage, or one beside it; None where all are known.

        Between two choices next to each other one weight's step is too much: where that is final, it is not
        taken, so that others have their turn.
        """
        low, high = 0.0, math.inf  # allowed damages that give what fits, and what does not
        for _ in range(_MOVES):
            choice = self.search.within_damage(allowed)
            if all(choice.candidates != c.candidates for c in tried):
                return choice
            if choice.damage > allowed:  # the mildest there is
                break
            fitting = min((c for c, e in self.known if e <= self.limit), key=lambda c: c.nbytes, default=None)
            if fitting is None:
                allowed /= _APART
                continue
            if all(fitting.candidates != c.candidates for c in tried):
                return fitting
            beyond = [c for c, e in self.known if e > self.limit and c.nbytes < fitting.nbytes]
            if not beyond:
                allowed *= _APART
                continue
            nearest = max(beyond, key=lambda c: c.nbytes)
            if choice.nbytes >= fitting.nbytes:
                low = max(low, allowed)
            else:
                high = min(high, allowed)
            least = max(low, self.search.foreseen(fitting))
            most = min(high, self.search.foreseen(nearest))
            if most > _ALIKE * least:
                allowed = (least * most) ** 0.5
            elif final:
                self.search.hold(c for n, c in fitting.candidates.items() if nearest.candidates[n] != c)
                self.known = [(c, e) for c, e in self.known if c is not nearest]
                allowed, low, high = self.next(fitting), 0.0, math.inf
            else:
                break
        return None

    def next(self, choice: Choice | None = None) -> float:
        """Return the damage to allow after an error, the latest: by the ratio, or between what is known."""
        damages = [(self.search.foreseen(c), e) for c, e in self.known]
        low = max((d for d, e in damages if e <= self.limit), default=0.0)
        high = min((d for d, e in damages if e > self.limit), default=math.inf)
        damage, error = (
            damages[-1]
            if choice is None
            else next((d, e) for (d, e), (c, _) in zip(damages, self.known, strict=True) if c is choice)
        )
        if choice is None and self._nearly <= error <= self.limit:
            return damage
        aim = damage * (_AIM * self.limit / max(error, 1e-3 * self.limit)) ** 2
        if low == 0:  # errors may hardly fall with damage: strides get longer
            aim = min(aim, high / _APART ** (len(damages) - 1))
        if not low < aim < high:
            if math.isinf(high):
                aim = _APART * (low or self.limit**2)
            else:
                aim = high / _APART if low == 0 else (low * high) ** 0.5
        return aim


def file_error(search: Search, limit: float, rewriter: Rewriter, original: Model, probes: Probes) -> Measure:
    """Return what measures the output error of arrays in the file they give, small vectors included.

    These stay exact from the first measurement on in which float16 takes too much of the limit.
    """
    if original.nbytes > LARGE:
        return lambda encoded, shifts: search.measured(encoded, shifts)[1]
    reference = verifier.Reference.of(runtime.session(model_file.serialize(original)), probes)

    def measure(encoded: list[Encoded], shifts: dict[str, Array]) -> float:
        made = model_file.serialize(rewriter.rewritten(encoded, shifts))
        outputs = verifier.compare(reference, runtime.session(made), probes).outputs
        error = max((o.relative for o in outputs), default=0.0)
        if rewriter.narrowed and error - search.measured(encoded, shifts)[1] > NARROW_SHARE * limit:
            rewriter.narrowed = False
            return measure(encoded, shifts)
        return error if math.isfinite(error) else math.inf

    return measure
