"""Choose what becomes of every weight: the least damage at the output within the bytes, or the reverse.

Damage of a weight is taken as a function of its local error, d(e^2), known at the points where it was
measured at the network's output, a straight line in logarithms between them and proportional to e^2 beyond.
All weights are chosen at once by one Lagrange multiplier (method.md 1.5), two where operations count beside
bytes; whoever conducts measures where the choice falls and chooses again.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from onnxdp.records import Array, Candidate, Weight


@dataclass(slots=True)
class Curve:
    """Damage as a function of a weight's squared local error: measured points, ascending."""

    squares: list[float] = field(default_factory=list)
    damages: list[float] = field(default_factory=list)
    scale: float = 1.0
    """What the joint check found the weight's damage to be, over what it is alone."""

    def add(self, square: float, damage: float) -> None:
        """Add a measurement."""
        place = bisect.bisect_left(self.squares, square)
        self.squares.insert(place, square)
        self.damages.insert(place, max(damage, 1e-14))

    def known(self, square: float, near: float, points: int = 2) -> bool:
        """Whether a measurement within a factor of this squared error exists, or some beyond it.

        Below so many ``points`` damage goes as the squared error does: noise that small adds up.
        """
        below = len(self.squares) >= points and square < self.squares[0]
        return below or any(square <= s * near and s <= square * near for s in self.squares)

    def __call__(self, squares: Array) -> Array:
        """Return the damage at each squared error."""
        e = np.maximum(np.asarray(squares, np.float64), 1e-300)
        if not self.squares:
            return self.scale * e
        xs, ys = np.log(self.squares), np.log(self.damages)
        ys = np.maximum.accumulate(ys)
        inside = np.interp(np.log(e), xs, ys)
        beyond = np.where(np.log(e) < xs[0], np.log(e) - xs[0], np.maximum(np.log(e) - xs[-1], 0.0))
        damage: Array = self.scale * np.exp(inside + beyond)
        return damage


Curves: TypeAlias = Mapping[tuple[str, str], Curve]
"""Of each weight under each method: errors of another kind do another damage."""


@dataclass(slots=True)
class Item:
    """Weights that are decided together: one alone, or several that may share arrays.

    ``alone`` holds the candidates of each weight by itself, ``together`` those of all at once; in either the
    first of a weight's candidates is to keep it.
    """

    names: tuple[str, ...]
    alone: dict[str, tuple[Candidate, ...]]
    together: tuple[tuple[Candidate, ...], ...] = ()

    def sharing(self) -> Item:
        """Return the item without what its weights may become alone in the way in which they could share."""
        methods = {c.method for option in self.together for c in option}
        alone = {n: tuple(c for c in own if c.method not in methods) for n, own in self.alone.items()}
        return replace(self, alone=alone)


@dataclass(frozen=True, slots=True)
class Choice:
    """One candidate per weight, the bytes they take and the damage that the curves foresee."""

    candidates: Mapping[str, Candidate]
    nbytes: int
    damage: float


KEEP = "keep"


def keep(weight: Weight) -> Candidate:
    """Return the candidate that changes nothing."""
    return Candidate(weight.name, KEEP, {}, weight.nbytes, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Operations:
    """What a run may cost: multiply-accumulates of one sample.

    Attributes
    ----------
    whole : int
        Of the network whose weights are chosen.
    before : int
        Of the original, channels that went included.
    budget : int
        Of the result, at most.
    dense : mapping of str to int
        Of each weight as it is; 0 where it is missing.
    share : callable
        What a candidate leaves of its weight's, a share.
    """

    whole: int
    before: int
    budget: int
    dense: Mapping[str, int]
    share: Callable[[Candidate], float]

    def of(self, candidate: Candidate) -> float:
        """Return the operations through one weight."""
        return self.dense.get(candidate.weight, 0) * self.share(candidate)

    def after(self, candidates: Iterable[Candidate]) -> int:
        """Return the operations of the network with some weights replaced."""
        return round(self.whole - sum(self.dense.get(c.weight, 0) - self.of(c) for c in candidates))

    def allows(self, choice: Choice) -> bool:
        """Whether a run of a choice costs no more than the budget."""
        return self.after(choice.candidates.values()) <= self.budget


def cheapest(
    items: Sequence[Item], overhead: Mapping[str, int], operations: Operations | None = None
) -> Choice:
    """Return the smallest choice there is, whatever it costs."""
    return _Table(items, {}, overhead, operations).at_price(math.inf)


def lightest(items: Sequence[Item], overhead: Mapping[str, int], operations: Operations) -> Choice:
    """Return the choice of fewest operations."""
    return _Table(items, {}, overhead, operations).at_prices(math.inf, math.inf)


def choose(
    items: Sequence[Item],
    curves: Curves,
    budget: int,
    overhead: Mapping[str, int],
    operations: Operations | None = None,
) -> Choice | None:
    """Return the choice of least foreseen damage within ``budget`` bytes; None where there is none.

    Parameters
    ----------
    items : sequence of Item
    curves : mapping of (str, str) to Curve
    budget : int
        Bytes for all candidates and what decodes them.
    overhead : mapping of str to int
        Method name -> bytes of the operators that decode one weight.
    operations : Operations, optional
        Bounds the operations of a run, too; they have a multiplier of their own.
    """
    least = cheapest(items, overhead, operations)
    if least.nbytes > budget or (operations and not operations.allows(least)):
        return None
    table = _Table(items, curves, overhead, operations)
    found = table.at_price(table.price(budget))
    return table.filled(found if found.nbytes <= budget else least, budget)


def filled(
    items: Sequence[Item],
    curves: Curves,
    choice: Choice,
    left: int,
    overhead: Mapping[str, int],
    operations: Operations | None = None,
) -> Choice:
    """Return a choice with ``left`` bytes more to spend."""
    table = _Table(items, curves, overhead, operations)
    return table.filled(choice, choice.nbytes + left)


def at_price(
    items: Sequence[Item],
    curves: Curves,
    price: float,
    overhead: Mapping[str, int],
    operations: Operations | None = None,
) -> Choice:
    """Return the choice that minimises damage + price * bytes, within the operations."""
    return _Table(items, curves, overhead, operations).at_price(price)


def bytes_of(candidate: Candidate, overhead: Mapping[str, int]) -> int:
    """Bytes of a candidate with the operators that decode it."""
    return candidate.nbytes + overhead.get(candidate.method, 0)


class _Options:
    """Lists of candidates: bytes, damage and operations of each, as rows that infinity fills up."""

    def __init__(
        self,
        lists: Sequence[Sequence[tuple[Candidate, ...]]],
        curves: Curves,
        overhead: Mapping[str, int],
        operations: Operations | None,
    ) -> None:
        self.lists = lists
        self.sizes, self.harm, self.work = (
            np.full((len(lists), max(map(len, lists), default=0)), np.inf) for _ in range(3)
        )
        for row, options in enumerate(lists):
            until = len(options)
            self.sizes[row, :until] = [sum(bytes_of(c, overhead) for c in option) for option in options]
            self.harm[row, :until] = sum(damages(own, curves) for own in zip(*options, strict=True))
            self.work[row, :until] = 0.0
            if operations is not None:
                self.work[row, :until] = [sum(map(operations.of, option)) for option in options]

    def best(self, price: float, toll: float) -> tuple[Array, Array]:
        """Return the place of the least cost in every row, and that cost."""
        if math.isinf(toll):
            cost = self.work
        else:
            cost = self.sizes if math.isinf(price) else price * self.sizes + self.harm
            cost = cost + toll * self.work if toll else cost
        places = np.argmin(cost, axis=1)
        return places, cost[np.arange(len(cost)), places]


class _Table:
    """Everything that a choice weighs, worked out once for all prices."""

    def __init__(
        self,
        items: Sequence[Item],
        curves: Curves,
        overhead: Mapping[str, int],
        operations: Operations | None,
    ) -> None:
        self._operations = operations
        self._names = [n for item in items for n in item.names]
        self._groups = [[self._names.index(n) for n in item.names] for item in items if item.together]
        known = curves, overhead, operations
        self._alone = _Options([[(c,) for c in item.alone[n]] for item in items for n in item.names], *known)
        self._together = _Options([item.together for item in items if item.together], *known)

    def at_price(self, price: float) -> Choice:
        """Return the best choice at a price of bytes whose operations are within their budget.

        Where none is, the one at a toll beside which nothing else counts.
        """
        best = self.at_prices(price, 0.0)
        if self._fits(best):
            return best
        low, high = (-40.0, 20.0) if math.isinf(price) else (-80.0, 10.0)  # log of bytes, of damage
        best = self.at_prices(price, math.exp(high))
        for _ in range(30):
            middle = (low + high) / 2
            tried = self.at_prices(price, math.exp(middle))
            if self._fits(tried):
                high, best = middle, tried
            else:
                low = middle
        return best

    def at_prices(self, price: float, toll: float) -> Choice:
        """Return the choice that minimises damage + price * bytes + toll * operations."""
        places, costs = self._alone.best(price, toll)
        picked = {row: (self._alone, row, int(place)) for row, place in enumerate(places)}
        if self._groups:
            shared, together = self._together.best(price, toll)
            for number, rows in enumerate(self._groups):
                if together[number] < costs[rows].sum():
                    picked.update({row: (self._together, number, int(shared[number])) for row in rows})
        candidates = {
            c.weight: c for options, row, place in picked.values() for c in options.lists[row][place]
        }
        used = dict.fromkeys(picked.values())
        nbytes = sum(int(options.sizes[row, place]) for options, row, place in used)
        return Choice(
            {n: candidates[n] for n in self._names},
            nbytes,
            sum(float(options.harm[row, place]) for options, row, place in used),
        )

    def price(self, budget: int) -> float:
        """Return the damage per byte from which on choices are within a budget, as far as any is."""
        low, high = -80.0, 20.0  # logarithms
        if self.at_price(math.exp(low)).nbytes <= budget:
            return math.exp(low)
        for _ in range(50):
            middle = (low + high) / 2
            if self.at_price(math.exp(middle)).nbytes <= budget:
                high = middle
            else:
                low = middle
        return math.exp(high)

    def filled(self, choice: Choice, budget: int) -> Choice:
        """Spend what the multipliers left over: the swap that saves most damage per byte, while one fits."""
        own = self._alone
        places = {}
        for row, name in enumerate(self._names):
            if "dictionary" not in choice.candidates[name].params:
                places[row] = own.lists[row].index((choice.candidates[name],))
        candidates = dict(choice.candidates)
        slack, room = float(budget - choice.nbytes), math.inf
        if self._operations is not None:
            room = self._operations.budget - self._operations.after(candidates.values())
        nbytes, damage = choice.nbytes, choice.damage
        while slack > 0:
            best: tuple[float, int, int] | None = None
            for row, now in places.items():
                more, gain = own.sizes[row] - own.sizes[row, now], own.harm[row, now] - own.harm[row]
                fits = (more > 0) & (more <= slack) & (own.work[row] - own.work[row, now] <= room)
                rate = np.where(fits, gain, -1.0) / np.maximum(more, 1.0)
                place = int(np.argmax(rate))
                if rate[place] > 0 and (best is None or rate[place] > best[0]):
                    best = (float(rate[place]), row, place)
            if best is None:
                break
            _, row, place = best
            now, places[row] = places[row], place
            slack -= own.sizes[row, place] - own.sizes[row, now]
            room -= own.work[row, place] - own.work[row, now]
            nbytes += int(own.sizes[row, place] - own.sizes[row, now])
            damage += float(own.harm[row, place] - own.harm[row, now])
            (candidates[self._names[row]],) = own.lists[row][place]
        return Choice(candidates, nbytes, damage)

    def _fits(self, choice: Choice) -> bool:
        return self._operations is None or self._operations.allows(choice)


def damages(candidates: Sequence[Candidate], curves: Curves) -> Array:
    """Return the damage that each candidate's curve foresees."""
    found = np.zeros(len(candidates))
    squares = np.array([c.error**2 for c in candidates])
    keys = [(c.weight, c.method) for c in candidates]
    for key in set(keys):
        if key[1] != KEEP:
            own = np.array([k == key for k in keys])
            found[own] = curves[key](squares[own]) if key in curves else squares[own]
    return found


def foreseen(candidate: Candidate, curves: Curves) -> float:
    """Return the damage that a candidate's curve foresees."""
    return float(damages([candidate], curves)[0])
