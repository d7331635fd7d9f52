"""Made-up texts: what ids of sequences have in common, and what uniform ids have not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxdp import texts

SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)


@given(shape=SHAPES, vocabulary=st.integers(1, 60_000), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_ids_fill_the_shape_and_lie_in_the_vocabulary(shape, vocabulary, seed):
    made = texts.draw(shape, vocabulary, np.random.default_rng(seed))
    assert made.shape == shape
    assert np.issubdtype(made.dtype, np.integer)
    assert ((made >= 0) & (made < vocabulary)).all()
    assert (made == texts.draw(shape, vocabulary, np.random.default_rng(seed))).all()


def test_texts_differ_in_how_many_ids_they_use_and_some_use_any():
    made = [texts.draw((2048,), 257, np.random.default_rng(seed)) for seed in range(100)]
    used = np.array([len(np.unique(t)) for t in made])
    assert used.min() < 10
    assert 20 < np.median(used) < 100  # of 8 to 257 in logarithm, and not all of these in every text
    assert 10 < (used == 257).sum() < 50  # a quarter is uniform: 25 +- 4.3
    assert len(np.unique(np.concatenate(made))) == 257


def test_pairs_of_neighbours_come_again():
    def apart(text):
        return len(set(pairwise(text)))

    rng = np.random.default_rng(0)
    made = [texts.draw((2048,), 257, np.random.default_rng(seed)) for seed in range(40)]
    assert np.median([apart(t.tolist()) for t in made]) < apart(rng.integers(0, 257, 2048).tolist()) / 2
