"""Sampled rows times the matrix are what ONNX Runtime computes, and the mean can go into the bias."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import rewriting
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import draw, model, one_conv, pair, rewrite, run
from test_rewrite import convolutions

from onnxdp import stats, weights
from onnxdp.network import Network
from onnxdp.pieces import Stream
from onnxdp.probes import Probes


def seen_of(proto, feeds, batch, name="W", rows=10**6):
    """Gather as the whole path does, every row there is; also what the network gave."""
    held, found = rewriting.find(proto)
    weight = next(w for w in found.weights if w.name == name)
    with mock.patch.object(weights, "MIN_BYTES", 1):
        network = Network(held, found)
    probes = Probes(tuple(feeds), batch * len(feeds), 0, "given")
    with mock.patch.object(stats, "rows_wanted", lambda w: rows):
        seen = stats.gather(Stream(network, probes), found, [weight], network, seed=0)
    return weight, found, seen.get(name), network


def uncentred(seen):
    rows = seen.samples * np.float32(np.sqrt(seen.samples.shape[1]))
    return rows if seen.mean is None else rows + seen.mean[:, None, :]


@given(convolutions())
@settings(max_examples=50, deadline=None)
def test_rows_of_a_conv_give_its_own_output(case):
    text, shape, groups, _, biased, seed = case
    proto, tensors, x = one_conv(text, shape, groups, biased=biased, seed=seed)
    weight, _, seen, _ = seen_of(proto, [{"x": x}], 2)
    (y,) = run(proto, {"x": x})
    bias = tensors["b"] if biased else np.zeros(shape[0], np.float32)
    wanted = np.moveaxis(y, 1, -1).reshape(-1, groups, shape[0] // groups).swapaxes(0, 1)
    rows = uncentred(seen)
    assert rows.shape == (groups, wanted.shape[1], weight.inputs)
    stack = weights.blocks(weight, tensors["W"])
    got = rows @ stack + bias.reshape(groups, 1, -1)
    most = (
        np.abs(rows) @ np.abs(stack)
        + np.abs(bias.reshape(groups, 1, -1))
        + np.abs(seen.mean)[:, None] @ np.abs(stack)
    )
    assert np.all(np.abs(got - wanted) <= 2.0**-23 * 2 * (weight.inputs + 8) * most)


@given(
    st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["Gemm", "MatMul"]), st.sampled_from([(), (2,), (2, 3)]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rows_of_a_product_give_its_own_output(trans_a, trans_b, left, op, lead):
    rng = np.random.default_rng(5)
    if op == "MatMul":
        trans_a = trans_b = False
    else:
        lead = ()
    m, k, n = 5, 8, 6
    a, b = ((k, m) if trans_a else (m, k)), ((n, k) if trans_b else (k, n))
    shape, x_shape = (a, (*lead, *b)) if left else (b, (*lead, *a))
    flags = f"<transA = {int(trans_a)}, transB = {int(trans_b)}>" if op == "Gemm" else ""
    dims = ",".join(map(str, x_shape))
    out = ",".join("?" * len(x_shape))
    tensors = {"W": draw(rng, *shape)}
    body = f"y = {op}{flags}({'W, x' if left else 'x, W'})"
    proto = model(body, f"float[{dims}] x", f"float[{out}] y", tensors)
    x = draw(rng, *x_shape)
    weight, _, seen, _ = seen_of(proto, [{"x": x}], 1)
    (y,) = run(proto, {"x": x})
    wanted = (y.swapaxes(-1, -2) if left else y).reshape(1, -1, weight.outputs)
    rows, stack = uncentred(seen), weights.blocks(weight, tensors["W"])
    most = np.abs(rows) @ np.abs(stack) + (
        0 if seen.mean is None else np.abs(seen.mean)[:, None] @ np.abs(stack)
    )
    assert np.all(np.abs(rows @ stack - wanted) <= 2.0**-23 * 2 * (k + 8) * most)


@pytest.mark.parametrize(
    "body", ["y = Conv<pads = [1, 1, 1, 1]>(x, W)", "f = Flatten(x) y = Gemm<alpha = 0.5>(f, V)"]
)
@pytest.mark.parametrize("run_as", ["fold", "split"])
def test_the_centred_shift_makes_the_mean_output_exact(body, run_as):
    rng = np.random.default_rng(5)
    name = "W" if "Conv" in body else "V"
    tensors = {name: draw(rng, 8, 4, 3, 3) if name == "W" else draw(rng, 144, 6)}
    proto = model(body, "float[N,4,6,6] x", "float[] y" if name == "W" else "float[N,6] y", tensors)
    x = draw(rng, 6, 4, 6, 6) + 1
    _, _, seen, _ = seen_of(proto, [{"x": x[:3]}, {"x": x[3:]}], 3, name)
    params = {name: pair(2, run=run_as)}
    plain = rewrite(proto, params)
    shift = rewriting.centred(plain, name, seen.mean)
    made = rewrite(proto, params, {name: shift})
    axes = (0, 2, 3) if name == "W" else (0,)
    wanted, got, uncorrected = (
        run(p, {"x": x})[0].astype(np.float64) for p in (proto, made.proto, plain.proto)
    )
    (most,) = run(plain.majorant(), {"x": np.abs(x)})
    bound = 2.0**-23 * 2 * plain.terms() * (most.mean(axis=axes) + np.abs(shift))
    assert np.all(np.abs(got.mean(axis=axes) - wanted.mean(axis=axes)) <= bound)
    assert np.abs(uncorrected.mean(axis=axes) - wanted.mean(axis=axes)).max() > 10 * bound.max()


def test_rows_are_centred_only_where_a_bias_can_take_up_the_mean():
    rng = np.random.default_rng(5)
    tensors = {"W": draw(rng, 8, 4, 3, 3), "V": draw(rng, 4, 6)}
    proto = model(
        "c = Conv(x, W) d = Conv<pads = [1, 1, 1, 1]>(x, W) y = MatMul(x, V)",
        "float[N,4,6,4] x", "float[] y", tensors,
    )  # fmt: skip
    x = draw(rng, 3, 4, 6, 4)
    for name in "WV":
        assert seen_of(proto, [{"x": x}], 3, name)[2].mean is None


def test_the_choice_of_rows_depends_on_the_seed_alone():
    rng = np.random.default_rng(5)
    proto = model("y = Conv(x, W)", "float[N,4,9,9] x", "float[] y", {"W": draw(rng, 8, 4, 3, 3)})
    feeds = [{"x": draw(rng, 2, 4, 9, 9)}]
    first, second = (seen_of(proto, feeds, 2, rows=20)[2] for _ in range(2))
    assert first.samples.shape == (1, 20, 36) and np.array_equal(first.samples, second.samples)
    everything = uncentred(seen_of(proto, feeds, 2)[2])[0]
    for row in uncentred(first)[0]:
        assert np.abs(everything - row).max(axis=1).min() <= 2.0**-20  # each is a row that there is


def test_positions_are_counted_over_all_readers():
    rng = np.random.default_rng(5)
    body = (
        "a = Conv<strides = [2, 2]>(x, W) b = Conv<pads = [1, 1, 1, 1]>(x, W) f = Flatten(x) y = Gemm(f, V)"
    )
    tensors = {"W": draw(rng, 8, 4, 3, 3), "V": draw(rng, 324, 5)}
    proto = model(body, "float[N,4,9,9] x", "float[N,5] y", tensors)
    held, found = rewriting.find(proto)
    with mock.patch.object(weights, "MIN_BYTES", 1):
        network = Network(held, found)
    counted = stats.counting(network, found)({"x": draw(rng, 3, 4, 9, 9)}, 3)
    assert counted == {"W": 4 * 4 + 9 * 9, "V": 1}
