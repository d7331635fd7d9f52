"""Choose what becomes of every weight: the least damage at the output within the bytes, or the reverse.

Damage of a weight is taken as a function of its local error, d(e^2), known at the points where it was
measured at the network's output, a straight line in logarithms between them and proportional to e^2 beyond.
All weights are chosen at once by one Lagrange multiplier (method.md 1.5); whoever conducts measures where the
choice falls and chooses again.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from onnxdp.methods.tables import Alphabet, table_of
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

    def known(self, square: float, near: float) -> bool:
        """Whether a measurement within a factor of this squared error exists, or two beyond it.

        Below two measurements damage goes as the squared error does: noise that small adds up.
        """
        below = len(self.squares) > 1 and square < self.squares[0]
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


def cheapest(items: Sequence[Item], overhead: Mapping[str, int]) -> Choice:
    """Return the smallest choice there is, whatever it costs."""
    return _collect((_pick(item, {}, math.inf, overhead) for item in items), {}, overhead)


def choose(items: Sequence[Item], curves: Curves, budget: int, overhead: Mapping[str, int]) -> Choice | None:
    """Return the choice of least foreseen damage within ``budget`` bytes; None where there is none.

    Parameters
    ----------
    items : sequence of Item
    curves : mapping of (str, str) to Curve
    budget : int
        Bytes for all candidates and what decodes them.
    overhead : mapping of str to int
        Method name -> bytes of the operators that decode one weight.
    """
    least = cheapest(items, overhead)
    if least.nbytes > budget:
        return None
    found = at_price(items, curves, price(items, curves, budget, overhead), overhead)
    return _fill(items, curves, found if found.nbytes <= budget else least, budget, overhead)


def price(items: Sequence[Item], curves: Curves, budget: int, overhead: Mapping[str, int]) -> float:
    """Return the damage per byte from which on choices are within ``budget`` bytes, as far as any is."""
    low, high = -80.0, 20.0  # logarithms
    if at_price(items, curves, math.exp(low), overhead).nbytes <= budget:
        return math.exp(low)
    for _ in range(50):
        middle = (low + high) / 2
        if at_price(items, curves, math.exp(middle), overhead).nbytes <= budget:
            high = middle
        else:
            low = middle
    return math.exp(high)


def with_tables_that_pay(
    items: Sequence[Item], curves: Curves, price: float, overhead: Mapping[str, int]
) -> list[Item]:
    """Return the items without the candidates whose table is worth less at a price than its own bytes.

    Tables are added one by one, the one that saves most beside those before it first.
    """
    alone = [own for item in items for own in item.alone.values()]
    tables = sorted({t for own in alone for c in own if (t := table_of(c.params))})
    if not tables:
        return list(items)
    costs = np.full((len(alone), len(tables) + 1), math.inf)  # the last column: without a table
    for row, own in zip(costs, alone, strict=True):
        each = damages(own, curves) + price * np.array([bytes_of(c, overhead) for c in own], np.float64)
        for c, cost in zip(own, each, strict=True):
            table = table_of(c.params)
            place = len(tables) if table is None else tables.index(table)
            row[place] = min(row[place], cost)
    least, kept = costs[:, -1], set[Alphabet]()
    while True:
        saved = {
            t: float((least - np.minimum(least, costs[:, k])).sum()) - price * t.levels * t.dim
            for k, t in enumerate(tables)
            if t not in kept
        }
        best = max(saved, key=lambda t: saved[t], default=None)
        if best is None or saved[best] <= 0:
            break
        kept.add(best)
        least = np.minimum(least, costs[:, tables.index(best)])

    def pays(c: Candidate) -> bool:
        return (table := table_of(c.params)) is None or table in kept

    return [
        replace(item, alone={n: tuple(c for c in own if pays(c)) for n, own in item.alone.items()})
        for item in items
    ]


def at_price(items: Sequence[Item], curves: Curves, price: float, overhead: Mapping[str, int]) -> Choice:
    """Return the choice that minimises damage + price * bytes."""
    return _collect((_pick(item, curves, price, overhead) for item in items), curves, overhead)


def bytes_of(candidate: Candidate, overhead: Mapping[str, int]) -> int:
    """Bytes of a candidate with the operators that decode it."""
    return candidate.nbytes + overhead.get(candidate.method, 0)


def _pick(item: Item, curves: Curves, price: float, overhead: Mapping[str, int]) -> tuple[Candidate, ...]:
    """Return the item's best candidates at a price: each weight by itself, or all together."""
    own = [_best([(c,) for c in item.alone[n]], curves, price, overhead) for n in item.names]
    alone = tuple(c for _, chosen in own for c in chosen)
    if not item.together:
        return alone
    cost, together = _best(item.together, curves, price, overhead)
    return together if cost < sum(c for c, _ in own) else alone


def _best(
    options: Sequence[tuple[Candidate, ...]],
    curves: Curves,
    price: float,
    overhead: Mapping[str, int],
) -> tuple[float, tuple[Candidate, ...]]:
    sizes = np.array([sum(bytes_of(c, overhead) for c in option) for option in options], np.float64)
    if math.isinf(price):
        best = int(np.argmin(sizes))
        return float(sizes[best]), options[best]
    cost = price * sizes
    for place in range(len(options[0])):
        cost += damages([option[place] for option in options], curves)
    best = int(np.argmin(cost))
    return float(cost[best]), options[best]


def _collect(picked: Iterable[tuple[Candidate, ...]], curves: Curves, overhead: Mapping[str, int]) -> Choice:
    candidates = {c.weight: c for chosen in picked for c in chosen}
    return Choice(
        candidates,
        sum(bytes_of(c, overhead) for c in candidates.values()),
        sum(foreseen(c, curves) for c in candidates.values()),
    )


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


def _fill(
    items: Sequence[Item],
    curves: Curves,
    choice: Choice,
    budget: int,
    overhead: Mapping[str, int],
) -> Choice:
    """Spend what the multiplier left over: the swap that saves most damage per byte, while one fits."""
    candidates = dict(choice.candidates)
    slack = budget - choice.nbytes
    shared = {
        n for item in items if item.together for n in item.names if "dictionary" in candidates[n].params
    }
    options: dict[str, tuple[Array, Array, tuple[Candidate, ...]]] = {}
    for item in items:
        for name, own in item.alone.items():
            if name not in shared:
                sizes = np.array([bytes_of(c, overhead) for c in own], np.float64)
                options[name] = (sizes, damages(own, curves), own)
    while slack > 0:
        best: tuple[float, str, int] | None = None
        for name, (sizes, harm, _) in options.items():
            now = candidates[name]
            size, damage = bytes_of(now, overhead), foreseen(now, curves)
            gain = np.where((sizes > size) & (sizes <= size + slack), damage - harm, -1.0)
            rate = gain / np.maximum(sizes - size, 1.0)
            place = int(np.argmax(rate))
            if gain[place] > 0 and (best is None or rate[place] > best[0]):
                best = (float(rate[place]), name, place)
        if best is None:
            break
        _, name, place = best
        slack -= int(options[name][0][place]) - bytes_of(candidates[name], overhead)
        candidates[name] = options[name][2][place]
    return _collect([tuple(candidates.values())], curves, overhead)
