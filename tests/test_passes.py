"""The passes alone: what each changes, and what it says about it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
import rewriting
from hypothesis import given, settings
from rewriting import branching, draw, model, one_conv, pair, rewrite, run
from test_rewrite import convolutions

import onnxdp
from onnxdp import model as model_file
from onnxdp import probes, runtime, weights
from onnxdp.build import Builder, Paper
from onnxdp.passes import FreezeInitializers, GatherConstants, LiftWeights, ReplaceWeights, ShortenNames

RNG = np.random.default_rng(6)
SHARED = Path(os.environ.get("ONNXDP_SHARED", Path(__file__).parents[2] / "shared"))


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
    result = onnxdp.compress(graph, ratio=4, method="dp", short_names=False)
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


# ---- short names

ZOO = sorted((SHARED / "data" / "zoo").glob("*.onnx"), key=lambda p: p.stat().st_size)
SMALL = [p for p in ZOO if p.stat().st_size < 3_000_000]
REAL = [*SMALL, *sorted((SHARED / "data" / "models").glob("cifar10_resnet*.onnx"))]
DIGITS = Path(__file__).parents[1] / "models" / "digits.onnx"


def shortened(source: onnx.ModelProto | Path) -> onnx.ModelProto:
    held = model_file.read(source)
    shorten = ShortenNames(held.original_value_info)
    shorten(held.ir)
    held.original_value_info = shorten.value_info
    made = model_file.serialize(held)
    onnx.checker.check_model(made)
    return made


def assert_same_bits(before: onnx.ModelProto, after: onnx.ModelProto, samples: int = 2) -> None:
    made = probes.make(runtime.input_specs(before), samples=samples, seed=3)
    old, new = rewriting.session(before), rewriting.session(after)
    for feed in made.feeds:
        for a, b in zip(old.run(None, feed), new.run(None, feed), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def inside(proto: onnx.ModelProto) -> list[str]:
    """Names that a graph or a body defines, the outermost inputs and outputs excepted."""
    outside = {v.name for v in (*proto.graph.input, *proto.graph.output)}
    found = []
    for graph in rewriting.graphs_of(proto.graph):
        fed = {v.name for v in graph.input}
        found += [v.name for v in graph.input] + [t.name for t in graph.initializer if t.name not in fed]
        found += [o for n in graph.node for o in n.output if o]
    return [n for n in found if n not in outside]


@pytest.mark.parametrize("path", [DIGITS, *REAL], ids=lambda p: p.stem)
def test_real_models_give_the_same_bits_under_short_names(path):
    before = model_file.serialize(model_file.read(path))
    after = shortened(path)
    assert_same_bits(before, after)
    assert after.ByteSize() < before.ByteSize()
    for field in ("input", "output"):
        assert getattr(after.graph, field) == getattr(before.graph, field)
    assert after.metadata_props == before.metadata_props and after.producer_name == before.producer_name
    assert [n.op_type for n in rewriting.nodes_of(after)] == [n.op_type for n in rewriting.nodes_of(before)]
    assert not any(n.name or n.doc_string for n in rewriting.nodes_of(after))
    names = inside(after)
    assert len(names) == len(set(names)) and max(map(len, names)) <= 3
    assert shortened(after) == after  # nothing is left to shorten


def test_real_models_are_there(shared):
    assert REAL


BODIES = """
    long_sum = Add(first, weight_of_some_layer)
    chosen = If(c) <
        then_branch = then_graph () => (float[N,3] t) {
            inner = Mul(long_sum, weight_of_some_layer)
            t = If(c) <
                then_branch = deep () => (float[N,3] d) { d = Add(inner, first) },
                else_branch = deeper () => (float[N,3] e) { e = Identity(long_sum) }
            >
        },
        else_branch = else_graph () => (float[N,3] f) { inner_two = Neg(long_sum) f = Add(inner_two, first) }
    >
    trips = Constant <value = int64 {3}> ()
    looped = Loop (trips, c, chosen) <
        body = body_graph (int64 step, bool go_on, float[N,3] carried) => (bool go, float[N,3] next) {
            go = Identity(go_on)
            grown = Add(carried, weight_of_some_layer)
            next = Sub(grown, first)
        }
    >
    a = Add(looped, chosen)
"""


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
def test_bodies_read_the_scopes_around_them_under_the_new_names(opset):
    proto = model(
        BODIES, "float[N,3] first, bool c", "float[N,3] a", {"weight_of_some_layer": draw(RNG, 3)},
        opset=opset, ir=10 if opset > 20 else 8,
    )  # fmt: skip
    proto.graph.doc_string, proto.doc_string = "about the graph", "about the model"
    proto.metadata_props.add(key="author", value="somebody")
    for i, node in enumerate(rewriting.nodes_of(proto)):
        node.name, node.doc_string = f"path/to/{node.op_type}_{i}", "a note"
    after = shortened(proto)
    for take in (True, False):
        feed = {"first": draw(RNG, 4, 3), "c": np.array(take)}
        for a, b in zip(run(proto, feed), run(after, feed), strict=True):
            assert np.array_equal(a, b)
    names = inside(after)
    assert len(names) == len(set(names)) and {len(n) for n in names} == {1} and "a" not in names
    assert after.graph.doc_string and after.doc_string and after.metadata_props == proto.metadata_props
    assert [v.name for v in after.graph.input] == ["first", "c"]
    assert not any(n.name or n.doc_string for n in rewriting.nodes_of(after))


@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_a_conv_without_its_defaults_gives_the_same_bits(case):
    text, shape, groups, _, biased, seed = case
    proto, _, x = one_conv(text, shape, groups, biased=biased, seed=seed)
    after = shortened(proto)
    assert np.array_equal(run(proto, {"x": x})[0], run(after, {"x": x})[0])
    left = {a.name: onnx.helper.get_attribute_value(a) for a in after.graph.node[0].attribute}
    assert left.get("group") != 1 and left.get("auto_pad") != b"NOTSET"
    assert set(left.get("strides", [2])) != {1} and set(left.get("dilations", [2])) != {1}
    assert "kernel_shape" not in left  # the weight has it


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
def test_attributes_go_where_they_are_at_their_defaults_and_only_there(opset):
    body = (
        "p = MaxPool<kernel_shape = [2, 2], strides = [1, 1], pads = [0, 0, 0, 0]>(x)"
        " q = AveragePool<kernel_shape = [2, 2], strides = [2, 1], pads = [0, 0, 1, 1]>(p)"
        " n = BatchNormalization<epsilon = 0.00001, momentum = 0.9>(q, s, b, m, v)"
        " k = BatchNormalization<epsilon = 0.001, momentum = 0.9>(n, s, b, m, v)"
        " f = Flatten<axis = 1>(k) g = Gemm<alpha = 1.0, beta = 2.0, transA = 0, transB = 1>(f, W, c)"
        " l = LeakyRelu<alpha = 0.01>(g) e = Elu<alpha = 0.5>(l) t = Transpose<perm = [1, 0]>(e)"
        " y = Concat<axis = 0>(t, t)"
    )
    vectors = {n: np.abs(draw(RNG, 4)) + 1 for n in "sbmv"}
    proto = model(
        body, "float[2,4,6,6] x", "float[10,2] y", vectors | {"W": draw(RNG, 5, 60), "c": draw(RNG, 5)},
        opset=opset, ir=10 if opset > 20 else 8,
    )  # fmt: skip
    after = shortened(proto)
    left = [{a.name for a in n.attribute} for n in after.graph.node]
    assert left == [
        {"kernel_shape"}, {"kernel_shape", "strides", "pads"}, set(), {"epsilon"}, set(), {"beta", "transB"},
        set(), {"alpha"}, {"perm"}, {"axis"},
    ]  # fmt: skip
    assert_same_bits(proto, after)


def test_types_that_nothing_infers_and_annotations_follow_their_values():
    proto = model(
        "found_places = NonZero(x) doubled = Mul(x, weight) z = Shape(found_places) y = Relu(doubled)",
        "float[3] x", "float[3] y, int64[2] z", {"weight": draw(RNG, 3)},
    )  # fmt: skip
    for name, kind, shape in (("found_places", 7, [1, 3]), ("doubled", 1, [3])):
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    proto.graph.metadata_props.add(key="signature", value="parameters: 'weight', 'x'")
    proto.graph.metadata_props.add(key="author", value="somebody who has weights")
    note = proto.graph.quantization_annotation.add(tensor_name="doubled")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="weight")
    after = shortened(proto)
    (info,) = after.graph.value_info
    assert info.name == after.graph.node[0].output[0] and info.type == proto.graph.value_info[0].type
    assert [p.key for p in after.graph.metadata_props] == ["author"]
    (kept,) = after.graph.quantization_annotation
    assert kept.tensor_name == after.graph.node[1].output[0]
    assert kept.quant_parameter_tensor_names[0].value == after.graph.initializer[0].name
    assert_same_bits(proto, after)


def test_functions_and_initializers_that_can_be_fed_keep_their_names():
    text = """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        net (float[3] x, float[3] fed = {1, 2, 3}) => (float[3] y) {
            between = local.twice(x) y = Add(between, fed)
        }
        <domain: "local", opset_import: ["" : 17]>
        twice (inner_x) => (inner_y) { inner_y = Add(inner_x, inner_x) }
    """
    proto = onnx.parser.parse_model(text)
    after = shortened(proto)
    assert after.functions == model_file.serialize(model_file.read(proto)).functions
    assert [t.name for t in after.graph.initializer] == ["fed"] and inside(after) == ["a"]
    assert_same_bits(proto, after)


@pytest.mark.parametrize(("asked", "short"), [(None, True), (True, True), (False, False)])
def test_the_written_file_the_dry_run_and_the_notice_agree_about_names(asked, short, tmp_path):
    source = gs.export_onnx(surgeon_graph())
    source.ir_version = 8
    options = {"ratio": 3, "method": "dp", "short_names": asked}
    made = onnxdp.compress(source, tmp_path / "out.onnx", **options)
    dry = onnxdp.compress(source, tmp_path / "out.onnx", dry_run=True, overwrite=True, **options)
    assert made.report.target.nbytes == dry.report.target.nbytes == (tmp_path / "out.onnx").stat().st_size
    names = {n.name for n in onnx.load(tmp_path / "out.onnx").graph.node}
    assert ({"one", "two", "three"} <= names) != short and (names == {""}) == short
    assert any("--keep-names" in n for n in made.report.notices) == short


def test_names_that_take_little_of_a_large_file_stay():
    tensors = {"weight": draw(RNG, 256, 8) @ draw(RNG, 8, 256)}
    proto = model("y = MatMul(x, weight)", "float[N,256] x", "float[N,256] y", tensors)
    proto.graph.node[0].name = "product"
    kept = onnxdp.compress(proto, ratio=4, method="dp").model
    assert "product" in {n.name for n in kept.graph.node}
    asked = onnxdp.compress(proto, ratio=4, method="dp", short_names=True).model
    assert {n.name for n in asked.graph.node} == {""}


# ---- constants put together


def gathered(source: onnx.ModelProto | Path) -> onnx.ModelProto:
    held = model_file.read(source)
    FreezeInitializers()(held.ir)
    GatherConstants()(held.ir)
    made = model_file.serialize(held)
    onnx.checker.check_model(made)
    return made


@pytest.mark.parametrize("path", [DIGITS, *REAL], ids=lambda p: p.stem)
def test_real_models_give_the_same_bits_with_their_constants_together(path):
    before = model_file.serialize(model_file.read(path))
    after = gathered(path)
    assert_same_bits(before, after)
    small = [t for t in rewriting.tensors_of(after) if len(onnx.numpy_helper.to_array(t).tobytes()) < 1024]
    if after.ir_version >= 4:
        fed = {v.name for v in after.graph.input}
        keys = [
            (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes())
            for t in small
            if t.name not in fed and t.data_type != onnx.TensorProto.STRING
        ]
        assert len(keys) == len(set(keys))
    assert gathered(after).ByteSize() <= after.ByteSize() < before.ByteSize() + 5 * len(small)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_paddings_that_exporters_leave_in_the_graph_are_worked_out(opset):
    body = """
        n = Constant <value = int64[4] {0, 1, 0, 2}> () rows = Constant <value = int64[2] {-1, 2}> ()
        zeros = ConstantOfShape <value = int64[1] {0}> (four) four_ = Identity(four)
        joined = Concat <axis = 0> (n, zeros) table = Reshape(joined, rows)
        turned = Transpose <perm = [1, 0]> (table) minus = Constant <value = int64[1] {-1}> ()
        flat = Reshape(turned, minus) pads = Cast <to = 7> (flat)
        shape = Shape(x) same = Reshape(x, shape) z = Add(pads, flat)
    """
    one = "one = Constant <value = float {1.0}> ()"
    body += branching("float[2,3]", f"{one} p = Add(same, one)", f"{one} q = Sub(same, one)")
    proto = model(
        body, "float[2,3] x, bool cond", "float[2,3] y, int64[8] z", {"four": np.array([4])},
        opset=opset, ir=10 if opset > 20 else 8,
    )  # fmt: skip
    after = gathered(proto)
    kinds = [n.op_type for n in rewriting.nodes_of(after)]
    assert kinds == ["Identity", "Shape", "Reshape", "Add", "If", "Add", "Sub"]
    held = [onnx.numpy_helper.to_array(t).tolist() for t in after.graph.initializer]
    assert sorted(held, key=str) == sorted([[4], [0, 0, 0, 0, 1, 2, 0, 0], 1.0], key=str)
    for take in (True, False):
        feed = {"x": draw(RNG, 2, 3), "cond": np.array(take)}
        for a, b in zip(run(proto, feed), run(after, feed), strict=True):
            assert np.array_equal(a, b)


def test_indices_of_64_bits_take_as_many_bytes_as_they_need():
    """Half of gtcrn.onnx are int64 indices up to 32."""
    places = RNG.integers(0, 100, (1000, 3))
    wide = RNG.integers(-(2**62), 2**62, 700)
    proto = model(
        "y = GatherND(x, places) z = Add(n, wide)",
        "float[100,100,100] x, int64[700] n",
        "float[1000] y, int64[700] z",
        {"places": places, "wide": wide},
    )
    after = gathered(proto)
    assert after.ByteSize() < proto.ByteSize() - 6.9 * places.size
    assert next(t for t in after.graph.initializer if t.dims == [700]).ByteSize() < 8 * 700 + 40
    feed = {"x": draw(RNG, 100, 100, 100), "n": np.arange(700)}
    for a, b in zip(run(proto, feed), run(after, feed), strict=True):
        assert np.array_equal(a, b)


def test_a_constant_that_can_be_fed_or_is_an_output_stays_where_it_is():
    tensors = {"fed": np.array([2, 3]), "other": np.array([2, 3])}
    proto = model(
        "y = Reshape(x, fed) z = Reshape(x, other) o = Constant <value = int64[2] {2, 3}> ()",
        "float[6] x, int64[2] fed", "float[2,3] y, float[2,3] z, int64[2] o", tensors,
    )  # fmt: skip
    after = gathered(proto)
    assert after.graph.initializer[0].name == "fed" and len(after.graph.initializer) == 2
    assert [n.op_type for n in after.graph.node] == ["Reshape", "Reshape", "Constant"]
    assert len(after.graph.initializer[1].int64_data) == 2  # two bytes, not sixteen
