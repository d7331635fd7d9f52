"""What a network draws is the same in every run where runs are compared, and nowhere else."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from edges import decaying, onnxdp, parsed, save

from onnxdp import noise


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
