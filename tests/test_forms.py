"""The two laws of a form, for every form that is registered, and what the forms refuse.

What ``cost`` counts is what a weight stores for itself: factors, words, steps. The shapes of Reshape and what
all weights together need for decoding (int8 tables, int32 and uint32 constants) are structure, not counted;
and steps that lie in a file alone may be float32 there, where a Cast would be longer than what it saves.
Where frequent numbers take fewer bits, ``cost`` is what a target allows, and what is stored comes near it.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rewriting import FORMS, draw, pair, session

from onnxdp.build import DTYPES, TERSE, Builder, Paper
from onnxdp.errors import MethodError, PlanError, UsageError
from onnxdp.methods import form, streams
from onnxdp.methods.form import Task
from onnxdp.methods.quantized import Quantized
from onnxdp.records import Encoded, Weight
from onnxdp.settings import Settings

SPARED = 768
"""Bytes that coded numbers take beyond the cost, at most, where operators are longer: six streams of 128."""
DECODE = Quantized.decode
ITEM = {"float32": 4, "float16": 2, "float64": 8, "bfloat16": 2}


def weight_of(shape, *, op="Conv", groups=1, transposed=True, dtype="float32") -> Weight:
    if op == "Conv":
        tap = int(np.prod(shape[2:]))
        view = {"inputs": shape[1] * tap, "outputs": shape[0] // groups, "groups": groups, "tap": tap}
    else:
        inputs, outputs = shape[::-1] if transposed else shape
        view = {"inputs": inputs, "outputs": outputs}
    nbytes = int(np.prod(shape)) * ITEM[dtype]
    return Weight("W", op, ("node",), shape, dtype, nbytes, transposed=transposed, **view)


@st.composite
def weights_(draw_):
    dtype = draw_(st.sampled_from(sorted(ITEM)))
    if draw_(st.booleans()):
        groups = draw_(st.sampled_from([1, 2]))
        kernel = draw_(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        shape = (groups * draw_(st.integers(2, 9)), draw_(st.integers(2, 9)), *kernel)
        return weight_of(shape, groups=groups, dtype=dtype)
    shape = (draw_(st.integers(2, 40)), draw_(st.integers(2, 40)))
    op = draw_(st.sampled_from(["Gemm", "MatMul"]))
    return weight_of(shape, op=op, transposed=draw_(st.booleans()), dtype=dtype)


def drawn(method: form.Form, weight: Weight, encoded: Encoded) -> ir.Model:
    """A model whose output is what emit draws where the weight stood."""
    x, y = ir.val("x", ir.DataType.FLOAT, [1]), ir.val("y", ir.DataType.FLOAT, [1])
    identity = ir.node("Identity", [x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[identity], opset_imports={"": 17}, name="net")
    model = ir.Model(graph, ir_version=8)
    paper = Paper(model)
    build = Builder(graph, "W", paper)
    value = method.emit(build, weight, encoded, None)
    assert value is not None and not build.nodes  # constants only
    paper.finish()
    if value.is_initializer():  # a graph's output comes from a node
        node = ir.node("Identity", [value])
        graph.append(node)
        value = node.outputs[0]
        value.name = "out"
    value.type = ir.TensorType(DTYPES[weight.dtype])
    graph.outputs.append(value)
    return model


def stored_bytes(model: ir.Model, encoded: Encoded) -> int:
    """Bytes of the initializers that are the weight's own, steps as if in float16 where that holds them."""
    held = [t for t in model.graph.initializers.values() if t.dtype != ir.DataType.INT64]
    own = [t for t in held if t.name.startswith("W.") or t.name == f"{TERSE}.vectors"]
    tables = [t.const_value.nbytes for t in held if t not in own and t.dtype == ir.DataType.FLOAT]
    assert sum(tables) <= 64  # what four raw bits stand for
    structure = {t.dtype for t in held} - {t.dtype for t in own} - {ir.DataType.FLOAT}
    assert structure <= {ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.UINT32}
    alone = {f"W.{role}": a.nbytes for role, a in encoded.arrays.items() if role.endswith("scale")}
    wide = [alone[t.name] for t in own if t.const_value.nbytes == 2 * alone.get(t.name, -1)]
    return sum(t.const_value.nbytes for t in own) - sum(wide)


def magnitudes(method: form.Form, weight: Weight, encoded: Encoded):
    """Decode to the sums of the magnitudes of what is added up; of words, those of what they stand for."""
    held = {k: np.abs(a) if a.dtype.kind == "f" else a for k, a in encoded.arrays.items()}
    unsigned = mock.patch.object(Quantized, "decode", lambda *given: np.abs(DECODE(*given)))
    with unsigned:
        return np.abs(method.decode(weight, dataclasses.replace(encoded, arrays=held)))


@pytest.mark.parametrize("name", sorted(FORMS))
@given(weight=weights_(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_emit_equals_decode_and_cost_equals_what_emit_stores(name, weight, data):
    method = FORMS[name]
    assume(method.supports(weight) is None)
    tensor = draw(np.random.default_rng(1), *weight.shape)
    stored = data.draw(st.sampled_from(["float16", "float32"]))
    task, options = Task(weight, tensor, None, False), Settings(factor_dtype=stored)
    solved = method.solve([task], options, device="cpu")
    candidates = solved.candidates()
    assume(candidates)
    (candidate,) = data.draw(st.sampled_from(candidates))
    method.check(weight, candidate.params)
    (encoded,) = solved.encode([task], [candidate.params])
    assert candidate.nbytes == method.cost(weight, candidate.params)
    if "bits" in candidate.params:
        encoded = method.encode(task, candidate.params, options, device="cpu")
        assert encoded.nbytes <= candidate.nbytes + SPARED
    else:
        assert candidate.nbytes == encoded.nbytes
    with mock.patch.object(streams, "SMALL", 0):  # the factors of a pair might share words
        model = drawn(method, weight, encoded)
    code = encoded.arrays.get("code", np.empty(0))  # is what operators there are
    assert stored_bytes(model, encoded) == encoded.nbytes - code.nbytes
    proto = ir.to_proto(model)
    made = session(proto)
    if weight.dtype == "bfloat16":  # NumPy cannot hold what the session would give
        return
    got = made.run([proto.graph.output[1].name], {"x": np.zeros(1, np.float32)})[0]
    wanted = method.decode(weight, encoded)
    most = magnitudes(method, weight, encoded)
    # sums of products in float32, and one rounding to the weight's type (absolute below its normals)
    terms = int(candidate.params.get("atoms", 0))
    half, tiny = (2.0**-11, 2.0**-25) if weight.dtype == "float16" else (0.0, 0.0)
    eps = 2.0**-23 * terms + half
    assert got.shape == weight.shape and got.dtype == np.dtype(weight.dtype)
    assert np.all(np.abs(got.astype(np.float64) - wanted) <= (1 + half) * eps * most + tiny)


@pytest.mark.parametrize(
    "name", sorted(set(FORMS) - {"pair"})
)  # care with atoms poses the codes another task
@given(weight=weights_())
@settings(max_examples=20, deadline=None)
def test_encoding_one_choice_equals_encoding_from_the_curve(name, weight):
    """A form that is always encoded again works harder then: its error is never above the curve's."""
    method = FORMS[name]
    assume(method.supports(weight) is None)
    task = Task(weight, draw(np.random.default_rng(1), *weight.shape), None, False)
    solved = method.solve([task], Settings(), device="cpu")
    for (candidate,) in solved.candidates()[::5]:
        (whole,) = solved.encode([task], [candidate.params])
        single = method.encode(task, candidate.params, Settings(), device="cpu")
        if "bits" in candidate.params:
            continue  # a curve's error is what it would be at so many bits, see test_escapes
        if method.sequential:
            # both are sums of `size` squares in float32
            assert single.error <= whole.error + weight.size * 2.0**-23
        else:
            assert np.array_equal(method.decode(weight, whole), method.decode(weight, single))


@pytest.mark.parametrize("name", sorted(FORMS))
@given(weight=weights_())
@settings(max_examples=20, deadline=None)
def test_points_are_candidates_that_need_no_samples_and_outlines_weigh_as_much(name, weight):
    method = FORMS[name]
    assume(method.supports(weight) is None)
    task = Task(weight, draw(np.random.default_rng(1), *weight.shape), None, False)
    solved = method.solve([task], Settings(), device="cpu")
    candidates = {tuple(sorted(c.params.items())): c for (c,) in solved.candidates()}
    for (point,) in solved.points():
        assert solved.ready([point.params])
        like = candidates[tuple(sorted(point.params.items()))]
        summed = pytest.approx(point.error, rel=weight.size * np.finfo(float).eps)  # in another order
        assert (like.nbytes, like.error) == (point.nbytes, summed)
    for candidate in list(candidates.values())[::5]:
        (encoded,) = solved.encode([task], [candidate.params])
        sketch = method.outline(weight, candidate.params)
        if "bits" in candidate.params:
            assert sketch.arrays["scale"].shape == encoded.arrays["scale"].shape
            assert sketch.nbytes <= candidate.nbytes + SPARED
            assert method.decode(weight, sketch).shape == weight.shape
            continue
        assert dict(sketch.params) == dict(encoded.params) and sketch.shared == encoded.shared
        assert {k: (a.shape, a.dtype) for k, a in sketch.arrays.items()} == {
            k: (a.shape, a.dtype) for k, a in encoded.arrays.items()
        }


@given(weight=weights_(), axis=st.sampled_from(["rows", "columns"]), parts=st.sampled_from([1, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_bytes_of_a_pair_grow_with_its_atoms(weight, axis, parts):
    costs = [FORMS["dp"].cost(weight, pair(r, axis=axis, parts=parts)[1]) for r in range(1, 6)]
    assert all(b > a for a, b in pairwise(costs))
    assert np.all(np.diff(costs) == costs[0])
    twice = FORMS["dp"].cost(weight, pair(1, axis=axis, parts=parts, dtype="float32")[1])
    assert twice == 2 * costs[0]


def test_error_falls_with_atoms_and_full_rank_is_exact():
    weight = weight_of((12, 4, 3, 3))
    task = Task(weight, draw(np.random.default_rng(1), 12, 4, 3, 3), None, False)
    errors = []
    for rank in range(1, 13):
        e = FORMS["dp"].encode(
            task, pair(rank, dtype="float32")[1], Settings(factor_dtype="float32"), device="cpu"
        )
        change = np.linalg.norm(FORMS["dp"].decode(weight, e) - task.tensor) / np.linalg.norm(task.tensor)
        errors.append(change)
        # norms of 432 numbers in float32, of a product that sums up 12 terms
        assert change == pytest.approx(e.error, rel=432 * 2.0**-24, abs=12 * 2.0**-23)
    assert all(b <= a for a, b in pairwise(errors))
    assert errors[-1] < 36 * 2.0**-23


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"axis": "depth"}, "axis|along"), ({"parts": 3}, "parts"), ({"parts": 0}, "parts"),
        ({"atoms": 0}, "atoms"), ({"atoms": 99}, "atoms"), ({"atoms": 2.5}, "atoms"),
        ({"dtype": "int8"}, "dtype"), ({"run": "fast"}, "run"),
        ({"rank": 3}, "rank"), ({"atoms": None}, "atoms"),
    ],
)  # fmt: skip
def test_params_without_a_meaning_are_refused_by_name(change, named):
    params = {k: v for k, v in (pair(4)[1] | change).items() if v is not None}
    with pytest.raises(PlanError, match=named):
        FORMS["dp"].check(weight_of((8, 4, 3, 3)), params)


def test_float16_takes_no_params_and_no_value_beyond_its_range():
    weight = weight_of((8, 4, 3, 3))
    with pytest.raises(PlanError, match="no parameter"):
        FORMS["float16"].check(weight, {"atoms": 3})
    tensor = draw(np.random.default_rng(1), 8, 4, 3, 3)
    tensor[0, 0, 0, 0] = 7e4
    task = Task(weight, tensor, None, False)
    assert not FORMS["float16"].solve([task], Settings(), device="cpu").candidates()
    with pytest.raises(PlanError, match="range"):
        FORMS["float16"].encode(task, {}, Settings(), device="cpu")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float16_refuses_what_is_that_small(dtype):
    assert "already" in FORMS["float16"].supports(weight_of((8, 4, 3, 3), dtype=dtype))


def test_a_depthwise_weight_is_too_thin_for_a_pair():
    assert "too thin" in FORMS["dp"].supports(weight_of((64, 1, 3, 3), groups=64))


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="dp, float16"):
        form.load("nothing")


def test_rounding_and_float16_stand_behind_auto():
    assert [f.name for f in form.forms_for("auto")] == ["quant", "float16"]
    assert [f.name for f in form.forms_for("auto", lighter=True)] == ["quant", "pair", "float16"]
    assert [f.name for f in form.forms_for("dp")] == ["dp", "float16"]
    assert [f.name for f in form.forms_for("float16")] == ["float16"]


def test_a_plug_in_that_is_no_form_is_refused(monkeypatch):
    class Point:
        name, value = "broken", "broken:Form"

        def load(self):
            return dict

    monkeypatch.setattr(form, "entry_points", lambda group: [Point()])
    with pytest.raises(MethodError, match="broken"):
        form.load("broken")
