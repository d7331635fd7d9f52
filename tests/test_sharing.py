"""One dictionary for several weights: what each keeps of itself."""

import numpy as np
import pytest

from onnxdp.methods.sharing import project
from onnxdp.methods.solvers import Moment, error, exact, refit_codes


@pytest.fixture
def case():
    rng = np.random.default_rng(8)
    w = rng.standard_normal((2, 20, 30))
    samples = rng.standard_normal((2, 60, 20)) / 60**0.5
    return w, Moment(samples, np.array([0.1, 0.2]))


@pytest.mark.parametrize("weighted", [True, False])
def test_errors_and_codes_are_those_of_the_best_codes_for_every_rank(case, weighted):
    w, moment = case
    moment = moment if weighted else None
    atoms, _ = exact(w, None).pair(w, 15)  # any dictionary will do
    seen = project(w, atoms, moment)
    for rank in range(1, 16):
        codes = refit_codes(w, atoms[..., :rank], moment)
        assert np.allclose(seen.codes(rank), codes, rtol=1e-8, atol=1e-10)
        left = w - atoms[..., :rank] @ codes
        energy = (
            (lambda a: moment.energy(lambda r: a[..., r, :], a))
            if moment
            else (lambda a: (a**2).sum((-2, -1)))
        )
        want = (energy(left).sum() / energy(w).sum()) ** 0.5
        assert seen.error(rank) == pytest.approx(want, rel=1e-7)


def test_a_weights_own_optimal_dictionary_loses_what_the_spectrum_says(case):
    w, moment = case
    factored = exact(w, moment)
    atoms, codes = factored.pair(w, 20)
    seen = project(w, atoms, moment)
    for rank in (1, 7, 19):
        want = (factored.tail(rank).sum() / factored.total.sum()) ** 0.5
        assert seen.error(rank) == pytest.approx(want, rel=1e-6)
    assert float(error(w[0], atoms[0] @ codes[0])) < 1e-6
