"""Made-up signals: any shape, any colour, loud and soft, always the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxdp import signals

SHAPES = st.lists(st.integers(1, 40), min_size=0, max_size=4).map(tuple)


@given(shape=SHAPES, seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_a_signal_fills_its_shape_with_finite_numbers_and_is_always_the_same(shape, seed):
    made = signals.draw(shape, np.random.default_rng(seed))
    assert np.shape(made) == shape
    assert np.isfinite(made).all()
    assert np.array_equal(made, signals.draw(shape, np.random.default_rng(seed)))


def drawn(count=200, length=4096):
    return np.stack([signals.draw((1, length), np.random.default_rng(seed)) for seed in range(count)])[:, 0]


def test_half_are_white_and_the_others_are_as_loud_as_they_like():
    deviations = drawn().std(axis=1)
    white = np.abs(deviations - 1) < 0.05  # 4.5 times the error of a deviation of 4096 numbers
    assert 80 < white.sum() < 130  # 100 +- 7, and the few of the others that are about 1
    low, high = signals.LOUDNESS
    others = deviations[~white]
    assert others.min() < 2 * low and others.max() > high / 2
    assert low * 0.99 < others.min() and others.max() < high * 1.01


def test_colours_go_from_white_to_brown():
    power = np.square(np.abs(np.fft.rfft(drawn(), axis=1)))
    low = power[:, 1:65].sum(axis=1) / power[:, 1:].sum(axis=1)  # white: 64 of 2048 places, 3 %
    assert np.quantile(low, 0.25) < 0.05 and np.quantile(low, 0.9) > 0.9
