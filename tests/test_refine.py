"""Refitting: each layer repairs what those before it lost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxdp import looks, probes, runtime, stats, weights
from onnxdp import model as model_file
from onnxdp.encoding import Workshop
from onnxdp.meter import Meter
from onnxdp.methods.form import forms_for
from onnxdp.network import Network
from onnxdp.refine import RIDGE, _ridge_solve, refine
from onnxdp.settings import Settings, silent

DIGITS = Path(__file__).parents[1] / "models" / "digits.onnx"


@pytest.mark.parametrize(("rows", "inputs"), [(40, 12), (12, 40)])
def test_ridge_solution_meets_the_normal_equations_through_either_gram(rows, inputs):
    rng = np.random.default_rng(5)
    b = rng.standard_normal((2, rows, inputs)).astype(np.float32) / np.float32(rows**0.5)
    target = rng.standard_normal((2, rows, 7)).astype(np.float32)
    out = _ridge_solve(b, target)
    for g in range(2):
        gram = b[g].T.astype(np.float64) @ b[g]
        delta = (RIDGE[0] + RIDGE[1] * min(1.0, inputs / rows)) * np.trace(gram) / inputs
        want = np.linalg.solve(gram + delta * np.eye(inputs), b[g].T.astype(np.float64) @ target[g])
        # float32 products of `rows` or `inputs` terms, through a matrix of condition at most |H| / delta
        condition = np.linalg.norm(gram, 2) / delta + 1
        bound = np.finfo(np.float32).eps * max(rows, inputs) * condition
        assert np.linalg.norm(out[g] - want) <= bound * np.linalg.norm(want)


@pytest.fixture(scope="module")
def job():
    model = model_file.read(DIGITS)
    found = weights.find(model.ir)
    network = Network(model, found)
    made = probes.make(runtime.input_specs(network.specification), samples=256, seed=1)
    fit, held_out = made.split(0.75)
    shop = Workshop(found, forms_for("dp"), Settings(ratio=3), device="cpu")
    shop.solve(network, fit, silent)
    return shop, network, fit, held_out


def choices(shop, share):
    """One pair for each weight that has one, of about this share of its float16 bytes."""
    picked = []
    for item in shop.items():
        for name, own in item.alone.items():
            pairs = [c for c in own if c.method == "dp"]
            if pairs:
                picked.append(min(pairs, key=lambda c: abs(c.nbytes - share * 2 * shop.weights[name].size)))
    return picked


def test_less_damage_on_held_out_probes(job):
    shop, network, fit, held_out = job
    meter = Meter(network, held_out)
    picked = choices(shop, 0.3)
    plain = shop.encode(picked)
    before, _ = meter.together(shop.fed(network, plain, shop.shifts(plain)))
    refitted, shifts = refine(shop, network, fit, picked, silent)
    after, _ = meter.together(shop.fed(network, refitted, shifts))
    assert [e.weight for e in refitted] == [c.weight for c in picked]
    assert [e.params for e in refitted] == [c.params for c in picked]
    assert after < before


def test_nothing_lost_nothing_moved(job):
    shop, network, fit, _ = job
    halves = [c for item in shop.items() for own in item.alone.values() for c in own if c.method == "float16"]
    plain = {e.weight: e for e in shop.encode(halves)}
    refitted, _ = refine(shop, network, fit, halves, silent)
    for e in refitted:
        old, new = (x.arrays["half"].astype(np.float32) for x in (plain[e.weight], e))
        # float16 storage moves activations by about eps16, and so the refitted weights
        assert np.linalg.norm(old - new) <= 20 * np.finfo(np.float16).eps * np.linalg.norm(old)


def test_what_is_kept_of_the_original_is_what_a_run_gives(job):
    shop, network, fit, _ = job
    order = looks.spots(shop, network, shop.weights)
    assert order and [s.place for s in order] == sorted(s.place for s in order)
    kept = looks.Original(shop, network, fit)
    kept.keep(order[1:], silent)
    once = looks.Original(shop, network, fit, kept.kept, once=True)
    for spot in (*order, *reversed(order)):  # forgotten by the second time
        alone = looks.Original(shop, network, fit).aims(spot)
        for aims in (kept.aims(spot), once.aims(spot)):
            for part in ("rows", "mean", "mean_beside"):
                np.testing.assert_array_equal(getattr(aims, part), getattr(alone, part))
    assert not once.kept and len(kept.kept) == len(order) - 1


def test_the_last_weights_are_kept_that_there_is_room_for(job):
    shop, network, fit, _ = job
    places = stats.counting(network, shop.found)(fit.feeds[0], fit.batch)
    order = [
        replace(spot, weight=replace(spot.weight, positions=places[spot.weight.name]))
        for spot in looks.spots(shop, network, shop.weights)
    ]
    original = looks.Original(shop, network, fit)
    original.keep(order, silent)
    sizes = [original.kept[spot.weight.name].rows.nbytes for spot in order]
    lengths = set()
    for room in range(0, 2 * sum(sizes), sum(sizes) // 50):
        count = len(looks.last(order, fit.samples, room))
        assert looks.last(order, fit.samples, room) == order[len(order) - count :]
        # a row of each feed more, because they share what is wanted
        assert sum(sizes[len(order) - count :]) <= room * (1 + len(fit.feeds) / min(s.rows for s in order))
        lengths.add(count)
    assert lengths >= {0, 1, len(order)}
