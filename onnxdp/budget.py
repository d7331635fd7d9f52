"""Reach bytes and operations: choose so that the whole file fits, and say why where nothing does.

The choice counts what weights and their decoding take by estimates; what a file really takes is counted by
drawing it, with arrays of the right shapes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxdp import planner, stats
from onnxdp.damage import Search
from onnxdp.encoder import near
from onnxdp.encoding import Workshop
from onnxdp.errors import PlanError, TargetError
from onnxdp.model import Model
from onnxdp.network import Network
from onnxdp.planner import Choice, Item, Operations
from onnxdp.probes import Probes
from onnxdp.records import Candidate, Kept, Made, Plan
from onnxdp.result import Rewriter
from onnxdp.settings import Settings
from onnxdp.weights import Found

MIN_GAIN = 0.01
"""Share of the bytes that must be saved for a result to be worth writing."""

NEARLY = 0.004
"""Share that may be left to a weight whose numbers can take a little more."""

KEPT = 0.3
"""About the share of a file beside its weights that is left once names are short and biases are float16."""

_LEAST = 10
"""Bytes that a weight's decoding takes at least: a place in a list of where its numbers start."""

_ROUNDS = 4
"""Times that changes are weighed within the whole where operations are bounded: pairs make up for much.

Where all is rounded, weights are rated for their places beforehand (damage.TILT); to weigh them so as well
changed the damage by -5 to 5 % on 15 networks, for a third of the time.
"""

log = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[Choice], Made]


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a file may have, and who is asked on the way to a choice of that size."""

    nbytes: int
    search: Search
    rewriter: Rewriter
    encode: Encode | None
    """Gives the arrays of a choice, quickly, where changes are to be weighed within it; None elsewhere."""

    def choose(self, reached: int) -> Choice:
        """Choose so that the whole file fits, where ``reached`` are the bytes of the smallest there is.

        Raises
        ------
        TargetError
            Not even that one fits.
        """
        if reached > self.nbytes:
            raise TargetError(
                f"The target ({self.rewriter.settings.target}) is out of reach: "
                f"the best reachable is {reached:,} bytes ({self.rewriter.model.nbytes / reached:.2f}x); "
                f"ask for that (--size {reached}) or less."
            )
        tried = []
        for number, _ in enumerate(self.search.ways_to_share()):
            reached = self.rewriter.size(self.search.smallest()) if number else reached
            if reached <= self.nbytes:
                fitting = self._fitting(self._room(reached))
                found = self.search.smallest() if fitting is None else self._filled(self._checked(*fitting))
                tried.append(found)
        return tried[0] if len(tried) == 1 else min(tried, key=lambda c: self.search.together(c)[0])

    def closest(self, reached: int) -> Choice:
        """Return the choice of least foreseen damage that fits, the smallest where none does."""
        fitting = self._fitting(self._room(reached))
        return self.search.smallest() if fitting is None else self._filled(fitting[0])

    def _room(self, reached: int) -> int:
        """Return what the budget leaves for weights, by their estimates.

        What is no candidate's, and what the estimates of decoding are off by, shows in the smallest result.
        """
        return self.nbytes - reached + self.search.smallest().nbytes

    def _fitting(self, room: int) -> tuple[Choice, int] | None:
        """Return a choice whose file fits the budget, closely, and the room for weights that gave it."""
        best: Choice | None = None
        low, high = -math.inf, math.inf  # rooms that are known to fit, and not to
        least = self.search.smallest().nbytes
        for _ in range(8):
            room = max(room, least)  # of the estimates; the exact count says that the target can be reached
            choice = self.search.within(room)
            over = self.rewriter.size(choice) - self.nbytes
            if over > 0:
                high = room
            elif best is not None and choice.candidates == best.candidates:
                low = room
                if math.isinf(high):
                    break
            else:
                best, low = choice, room
                if -over <= self._near(choice) or not self.search.workshop.sequential:
                    break
            # Below what was chosen, where that is too much: else the same choice comes again.
            room = min(room, choice.nbytes) - max(over, 64) if over > 0 else room - over
            if not low < room < high:
                room = int(low + high) // 2
            if high - low < 128 or room < least == high:
                break
        while best is None and room > least:  # the smallest fits, so what lies halfway may
            room = (room + least) // 2
            choice = self.search.within(room)
            if self.rewriter.size(choice) <= self.nbytes:
                best, low = choice, room
        return None if best is None else (best, int(low))

    def _filled(self, choice: Choice) -> Choice:
        """Spend what steps between choices left over on single weights, as far as the file still fits."""
        left = self.nbytes - self.rewriter.size(choice)
        for _ in range(8):
            if left <= self._near(choice):
                break
            more = self.search.filled(choice, left)
            if more.candidates == choice.candidates:
                break
            over = self.rewriter.size(more) - self.nbytes
            choice, left = (choice, left - over) if over > 0 else (more, -over)
        return choice

    def _near(self, choice: Choice) -> float:
        """Return the bytes that a choice may leave over: more where encoding fills the file (see refine)."""
        fills = any("bits" in c.params for c in choice.candidates.values())
        fills = fills and self.rewriter.settings.refit is not False
        return near(self.nbytes, NEARLY) if fills else near(self.nbytes)

    def _checked(self, choice: Choice, room: int) -> Choice:
        """Return the choice, or it repaired, where that is better as a whole and fits."""
        if self.search.workshop.sequential:
            return choice if self.encode is None else self._reweighed(choice, room, self.encode)
        other = self.search.repaired(choice, room)
        return other if other is choice or self.rewriter.size(other) <= self.nbytes else choice

    def _reweighed(self, choice: Choice, room: int, encode: Encode) -> Choice:
        """Return the choice, or the one made with every change weighed within the whole, if it is better."""
        encoded = encode(choice)
        best, damage = choice, self.search.measured(*encoded)[0]
        for _ in range(_ROUNDS):
            self.search.reweighed(choice, *encoded)
            fitting = self._fitting(room)
            if fitting is None or fitting[0].candidates in (choice.candidates, best.candidates):
                break
            choice = fitting[0]
            encoded = encode(choice)
            again, _ = self.search.measured(*encoded)
            log.info("damage %.4g, weighed within the whole %.4g", damage, again)
            best, damage = (choice, again) if again < damage else (best, damage)
        return best


def overhead(items: Sequence[Item], rewriter: Rewriter) -> dict[str, int]:
    """Count the bytes of what decodes one weight, by method: drawn for all weights that it can store.

    The smallest candidates are drawn: of them most share their operators, and where weights are large none
    of this matters.
    """
    kept = [options[0] for item in items for options in item.alone.values()]
    bare = rewriter.size(_choice(kept))
    found = {}
    for method in rewriter.workshop.forms:
        own = [_smallest(method, options) for item in items for options in item.alone.values()]
        count = sum(c.method == method for c in own)
        grown = rewriter.size(_choice(own)) - bare
        stored = sum(c.nbytes for c in own) - sum(c.nbytes for c in kept)
        found[method] = max(round((grown - stored) / max(count, 1)), _LEAST)
    return found


def _choice(candidates: Sequence[Candidate]) -> Choice:
    return Choice({c.weight: c for c in candidates}, sum(c.nbytes for c in candidates), 0.0)


def _smallest(method: str, options: Sequence[Candidate]) -> Candidate:
    return min((c for c in options if c.method == method), key=lambda c: c.nbytes, default=options[0])


def least_bytes(search: Search, rewriter: Rewriter) -> int:
    """Return the bytes of the smallest result there is.

    Raises
    ------
    TargetError
        It is about as large as the original.
    """
    nbytes = rewriter.model.nbytes
    reached = rewriter.size(search.smallest())
    if nbytes - reached < MIN_GAIN * nbytes:
        raise TargetError(f"Nothing to gain: {why_nothing(rewriter.found, rewriter.settings.method)}.")
    return reached


def require_gain(choice: Choice, search: Search, rewriter: Rewriter) -> None:
    """Refuse to write what is the original once more."""
    settings, nbytes = rewriter.settings, rewriter.model.nbytes
    if nbytes - rewriter.size(choice) >= MIN_GAIN * nbytes:
        return
    limit = settings.error_target
    if limit is None:
        raise TargetError(
            f"Nothing to gain: the target ({settings.target}) lets the file stay as it is, "
            f"{nbytes:,} bytes; ask for a smaller one."
        )
    if search.operations is not None:
        raise TargetError(
            f"Nothing that was tried runs in {search.operations.budget:,} multiply-accumulates (macs "
            f"{settings.macs:g}) within an output error of {limit:g}; allow more with --max-error, or ask "
            "for less with --macs."
        )
    raise TargetError(
        f"Nothing to gain within an output error of {limit:g}: changing every weight as little as can be "
        f"gives {search.mildest():.2g}; allow more with --max-error, or give --ratio."
    )


def require_reach(found: Operations, search: Search, settings: Settings) -> None:
    """Refuse what no choice reaches.

    Raises
    ------
    TargetError
        Nothing makes runs that light.
    """
    least = found.after(planner.lightest(search.items, search.overhead, found).candidates.values())
    if least > found.budget:
        reached = math.floor(100 * found.before / max(least, 1)) / 100
        remedy = f"ask for --macs {reached:g} or less" if reached > 1 else "leave --macs out"
        raise TargetError(
            f"The target (macs {settings.macs:g}) is out of reach: the fewest multiply-accumulates that "
            f"method {settings.method} reaches are {least:,} of {found.before:,}; {remedy}."
        )


def operations(
    original: Network, network: Network, workshop: Workshop, probes: Probes, asked: float
) -> Operations:
    """Count the operations of one run, and say how many the result may have, ``asked`` times fewer.

    ``network`` is the original, or what is left of it once channels went.
    """
    one = probes.rebatch(1)
    whole = before = stats.operations(network, one.feeds[0], one.batch)
    if network is not original:
        before = stats.operations(original, one.feeds[0], one.batch)
    dense = {w.name: stats.macs([w]) for w in workshop.found.weights}
    return Operations(whole, before, math.floor(before / asked), dense, workshop.macs)


def refuse(plan: Plan, model: Model, nbytes: int) -> None:
    """Refuse a result (of a plan edited by hand) that is larger than the original, or than its budget.

    Raises
    ------
    TargetError, PlanError
        The first, the second.
    """
    if nbytes >= model.nbytes:
        raise TargetError(
            f"Nothing to gain: the result would have {nbytes:,} bytes "
            f"and the model has {model.nbytes:,}; change the plan."
        )
    if plan.budget is not None and nbytes > plan.budget:
        raise PlanError(
            f"The plan's choices give {nbytes:,} bytes and its budget is {plan.budget:,}; raise the budget "
            "in the plan (null: none), or let a weight take less."
        )


def bits_left(original: Model, whole: Found, found: Found, settings: Settings) -> float:
    """Return about the bits that the target leaves each number of the weights; 16 where it does not say."""
    budget = settings.budget(original.nbytes)
    if budget is None:
        return 16.0
    left = budget - KEPT * (original.nbytes - sum(w.nbytes for w in whole.weights))
    return float(np.clip(8 * left / max(sum(w.size for w in found.weights), 1), 0.5, 16.0))


def why_nothing(found: Found, method: str = "auto") -> str:
    """Say why no weight of a model becomes smaller by a method."""
    if found.weights:
        if method != "auto":
            return f"its weights are as small as method {method} makes them; leave --method out"
        return "its weights are as small as onnxdp can make them"
    if not found.kept:
        return "the model has no Conv, Gemm or MatMul weight of 1 kB or more"
    by_reason: dict[str, list[Kept]] = {}
    for k in found.kept:
        by_reason.setdefault(k.reason, []).append(k)
    alike = max(by_reason.values(), key=_held)
    largest = max(alike, key=lambda k: k.nbytes)
    beside = f", the largest of {len(alike)} alike ({_held(alike):,} bytes)," if len(alike) > 1 else ""
    return f"of what it holds, {largest.weight} ({largest.nbytes:,} bytes){beside} {largest.reason}"


def _held(kept: Sequence[Kept]) -> int:
    return sum(k.nbytes for k in kept)
