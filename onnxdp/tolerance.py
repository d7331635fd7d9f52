"""Reach an error: find the smallest choice whose outputs stay within it.

What weights lose together is not the sum of what they lose alone, so every bound that a search moves along is
checked by a measurement of all changes at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeAlias

from onnxdp import model as model_file
from onnxdp import runtime, verifier
from onnxdp.damage import Search
from onnxdp.errors import TargetError
from onnxdp.model import Model
from onnxdp.planner import Choice
from onnxdp.probes import Probes
from onnxdp.records import Array, Encoded
from onnxdp.result import LARGE, Rewriter

_ENCODINGS = {False: 5, True: 3}
"""Times that a choice is encoded on the way to an error, and where the network is costly."""

NARROW_SHARE = 0.1
"""Share of the allowed output error that small vectors in float16 may take: they save a percent or two."""

log = logging.getLogger(__name__)

Measure: TypeAlias = Callable[[list[Encoded], dict[str, Array]], float]
"""Gives the relative output error of encoded weights and of what biases gain."""


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
    search: Search,
    limit: float,
    encode: Callable[[Choice], tuple[list[Encoded], dict[str, Array]]],
    measure: Measure,
) -> tuple[Choice, tuple[list[Encoded], dict[str, Array]]]:
    """Return the smallest choice found whose outputs, once encoded layer by layer, stay within ``limit``.

    What layers make up for one another is not foreseen: a choice is encoded, its error measured, and the
    damage allowed to the next is corrected by the ratio, or lies between what fitted and what did not.

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
    nothing = search.untouched()
    best: tuple[Choice, tuple[list[Encoded], dict[str, Array]]] = nothing, ([], {})
    allowed, low, high = limit**2, 0.0, math.inf
    least = search.smallest().candidates
    tried: list[tuple[Choice, float]] = []
    for _ in range(_ENCODINGS[search.costly]):
        choice = _within_damage(search, allowed)
        error = next((e for c, e in tried if c.candidates == choice.candidates), math.nan)
        if math.isnan(error):
            encoded = encode(choice)
            error = measure(*encoded)
            tried.append((choice, error))
            log.info("allowed damage %.3g: %d bytes, output error %.4g", allowed, choice.nbytes, error)
            if error <= limit and choice.nbytes < best[0].nbytes:
                best = choice, encoded
        if 0.85 * limit <= error <= limit or (error <= limit and choice.candidates == least):
            break
        low, high = (max(low, allowed), high) if error <= limit else (low, min(high, allowed))
        aim = allowed * (0.93 * limit / max(error, 1e-3 * limit)) ** 2
        allowed = aim if low < aim < high else (low * high) ** 0.5
    if best[0] is nothing:  # errors that hardly fall with the damage allowed
        free = search.free()
        encoded = encode(free)
        if free.nbytes < nothing.nbytes and measure(*encoded) <= limit:
            best = free, encoded
    return best


def _within_damage(search: Search, allowed: float) -> Choice:
    """Return the smallest choice whose foreseen damage is allowed."""
    low, high = -60.0, 0.0  # log of damage per byte
    best = search.settled(low, 0)
    for number in range(12):
        middle = (low + high) / 2
        choice = search.settled(middle, number)
        if choice.damage <= allowed:
            best, low = choice, middle
        else:
            high = middle
    return best


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
