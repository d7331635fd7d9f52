"""Laws of rounding; a bound is float32's rounding unit times the sizes it passes through, or a theorem's."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxdp import arrays
from onnxdp.errors import UsageError
from onnxdp.methods import rounding
from onnxdp.methods.rounding import Curvature, round_weights

EPS32 = float(np.finfo(np.float32).eps)
LEVELS = [2, 3, 4, 5, 7, 16, 40, 127, 255, 1625]

host = arrays.to_host


def problem(inputs=24, outputs=9, seed=0, stack=1, samples=None):
    """Weights (stack, inputs, outputs) and the second moments of inputs that resemble one another."""
    rng = np.random.default_rng(seed)
    rows = samples or 3 * inputs
    mix = rng.standard_normal((stack, inputs, inputs)) / inputs**0.5 + 0.3
    x = rng.standard_normal((stack, rows, inputs)) @ mix / rows**0.5
    w = rng.standard_normal((stack, inputs, outputs)).astype(np.float32)
    return w, (x.swapaxes(1, 2) @ x).astype(np.float32)


def curved(moment, share=0.01):
    return Curvature.of(moment, (share * np.trace(moment, axis1=1, axis2=2) / moment.shape[1]))


def units(made, levels):
    """The levels as numbers, float64."""
    return made.digits.astype(np.float64) - (levels - 1) / 2


def quadratic(moment, x):
    return np.einsum("sin,sij,sjn->sn", x, moment.astype(np.float64), x)


def in_order(w, curvature, step):
    """Weights in units of their steps and processing order."""
    return np.take_along_axis(w, curvature.order[:, :, None], axis=1) / step[:, None, :]


def first_steps(w, curvature, levels):
    ordered = np.take_along_axis(w, curvature.order[:, :, None], axis=1)
    return rounding._first_scale(ordered, curvature.pivots, levels, 1)


def eliminated(w, h, half):
    """Optimal brain quantisation in a fixed order, to the letter: round, pay the others, leave H^-1."""
    w, left, q = w.astype(np.float64).copy(), np.linalg.inv(h), np.empty_like(w, np.float64)
    nearest_tie = np.inf
    for i in range(len(w)):
        q[i] = np.clip(np.round(w[i] + half), 0, 2 * half) - half
        inner = np.abs(w[i]) < half
        ties = np.abs(np.abs(w[i] + half - np.floor(w[i] + half)) - 0.5)[inner]
        nearest_tie = min(nearest_tie, ties.min(initial=np.inf))
        w += -np.outer(left[:, i], (w[i] - q[i]) / left[i, i])
        left -= np.outer(left[:, i], left[i]) / left[i, i]
        left[i, i] = 1.0  # done: never read for a later row
    return q, nearest_tie


@given(
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 4),
    levels=st.sampled_from([2, 3, 4, 7, 16]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_feedback_is_the_literal_elimination(inputs, outputs, levels, seed):
    w, moment = problem(inputs, outputs, seed)
    curvature = curved(moment)
    half = (levels - 1) / 2
    unit = in_order(w, curvature, first_steps(w, curvature, levels))
    h = curvature.moment[0].astype(np.float64)
    wanted, tie = eliminated(unit[0], h, half)
    # both sum up `inputs` corrections, each good to the rounding of a factor of H; nearer ties go either way
    assume(tie > 4 * inputs * EPS32 * np.linalg.cond(h) ** 0.5 * (1 + np.abs(unit).max()))
    got, _ = rounding._feedback(unit.astype(np.float32), curvature.feedback, half)
    assert np.array_equal(got[0], wanted)


@pytest.mark.parametrize("inputs", [5, 15, 16, 17, 95, 96, 97, 210])
def test_feedback_in_blocks_is_feedback_row_by_row(inputs, monkeypatch):
    w, moment = problem(inputs, 5, seed=3)
    curvature = curved(moment)
    unit = in_order(w, curvature, first_steps(w, curvature, 5))
    q = np.zeros_like(unit)
    target = unit.astype(np.float64)
    for i in range(inputs):
        fed = curvature.feedback[0, :i, i].astype(np.float64) @ (unit[0] - q[0])[:i]
        q[0, i] = np.clip(np.round(target[0, i] + fed + 2), 0, 4) - 2
    again, missed = rounding._feedback(unit, curvature.feedback, 2.0)
    # float32 and float64 part ways at a tie only
    assert np.array_equal(q, again)
    lost = (unit - q).astype(np.float64)
    v = curvature.feedback[0].astype(np.float64)
    bound = 2 * inputs * EPS32 * (np.abs(v).T @ np.abs(lost[0]) + np.abs(unit[0]) + 2)
    assert np.all(np.abs(missed[0] - (lost[0] + v.T @ lost[0])) <= bound)


@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 30])
def test_factoring_in_blocks_gives_the_moment_back(inputs, monkeypatch):
    monkeypatch.setattr(rounding, "_SOLVED", 8)
    w, moment = problem(inputs, 3, seed=5, stack=2)
    curvature = curved(moment)
    v = curvature.feedback.astype(np.float64)
    assert not np.tril(v).any()
    unit = v + np.eye(inputs)
    h = curvature.moment.astype(np.float64)
    again = (unit * curvature.pivots[:, None, :]) @ unit.swapaxes(1, 2)
    size = np.sqrt(np.einsum("bi,bj->bij", *(np.diagonal(h, axis1=1, axis2=2),) * 2))
    assert np.all(np.abs(again - h) <= 4 * inputs * EPS32 * size)
    white = rounding.whitened(w, curvature.feedback).astype(np.float64)
    energy = np.sum(curvature.pivots[:, :, None] * white**2, axis=1)
    # sums of `inputs` terms in float32, one upon the other: the factor, what it multiplies, the energy
    assert energy == pytest.approx(quadratic(h, w), rel=3 * inputs * EPS32)


@pytest.mark.parametrize("levels", [2, 3, 5, 16])
def test_feedback_beats_rounding_to_nearest_with_the_same_steps(levels):
    half = (levels - 1) / 2
    ratios = []
    for seed in range(40):
        w, moment = problem(seed=seed)
        curvature = curved(moment)
        unit = in_order(w, curvature, first_steps(w, curvature, levels))
        fed, _ = rounding._feedback(unit, curvature.feedback, half)
        near = rounding._nearest(unit, half)
        costs = [quadratic(curvature.moment, (unit - q).astype(np.float64)).sum() for q in (fed, near)]
        ratios.append(costs[0] / costs[1])
    assert np.mean(ratios) < 1


@pytest.mark.parametrize("inputs", [5, 15, 16, 17, 95, 96, 97, 210])
def test_a_sweep_is_coordinate_descent(inputs):
    w, moment = problem(inputs, 5, seed=4)
    curvature = curved(moment)
    unit = in_order(w, curvature, first_steps(w, curvature, 5))
    got = rounding._nearest(unit, 2.0)
    h, wanted = curvature.moment[0].astype(np.float64), got[0].astype(np.float64)
    rounding._sweep(curvature.moment @ unit, 1.0, got, curvature.moment, 2.0)
    for i in range(inputs):
        best = wanted[i] + h[i] @ (unit[0] - wanted) / h[i, i]
        wanted[i] = np.clip(np.round(best), -2, 2)
    # float32 and float64 part ways at a tie only
    assert np.array_equal(got[0], wanted)


@given(inputs=st.integers(1, 120), levels=st.sampled_from([2, 3, 5, 16, 127]), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_a_sweep_never_increases_the_objective(inputs, levels, seed):
    w, moment = problem(inputs, 6, seed)
    curvature = curved(moment)
    half = (levels - 1) / 2
    unit = in_order(w, curvature, first_steps(w, curvature, levels))
    before = rounding._nearest(unit, half)
    times = curvature.moment.__matmul__
    after = before.copy()
    rounding._sweep(times(unit), 1.0, after, curvature.moment, half)
    h = np.abs(curvature.moment.astype(np.float64))
    # a move is chosen by a pull, the difference of two sums of `inputs` float32 terms: their errors a step
    lost = np.maximum(np.abs(unit), np.abs(after) + np.abs(before)).astype(np.float64)
    bound = 2 * np.sum(np.abs(after - before) * 2 * inputs * EPS32 * (h @ lost), axis=1)
    costs = [quadratic(curvature.moment, (unit - q).astype(np.float64)) for q in (before, after)]
    assert np.all(costs[1] <= costs[0] + bound)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("plain", [False, True])
def test_more_steps_and_sweeps_never_harm_and_pay_on_average(levels, plain):
    """The steps tried hold the one that is tried alone, and are compared as they are kept: refitted."""
    gains = []
    for seed in range(10):
        w, moment = problem(seed=seed)
        curvature = Curvature.flat(w.shape[1], w) if plain else curved(moment)
        h = np.eye(w.shape[1])[None] if plain else moment + curvature.damping[:, None, None] * np.eye(24)
        costs = []
        for tries, sweeps in [(1, 0), (3, 0), (3, 3)]:
            made = round_weights(w, curvature, levels, tries=tries, sweeps=sweeps)
            lost = w - units(made, levels) * made.scale.astype(np.float64)[:, None, :]
            costs.append((quadratic(h, lost), quadratic(np.abs(h), np.abs(lost) + EPS32 * np.abs(w))))
        for (before, known), (after, _) in pairwise(costs):  # products of H known to `inputs` roundings
            assert np.all(after <= before + 4 * 24 * EPS32 * known)
        gains.append([after.sum() / before.sum() for (before, _), (after, _) in pairwise(costs)])
    by_steps, by_sweeps = np.mean(gains, axis=0)
    # signs are the same at every step; and of many levels, feedback leaves no better one beside it
    assert by_steps < 1 or (plain and levels == 2)
    assert by_sweeps < 1 or plain or levels > 5


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_steps_are_the_best_for_their_levels(levels, parts):
    w, moment = problem(stack=2, seed=levels)
    curvature = curved(moment)
    made = round_weights(w, curvature, levels, parts=parts, tries=2, sweeps=1)
    h = moment.astype(np.float64) + curvature.damping[:, None, None] * np.eye(w.shape[1])
    q, step = units(made, levels), made.scale.astype(np.float64)[:, None, :]

    def cost(factor):
        own = quadratic(h, w - q * step * factor)
        return own if parts == 1 else own.sum(axis=0)

    under, most = quadratic(h, q), quadratic(np.abs(h), np.abs(q))
    over = quadratic(np.abs(h), np.maximum(np.abs(q), np.abs(w) / step))
    # what float32 leaves unknown of q^T H w / q^T H q; half of a change beyond it must cost
    unsure = 4 * w.shape[1] * EPS32 * ((most + over) / under).max()
    assert unsure < 0.02
    for change in (2 * unsure, 0.05):
        assert np.all(cost(1.0) < cost(1 + change)) and np.all(cost(1.0) < cost(1 - change))


def test_a_matrix_cut_into_parts_is_the_whole_where_its_moment_is_in_blocks():
    for seed in range(5):
        w, moment = problem(16, 6, seed, stack=2)
        blocks = np.zeros((1, 32, 32), np.float32)
        blocks[0, :16, :16], blocks[0, 16:, 16:] = moment
        whole = round_weights(w.reshape(1, 32, 6), Curvature.of(blocks, np.full(1, 0.02)), 5)
        cut = round_weights(w, Curvature.of(moment, np.full(2, 0.02)), 5, parts=2)
        assert np.array_equal(cut.digits.reshape(1, 32, 6), whole.digits)
        assert np.array_equal(cut.scale[0], cut.scale[1])
        bound = 2 * 32 * EPS32 * np.linalg.cond(blocks[0] + 0.02 * np.eye(32))
        assert np.allclose(cut.scale[:1], whole.scale, rtol=bound, atol=0)
        assert np.allclose(cut.error.sum(axis=0), whole.error[0], rtol=bound, atol=bound * whole.energy.max())


def test_the_plain_norm_is_the_identity_and_rounds_to_nearest():
    for levels in LEVELS:
        w, _ = problem(seed=levels, stack=2)
        made = round_weights(w, Curvature.flat(w.shape[1], w), levels)
        one = np.broadcast_to(np.eye(w.shape[1], dtype=np.float32), (2, *[w.shape[1]] * 2))
        same = round_weights(w, Curvature.of(one, np.zeros(2)), levels)
        assert np.array_equal(made.digits, same.digits)
        assert np.allclose(made.scale, same.scale, rtol=2 * w.shape[1] * EPS32, atol=0)
        # some step rounds all numbers of a column to these: an end means "or beyond"
        q = units(made, levels) * np.sign(w)
        size, half = np.abs(w.astype(np.float64)), (levels - 1) / 2
        low = np.where(q <= -half, 0.0, (q - 0.5) / size)
        high = np.where(q >= half, np.inf, (q + 0.5) / size)
        low, high = low.max(axis=1), high.min(axis=1)
        assert np.all(low <= high * (1 + 4 * EPS32)) and np.all(high > 0)


@given(
    inputs=st.integers(1, 30),
    outputs=st.integers(1, 5),
    levels=st.integers(2, 255) | st.just(1625),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_digits_are_levels_and_the_error_is_what_they_lose(inputs, outputs, levels, seed):
    w, moment = problem(inputs, outputs, seed)
    curvature = curved(moment)
    made = round_weights(w, curvature, levels, tries=2, sweeps=1)
    assert (
        made.digits.dtype == (np.uint8 if levels <= 255 else np.uint16)
        and made.digits.max() < levels
        and np.all(made.scale > 0)
    )
    back = units(made, levels) * made.scale.astype(np.float64)[:, None, :]
    lost = np.abs(w - back)
    h = np.abs(moment.astype(np.float64)) + curvature.damping[:, None, None] * np.eye(inputs)
    # products of `inputs` terms of H (the damping goes in and out), of numbers known to an eps of w and q
    known = EPS32 * (np.abs(w) + np.abs(back))
    bound = 4 * (inputs + 2) * EPS32 * quadratic(h, lost) + 4 * np.einsum(
        "sin,sij,sjn->sn", known, h, lost + known
    )
    assert np.all(np.abs(made.error - quadratic(moment, w - back)) <= bound)
    full = np.abs(w.astype(np.float64))
    assert np.all(np.abs(made.energy - quadratic(moment, w)) <= 4 * (inputs + 2) * EPS32 * quadratic(h, full))


def spread_out(made, inputs):
    """The steps of blocks for every row, float64."""
    return np.repeat(made.scale.astype(np.float64), inputs // made.scale.shape[1], axis=1)


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize(("levels", "parts", "blocks"), [(255, 1, 4), (1625, 1, 2), (255, 2, 3), (7, 1, 6)])
def test_blocks_have_steps_of_their_own(levels, parts, blocks, sweeps):
    w, moment = problem(24, 5, seed=levels, stack=2)
    w[:, :4] *= 20  # so that a step for the whole column is too large for the others
    curvature = curved(moment)
    made = round_weights(w, curvature, levels, parts=parts, blocks=blocks, sweeps=sweeps)
    assert made.scale.shape == (2, blocks, 5) and made.digits.max() < levels and np.all(made.scale > 0)
    q, step = units(made, levels), spread_out(made, 24)
    back = q * step
    h = np.abs(moment.astype(np.float64)) + curvature.damping[:, None, None] * np.eye(24)
    lost, known = np.abs(w - back), EPS32 * (np.abs(w) + np.abs(back))
    bound = 4 * 26 * EPS32 * quadratic(h, lost) + 4 * np.einsum("sin,sij,sjn->sn", known, h, lost + known)
    assert np.all(np.abs(made.error - quadratic(moment, w - back)) <= bound)
    one = round_weights(w, curvature, levels, parts=parts, sweeps=sweeps)
    assert made.error.sum() < 0.7 * one.error.sum()


def test_one_row_a_block_is_met_to_the_bit_where_the_norm_is_plain():
    """Nothing but the top of the range keeps a step from its number: the first scale tried beyond it."""
    w, _ = problem(12, 4, seed=2)
    made = round_weights(w, Curvature.flat(12, w), 255, blocks=12)
    assert np.abs(w - units(made, 255) * spread_out(made, 12)).max() <= np.abs(w).max() / 254


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_inputs_that_are_never_seen_are_rounded_to_nearest(levels, sweeps):
    """Made-up inputs may leave silent what real ones do not: nothing may be dropped for it."""
    w, moment = problem(20, 7, seed=levels)
    dead = [3, 11, 12]
    moment[:, dead] = moment[:, :, dead] = 0
    made = round_weights(w, curved(moment), levels, sweeps=sweeps)
    half = (levels - 1) / 2
    q, unit = units(made, levels)[0, dead], w[0, dead] / made.scale
    # the last refit moves the step after the rounding: a level may be missed by what that moved it
    assert np.all(np.abs(q - np.clip(unit, -half, half)) <= 0.5 + 0.25)
    assert np.all(np.sign(q) * np.sign(unit) >= 0)
    assert np.any(np.abs(q) > 0.5) or levels == 2


def test_the_order_of_the_inputs_does_not_matter():
    w, moment = problem(40, 6, seed=4, stack=3)
    turn = np.random.default_rng(1).permutation(40)
    straight = round_weights(w, curved(moment), 5)
    turned = round_weights(w[:, turn], curved(moment[:, turn][:, :, turn]), 5)
    assert np.array_equal(straight.digits[:, turn], turned.digits)
    # the same numbers in the same processing order; only the trace that scales the damping sums up otherwise
    assert np.allclose(straight.scale, turned.scale, rtol=40 * EPS32, atol=0)


@pytest.mark.parametrize(("stack", "inputs", "outputs"), [(4, 18, 5), (16, 9, 1)])
def test_a_stack_is_its_matrices_one_by_one(stack, inputs, outputs):
    w, moment = problem(inputs, outputs, seed=6, stack=stack)
    made = round_weights(w, curved(moment), 7)
    for b in range(stack):
        alone = round_weights(w[b : b + 1], curved(moment[b : b + 1]), 7)
        assert np.array_equal(made.digits[b], alone.digits[0])
        assert np.allclose(made.scale[b], alone.scale[0], rtol=4 * inputs * EPS32, atol=0)


def test_one_plain_norm_serves_a_whole_stack():
    w, _ = problem(stack=3)
    made = round_weights(w, Curvature.flat(w.shape[1], w), 3)
    for b in range(3):
        alone = round_weights(w[b : b + 1], Curvature.flat(w.shape[1], w), 3)
        assert np.array_equal(made.digits[b], alone.digits[0])


@pytest.mark.parametrize("samples", [1, 6])
def test_fewer_samples_than_inputs_need_no_more_than_the_damping(samples):
    w, moment = problem(20, 4, samples=samples)
    curvature = curved(moment, 1e-12)  # too little: it grows until H has a factor
    assert np.all(curvature.damping >= 1e-12 * np.trace(moment, axis1=1, axis2=2) / 20)
    made = round_weights(w, curvature, 4)
    assert np.isfinite(made.scale).all() and np.isfinite(made.error).all()


def test_the_factor_of_the_moment_is_one():
    _, moment = problem(30, stack=2)
    curvature = curved(moment)
    upper = curvature.feedback.astype(np.float64) + np.eye(30)
    assert np.array_equal(upper, np.triu(upper))
    again = upper * curvature.pivots[:, None, :].astype(np.float64) @ upper.swapaxes(1, 2)
    assert np.abs(again - curvature.moment).max() <= 4 * 30 * EPS32 * np.abs(moment).max()
    diagonal = np.diagonal(curvature.moment, axis1=1, axis2=2)
    assert np.all(np.diff(diagonal, axis=1) <= 0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_moment_without_a_factor_is_refused(wrong):
    _, moment = problem(5)
    moment[0, 2, 2] = wrong
    with pytest.raises(UsageError, match="not a number"):
        curved(moment)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("levels", [2, 3])
def test_a_constant_column_has_a_step_all_the_same(value, levels):
    w = np.full((1, 6, 2), value, np.float32)
    made = round_weights(w, curved(problem(6)[1]), levels)
    assert np.isfinite(made.scale).all() and np.all(made.scale > 0)
    if value:
        back = units(made, levels) * made.scale[:, None, :]
        assert np.allclose(back, value, rtol=6 * 6 * EPS32, atol=0)


@pytest.mark.parametrize("plain", [False, True])
def test_every_namespace_gives_the_same_levels(to, plain):
    w, moment = problem(60, 5, seed=2, stack=2)

    def made(move):
        there = move(w)
        share = move(0.01 * np.trace(moment, axis1=1, axis2=2).astype(np.float32) / 60)
        curvature = Curvature.flat(60, there) if plain else Curvature.of(move(moment), share)
        return round_weights(there, curvature, 5, parts=2)

    wanted, got = made(np.asarray), made(to)
    assert type(got.digits) is type(to(w)) and arrays.namespace(got.scale) is arrays.namespace(to(w))
    assert np.array_equal(host(got.digits), wanted.digits)
    for name in ("scale", "error", "energy"):
        bound = 60 * EPS32 * np.abs(wanted.energy).max() if name != "scale" else 60 * EPS32
        assert np.allclose(host(getattr(got, name)), getattr(wanted, name), rtol=60 * EPS32, atol=bound)
