"""What a network draws is the same in every run where runs are compared, and nowhere else."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from edges import decaying, onnxdp, parsed, save

from onnxdp import noise

ZEROS = np.zeros((50, 40), np.float32)


def answers(model, x):
    made = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [made.run(None, {"x": x})[0] for _ in range(2)]


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize(
    ("drawing", "mean", "deviation"),
    [
        ("RandomNormalLike <mean = 2.0, scale = 3.0> (x)", 2, 3),
        ("RandomUniformLike <low = -1.0, high = 5.0> (x)", 2, 3**0.5),
        ("RandomNormal <shape = [50, 40], dtype = 1> ()", 0, 1),
        ("RandomUniform <shape = [50, 40], dtype = 1, seed = 4.0> ()", 0.5, 12**-0.5),
    ],
)
def test_what_is_drawn_becomes_the_same_numbers_of_that_mean_and_deviation(drawing, mean, deviation, opset):
    text = f"""<ir_version: 6, opset_import: ["" : {opset}]>
        g (float[50, 40] x) => (float[50, 40] y) {{ d = {drawing} y = Identity (d) }}"""
    model, x = parsed(text), np.zeros((50, 40), np.float32)
    assert noise.draws(model)
    first, second = answers(model, x)
    assert not np.array_equal(first, second)
    noise.settle(model)
    onnx.checker.check_model(model)
    assert not noise.draws(model)
    first, second = answers(model, x)
    assert np.array_equal(first, second)
    assert abs(first.mean() - mean) < 4 * deviation / 2000**0.5
    assert abs(first.std() - deviation) < 0.1 * deviation
    assert len(np.unique(first)) > 1900


def drawing(body: str, kind: str = "float", opset: int = 17, **initializers):
    text = f"g ({kind}[50, 40] x) => ({kind}[50, 40] y) {{ {body} }}"
    model = parsed(f'<ir_version: 7, opset_import: ["" : {opset}]> {text}', **initializers)
    noise.settle(model)
    return model


@pytest.mark.parametrize("kind", ["float", "double", "float16"])
def test_the_type_is_that_of_what_is_drawn_like(kind):
    """CastLike is of opset 15: before it the type has to be known."""
    dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
    for opset in (13, 17):
        model = drawing("r = Relu (x) d = RandomNormalLike (r) y = Add (r, d)", kind, opset)
        assert not noise.draws(model)
        first, second = answers(model, np.zeros((50, 40), dtype))
        assert first.dtype == dtype and np.array_equal(first, second) and first.std() > 0.9


def test_two_draws_differ_and_their_logarithm_is_finite():
    y, _ = answers(drawing("u = RandomUniformLike (x) v = RandomUniformLike (x) y = Sub (u, v)"), ZEROS)
    assert y.std() > 0.3 and abs(np.corrcoef(y[:-1].ravel(), y[1:].ravel())[0, 1]) < 0.2
    y, _ = answers(drawing("u = RandomUniformLike (x) l = Log (u) n = Neg (l) y = Log (n)"), ZEROS)
    assert np.isfinite(y).all()


def test_yes_is_drawn_as_often_as_it_is_likely():
    model = drawing("y = Bernoulli (x)")
    assert not noise.draws(model)
    likely = np.repeat(np.float32([0, 0.2, 0.7, 1, 0.5]), 400).reshape(50, 40)
    first, second = answers(model, likely)
    assert np.array_equal(first, second) and set(np.unique(first)) == {0, 1}
    np.testing.assert_allclose(first.reshape(5, 400).mean(axis=1), [0, 0.2, 0.7, 1, 0.5], atol=0.1)


def test_what_is_no_draw_that_onnx_knows_is_left_to_onnx_runtime():
    """No attribute to work with, a name taken, an operator of somebody else's."""
    for body in (
        "y = RandomUniform ()",
        "y = RandomUniform <shape = [1099511627776, 4]> ()",
        "y = RandomNormalLike ()",
    ):
        assert noise.draws(drawing(body))
    model = drawing("d = RandomNormalLike (x) y = Add (d, taken)", taken=ZEROS)
    model.graph.initializer[0].name = model.graph.node[-1].input[1] = "d/0"
    answers(model, ZEROS)
    other = onnx.helper.make_node("RandomNormalLike", ["x"], ["y"], domain="mine")
    graph = onnx.helper.make_graph([other], "g", [], [])
    assert not noise.draws(onnx.helper.make_model(graph))


def test_functions_draw_the_same_numbers_too():
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[50, 40] x) => (float[50, 40] y) { y = own.noisy (x) }
        <domain: "own", opset_import: ["" : 17]>
        noisy (a) => (b) { d = RandomNormalLike (a) b = Add (a, d) }"""
    )
    noise.settle(model)
    assert not noise.draws(model)
    first, second = answers(model, ZEROS)
    assert np.array_equal(first, second) and first.std() > 0.9


def test_a_body_draws_the_same_numbers_in_every_run():
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[3, 8] x) => (float[3, 8] y) {
          y = If (yes) <
            then_branch = a () => (float[3, 8] p) { p = RandomNormalLike (x) },
            else_branch = b () => (float[3, 8] q) { q = Identity (x) }
          >
        }""",
        yes=np.array(True),
    )
    assert noise.draws(model)
    noise.settle(model)
    assert not noise.draws(model)
    first, second = answers(model, np.zeros((3, 8), np.float32))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("words", [("--ratio", "3"), ("--max-error", "0.05")], ids=" ".join)
def test_a_network_that_draws_is_compared_under_the_same_draws_and_goes_on_drawing(
    tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        autoencoder (float[N, 32] x) => (float[N, 32] y) {
          a = MatMul (x, w1)
          r = Relu (a)
          mean = MatMul (r, w2)
          deviation = MatMul (r, w3)
          drawn = RandomNormalLike (mean)
          apart = Mul (deviation, drawn)
          z = Add (mean, apart)
          h = MatMul (z, w4)
          y = Tanh (h)
        }""",
        w1=decaying(32, 64, 1),
        w2=decaying(64, 24, 2),
        w3=decaying(64, 24, 3),
        w4=decaying(24, 32, 4),
    )
    save(model)
    done = onnxdp("compress", "in.onnx", "out.onnx", *words, "--samples", "8", "--json")
    assert done.exit_code == 0, done.stderr
    assert 0 < json.loads(done.stdout)["verification"]["outputs"][0]["relative"] < 0.1
    again = onnxdp("verify", "in.onnx", "out.onnx", "--tolerance", "0.1")
    assert again.exit_code == 0, again.stdout + again.stderr
    made = onnx.load("out.onnx")
    assert [n.op_type for n in made.graph.node].count("RandomNormalLike") == 1
    first, second = answers(made, np.ones((2, 32), np.float32))
    assert not np.array_equal(first, second)
