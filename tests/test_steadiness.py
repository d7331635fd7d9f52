"""Signals that a chaotic network is erratic about are passed over; a steady network is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxdp import probes
from onnxdp.inputs import InputSpec
from onnxdp.steadiness import STEADY, erratic

RNG = np.random.default_rng(3)


def feeds(count=24, width=40):
    """Loud feeds and soft ones by turns."""
    made = [
        RNG.standard_normal((1, width)).astype(np.float32) * (1.0 if i % 2 else 0.1) for i in range(count)
    ]
    return [{"x": x} for x in made]


def chaotic(feed):
    """A logistic map run 30 times from where soft feeds put it; loud ones rest on tanh."""
    x = feed["x"].astype(np.float64)
    loud = np.abs(x).mean() > 0.4
    y = np.tanh(x)
    for _ in range(0 if loud else 30):
        y = 1 - 2 * y * y
    return [y.astype(np.float32)]


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_a_linear_network_is_never_erratic(scale, seed):
    matrix = np.random.default_rng(seed).standard_normal((40, 30)) * scale
    assert not erratic(lambda feed: [feed["x"] @ matrix], feeds(), seed).any()


def test_the_feeds_that_a_chaotic_network_amplifies_are_told_from_the_others():
    mostly = [f for i, f in enumerate(feeds(36)) if i % 4 != 1]  # more soft ones than loud ones
    found = erratic(chaotic, mostly, 0)
    is_soft = np.array([np.abs(f["x"]).mean() < 0.4 for f in mostly])
    assert is_soft.sum() > len(mostly) / 2
    assert found[is_soft].min() > STEADY and found[is_soft].min() > found[~is_soft].max()


def test_where_most_feeds_are_erratic_one_whose_answer_is_the_usual_one_is_no_better():
    def run(feed):
        x = feed["x"]
        return [np.zeros(3)] if np.abs(x).mean() < 0.4 else [x[0, :3] * 1e4 % 7 - 3.5]

    # a third gives zeros, the others numbers on either side: the median is zero
    found = erratic(run, [f for i, f in enumerate(feeds(36)) if i % 4 != 0], 0)
    assert found.min() > STEADY


def test_made_up_signals_are_those_that_the_network_answers_steadily():
    spec = InputSpec("x", "float32", (None, 200))
    plain = probes.make([spec], samples=16, seed=5)
    steady = probes.make([spec], samples=16, seed=5, responses=lambda feed: [feed["x"] * 2])
    for a, b in zip(plain.feeds, steady.feeds, strict=True):
        assert np.array_equal(a["x"], b["x"])

    def erratic_when_loud(feed):
        x = feed["x"].astype(np.float64)
        return [x if np.abs(x).mean() < 0.6 else 1e6 * x % 1.0]

    chosen = probes.make([spec], samples=16, seed=5, responses=erratic_when_loud)
    loud = [np.abs(p.feeds[k]["x"]).mean(axis=1) > 0.6 for p in (plain, chosen) for k in range(1)]
    assert loud[1].sum() < loud[0].sum()
    assert chosen.samples == 16


@pytest.mark.parametrize("shape", [(0,), ()])
def test_outputs_without_numbers_and_integers_say_nothing(shape):
    assert not erratic(lambda feed: [np.zeros(shape)], [{"ids": np.arange(4)}] * 3, 0).any()
