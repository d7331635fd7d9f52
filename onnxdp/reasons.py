"""Why every weight became what it became, or stayed: a sentence for each."""

from __future__ import annotations

from dataclasses import replace

from onnxdp import planner
from onnxdp.damage import Search
from onnxdp.planner import Choice
from onnxdp.records import Candidate, Kept

_MUCH = 1000
"""Ratio of damages beyond which its number says nothing: the smaller is rounding."""


def chosen(search: Search, choice: Choice) -> tuple[Candidate, ...]:
    """Return the candidates that change something, with the damage that is foreseen and the reason."""
    return tuple(
        replace(c, damage=planner.foreseen(c, search.curves), reason=_why(search, c))
        for c in choice.candidates.values()
        if c.method != planner.KEEP
    )


def kept(search: Search, choice: Choice) -> tuple[Kept, ...]:
    """Return the weights that stay as they are, with what every form says, or that nothing was worth it."""
    stay = (w for n, w in search.workshop.weights.items() if _stays(choice, n))
    return tuple(Kept(w.name, _why_kept(search, w.name), w.nbytes) for w in stay)


def _stays(choice: Choice, name: str) -> bool:
    candidate = choice.candidates.get(name)
    return candidate is None or candidate.method == planner.KEEP


def _why_kept(search: Search, name: str) -> str:
    """Say why a weight stays: what every form says, that none is smaller, or that none was worth it."""
    weight = search.workshop.weights[name]
    refusals = [f.supports(weight) for f in search.workshop.forms.values()]
    if all(refusals):
        return "; ".join(r for r in refusals if r)
    return "nothing smaller was worth its damage" if name in search.smaller else "no form of it is smaller"


def _why(search: Search, chosen: Candidate) -> str:
    """Say why a weight's form was chosen: what the best other form does in no more bytes."""
    workshop, curves = search.workshop, search.curves
    share = workshop.macs(chosen)
    size, damage = planner.bytes_of(chosen, search.overhead), planner.foreseen(chosen, curves)
    (own,) = (item.alone[chosen.weight] for item in search.items if chosen.weight in item.names)
    others = [c for c in own if c.method != chosen.method and workshop.macs(c) >= share]
    small = [c for c in others if planner.bytes_of(c, search.overhead) <= size]
    lead = f"{share:.2f} of its operations; " if share < 1 else ""
    if not small:
        return lead + "no other form is as small"
    best = min(small, key=lambda c: planner.foreseen(c, curves))
    other = planner.foreseen(best, curves)
    if not damage:
        beside = f"{other:.2g}" if other else "none either"
        return f"{lead}does no damage, {best.method} in as many bytes {beside}"
    ratio = max(other, 1e-300) / damage
    if ratio >= 1:
        alone = "wins on bytes alone: " if share < 1 else ""
        return f"{lead}{alone}{_times(ratio)} less damage than {best.method} in as many bytes"
    return f"{lead}{best.method} in as many bytes does {_times(1 / ratio)} less damage"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < _MUCH else f"over {_MUCH:,} times"
