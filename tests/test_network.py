"""The network fed from outside: it is the original, whole and in pieces."""

import sys
from pathlib import Path

import numpy as np
import pytest

from onnxdp import model as model_file
from onnxdp import probes, runtime, weights
from onnxdp.meter import Meter
from onnxdp.network import Network, bias_input
from onnxdp.pieces import Stream

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import builders

EPS = float(np.finfo(np.float32).eps)
BOUND = 5000 * EPS
"""Float32 rounding times the longest reduction of the small variants (a few thousand terms)."""


@pytest.fixture(scope="module", params=["resnet18", "googlenet", "transformer"])
def parts(request):
    small = {"layers": 1, "width": 32, "heads": 2, "tokens": 8, "vocabulary": 64, "classes": 10}
    options = small if request.param == "transformer" else {"small": True}
    model = model_file.read(builders.build(request.param, **options))
    found = weights.find(model.ir)
    network = Network(model, found)
    made = probes.make(runtime.input_specs(network.specification), samples=6, seed=3, batch=3)
    return model, found, network, made


def known(error):
    """How far a damage is known: a squared difference, ``error`` of outputs that pieces round by 1000 EPS."""
    return 2 * 1000 * EPS / error


def close(a, b):
    return np.linalg.norm(a - b) <= BOUND * np.linalg.norm(b)


def test_fed_its_own_weights_it_is_the_original(parts):
    model, _, network, made = parts
    original = runtime.session(model_file.serialize(model))
    lifted = network.session(network.outputs)
    for feed in made.feeds:
        want = runtime.run(original, feed)
        got = network.run(lifted, feed, network.outputs, {})
        assert all(close(got[n], want[n]) for n in want)


def test_nothing_changed_does_no_damage_and_a_lost_weight_does(parts):
    _, found, network, made = parts
    meter = Meter(network, made)
    assert meter.together({}) == (0.0, 0.0)
    name = max((w for w in found.weights if w.name in network.fed), key=lambda w: w.size).name
    damage, error = meter.together({name: np.zeros_like(network.fed[name])})
    assert damage > 1e-3
    assert error > 1e-3


def test_a_suffix_measures_what_the_whole_does(parts):
    _, found, network, made = parts
    meter = Meter(network, made)
    names = [w.name for w in found.weights if w.name in network.fed]
    for name in (names[0], names[len(names) // 2], names[-1]):
        changed = {name: network.fed[name] * np.float32(0.9)}
        if bias_input(name) in network.fed:
            changed[bias_input(name)] = network.fed[bias_input(name)] + np.float32(0.1)
        whole, error = meter.together(changed)
        assert meter.alone(name, changed) == pytest.approx(whole, rel=known(error))
        assert whole > 0


def test_a_stream_carries_the_tensors_of_a_whole_run(parts):
    _, found, network, made = parts
    places = sorted({network.position(w.name) for w in found.weights if w.name in network.fed})
    stream = Stream(network, made)
    for place in places:
        stream.advance(place, {})
        alive = network.alive(place)
        if not alive:
            continue
        session = network.session(alive)
        for number, feed in enumerate(made.feeds):
            want = network.run(session, feed, alive, {})
            for name in alive:
                if want[name].dtype.kind == "f":
                    assert close(stream.tensor(number, name), want[name])
    stream.advance(places[0], {})  # backwards: from the start again
    for name in network.alive(places[0]):
        assert stream.tensor(0, name) is not None


def test_what_a_stream_cannot_hold_it_makes_again(parts):
    _, found, network, made = parts
    places = sorted({network.position(w.name) for w in found.weights if w.name in network.fed})
    changes = {n: a * np.float32(0.9) for n, a in network.fed.items() if a.dtype.kind == "f"}
    held, small = Stream(network, made), Stream(network, made, cap=0)
    for place in places:
        held.advance(place, changes)
        small.advance(place, changes)
        for number in range(held.feeds):
            want, got = held.state(number), small.state(number)
            assert want.keys() == got.keys() == set(network.alive(place))
            for name in want:
                if want[name].dtype.kind == "f":
                    assert close(got[name], want[name])


def test_undoing_all_but_one_change_leaves_what_that_one_does(parts):
    _, found, network, made = parts
    meter = Meter(network, made)
    names = [w.name for w in found.weights if w.name in network.fed]
    changes = {n: network.fed[n] * np.float32(0.9) for n in (names[0], names[-1])}
    undone = meter.undone([[n] for n in changes], changes)
    meter.rest()
    for left, rest in zip(reversed(changes), undone, strict=True):
        whole, error = meter.together({left: changes[left]})
        assert rest == pytest.approx(whole, rel=known(error))


def test_weights_are_constants_of_a_piece_where_they_are_few_enough(parts, monkeypatch):
    _, _, network, made = parts
    given = {i.name for i in network.segment(0, None, {}, network.outputs, network.fed).get_inputs()}
    assert given == set(made.feeds[0])
    monkeypatch.setattr(network, "_laid_out", False)
    given = {i.name for i in network.segment(0, None, {}, network.outputs, network.fed).get_inputs()}
    assert given > set(made.feeds[0])
