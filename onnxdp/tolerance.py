"""Reach an error: find the smallest choice whose outputs stay within it.

What weights lose together is not the sum of what they lose alone, so every bound that a search moves along is
checked by a measurement of all changes at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from onnxdp import model as model_file
from onnxdp import verifier
from onnxdp.damage import PRICES, Search
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
    low, high = PRICES
    best: Choice | None = None
    for _ in range(evaluations):
        middle = (low + high) / 2
        choice = search.at_price(middle)
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


class _Known(NamedTuple):
    """A choice that was encoded, and its error."""

    choice: Choice
    error: float


@dataclass(slots=True)
class _Hunt:
    """Choices encoded one after the other, each allowed the damage that the errors before it suggest."""

    search: Search
    limit: float
    encode: Encode
    measure: Measure
    known: list[_Known] = field(default_factory=list)
    """The latest last."""

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
            first = quick and number == 0 and self.search.workshop.light
            weighed = first and self.search.reweighed(choice, *made)
            if fits and not weighed and (error >= self._nearly or choice.candidates == least):
                break
            allowed = self.next()
        return best

    def _learn(self, choice: Choice, error: float, tried: Sequence[Choice]) -> None:
        """Note an error; what care gains for one choice, made quickly before, it will for those not tried."""
        before = next((k.error for k in self.known if k.choice.candidates == choice.candidates), 0.0)
        gain = error / before if 0 < before < math.inf and math.isfinite(error) else 1.0
        self.known = [
            k if _among(k.choice, tried) else _Known(k.choice, gain * k.error)
            for k in self.known
            if k.choice.candidates != choice.candidates
        ]
        self.known.append(_Known(choice, error))

    def _untried(self, allowed: float, tried: Sequence[Choice], *, final: bool) -> Choice | None:
        """Return the choice of an allowed damage, or one beside it; None where all are known.

        Between two choices next to each other one weight's step is too much: where that is final, it is not
        taken, so that others have their turn.
        """
        low, high = 0.0, math.inf  # allowed damages that give what fits, and what does not
        for _ in range(_MOVES):
            choice = self.search.within_damage(allowed)
            if not _among(choice, tried):
                return choice
            if choice.damage > allowed:  # the mildest there is
                return None
            fitting, beyond = self._nearest()
            if fitting is None:
                allowed /= _APART
            elif not _among(fitting.choice, tried):
                return fitting.choice
            elif beyond is None:
                allowed *= _APART
            else:
                if choice.nbytes >= fitting.choice.nbytes:
                    low = max(low, allowed)
                else:
                    high = min(high, allowed)
                least = max(low, self.search.foreseen(fitting.choice))
                most = min(high, self.search.foreseen(beyond.choice))
                if most > _ALIKE * least:
                    allowed = (least * most) ** 0.5
                elif not final:
                    return None
                else:
                    self._forgo(beyond, fitting)
                    allowed, low, high = self._aim(fitting), 0.0, math.inf
        return None

    def _nearest(self) -> tuple[_Known | None, _Known | None]:
        """Return the smallest choice known to be within the limit, and the largest smaller one beyond it."""
        within = [k for k in self.known if k.error <= self.limit]
        fitting = min(within, key=lambda k: k.choice.nbytes, default=None)
        if fitting is None:
            return None, None
        smaller = [k for k in self.known if k.error > self.limit and k.choice.nbytes < fitting.choice.nbytes]
        return fitting, max(smaller, key=lambda k: k.choice.nbytes, default=None)

    def _forgo(self, beyond: _Known, fitting: _Known) -> None:
        """Take no more of the steps down that lead from what fits to what does not, nor beyond them."""
        kept, stepped = fitting.choice.candidates, beyond.choice.candidates
        self.search.hold(c for n, c in stepped.items() if c.nbytes < kept[n].nbytes)
        self.known = [k for k in self.known if k is not beyond]

    def next(self) -> float:
        """Return the damage to allow after the latest error: the same again where that was near enough."""
        latest = self.known[-1]
        if self._nearly <= latest.error <= self.limit:
            return self.search.foreseen(latest.choice)
        return self._aim(latest)

    def _aim(self, start: _Known) -> float:
        """Return the damage to allow, by what an error lacks to the limit, or between what is known."""
        damages = [(self.search.foreseen(k.choice), k.error) for k in self.known]
        low = max((d for d, e in damages if e <= self.limit), default=0.0)
        high = min((d for d, e in damages if e > self.limit), default=math.inf)
        ratio = _AIM * self.limit / max(start.error, 1e-3 * self.limit)
        aim = self.search.foreseen(start.choice) * ratio**2
        if low == 0:  # errors may hardly fall with damage: strides get longer
            aim = min(aim, high / _APART ** (len(damages) - 1))
        if not low < aim < high:
            if math.isinf(high):
                aim = _APART * (low or self.limit**2)
            else:
                aim = high / _APART if low == 0 else (low * high) ** 0.5
        return aim


def _among(choice: Choice, others: Sequence[Choice]) -> bool:
    return any(choice.candidates == other.candidates for other in others)


def file_error(search: Search, limit: float, rewriter: Rewriter, original: Model, probes: Probes) -> Measure:
    """Return what measures the output error of arrays in the file they give, small vectors included.

    These stay exact from the first measurement on in which float16 takes too much of the limit.
    """
    if original.nbytes > LARGE:
        return lambda encoded, shifts: search.measured(encoded, shifts)[1]
    session = rewriter.opened(model_file.serialize(original))
    reference = verifier.Reference.of(session, probes, rewriter.decisions)

    def measure(encoded: list[Encoded], shifts: dict[str, Array]) -> float:
        made = model_file.serialize(rewriter.rewritten(encoded, shifts))
        outputs = verifier.compare(reference, rewriter.followed(made), probes).outputs
        error = max((o.relative for o in outputs), default=0.0)
        if rewriter.narrowed and error - search.measured(encoded, shifts)[1] > NARROW_SHARE * limit:
            rewriter.narrowed = False
            return measure(encoded, shifts)
        return error if math.isfinite(error) else math.inf

    return measure
