"""Channels: which may go, that the network without dead ones answers alike, and that plans carry them."""

from __future__ import annotations

import json
from dataclasses import replace

import edges
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import rewriting
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxdp
from onnxdp import channels, pruning, stats, surgeon, weights
from onnxdp import model as model_file
from onnxdp.network import Network
from onnxdp.passes import DropChannels
from onnxdp.pieces import Stream
from onnxdp.probes import Probes
from onnxdp.pruning import Pruner
from onnxdp.settings import silent

EPS32 = float(np.finfo(np.float32).eps)

C, WIDE = 16, 24
"""Channels of a chain, and outputs of what reads it."""

BETWEEN = {
    "nothing": ("z = Identity(h)", {}),
    "relu": ("z = Relu(h)", {}),
    "clip": ("z = Clip(h, low, high)", {"low": 0.0, "high": 6.0}),
    "prelu": ("z = PRelu(h, slope)", {"slope": (C, 1, 1)}),
    "leaky": ("z = LeakyRelu<alpha=0.1>(h)", {}),
    "swish": ("s = Sigmoid(h) z = Mul(h, s)", {}),
    "hard swish": ("s = HardSigmoid(h) z = Mul(s, h)", {}),
    "norm": ("z = BatchNormalization(h, g, b, m, v)", {"g": (C,), "b": (C,), "m": (C,), "v": (C,)}),
    "scaled": ("a = Mul(h, k) z = Add(b, a)", {"k": (1, C, 1, 1), "b": (C, 1, 1)}),
    "one number": ("a = Mul(h, k) z = Sub(a, b)", {"k": (), "b": (1, 1, 1, 1)}),
    "depthwise": (
        f"a = Conv<group={C}, pads=[1,1,1,1]>(h, D, e) z = Relu(a)",
        {"D": (C, 1, 3, 3), "e": (C,)},
    ),
    "pools": ("a = MaxPool<kernel_shape=[2,2]>(h) z = AveragePool<kernel_shape=[2,2]>(a)", {}),
    "padded": ('z = Pad<mode="constant">(h, pads)', {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "dropped out": ("z = Dropout(h)", {}),
}
"""What may lie between two Convs."""

HEADS = {
    "flatten": ("f = Flatten(z)", 36, {}),
    "reshape": ("f = Reshape(z, to)", 36, {"to": np.array([-1, C * 36])}),
    "reshape back": ("f = Reshape(z, to)", 36, {"to": np.array([0, -1])}),
    "global": ("a = GlobalAveragePool(z) f = Flatten(a)", 1, {}),
    "mean": ("f = ReduceMean<axes=[2,3], keepdims=0>(z)", 1, {}),
    "squeezed": ("a = GlobalMaxPool(z) f = Squeeze(a, axes)", 1, {"axes": np.array([2, 3])}),
}
"""What may lie between a Conv and a Gemm, and the entries of a channel."""


def tensors_of(rng, shapes):
    def one(name, shape):
        if isinstance(shape, float):
            return np.float32(shape)
        if isinstance(shape, np.ndarray):
            return shape
        made = rewriting.draw(rng, *shape)
        return np.abs(made) + np.float32(0.5) if name == "v" else made

    return {n: one(n, s) for n, s in shapes.items()}


def two_convs(kind, seed=0, kernel=(3, 3), dead=(1, 5, 6)):
    """A model of Conv -> kind -> Conv, the second blind to some channels of the first."""
    body, shapes = BETWEEN[kind]
    rng = np.random.default_rng(seed)
    pads = [k // 2 for k in kernel] * 2
    tensors = {"A": rewriting.draw(rng, C, 8, 3, 3), "c": rewriting.draw(rng, C)}
    tensors |= tensors_of(rng, shapes) | {"B": rewriting.draw(rng, WIDE, C, *kernel)}
    tensors["B"][:, list(dead)] = 0
    text = f"h = Conv(x, A, c) {body} y = Conv<pads={pads}>(z, B)"
    return rewriting.model(text, "float[N,8,10,10] x", f"float[N,{WIDE},?,?] y", tensors)


def into_gemm(kind, seed=0, dead=(0, 3), turned=1):
    """A model of Conv -> kind -> Gemm that is blind to some channels."""
    body, each, more = HEADS[kind]
    rng = np.random.default_rng(seed)
    tensors = {"A": rewriting.draw(rng, C, 8, 3, 3), **more, "B": rewriting.draw(rng, C * each, 40)}
    tensors["B"].reshape(C, each, 40)[list(dead)] = 0
    if turned:
        tensors["B"] = np.ascontiguousarray(tensors["B"].T)
    text = f"z = Conv(x, A) {body} y = Gemm<transB={turned}>(f, B)"
    opset = 13
    return rewriting.model(text, "float[N,8,8,8] x", "float[N,40] y", tensors, opset=opset)


def opened(proto):
    model = model_file.read(proto)
    found = weights.find(model.ir)
    network = Network(model, found)
    return model, found, channels.shapes_of(network.proto), network


def without(proto, dropped, tensors=None, shifts=None):
    """Drop channels as they are: what reads them is not fitted again."""
    model, found, shapes, _ = opened(proto)
    DropChannels(found, shapes, dropped, tensors or {}, shifts or {})(model.ir)
    made = model_file.serialize(model)
    onnx.checker.check_model(made, full_check=True)
    return made


def alike(a, b, feed):
    """Outputs are equal to the rounding of sums of a few hundred products."""
    for x, y in zip(rewriting.run(a, feed), rewriting.run(b, feed), strict=True):
        assert x.shape == y.shape
        bound = 64 * np.finfo(np.float32).eps * np.abs(x).max()
        np.testing.assert_allclose(y, x, rtol=0, atol=bound)


def shapes_in(proto):
    return {t.name: tuple(t.dims) for t in proto.graph.initializer}


@pytest.mark.parametrize("kind", BETWEEN)
@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 99),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 3)]),
    dead=st.sets(st.integers(0, C - 1), min_size=1, max_size=C - 1),
)
def test_channels_that_nothing_reads_go_without_a_trace(kind, seed, kernel, dead):
    proto = two_convs(kind, seed, kernel, dead)
    made = without(proto, {"A": sorted(dead)})
    alike(proto, made, {"x": rewriting.draw(np.random.default_rng(seed), 3, 8, 10, 10)})
    shapes = shapes_in(made)
    left = C - len(dead)
    assert shapes["A"][0] == shapes["c"][0] == shapes["B"][1] == left
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in proto.graph.node]
    assert made.graph.output == proto.graph.output and made.graph.input == proto.graph.input


@pytest.mark.parametrize("kind", HEADS)
@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 99),
    turned=st.integers(0, 1),
    dead=st.sets(st.integers(0, C - 1), min_size=1, max_size=C - 1),
)
def test_channels_go_through_what_flattens_them(kind, seed, turned, dead):
    proto = into_gemm(kind, seed, dead, turned)
    made = without(proto, {"A": sorted(dead)})
    alike(proto, made, {"x": rewriting.draw(np.random.default_rng(seed), 3, 8, 8, 8)})
    assert shapes_in(made)["B"][turned] == (C - len(dead)) * HEADS[kind][1]


@settings(deadline=None, max_examples=10)
@given(first=st.sets(st.integers(0, 15), max_size=15), second=st.sets(st.integers(0, 11), max_size=11))
def test_branches_that_a_concat_joins_lose_channels_apart(first, second):
    rng = np.random.default_rng(0)
    tensors = {"S": rewriting.draw(rng, 16, 8, 3, 3), "A": rewriting.draw(rng, 16, 16, 1, 1)}
    tensors |= {"D": rewriting.draw(rng, 12, 16, 3, 3), "B": rewriting.draw(rng, 20, 28, 1, 1)}
    tensors |= {n: np.abs(rewriting.draw(rng, 28)) + np.float32(0.1) for n in ("g", "b", "m", "v")}
    tensors["B"][:, [*first, *(16 + c for c in second)]] = 0
    body = """s = Conv(x, S) r = Relu(s) p = Conv(r, A) q = Conv<pads=[1,1,1,1]>(r, D)
        j = Concat<axis=1>(p, q) n = BatchNormalization(j, g, b, m, v) y = Conv(n, B)"""
    proto = rewriting.model(body, "float[N,8,9,9] x", "float[N,20,7,7] y", tensors)
    _, found, shapes, _ = opened(proto)
    by_name = {c.weight: c for c in channels.chains(found, shapes)}
    assert {n: [e.weight for e in c.ends] for n, c in by_name.items()} == {
        "S": ["A", "D"],
        "A": ["B"],
        "D": ["B"],
    }
    made = without(proto, {"A": sorted(first), "D": sorted(second)})
    alike(proto, made, {"x": rewriting.draw(rng, 2, 8, 9, 9)})
    assert shapes_in(made)["B"][1] == shapes_in(made)["g"][0] == 28 - len(first) - len(second)


def test_matmuls_of_any_rank_lose_channels_at_their_last_axis():
    rng = np.random.default_rng(1)
    tensors = {
        "A": rewriting.draw(rng, 20, 32),
        "c": rewriting.draw(rng, 32),
        "B": rewriting.draw(rng, 32, 20),
    }
    tensors["B"][[4, 9]] = 0
    body = "a = MatMul(x, A) b = Add(a, c) g = Tanh(b) y = MatMul(g, B)"
    proto = rewriting.model(body, "float[N,5,20] x", "float[N,5,20] y", tensors)
    made = without(proto, {"A": [4, 9]})
    alike(proto, made, {"x": rewriting.draw(rng, 2, 5, 20)})
    assert shapes_in(made)["c"] == (30,)


UNTOUCHABLE = {
    "a residual join": ("h = Conv(x, A) r = Relu(h) j = Add(r, x) y = Conv(j, B)", {}),
    "an output on the way": ("z = Conv(x, A) r = Relu(z) y = Conv(r, B)", {}),
    "a softmax over channels": ("h = Conv(x, A) r = Softmax<axis=1>(h) y = Conv(r, B)", {}),
    "groups": ("h = Conv(x, A) y = Conv<group=2>(h, G)", {"G": (32, 8, 3, 3)}),
    "a producer in groups": ("h = Conv<group=2>(x, G) y = Conv(h, B)", {"G": (16, 8, 3, 3)}),
    "a weight read twice": ("h = Conv(x, A) r = Conv<pads=[1,1,1,1]>(h, A) y = Conv(r, B)", {}),
    "a transposition": ("h = Conv(x, A) t = Transpose<perm=[0,2,3,1]>(h) y = MatMul(t, M)", {"M": (16, 32)}),
    "a reduction over channels": (
        "h = Conv(x, A) r = ReduceMean<axes=[1]>(h) j = Mul(h, r) y = Conv(j, B)",
        {},
    ),
    "a concat along space": ("h = Conv(x, A) j = Concat<axis=2>(h, h) y = Conv(j, B)", {}),
    "an operator of another domain": ("h = Conv(x, A) r = other.Relu(h) y = Conv(r, B)", {}),
}


@pytest.mark.parametrize("kind", UNTOUCHABLE)
def test_chains_that_are_not_understood_stay(kind):
    body, shapes = UNTOUCHABLE[kind]
    rng = np.random.default_rng(0)
    tensors = {"A": rewriting.draw(rng, 16, 16, 3, 3), "B": rewriting.draw(rng, 32, 16, 3, 3)}
    tensors |= {n: rewriting.draw(rng, *s) for n, s in shapes.items()}
    tensors = {n: t for n, t in tensors.items() if f", {n})" in body}
    outputs = "float[N,?,?,?] y" + (", float[N,?,?,?] z" if kind == "an output on the way" else "")
    proto = rewriting.model(body, "float[N,16,10,10] x", outputs, tensors)
    proto.opset_import.append(onnx.helper.make_opsetid("other", 1))
    model = model_file.read(proto)
    found = weights.find(model.ir)
    assert channels.chains(found, channels.shapes_of(proto)) == ()


@pytest.mark.parametrize("left_out", ["A", "D", "B"])
def test_weights_that_may_not_change_keep_their_channels(left_out):
    rng = np.random.default_rng(0)
    tensors = {"A": rewriting.draw(rng, 32, 16, 3, 3), "D": rewriting.draw(rng, 32, 1, 3, 3)}
    tensors["B"] = rewriting.draw(rng, 32, 32, 1, 1)
    proto = rewriting.model(
        "h = Conv(x, A) d = Conv<group=32>(h, D) y = Conv(d, B)",
        "float[N,16,10,10] x",
        "float[N,32,6,6] y",
        tensors,
    )
    _, found, shapes, _ = opened(proto)
    assert [c.weight for c in channels.chains(found, shapes)] == ["A"]
    for chosen in (weights.select(found, (), (left_out,)), weights.select(found, ("A", "B"), ())):
        assert channels.chains(chosen, shapes) == ()


def test_constants_that_others_read_are_copied():
    rng = np.random.default_rng(0)
    tensors = {"A": rewriting.draw(rng, C, 8, 3, 3), "b": rewriting.draw(rng, C)}
    tensors |= {"B": rewriting.draw(rng, C, C, 3, 3), "E": rewriting.draw(rng, 24, C, 3, 3)}
    tensors["B"][:, 2] = 0
    body = "h = Conv(x, A, b) k = Conv(h, B, b) y = Conv(k, E) "
    proto = rewriting.model(body, "float[N,8,12,12] x", "float[N,24,6,6] y", {n: tensors[n] for n in "AbBE"})
    made = without(proto, {"A": [2]})
    alike(proto, made, {"x": rewriting.draw(rng, 2, 8, 12, 12)})


# What is chosen


def moments(rng, rows, inputs):
    mixed = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs))
    return mixed.T @ mixed / rows


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), tap=st.sampled_from([1, 4]), count=st.integers(1, 5))
def test_elimination_is_the_least_squares_fit_of_what_is_left(seed, tap, count):
    rng = np.random.default_rng(seed)
    inputs = 8 * tap
    h, w = moments(rng, 200, inputs), rng.standard_normal((inputs, 5))
    rows = np.arange(inputs).reshape(8, tap)
    patient = surgeon.Patient.of(w, h, 0.1, rows)
    gone = rng.choice(8, count, replace=False)
    foreseen = patient.loss(gone)
    for channel in gone:
        patient.drop(np.array([channel]))
    damped = h + 0.1 * np.trace(h) / inputs * np.eye(inputs)
    kept = np.setdiff1d(np.arange(inputs), rows[gone].reshape(-1))
    best = np.zeros_like(w)
    best[kept] = np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ w)
    rounding = 4 * inputs * np.finfo(float).eps * np.linalg.cond(damped)
    np.testing.assert_allclose(patient.w, best, rtol=0, atol=rounding * np.abs(w).max())
    lost = np.trace((w - best).T @ damped @ (w - best)) / np.trace(w.T @ h @ w)
    assert foreseen == pytest.approx(lost, rel=rounding)


def test_of_two_equal_channels_one_goes_and_the_other_takes_its_part():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6))
    x[:, 4] = x[:, 1]
    w = rng.standard_normal((6, 3))
    patient = surgeon.Patient.of(w, x.T @ x / 500, 1e-9, np.arange(6)[:, None])
    owners = np.zeros(6, int)
    (gone,) = surgeon.eliminate([patient], np.full(6, 1 / 6), owners, [5], [1e-3])
    assert gone.sum() == 1 and (gone[1] or gone[4])
    taken = 4 if gone[1] else 1
    # the ridge, 1e-9 of the mean diagonal, draws weights to zero by as much of them over the least eigenvalue
    rest = np.delete(x, 4, axis=1)
    bound = 1e-9 * np.linalg.cond(rest.T @ rest) * np.linalg.norm(w)
    np.testing.assert_allclose(patient.w[taken], w[1] + w[4], rtol=0, atol=bound)


def chained(seed=0, twins=4, dead=3):
    """A small network of which some inner channels are constant, and some the same twice."""
    rng = np.random.default_rng(seed)
    a, b = rewriting.draw(rng, 32, 8, 3, 3), rewriting.draw(rng, 32, 32, 3, 3) / np.float32(17)
    c = rewriting.draw(rng, 32) * np.float32(0.1)
    a[:dead] = 0
    a[8 : 8 + twins], c[8 : 8 + twins] = a[16 : 16 + twins], c[16 : 16 + twins]
    tensors = {"A": a, "c": c, "B": b, "d": rewriting.draw(rng, 32), "E": rewriting.draw(rng, 10, 32)}
    body = """h = Conv(x, A, c) r = Relu(h) k = Conv(r, B, d) s = Relu(k) p = GlobalAveragePool(s)
        f = Flatten(p) y = Gemm<transB=1>(f, E)"""
    return rewriting.model(body, "float[N,8,12,12] x", "float[N,10] y", tensors)


def pruner(proto, samples=32):
    _, found, shapes, network = opened(proto)
    x = rewriting.draw(np.random.default_rng(7), samples, 8, 12, 12)
    probes = Probes(({"x": x},), samples, 0, "", {"x": 0}, True)
    return Pruner(network, found, probes, channels.chains(found, shapes), seed=0, progress=silent), network


def test_constant_and_equal_channels_go_first_and_cost_nothing(monkeypatch):
    # take the probes at their word, but for what float32 rounds: 288 inputs, 1.2e-7 of the diagonal each
    monkeypatch.setattr(pruning, "DAMPING", (288 * 2.0**-23, 0.0))
    proto = chained()
    mine, _ = pruner(proto)
    (fit,) = mine.candidates([1e-4])
    gone = set(fit.dropped["A"])
    assert {0, 1, 2} <= gone and len(gone) == 7
    for pair in zip(range(8, 12), range(16, 20), strict=True):
        assert len(gone & set(pair)) == 1
    again = mine.fitted(fit.dropped)
    made = without(proto, again.dropped, again.tensors, again.shifts)
    feed = {"x": rewriting.draw(np.random.default_rng(3), 4, 8, 12, 12)}
    (a,), (b,) = rewriting.run(proto, feed), rewriting.run(made, feed)
    assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(a - a.mean(0))


def test_merging_repairs_what_dropping_alone_loses():
    proto = chained(twins=8)
    mine, _ = pruner(proto)
    dropped = {"A": tuple(range(8, 16))}
    fit = mine.fitted(dropped)
    merged = without(proto, fit.dropped, fit.tensors, fit.shifts)
    bare = without(proto, dropped)
    feed = {"x": rewriting.draw(np.random.default_rng(3), 8, 8, 12, 12)}
    (a,), (b,), (c,) = (rewriting.run(p, feed) for p in (proto, merged, bare))
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a - c)


def test_dead_channels_are_those_that_give_nothing_and_nothing_changes_without_them():
    proto = chained(dead=8)
    mine, _ = pruner(proto, pruning.ENOUGH)
    dropped = mine.dead()
    assert dropped == {"A": tuple(range(8))}
    fit = mine.fitted(dropped)
    feed = {"x": rewriting.draw(np.random.default_rng(3), 8, 8, 12, 12)}
    (a,), (b,) = (
        rewriting.run(proto, feed),
        rewriting.run(without(proto, dropped, fit.tensors, fit.shifts), feed),
    )
    # the least squares are solved in float64 from sums of 32 channels x 9 taps in float32
    assert np.linalg.norm(a - b) <= 32 * 9 * EPS32 * np.linalg.norm(a)


@pytest.mark.parametrize(("dead", "gone"), [(3, 0), (4, 4), (7, 4), (11, 8)])
def test_channels_left_are_as_many_as_a_blocked_layout_takes(dead, gone):
    mine, _ = pruner(chained(twins=0, dead=dead), pruning.ENOUGH)
    assert mine.dead() == ({"A": tuple(range(gone))} if gone else {})


def test_channels_that_are_only_quiet_are_not_dead():
    """Where many give next to nothing, those that give nothing may be silent on these probes only."""
    proto = chained(dead=8)
    weight, bias = (numpy_helper.to_array(i).copy() for i in proto.graph.initializer[:2])
    weight[6:9] *= 1e-3
    bias[6:9] = 0
    for place, array in ((0, weight), (1, bias)):
        name = proto.graph.initializer[place].name
        proto.graph.initializer[place].CopyFrom(numpy_helper.from_array(array, name))
    mine, _ = pruner(proto, pruning.ENOUGH)
    assert mine.dead() == {}


def test_few_inputs_do_not_show_what_is_dead():
    mine, _ = pruner(chained(dead=8), pruning.ENOUGH - 1)
    assert mine.dead() == {}


def test_units_of_an_mlp_are_not_dead_because_probes_miss_them(tmp_path):
    """With biases far below 0 noise wakes no unit, and real rows would."""
    rng = np.random.default_rng(1)
    tensors = {"A": rewriting.draw(rng, 64, 256), "a": np.full(256, -40, np.float32)}
    tensors |= {"B": rewriting.draw(rng, 256, 16)}
    proto = rewriting.model(
        "h = Gemm(x, A, a) r = Relu(h) y = MatMul(r, B)", "float[N,64] x", "float[N,16] y", tensors
    )
    assert onnxdp.plan(proto, **PRUNED).pruned == ()


def test_asking_for_less_takes_the_dead_ones_too():
    unasked, asked = (onnxdp.plan(chained(dead=8), **PRUNED, prune=p).pruned for p in (None, True))
    assert sum(len(p.channels) for p in asked) >= sum(len(p.channels) for p in unasked) >= 8


def test_operations_are_counted_from_the_original():
    made = onnxdp.compress(chained(dead=16), **PRUNED, macs=2).report
    whole = sum(int(np.prod(s)) * n for s, n in (((32, 8, 3, 3), 100), ((32, 32, 3, 3), 64), ((10, 32), 1)))
    assert made.macs.before == whole >= 2 * made.macs.after


# The whole way


PRUNED = {"ratio": 8, "samples": 128}


def test_a_plan_carries_the_channels_and_gives_the_same_file(tmp_path):
    proto = chained(dead=8)
    made = onnxdp.compress(proto, tmp_path / "a.onnx", **PRUNED)
    (pruned,) = [p for p in made.report.plan.pruned if p.weight == "A"]
    assert set(range(8)) <= set(pruned.channels)
    assert any("--no-prune" in n for n in made.report.notices)
    plan = onnxdp.Plan.from_json(made.report.plan.to_json())
    assert plan == made.report.plan
    applied = onnxdp.apply(proto, plan, tmp_path / "b.onnx")
    assert applied.report.target.sha256 == made.report.target.sha256
    assert made.report.source.sha256 == model_file.read(proto).sha256
    before = {line.weight: line.before for line in made.report.lines}
    assert before["A"] == numpy_helper.to_array(proto.graph.initializer[0]).nbytes


def test_an_edited_plan_is_followed_or_refused():
    proto = chained(dead=8)
    plan = onnxdp.plan(proto, **PRUNED)
    plan = replace(plan, budget=None)  # with more channels left the file is larger
    edited = replace(plan, pruned=(onnxdp.records.Pruned("A", (0, 30)),))
    made = onnxdp.apply(proto, edited).report
    assert made.plan.pruned == edited.pruned
    assert any("2 went" in n for n in made.notices)
    assert not [n for n in onnxdp.apply(proto, replace(plan, pruned=())).report.notices if "prune" in n]
    for weight, gone in (("E", (1,)), ("A", (32,)), ("A", (1, 1)), ("A", (2, 1)), ("A", tuple(range(31)))):
        with pytest.raises(onnxdp.errors.PlanError):
            onnxdp.apply(proto, replace(plan, pruned=(onnxdp.records.Pruned(weight, gone),)))
    text = json.loads(plan.to_json())
    text["pruned"][0]["channels"] = ["1"]
    with pytest.raises(onnxdp.errors.PlanError, match="channels"):
        onnxdp.Plan.from_json(json.dumps(text))


def test_channels_stay_where_it_is_said_or_the_method_knows_no_rounding():
    proto = chained(dead=8)
    for options in ({"prune": False}, {"method": "dp"}, {"method": "float16"}):
        given = {**PRUNED, **options} | ({} if "prune" in options else {"ratio": 1.5})
        assert onnxdp.plan(proto, **given).pruned == ()
    with pytest.raises(onnxdp.errors.UsageError, match="--prune"):
        onnxdp.Settings(prune=True, method="dp")


def test_within_an_error_only_what_costs_next_to_nothing_goes():
    made = onnxdp.compress(chained(dead=8), max_error=0.05, samples=128).report
    assert set(range(8)) <= set(made.plan.pruned[0].channels)
    assert made.verification.error <= 0.05


def test_a_sweep_gives_the_files_of_compress():
    proto = chained(dead=8)
    points = onnxdp.sweep(proto, [2, 8], samples=128).points
    for point in points:
        made = onnxdp.compress(proto, ratio=point.asked, samples=128)
        assert made.report.target.sha256 == point.sha256


def test_the_command_line_knows_both_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edges.save(chained(dead=8))
    for word, pruned in (("--prune", True), ("--no-prune", False)):
        result = edges.onnxdp("plan", "in.onnx", "--ratio", "8", "--samples", "128", word, "--json")
        assert result.exit_code == 0
        assert bool(json.loads(result.stdout)["pruned"]) == pruned


def test_rows_are_those_that_a_channel_feeds():
    proto = into_gemm("flatten", turned=0)
    _, found, shapes, network = opened(proto)
    (chain,) = channels.chains(found, shapes)
    weight = next(w for w in found.weights if w.name == "B")
    x = rewriting.draw(np.random.default_rng(0), 2, 8, 8, 8)
    stream = Stream(network, Probes(({"x": x},), 2, 0, "", {"x": 0}, True))
    tap = stats.single_tap(found, weight)
    stream.advance(network.place(tap.output), {})
    seen = stats.sampled(stream, weight, tap, 2, 0)[0]
    z = rewriting.run(_ending_at(proto, "z"), {"x": x})[0]
    rows = chain.ends[0].span.places([5])[0]
    bound = 64 * np.finfo(np.float32).eps * np.abs(z).max()  # sums of some dozen products, as in `alike`
    np.testing.assert_allclose(
        np.sort(seen[:, rows], 0), np.sort(z[:, 5].reshape(2, -1), 0), rtol=0, atol=bound
    )


def _ending_at(proto, name):
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    del made.graph.output[:]
    made.graph.output.append(onnx.ValueInfoProto(name=name))
    return made


def test_a_compressed_network_runs_on_the_kernels_that_the_original_does(shared, tmp_path):
    """Convs of 14 or 61 channels are not laid out in blocks and take 1.2 times as long in all."""
    path, out = shared / "models" / "cifar10_resnet20.onnx", tmp_path / "out.onnx"
    onnxdp.compress(path, out, ratio=8, samples=128)
    assert kernels(out, tmp_path) == kernels(path, tmp_path)


def kernels(path, folder):
    """Name what ONNX Runtime runs, with the shapes of its constants."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "kept.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "kept.onnx").graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    return [(n.domain, n.op_type, tuple(shapes.get(i, ()) for i in n.input)) for n in graph.node]
