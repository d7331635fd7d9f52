"""Find the choice: measure where the plan goes, check the whole jointly, repair where it disagrees.

A plan that trusts one or two measured ranks, extrapolated, can lose everything (prototype.md section 5). So
every round measures, at the network's output on held-out probes, the very candidates that the current choice
took, and chooses again, until the choice rests on measurements; then all are changed at once and compared
with the sum.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from onnxdp import planner
from onnxdp.encoding import Workshop
from onnxdp.errors import TargetError
from onnxdp.meter import Meter
from onnxdp.network import bias_input
from onnxdp.planner import Choice, Curve, Item, Operations
from onnxdp.records import Array, Candidate, Encoded, Named
from onnxdp.settings import Progress

ROUNDS = 6
"""Most rounds of measuring and choosing again."""
FREE = 1e-5
"""Local errors whose square is below this are not worth a measurement (float16 has about 1e-7)."""

APART = 1.5
"""Damage as a whole over the sum of its parts, beyond which the choice is repaired."""
SLIGHT = 0.01
"""Damage that is not worth a repair."""
LIMIT = 3.0
"""Most by which one repair may change what a weight counts."""
TRUST = 0.5
"""Power of what a weight counts within the whole over what it does alone: later layers have adapted."""
_UNREACHED = 0.5
"""What the damage of a weight that no probe reaches counts: few inputs will."""
TILT = 2.0
"""What the last weight's damage counts over what it does alone, and the first's the other way round."""
DEEP = 12
"""Weights from which that holds in full: where few layers follow, little is made up for."""
SMALL = 0.05
"""Share of the numbers whose holders, the smallest weights, stay float16 unless the target needs them ..."""
SLACK = 0.02
"""... and the share of the file's budget that they may take so."""

PRICES = (-60.0, 0.0)
"""Least and highest logarithm of damage per byte."""
_HALVINGS = 14
"""Times that what lies between these is halved to find the price of an allowed damage."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Search:
    """One analysis of a model: what weights may become, and what is known of the damage so far.

    ``meter`` is None where the network cannot be run piecewise; local errors then stand for damage.
    """

    workshop: Workshop
    meter: Meter | None
    items: list[Item]
    overhead: Mapping[str, int]
    progress: Progress
    budget: int | None = None
    """Bytes that the whole file may have."""
    costly: bool = False
    """Whether one point of every curve has to do."""
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    measured_alone: dict[Named, float] = field(default_factory=dict)
    """Damage of the candidates that were measured; searches for several targets share it."""
    operations: Operations | None = None
    """What a run may cost, where that is asked for."""
    late: Mapping[str, float] = field(default_factory=dict)
    """What weights count for their places: what later layers make up for is not lost."""
    smaller: frozenset[str] = frozenset()
    """Weights that some candidate makes smaller, whether it may still be taken or not."""
    _spare: dict[str, tuple[Candidate, ...]] = field(default_factory=dict)
    _scanned: bool = False
    _wholes: dict[frozenset[Named], tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        workshop: Workshop,
        meter: Meter | None,
        overhead: Mapping[str, int],
        progress: Progress,
        *,
        costly: bool = False,
    ) -> Search:
        """Start with no measurement."""
        items, late = workshop.items(), _late(workshop, meter)
        smaller = frozenset(n for i in items for n, own in i.alone.items() if len(own) > 1 or i.together)
        return cls(workshop, meter, items, overhead, progress, costly=costly, late=late, smaller=smaller)

    def curve(self, candidate: Candidate) -> Curve:
        """Return what is known of the damage of a candidate's kind."""
        key = candidate.weight, candidate.method
        if key not in self.curves:
            self.curves[key] = Curve(scale=self.late.get(candidate.weight, 1.0))
        return self.curves[key]

    def within(self, budget: int) -> Choice:
        """Return the choice of least damage within ``budget`` bytes of weights and what decodes them.

        Raises
        ------
        TargetError
            Not even the smallest candidates fit.
        """
        self._scan_once()
        return self._settle(lambda: self._choose(budget), ROUNDS)

    def within_damage(self, allowed: float) -> Choice:
        """Return the smallest choice whose foreseen damage is allowed, measured where it falls.

        Where that is costly, what the scan says has to do: the choice is encoded and measured as a whole.
        """
        self._scan_once()
        return self._settle(lambda: self._smallest_within(allowed), 0 if self.costly else ROUNDS)

    def at_price(self, log_price: float) -> Choice:
        """Return the best choice at a price (log of damage per byte), measured where it falls."""
        return self._settle(lambda: self._best_at(log_price), 2)

    def _settle(self, choose: Callable[[], Choice], rounds: int) -> Choice:
        """Choose, measure where the choice falls, and choose again, until it rests on measurements."""
        choice = choose()
        for number in range(rounds):
            if not self._measure(choice, number):
                break
            choice = choose()
        return choice

    def foreseen(self, choice: Choice) -> float:
        """Return the damage that a choice does by what is known now, rounded up: allowed, it comes again."""
        return (1 + 1e-9) * float(planner.damages(list(choice.candidates.values()), self.curves).sum())

    def _smallest_within(self, allowed: float) -> Choice:
        low, high = PRICES
        best = self._best_at(low)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            choice = self._best_at(middle)
            if choice.damage <= allowed:
                best, low = choice, middle
            else:
                high = middle
        return best

    def _best_at(self, log_price: float) -> Choice:
        """Return the best choice at a price, on what is known."""
        price = math.exp(log_price)
        return planner.at_price(self.items, self.curves, price, self.overhead, self.operations)

    def filled(self, choice: Choice, left: int) -> Choice:
        """Return the choice with ``left`` bytes more to spend, on what is known."""
        return planner.filled(self.items, self.curves, choice, left, self.overhead, self.operations)

    def _scan_once(self) -> None:
        if not self._scanned:
            self.scan()
            self._scanned = True

    def scan(self) -> None:
        """Measure weights alone at a few shares of their float16 bytes: every curve needs a foot to stand on.

        The small weights that together hold 1/20 of the bytes are left at float16 unless a budget needs
        them: they can save little, and in a convolutional network their suffix is the whole network.
        """
        if self.meter is None:
            return
        sizes = {w.name: w.size for w in self.workshop.found.weights if w.name in self.meter.network.fed}
        held = sum(sizes.values())
        worth = list(sizes)
        if self.budget is not None and not self.operations:  # small weights may take most operations
            worth = _largest(sizes, 1 - min(SMALL, SLACK * self.budget / (2 * max(held, 1))))
        unreached: list[Candidate] = []
        for done, name in enumerate(worth):
            self.progress("measuring damage", done, len(worth), name)
            unreached += self._scan_one(name)
        self._presume(unreached)
        for item in self.items:
            for name in set(item.names) & (set(sizes) - set(worth)):
                self._spare[name] = item.alone[name]
                item.alone[name] = tuple(c for c in item.alone[name] if c.error**2 <= FREE)

    def _scan_one(self, name: str) -> list[Candidate]:
        points = self.workshop.points(name, middle=self.costly)
        return [c for c in points if c.error**2 > FREE and not self._known(c) and not self._entered(c)]

    def _entered(self, candidate: Candidate) -> bool:
        """Measure a candidate and enter it into its curve; False where no probe reaches its weight."""
        damage = self._alone(candidate)
        if damage:
            self.curve(candidate).add(candidate.error**2, damage)
        return bool(damage)

    def _presume(self, unreached: Sequence[Candidate]) -> None:
        """Let errors of weights that no probe reaches, in another branch of an If, count half as much."""
        rates = (
            [d / s for c in self.curves.values() for s, d in zip(c.squares, c.damages, strict=True)]
            if unreached
            else []
        )
        rate = _UNREACHED * max(1.0, median(rates)) if rates else 1.0
        for c in unreached:
            self.curve(c).add(c.error**2, rate * c.error**2)

    def _known(self, candidate: Candidate) -> bool:
        form = self.workshop.forms[candidate.method]
        return self.curve(candidate).known(candidate.error**2, form.near, 1 if form.sequential else 2)

    def _give_spare(self) -> bool:
        """Put the small weights' other candidates back; returns whether there were any."""
        assert self.meter is not None or not self._spare
        given = bool(self._spare)
        for item in self.items:
            for name in set(item.names) & set(self._spare):
                item.alone[name] = self._spare.pop(name)
                self._presume(self._scan_one(name))
        return given

    def _choose(self, budget: int) -> Choice:
        known = self.curves, budget, self.overhead, self.operations
        choice = planner.choose(self.items, *known)
        if choice is None and self._give_spare():
            choice = planner.choose(self.items, *known)
        if choice is None:
            raise TargetError("out of reach")
        return choice

    def _measure(self, choice: Choice, number: int) -> int:
        """Measure the candidates of a choice whose curves say nothing near them; returns how many."""
        if self.meter is None:
            return 0
        new = [
            c
            for c in choice.candidates.values()
            if c.method != planner.KEEP
            and c.error**2 > FREE
            and c.weight in self.meter.network.fed
            and not self._known(c)
        ]
        unreached: list[Candidate] = []
        for done, c in enumerate(new):
            self.progress(f"measuring damage, round {number + 1}", done, len(new), c.weight)
            if not self._entered(c):
                unreached.append(c)
        self._presume(unreached)
        return len(new)

    def _alone(self, candidate: Candidate) -> float:
        assert self.meter is not None
        key = candidate.named
        if key not in self.measured_alone:
            encoded = self.workshop.encode(self._with_sharers(candidate))
            own = [e for e in encoded if e.weight == candidate.weight]
            changes = self.workshop.fed(self.meter.network, own)
            self.measured_alone[key] = self.meter.alone(candidate.weight, changes)
        return self.measured_alone[key]

    def _with_sharers(self, candidate: Candidate) -> list[Candidate]:
        """Return the candidate and those that share its dictionary."""
        if "dictionary" not in candidate.params:
            return [candidate]
        for item in self.items:
            if candidate.weight in item.names:
                for option in item.together:
                    if candidate in option:
                        return list(option)
        return [candidate]

    def together(self, choice: Choice) -> tuple[float, float]:
        """Return (damage, relative output error) of a choice as a whole, measured."""
        if self.meter is None:
            return choice.damage, choice.damage**0.5
        key = frozenset(c.named for c in choice.candidates.values())
        if key not in self._wholes:
            self._wholes[key] = self.measured(self.workshop.encode(choice.candidates.values()))
        return self._wholes[key]

    def measured(
        self, encoded: Sequence[Encoded], shifts: Mapping[str, Array] | None = None
    ) -> tuple[float, float]:
        """Return (damage, relative output error) of encoded weights and shifted biases, all at once."""
        assert self.meter is not None
        return self.meter.together(self.workshop.fed(self.meter.network, encoded, shifts))

    def ways_to_share(self) -> Iterator[None]:
        """Turn to each way of sharing in turn: what pays by itself; nothing; all there can be.

        What shares is chosen group by group, and what all of it does together is not the sum of that. Each
        way starts from the damages that were measured alone, and from nothing else.
        """
        several = not self.workshop.sharing_is_asked and any(item.together for item in self.items)
        untouched = [replace(item, alone=dict(item.alone)) for item in self.items] if several else []
        yield
        if not several:
            return
        mixed = self.items, self.curves, self._spare
        for other in ([replace(i, together=()) for i in untouched], [i.sharing() for i in untouched]):
            self.items, self.curves, self._spare, self._scanned = other, {}, {}, False
            yield
        (self.items, self.curves, self._spare), self._scanned = mixed, True

    def reweighed(self, choice: Choice, encoded: Sequence[Encoded], shifts: Mapping[str, Array]) -> bool:
        """Weigh every change within the encoded whole; returns whether there was anything to weigh.

        Later layers make up for what earlier ones lost, so damage done alone overrates the early ones. What a
        weight's change costs is what goes when that one change is undone.
        """
        if self.meter is None:
            return False
        changes = self.workshop.fed(self.meter.network, encoded, shifts)
        damage, _ = self.meter.together(changes)
        changed = [
            c
            for c in choice.candidates.values()
            if c.method != planner.KEEP and c.error**2 > FREE and c.weight in changes
        ]
        without = self.meter.undone([(c.weight, bias_input(c.weight)) for c in changed], changes)
        for c, rest in zip(changed, without, strict=True):
            foreseen = planner.foreseen(c, self.curves)
            ratio = (damage - rest) / max(foreseen, 1e-300)
            self.curve(c).scale *= min(max(ratio, 1 / LIMIT), LIMIT) ** TRUST
        return bool(changed)

    def repaired(self, choice: Choice, budget: int) -> Choice:
        """Check the choice as a whole; where the sum of its parts is far off, weigh each within the whole.

        What a weight's change costs is then the damage that goes when that one change is undone. The better
        of the two choices, measured as wholes, is returned.
        """
        damage, error = self.together(choice)
        log.info("foreseen damage %.4g, together %.4g, output error %.4g", choice.damage, damage, error)
        if self.meter is None or damage <= max(APART * choice.damage, SLIGHT):
            return choice
        changed = [c for c in choice.candidates.values() if c.method != planner.KEEP and c.error**2 > FREE]
        for done, c in enumerate(changed):
            self.progress("weighing weights within the whole", done, len(changed), c.weight)
            rest = {
                n: o
                for n, o in choice.candidates.items()
                if n not in {s.weight for s in self._with_sharers(c)}
            }
            within = damage - self.together(Choice(rest, 0, 0.0))[0]
            foreseen = planner.foreseen(c, self.curves)
            self.curve(c).scale *= min(max(within / max(foreseen, 1e-300), 1 / LIMIT), LIMIT)
        other = self._choose(budget)
        again, _ = self.together(other)
        log.info("repaired: damage %.4g", again)
        return other if again < damage else choice

    def soften(self, most: float) -> None:
        """Leave no candidate whose local error is above ``most``: where measurements say too little."""
        for item in self.items:
            item.alone = {n: tuple(c for c in o if c.error <= most) for n, o in item.alone.items()}
            item.together = tuple(o for o in item.together if all(c.error <= most for c in o))

    def hold(self, candidates: Iterable[Candidate]) -> None:
        """Leave no candidate that is as small as these, of their weights alone."""
        held = {c.weight: c.nbytes for c in candidates}
        self.items = [
            replace(
                i,
                alone={n: tuple(c for c in own if c.nbytes > held.get(n, -1)) for n, own in i.alone.items()},
            )
            for i in self.items
        ]

    def light_enough(self, choice: Choice) -> bool:
        """Whether a run of the choice costs no more than is asked for."""
        return self.operations is None or self.operations.allows(choice)

    def free(self) -> Choice:
        """Return the choice of the smallest errors that save bytes (or none): not worth a measurement."""
        least = {
            n: min((c for c in options[1:] if c.error**2 <= FREE), key=lambda c: c.error, default=options[0])
            for item in self.items
            for n, options in item.alone.items()
        }
        return Choice(least, sum(planner.bytes_of(c, self.overhead) for c in least.values()), 0.0)

    def untouched(self) -> Choice:
        """Return the choice that keeps every weight."""
        kept = {n: options[0] for item in self.items for n, options in item.alone.items()}
        return Choice(kept, sum(c.nbytes for c in kept.values()), 0.0)

    def smallest(self) -> Choice:
        """Return the smallest choice there is."""
        return planner.cheapest(self.items, self.overhead, self.operations)

    def mildest(self) -> float:
        """Return the relative output error of changing every weight as little as any candidate does."""
        own = {n: options for item in self.items for n, options in item.alone.items()}
        least = {n: min(options[1:] or options, key=lambda c: c.error) for n, options in own.items()}
        return self.together(Choice(least, 0, 0.0))[1]


def _late(workshop: Workshop, meter: Meter | None) -> dict[str, float]:
    """Return what weights count for their places in the graph, where later layers can make up for them."""
    if meter is None or not workshop.sequential:
        return {}
    order = sorted(workshop.weights, key=meter.network.position)
    last, full = max(len(order) - 1, 1), min(1.0, len(order) / DEEP)
    return {name: float(TILT ** ((2 * at / last - 1) * full)) for at, name in enumerate(order)}


def _largest(sizes: Mapping[str, int], share: float) -> list[str]:
    """Return the largest weights that hold ``share`` of the numbers, in graph order."""
    total, held, chosen = sum(sizes.values()), 0, set()
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        if held >= share * total:
            break
        chosen.add(name)
        held += sizes[name]
    return [n for n in sizes if n in chosen]
