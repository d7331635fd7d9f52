"""Normalisation that goes into the Conv before it: the same answers, and only where nobody would notice."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import rewriting
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from rewriting import branching, draw, model, run

import onnxdp
from onnxdp import model as model_file
from onnxdp import preparation, weights
from onnxdp.passes import FoldNormalisation

EPS32 = 2.0**-23
FOUR = ("scale", "shift", "mean", "var")
NORM = "BatchNormalization"


def four(rng, channels):
    return {n: draw(rng, channels) for n in FOUR[:3]} | {"var": draw(rng, channels) ** 2}


def normalised(body, tensors, *, inputs="float[N,4,6,6] x", outputs="float[N,?,?,?] y", **more):
    return model(body, inputs, outputs, tensors, **more)


def folded(proto, spared=()):
    held = model_file.read(proto)
    found = weights.find(held.ir)
    fold = FoldNormalisation({found.values[n] for n in spared})
    modified = fold(held.ir).modified
    made = model_file.serialize(held)
    assert modified == (fold.folded > 0)
    assert modified or made == model_file.serialize(model_file.read(proto))
    return made, fold.folded


def magnitudes(proto):
    """The model with every number's magnitude, what is subtracted turned: what rounding errors grow with."""
    held = {t.name or "": numpy_helper.to_array(t) for t in rewriting.tensors_of(proto)}
    return rewriting.with_tensors(
        proto, {n: -np.abs(a) if n == "mean" else np.abs(a) for n, a in held.items() if a.dtype == np.float32}
    )


@given(
    shape=st.sampled_from([(6, 4, 3, 3), (6, 4, 1, 1), (8, 1, 3, 3), (6, 2, 2, 2)]),
    biased=st.booleans(),
    epsilon=st.sampled_from([None, 1e-3, 0.1]),
    passed_on=st.booleans(),
    opset=st.sampled_from([7, 9, 13, 15, 17]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_answers_stay(shape, biased, epsilon, passed_on, opset, seed):
    rng = np.random.default_rng(seed)
    tensors = {"W": draw(rng, *shape)} | ({"b": draw(rng, shape[0])} if biased else {}) | four(rng, shape[0])
    group = 4 // shape[1]
    told = "" if epsilon is None else f"<epsilon = {epsilon}>"
    body = f"c = Conv<group = {group}>(x, W{', b' if biased else ''})"
    body += f" n = {NORM}{told}(c, {'again' if passed_on else 'scale'}, shift, mean, var) y = Relu(n)"
    proto = normalised(("again = Identity(scale) " if passed_on else "") + body, tensors, opset=opset)
    made, count = folded(proto)
    assert count == 1
    assert [n.op_type for n in made.graph.node] == ["Conv", "Relu"]
    assert {t.name for t in made.graph.initializer} == {"W", "W.bias"}
    onnx.checker.check_model(made, full_check=True)
    x = draw(rng, 2, 4, 6, 6)
    (got,), (wanted,) = run(made, {"x": x}), run(proto, {"x": x})
    (most,) = run(magnitudes(proto), {"x": np.abs(x)})
    terms = int(np.prod(shape[1:])) + 8
    assert np.all(np.abs(got - wanted) <= EPS32 * terms * most)


BODY = f"c = Conv(x, W) n = {NORM}(c, scale, shift, mean, var) y = Relu(n)"
REASONS = {
    "another reader of the Conv": (BODY + " z = Relu(c)", ", float[N,?,?,?] z"),
    "the Conv is an output": (BODY, ", float[N,?,?,?] c"),
    "training": (BODY.replace(f"n = {NORM}", f"n, m2, v2 = {NORM}<training_mode = 1>"), ""),
    "a weight of two": (BODY + " z = Conv(x, W)", ", float[N,?,?,?] z"),
    "a weight that is made": (f"V = Neg(W) {BODY.replace('x, W', 'x, V')}", ""),
    "no Conv": (BODY.replace("Conv(x, W)", "Relu(x)"), ""),
    "something between": (BODY.replace("c = Conv(x, W)", "a = Conv(x, W) c = Abs(a)"), ""),
}


@pytest.mark.parametrize("why", REASONS)
def test_what_could_be_noticed_stays(why):
    body, more = REASONS[why]
    rng = np.random.default_rng(1)
    channels = 4 if why == "no Conv" else 6
    tensors = {"W": draw(rng, 6, 4, 3, 3), **four(rng, channels)}
    assert folded(normalised(body, tensors, outputs="float[N,?,?,?] y" + more))[1] == 0


@pytest.mark.parametrize("fed", ["W", "scale", "var"])
def test_what_can_be_fed_stays(fed):
    tensors = {"W": draw(np.random.default_rng(1), 6, 4, 3, 3), **four(np.random.default_rng(1), 6)}
    shape = ",".join(map(str, tensors[fed].shape))
    inputs = f"float[N,4,6,6] x, float[{shape}] {fed}"
    assert folded(normalised(BODY, tensors, inputs=inputs))[1] == 0


def test_numbers_that_float32_does_not_hold_stay():
    tensors = {"W": draw(np.random.default_rng(1), 6, 4, 3, 3), **four(np.random.default_rng(1), 6)}
    for var in (-1.0, np.nan):
        held = {**tensors, "var": np.full(6, var, np.float32)}
        assert folded(normalised(BODY, held))[1] == 0
    assert folded(normalised(BODY, {**tensors, "scale": np.full(6, 3e38, np.float32)}))[1] == 0


def test_numbers_that_others_read_stay_for_these():
    rng = np.random.default_rng(2)
    tensors = {"W": draw(rng, 6, 4, 3, 3), "V": draw(rng, 6, 6, 1, 1), **four(rng, 6)}
    second = f" d = Conv(y, V) e = Relu(d) z = {NORM}(e, scale, shift, mean, var)"
    proto = normalised(BODY + second, tensors, outputs="float[N,?,?,?] z")
    made, count = folded(proto)
    assert count == 1 and {t.name for t in made.graph.initializer} == {"W", "W.bias", "V", *FOUR}
    x = draw(rng, 1, 4, 6, 6)
    (got,), (wanted,), (most,) = (
        run(made, {"x": x}),
        run(proto, {"x": x}),
        run(magnitudes(proto), {"x": np.abs(x)}),
    )
    assert np.all(np.abs(got - wanted) <= EPS32 * 60 * most)


def test_an_output_keeps_its_name_and_what_is_said_of_it():
    rng = np.random.default_rng(2)
    proto = normalised(
        BODY.replace("y = Relu(n)", ""),
        {"W": draw(rng, 6, 4, 3, 3), **four(rng, 6)},
        outputs="float[N,6,4,4] n",
    )
    proto.graph.output[0].doc_string = "scores"
    made, count = folded(proto)
    assert count == 1 and made.graph.output == proto.graph.output
    assert [list(n.output) for n in made.graph.node] == [["n"]]
    x = draw(rng, 1, 4, 6, 6)
    (got,), (wanted,), (most,) = (
        run(m, {"x": i}) for m, i in ((made, x), (proto, x), (magnitudes(proto), np.abs(x)))
    )
    assert np.all(np.abs(got - wanted) <= EPS32 * 44 * most)


def test_inside_the_body_of_an_if():
    rng = np.random.default_rng(3)
    inside = f"c = Conv(x, W) n = {NORM}(c, scale, shift, mean, var) p = Relu(n)"
    text = branching("float[N,6,4,4]", inside, "q = Conv(x, V)")
    tensors = {"W": draw(rng, 6, 4, 3, 3), "V": draw(rng, 6, 4, 3, 3), **four(rng, 6)}
    proto = model(text, "float[N,4,6,6] x, bool cond", "float[N,6,4,4] y", tensors)
    made, count = folded(proto)
    assert count == 1
    feed = {"x": draw(rng, 1, 4, 6, 6), "cond": np.array(True)}
    (got,), (wanted,) = run(made, feed), run(proto, feed)
    (most,) = run(magnitudes(proto), {**feed, "x": np.abs(feed["x"])})
    assert np.all(np.abs(got - wanted) <= EPS32 * 44 * most)


# ---- in a whole run


def network(opset=17):
    """Two Convs, each normalised, and a head."""
    rng = np.random.default_rng(5)
    tensors = {"A": draw(rng, 16, 3, 3, 3), "B": draw(rng, 24, 16, 3, 3), "C": draw(rng, 10, 24)}
    one, two = (tuple(f"{n}{k}" for n in FOUR) for k in (1, 2))
    for names, channels in ((one, 16), (two, 24)):
        tensors |= dict(zip(names, four(rng, channels).values(), strict=True))
    body = (
        f"a = Conv<pads=[1,1,1,1]>(x, A) an = {NORM}(a, {', '.join(one)}) ar = Relu(an)"
        f" b = Conv<pads=[1,1,1,1]>(ar, B) bn = {NORM}(b, {', '.join(two)}) br = Relu(bn)"
        " p = GlobalAveragePool(br) f = Flatten(p) y = Gemm<transB=1>(f, C)"
    )
    return model(body, "float[N,3,12,12] x", "float[N,10] y", tensors, opset=opset)


def ops(proto):
    return [n.op_type for n in proto.graph.node]


def test_rounded_weights_take_it_up():
    proto = network()
    made = onnxdp.compress(proto, ratio=3)
    assert NORM not in ops(made.model)
    assert made.report.target.nbytes <= made.report.source.nbytes / 3
    again = onnxdp.apply(proto, made.report.plan)
    assert again.model == made.model


def test_what_is_excluded_stays_with_what_normalises_it():
    made = onnxdp.compress(network(), ratio=1.4, exclude=("A",), short_names=False)
    assert ops(made.model).count(NORM) == 1
    kept = {t.name: numpy_helper.to_array(t) for t in made.model.graph.initializer}
    given_ = {t.name: numpy_helper.to_array(t) for t in network().graph.initializer}
    assert all(np.array_equal(kept[n], given_[n]) for n in ("A", *(f"{n}1" for n in FOUR)))


def test_dictionary_pairs_leave_it():
    assert ops(onnxdp.compress(network(), ratio=1.5, method="dp").model).count(NORM) == 2


def test_weights_are_what_they_were_called():
    """Nodes without a name are called by their place; those that go leave the others' be."""
    proto = network()
    held = model_file.read(proto)
    found = weights.select(weights.find(held.ir), ("Conv#3",), ())
    made, after, count = preparation.folded(held, found)
    assert count == 1 and made is not held and [w.name for w in after.weights] == ["B"]
    assert after.weights == found.weights and {k.weight for k in after.kept} >= {"A"}
    assert ops(model_file.serialize(held)).count(NORM) == 2  # what was given stays
