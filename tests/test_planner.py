"""The choice under a budget: against brute force, and the laws of the curves."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxdp import planner
from onnxdp.planner import Curve, Item
from onnxdp.records import Candidate

NO_OVERHEAD: dict[str, int] = {}


def options(name, pairs):
    """Candidates from (bytes, error) pairs, the first being the original."""
    kept = Candidate(name, planner.KEEP, {}, 1000, 0.0, 0.0)
    return (kept, *(Candidate(name, "dp", {"atoms": i}, n, e) for i, (n, e) in enumerate(pairs, 1)))


tables = st.lists(
    st.lists(st.tuples(st.integers(10, 999), st.floats(0.01, 1.0)), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


def brute(items, curves, budget):
    best = None
    for combination in itertools.product(*(item.alone[item.names[0]] for item in items)):
        if sum(c.nbytes for c in combination) <= budget:
            damage = sum(planner.foreseen(c, curves) for c in combination)
            best = damage if best is None else min(best, damage)
    return best


def upgrade(items, curves):
    """The most that a candidate can differ from its neighbour on the hull: the gap Lagrange may leave."""
    return max(max(planner.foreseen(c, curves) for c in item.alone[item.names[0]]) for item in items)


@given(tables, st.floats(0.05, 1.0))
@settings(max_examples=150, deadline=None)
def test_within_the_budget_and_near_the_optimum(table, share):
    items = [Item((f"w{i}",), {f"w{i}": options(f"w{i}", t)}) for i, t in enumerate(table)]
    curves = {item.names[0]: Curve() for item in items}
    budget = int(1000 * len(items) * share)
    best = brute(items, curves, budget)
    choice = planner.choose(items, curves, budget, NO_OVERHEAD)
    if best is None:
        assert choice is None
        return
    assert choice is not None
    assert choice.nbytes == sum(c.nbytes for c in choice.candidates.values()) <= budget
    # method.md 1.5: the Lagrangian solution is within one upgrade's damage of the optimum.
    assert choice.damage <= best + upgrade(items, curves) + 1e-12


@given(tables)
@settings(max_examples=50, deadline=None)
def test_more_bytes_never_do_more_damage(table):
    items = [Item((f"w{i}",), {f"w{i}": options(f"w{i}", t)}) for i, t in enumerate(table)]
    curves = {item.names[0]: Curve() for item in items}
    prices = [planner.at_price(items, curves, p, NO_OVERHEAD) for p in np.geomspace(1e-9, 1e2, 12)]
    for dear, cheap in itertools.pairwise(reversed(prices)):
        assert dear.nbytes <= cheap.nbytes
        assert dear.damage >= cheap.damage - 1e-12


def test_everything_fits_then_nothing_changes():
    items = [Item(("w",), {"w": options("w", [(500, 0.1)])})]
    choice = planner.choose(items, {"w": Curve()}, 1000, NO_OVERHEAD)
    assert choice.candidates["w"].method == planner.KEEP
    assert choice.damage == 0


def test_overhead_counts():
    items = [Item(("w",), {"w": options("w", [(500, 0.1)])})]
    assert planner.choose(items, {"w": Curve()}, 520, {"dp": 21}) is None
    assert planner.choose(items, {"w": Curve()}, 520, {"dp": 20}).nbytes == 520


def shared_item(together_bytes):
    a, b = options("a", [(600, 0.1)]), options("b", [(600, 0.1)])
    both = tuple(Candidate(n, "dp", {"atoms": 1, "dictionary": "a"}, together_bytes, 0.1) for n in ("a", "b"))
    return Item(("a", "b"), {"a": a, "b": b}, (both,))


@pytest.mark.parametrize(("nbytes", "taken"), [(500, True), (700, False)])
def test_sharing_is_chosen_where_it_is_cheaper(nbytes, taken):
    curves = {"a": Curve(), "b": Curve()}
    choice = planner.choose([shared_item(nbytes)], curves, 1300, NO_OVERHEAD)
    assert all(("dictionary" in c.params) == taken for c in choice.candidates.values())


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1), st.floats(1e-9, 10)), min_size=1, max_size=6, unique_by=lambda p: p[0]
    ),
    st.lists(st.floats(1e-8, 10), min_size=2, max_size=10),
)
@settings(max_examples=100, deadline=None)
def test_a_curve_never_falls_and_keeps_its_floor(points, at):
    curve = Curve()
    for square, damage in points:
        curve.add(square, damage)
    values = curve(np.sort(at))
    assert (np.diff(values) >= -1e-9 * values[1:]).all()
    assert all(curve.known(square, 1.3) for square, _ in points)


def test_a_curve_passes_through_its_measurements():
    """To what float64 keeps of a number through its logarithm, and to spare."""
    curve = Curve()
    for square, damage in ((0.5, 3.0), (0.01, 0.1)):
        curve.add(square, damage)
    assert curve(np.array([0.01, 0.5])) == pytest.approx([0.1, 3.0], rel=1e-12)
    # beyond the measurements damage is proportional to the squared error
    assert curve(np.array([0.005, 1.0])) == pytest.approx([0.05, 6.0], rel=1e-12)
