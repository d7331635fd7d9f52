"""The passes alone: what each changes, and what it says about it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
import rewriting
from rewriting import draw, model, pair, rewrite, run

import onnxdp
from onnxdp import model as model_file
from onnxdp import weights
from onnxdp.build import Builder, Paper
from onnxdp.passes import FreezeInitializers, LiftWeights, ReplaceWeights

RNG = np.random.default_rng(6)


def both_inputs(version: int) -> ir.Model:
    proto = model(
        "a = MatMul(x, W) y = Add(a, b)", "float[N,9] x, float[9,9] W, float[9] b", "float[N,9] y",
        {"W": draw(RNG, 9, 9), "b": draw(RNG, 9)}, ir=version, opset=9,
    )  # fmt: skip
    return model_file.read(proto).ir


@pytest.mark.parametrize(
    ("version", "told", "frozen"), [(3, False, True), (8, False, False), (8, True, True)]
)
def test_freezing(version, told, frozen):
    held = both_inputs(version)
    result = FreezeInitializers(fed_too=told)(held)
    assert result.modified == frozen
    assert [v.name for v in held.graph.inputs] == (["x"] if frozen else ["x", "W", "b"])
    assert held.ir_version == max(version, 4)
    assert set(held.graph.initializers) == {"W", "b"}
    assert not FreezeInitializers(fed_too=told)(held).modified


@pytest.mark.parametrize("constant", [True, False])
def test_a_lifted_weight_can_be_fed(constant):
    tensors = {"W": draw(RNG, 8, 4, 3, 3)}
    proto = model(
        "y = Conv(x, W)", "float[N,4,6,6] x", "float[N,8,4,4] y", tensors, constants=["W"] if constant else []
    )
    held, found = rewriting.find(proto)
    (reader,) = found.readers["W"]
    LiftWeights({"W": found.values["W"]}, {"W/bias": reader.node})(held.ir)
    lifted = model_file.serialize(held)
    assert [v.name for v in lifted.graph.input] == ["x", "W/bias", "W"]
    assert not lifted.graph.initializer and [n.op_type for n in lifted.graph.node] == ["Conv"]
    x, other, bias = draw(RNG, 2, 4, 6, 6), draw(RNG, 8, 4, 3, 3), draw(RNG, 8)
    (got,) = run(lifted, {"x": x, "W": other, "W/bias": bias})
    (wanted,) = run(rewriting.with_tensors(proto, {"W": other}), {"x": x})
    (most,) = run(rewriting.with_tensors(proto, {"W": np.abs(other)}), {"x": np.abs(x)})
    assert np.all(
        np.abs(got - bias[:, None, None] - wanted) <= 2.0**-23 * 38 * (most + np.abs(bias)[:, None, None])
    )


def test_replacing_nothing_changes_nothing():
    proto = model("y = MatMul(x, W)", "float[N,9] x", "float[N,9] y", {"W": draw(RNG, 9, 9)})
    held, found = rewriting.find(proto)
    before = model_file.serialize(held)
    assert not ReplaceWeights(found, [], rewriting.FORMS, {}, "test")(held.ir).modified
    assert model_file.serialize(held) == before


def test_names_that_are_taken_get_a_number():
    tensors = {"W": draw(RNG, 9, 9), "W_": draw(RNG, 9, 9)}
    proto = model("a = MatMul(x, W) y = MatMul(a, W_)", "float[N,9] x", "float[N,9] y", tensors)
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "W.atoms"
    proto.graph.node[0].name = "W.codes"
    made = rewrite(proto, {"W": pair(2)})
    assert [t.name for t in made.proto.graph.initializer][-2:] == ["W.atoms.2", "W.codes.2"]
    made.assert_equals_dense({"x": draw(RNG, 3, 9)})


def test_a_mean_that_two_normalisations_read_changes_for_one():
    tensors = {"W": draw(RNG, 8, 4, 1, 1), "s": np.ones(8, np.float32), "b": draw(RNG, 8), "m": draw(RNG, 8)}
    tensors |= {"v": np.ones(8, np.float32)}
    body = "c = Conv(x, W) p = BatchNormalization(c, s, b, m, v) y = BatchNormalization(p, s, b, m, v)"
    proto = model(body, "float[N,4,5,5] x", "float[N,8,5,5] y", tensors)
    made = rewrite(proto, {"W": pair(2)}, {"W": np.arange(8, dtype=np.float32)})
    held = {t.name: onnx.numpy_helper.to_array(t) for t in made.proto.graph.initializer}
    assert np.array_equal(held["m"], tensors["m"])
    assert np.array_equal(held["W.mean"], (tensors["m"].astype(np.float64) - np.arange(8)).astype(np.float32))


@pytest.mark.parametrize("why", ["two_readers", "graph_output", "training"])
def test_where_no_normalisation_takes_it_up_the_conv_gets_a_bias(why):
    tensors = {"W": draw(RNG, 8, 4, 1, 1), "s": np.ones(8, np.float32), "b": draw(RNG, 8), "m": draw(RNG, 8)}
    tensors |= {"v": np.ones(8, np.float32)}
    body, outputs = "c = Conv(x, W) y = BatchNormalization(c, s, b, m, v)", "float[N,8,5,5] y"
    if why == "two_readers":
        body += " z = Relu(c)"
        outputs += ", float[N,8,5,5] z"
    if why == "graph_output":
        outputs += ", float[N,8,5,5] c"
    if why == "training":
        body = body.replace("y = BatchNormalization", "y, n, w = BatchNormalization<training_mode = 1>")
    proto = model(body, "float[N,4,5,5] x", outputs, tensors)
    made = rewrite(proto, {"W": pair(2)}, {"W": np.arange(8, dtype=np.float32)})
    held = {t.name: onnx.numpy_helper.to_array(t) for t in made.proto.graph.initializer}
    assert np.array_equal(held["m"], tensors["m"]) and np.array_equal(held["W.bias"], np.arange(8))


def test_the_pencil_draws_what_is_shared_once():
    held = model_file.read(model("y = Relu(x)", "float[N,9] x", "float[N,9] y", {})).ir
    paper = Paper(held)
    first, second = (Builder(held.graph, name, paper) for name in "VW")
    half = np.zeros((2, 2), np.float16)
    assert first.constant("atoms", half, "V.shared") is second.constant("atoms", half, "V.shared")
    assert first.ints([2, 2]) is second.ints([2, 2]) and first.ints([4]) is not first.ints([2, 2])
    atoms = first.constant("atoms", half, "V.shared")
    assert first.cast(atoms, "float16", "cast") is atoms
    assert first.cast(atoms, "float32", "cast") is second.cast(atoms, "float32", "cast")
    paper.finish()
    assert [n.op_type for n in held.graph] == ["Cast", "Relu"]  # what decodes comes first


# ---- models as objects


def surgeon_graph() -> gs.Graph:
    rng = np.random.default_rng(1)
    x = gs.Variable("x", np.float32, ["N", 64])
    a, r, y = (gs.Variable(n, np.float32, ["N", 64]) for n in "ary")
    first, second = (gs.Constant(n, draw(rng, 64, 6) @ draw(rng, 6, 64)) for n in ("first", "second"))
    nodes = [
        gs.Node("MatMul", "one", inputs=[x, first], outputs=[a]),
        gs.Node("Relu", "two", inputs=[a], outputs=[r]),
        gs.Node("MatMul", "three", inputs=[r, second], outputs=[y]),
    ]
    return gs.Graph(nodes, [x], [y], name="surgery", opset=17)


def test_a_surgeon_graph_goes_in_and_one_that_runs_comes_back():
    graph = surgeon_graph()
    result = onnxdp.compress(graph, ratio=4)
    assert isinstance(result.model, gs.Graph)
    proto, source = gs.export_onnx(result.model), gs.export_onnx(graph)
    proto.ir_version = source.ir_version = 8
    assert proto.ByteSize() <= source.ByteSize() / 3.9  # exporting anew writes a few bytes more
    x = draw(RNG, 5, 64)
    (got,), (wanted,) = run(proto, {"x": x}), run(source, {"x": x})
    # weights of rank 6 stand in 6 atoms and float16 factors: what is left is their rounding, twice
    assert np.linalg.norm(got - wanted) <= 4 * 2.0**-11 * np.linalg.norm(wanted)
    assert {n.name for n in graph.nodes} == {"one", "two", "three"}  # what was given is not changed
    assert {"one", "two", "three"} <= {n.name for n in result.model.nodes}


def test_an_ir_model_goes_in_and_one_comes_back():
    proto = gs.export_onnx(surgeon_graph())
    proto.ir_version = 8
    given = ir.from_proto(proto)
    before = ir.to_proto(given).SerializeToString(deterministic=True)
    result = onnxdp.compress(given, ratio=4)
    assert isinstance(result.model, ir.Model)
    assert ir.to_proto(given).SerializeToString(deterministic=True) == before
    same = onnxdp.compress(proto, ratio=4).model
    x = draw(RNG, 5, 64)
    assert np.array_equal(run(ir.to_proto(result.model), {"x": x})[0], run(same, {"x": x})[0])


def test_a_weight_read_as_is_and_through_a_cast():
    proto = model(
        "h = Cast<to = 1>(W) a = MatMul(x, h) w = Cast<to = 1>(W) y = MatMul(a, w)",
        "float[N,9] x", "float[N,9] y",
        {"W": draw(RNG, 9, 9, dtype="float16")},
    )  # fmt: skip
    _, found = rewriting.find(proto)
    assert len(found.readers["W"]) == 2 and found.weights[0].dtype == "float16"
    assert weights.tensor_of(found, "W").dtype == np.float32
    made = rewrite(proto, {"W": pair(3)})
    got, wanted = (run(p, {"x": np.eye(9, dtype=np.float32)})[0] for p in (made.proto, made.dense()))
    assert np.abs(got - wanted).max() <= 2.0**-9 * np.abs(made.decoded(np.abs)["W"]).max() ** 2 * 9
