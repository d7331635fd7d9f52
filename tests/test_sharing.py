"""One dictionary for several weights: what each keeps of itself."""

import builders
import numpy as np
import pytest

import onnxdp
from onnxdp.methods.sharing import project
from onnxdp.methods.solvers import Moment, error, exact, refit_codes

EPS = np.finfo(float).eps


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
    seen_by = moment.dense() if moment else np.eye(20)
    # sums of up to 60 products, and the normal equations of the codes
    rounding = 60 * EPS * np.linalg.cond(atoms.swapaxes(-1, -2) @ seen_by @ atoms).max()
    for rank in range(1, 16):
        codes = refit_codes(w, atoms[..., :rank], moment)
        assert np.allclose(seen.codes(rank), codes, rtol=rounding, atol=rounding)
        left = w - atoms[..., :rank] @ codes
        energy = (
            (lambda a: moment.energy(lambda r: a[..., r, :], a))
            if moment
            else (lambda a: (a**2).sum((-2, -1)))
        )
        want = (energy(left).sum() / energy(w).sum()) ** 0.5
        assert seen.error(rank) == pytest.approx(want, rel=rounding)


def test_a_weights_own_optimal_dictionary_loses_what_the_spectrum_says(case):
    w, moment = case
    factored = exact(w, moment)
    atoms, codes = factored.pair(w, 20)
    seen = project(w, atoms, moment)
    floor = 4 * (20 + 30 * 30) * EPS  # energies, over the whole: see tail_bound in test_solvers
    for rank in (1, 7, 19):
        want = factored.tail(rank).sum() / factored.total.sum()
        assert abs(seen.error(rank) ** 2 - want) <= floor
    assert float(error(w[0], atoms[0] @ codes[0])) < floor**0.5


def test_automatic_sharing_is_never_worse_than_either():
    """Measured as a whole; to the rounding of an error between sessions of other files (float32)."""
    proto = builders.build("googlenet", small=True)
    reports = [
        onnxdp.compress(proto, method="dp", ratio=2.6, shared=shared, refit=False)[1]
        for shared in (None, True, False)
    ]
    sharing = [sum("dictionary" in c.params for c in r.plan.choices) for r in reports]
    assert sharing[1] > sharing[2] == 0
    errors = [r.verification.error for r in reports]
    assert errors[0] <= min(errors[1:]) * (1 + 64 * np.finfo(np.float32).eps)
