"""Reaching bytes: what is chosen fits, and is not far from what would have fitted."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from edges import save_external
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxdp
from onnxdp.budget import Budget
from onnxdp.errors import TargetError
from onnxdp.planner import Choice
from onnxdp.records import Candidate
from onnxdp.tolerance import within_error_encoded


class Steps:
    """A search whose choices come in steps of bytes, and a file that takes other bytes than they say."""

    def __init__(self, steps, off):
        self.steps, self.off = sorted(steps), off
        self.workshop = SimpleNamespace(sequential=True)

    def _choice(self, nbytes):
        return Choice({"w": Candidate("w", "quant", {"levels": nbytes}, nbytes, 0.0)}, nbytes, -float(nbytes))

    def smallest(self):
        return self._choice(self.steps[0])

    def within(self, room):
        return self._choice(max(s for s in self.steps if s <= room))

    def filled(self, choice, left):
        return max((self._choice(s) for s in self.steps if s <= choice.nbytes + left), key=lambda c: c.nbytes)

    def size(self, choice):
        return choice.nbytes + self.off


@given(
    steps=st.sets(st.integers(1_000, 500_000), min_size=2, max_size=30),
    off=st.integers(-3_000, 3_000),
    share=st.floats(0.0, 1.2),
)
@settings(max_examples=300, deadline=None)
def test_what_is_chosen_fits_and_leaves_no_more_than_the_steps_between_choices(steps, off, share):
    known = Steps(steps, off)
    least, most = min(steps) + off, max(steps) + off
    budget = Budget(int(least + share * (most - least)), known, known, None)
    made = budget.closest(least)
    assert known.size(made) <= budget.nbytes
    full = budget.nbytes - known.size(made) <= max(0.001 * budget.nbytes, 64)
    assert full or made.nbytes == max(s for s in steps if s + off <= budget.nbytes)


def test_a_file_that_takes_more_than_foreseen_does_not_fall_back_to_the_smallest():
    """ResNet-20 at 4x: 111 bytes too many, eight times over, and the next choice a thousand bytes below."""
    known = Steps({40_000, 200_000, 270_000, 275_895}, -2_135)
    made = Budget(273_649, known, known, None).closest(40_000 - 2_135)
    assert made.nbytes == 270_000


class Restless:
    """A search whose outputs are far off as soon as anything is rounded, whatever damage was foreseen."""

    costly, workshop = False, SimpleNamespace(light=False)
    items = ()

    def light_enough(self, choice):
        return True

    def _choice(self, method, nbytes, damage=0.0):
        return Choice({"w": Candidate("w", method, {}, nbytes, 0.0)}, nbytes, damage)

    def untouched(self):
        return self._choice("keep", 4_000)

    def smallest(self):
        return self._choice("quant", 500, 1.0)

    def free(self):
        return self._choice("float16", 2_000)

    def within_damage(self, allowed):
        return self._choice("quant", 500 + round(1 / allowed), allowed)

    def foreseen(self, choice):
        return choice.damage


@pytest.mark.parametrize(("of_halves", "left"), [(0.001, "float16"), (0.035, "keep")])
def test_where_no_rounding_stays_within_an_error_halves_may(of_halves, left):
    """basic_pitch came out with shorter names and nothing else: five tries, each of them beyond."""
    errors = {"quant": 0.08, "float16": of_halves}
    choice, (encoded, _) = within_error_encoded(
        Restless(),
        0.03,
        lambda choice, quick: (list(choice.candidates.values()), {}),
        lambda encoded, _: max(errors[c.method] for c in encoded),
    )
    assert choice.candidates["w"].method == left
    assert [c.method for c in encoded] == ([left] if left != "keep" else [])


class Stairs:
    """A search along stairs of bytes, each with the damage that is foreseen and the error that it does."""

    costly, workshop = False, SimpleNamespace(light=False)

    items = ()

    def light_enough(self, choice):
        return True

    def __init__(self, errors, trust):
        self.errors, self.trust = sorted(errors), trust  # the more bytes, the smaller the error
        self.encoded = []

    def _choice(self, step):
        nbytes = 1_000 * (len(self.errors) - step)
        return Choice(
            {"w": Candidate("w", "quant", {"step": step}, nbytes, 0.0)}, nbytes, self._foreseen(step)
        )

    def _foreseen(self, step):
        return self.trust * self.errors[step] ** 2

    def untouched(self):
        return Choice({"w": Candidate("w", "keep", {}, 10**6, 0.0)}, 10**6, 0.0)

    def smallest(self):
        return self._choice(len(self.errors) - 1)

    def free(self):
        return self.untouched()

    def foreseen(self, choice):
        return choice.damage

    def within_damage(self, allowed):
        return self._choice(
            max((k for k in range(len(self.errors)) if self._foreseen(k) <= allowed), default=0)
        )

    def hold(self, candidates):
        least = min(c.params["step"] for c in candidates)
        self.errors = self.errors[:least]

    def encode(self, choice, *, quick):
        self.encoded.append(quick)
        return [choice.candidates["w"]], {}

    def error(self, encoded, shifts):
        return self.errors[encoded[0].params["step"]]


@given(
    errors=st.sets(st.floats(1e-4, 3.0), min_size=1, max_size=30),
    trust=st.floats(0.01, 100.0),
    limit=st.floats(1e-3, 1.0),
)
@example(errors={0.5, 0.78125, 0.8125}, trust=2.0, limit=0.796875)  # one of like damages was never tried
@settings(max_examples=300, deadline=None)
def test_a_hunt_stays_within_the_error_and_near_it_in_few_encodings(errors, trust, limit):
    """Foreseen damage is off by a factor that nobody knows; steps may be anything."""
    search = Stairs(errors, trust)
    choice, (encoded, _) = within_error_encoded(search, limit, search.encode, search.error)
    assert sum(search.encoded) <= 4 and len(search.encoded) <= 4 + 8 + 1
    fitting = [e for e in errors if e <= limit]
    if choice.candidates["w"].method == "keep":
        assert not fitting or max(fitting) < 0.1 * limit or len(errors) > 8
        return
    reached = sorted(errors)[choice.candidates["w"].params["step"]]
    assert reached <= limit and encoded == [choice.candidates["w"]]
    assert reached >= 0.85 * limit or reached == max(fitting) or len(errors) > 8


def layers(opset=17, sizes=(64, 96, 80, 10), scale=1.0):
    """Three products with Relu between them, the first two scaled."""
    rng = np.random.default_rng(0)
    held, nodes, name = [], [], "x"
    for i, (a, b) in enumerate(pairwise(sizes)):
        held.append(
            numpy_helper.from_array((rng.standard_normal((a, b)) / a**0.5).astype(np.float32), f"w{i}")
        )
        last = i == len(sizes) - 2
        if not last:
            held[-1].raw_data = (np.float32(scale) * numpy_helper.to_array(held[-1])).tobytes()
        nodes.append(helper.make_node("MatMul", [name, f"w{i}"], ["y" if last else f"m{i}"]))
        name = f"r{i}"
        nodes += [] if last else [helper.make_node("Relu", [f"m{i}"], [name])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", d]) for n, d in (("x", 64), ("y", 10))]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


@pytest.mark.parametrize(("opset", "offered"), [(9, False), (10, True)])
def test_levels_that_an_operator_set_cannot_take_apart_are_not_taken(opset, offered):
    """Below opset 10 one number of 1625 levels takes 16 bits, as float16 does."""
    plan = onnxdp.plan(layers(opset), max_error=0.001)
    assert (1625 in {c.params.get("levels") for c in plan.choices}) == offered


def test_many_bits_are_coded_too():
    """Raw bits below the coded ones: no levels where there are codes."""
    plan = onnxdp.plan(layers(17), max_error=0.001)
    assert max(c.params.get("bits", 0) for c in plan.choices) > 8
    assert not any("levels" in c.params for c in plan.choices)


def test_an_error_out_of_reach_names_what_the_mildest_change_gives():
    with pytest.raises(TargetError, match=r"as little as can be gives 0\.000\d+;"):
        onnxdp.compress(layers(), max_error=1e-4)


def test_a_hunt_keeps_the_operations_that_are_asked_for():
    with pytest.raises(TargetError, match="multiply-accumulates"):
        onnxdp.compress(layers(), max_error=0.05, macs=1.5)


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1.0, 1e7])
def test_the_smallest_file_that_is_named_is_reached(scale):
    """Float16 holds no steps below 3e-5 or above 65504: files came out larger than was foreseen."""
    model = layers(scale=scale)
    with pytest.raises(TargetError, match="best reachable") as e:
        onnxdp.compress(model, ratio=40, samples=16)
    size = int(re.search(r"--size (\d+)", str(e.value))[1])
    assert onnxdp.compress(model, size=str(size), samples=16).report.target.nbytes <= size
    with pytest.raises(TargetError, match=f"--size {size}"):
        onnxdp.compress(model, size=str(size - 1), samples=16)


def test_a_long_name_of_the_target_counts_in_its_data_file(tmp_path):
    """Each tensor in a data file repeats the name of that file: 1.3 kB of 63 were beyond the target."""
    save_external(layers(sizes=(64, *[96] * 8, 10)), tmp_path / "in.onnx")
    for name in ("o.onnx", 150 * "o" + ".onnx"):
        (tmp_path / name[:3]).mkdir()
        made = onnxdp.compress(tmp_path / "in.onnx", tmp_path / name[:3] / name, ratio=4, samples=16)
        taken = sum(p.stat().st_size for p in (tmp_path / name[:3]).iterdir())
        report = made.report
        assert report.target.nbytes == taken <= report.plan.budget == report.source.nbytes // 4
