"""Weights are found wherever they stand, seen as the right matrix, or left alone for a reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import rewriting
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import draw, model
from test_forms import weight_of

from onnxdp import weights
from onnxdp.errors import UsageError

RNG = np.random.default_rng(4)


def found_in(body: str, tensors, *, inputs="float[N,8,9,9] x", outputs="float[] y", smallest=1, **more):
    return rewriting.find(model(body, inputs, outputs, tensors, **more), smallest)[1]


@st.composite
def cuts(draw_):
    groups, parts = draw_(st.sampled_from([1, 2, 3])), draw_(st.sampled_from([1, 2, 4]))
    if draw_(st.booleans()):
        kernel = draw_(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        shape = (groups * 4 * draw_(st.integers(1, 3)), 4 * draw_(st.integers(1, 3)), *kernel)
        return weight_of(shape, groups=groups), parts
    shape = (4 * draw_(st.integers(1, 4)), 4 * draw_(st.integers(1, 4)))
    return weight_of(shape, op="MatMul", transposed=draw_(st.booleans())), parts


@given(cuts(), st.sampled_from(["rows", "columns"]))
@settings(max_examples=60, deadline=None)
def test_cutting_into_blocks_and_back_changes_nothing(cut, axis):
    weight, parts = cut
    tensor = draw(np.random.default_rng(0), *weight.shape)
    stack = weights.blocks(weight, tensor, axis, parts)
    m, n = weight.inputs, weight.outputs
    shape = (m // parts, n) if axis == "rows" else (m, n // parts)
    assert stack.shape == (weight.groups * parts, *shape)
    assert np.array_equal(weights.unblocks(weight, stack, axis, parts), tensor)


@given(cuts())
@settings(max_examples=30, deadline=None)
def test_blocks_multiply_like_the_whole(cut):
    weight, parts = cut
    tensor = np.random.default_rng(0).integers(-8, 9, weight.shape).astype(np.float64)
    rows = np.random.default_rng(1).integers(-8, 9, (weight.groups, 5, weight.inputs)).astype(np.float64)
    whole = rows @ weights.blocks(weight, tensor)
    by_rows = weights.blocks(weight, tensor, "rows", parts).reshape(weight.groups, parts, -1, weight.outputs)
    cut_rows = rows.reshape(weight.groups, 5, parts, -1).swapaxes(1, 2)
    assert np.array_equal((cut_rows @ by_rows).sum(axis=1), whole)  # whole numbers: exact
    columns = weights.blocks(weight, tensor, "columns", parts).reshape(
        weight.groups, parts, weight.inputs, -1
    )
    assert np.array_equal(np.concatenate(list((rows[:, None] @ columns).swapaxes(0, 1)), axis=-1), whole)


VIEWS = {
    "conv": ("y = Conv(x, W)", (16, 8, 3, 3), (72, 16, 1, 9, True)),
    "grouped": ("y = Conv<group = 2>(x, W)", (16, 4, 3, 3), (36, 8, 2, 9, True)),
    "depthwise": ("y = Conv<group = 8>(x, W)", (8, 1, 3, 3), (9, 1, 8, 9, True)),
    "gemm": ("f = Flatten(x) y = Gemm(f, W)", (648, 6), (648, 6, 1, 1, False)),
    "gemm_b": ("f = Flatten(x) y = Gemm<transB = 1>(f, W)", (6, 648), (648, 6, 1, 1, True)),
    "left": ("y = MatMul(W, x)", (4, 9), (9, 4, 1, 1, True)),
    "gemm_left": ("f = Flatten(x) y = Gemm<transA = 1, transB = 1>(W, f)", (648, 6), (648, 6, 1, 1, False)),
    "right": ("y = MatMul(x, W)", (9, 4), (9, 4, 1, 1, False)),
    "turned": ("w = Transpose(W) y = MatMul(x, w)", (4, 9), (9, 4, 1, 1, True)),
    "turned_twice": (
        "w = Transpose(W) f = Flatten(x) y = Gemm<transB = 1>(f, w)",
        (648, 6),
        (648, 6, 1, 1, False),
    ),
}


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize("constant", [True, False])
def test_the_matrix_that_the_readers_multiply_by(case, constant):
    body, shape, (inputs, outputs, groups, tap, transposed) = VIEWS[case]
    found = found_in(body, {"W": draw(RNG, *shape)}, constants=["W"] if constant else [])
    (w,) = found.weights
    assert (w.inputs, w.outputs, w.groups, w.tap, w.transposed) == (inputs, outputs, groups, tap, transposed)
    assert w.size == w.groups * w.inputs * w.outputs and w.nbytes == 4 * w.size
    assert w.op == body.split("y = ")[1].split("(")[0].split("<")[0]


STORED = {
    "gather": ("y = Gather(W, i)", (20, 9), "Gather"),
    "lstm": ("y, h, c = LSTM<hidden_size = 4>(s, W, R)", (1, 16, 9), "LSTM"),
    "transposed": ("y = ConvTranspose(x, W)", (8, 16, 3, 3), "ConvTranspose"),
    "batched": ("y = MatMul(x, W)", (8, 9, 4), "MatMul (stored)"),
    "sliced": ("a, b = Split<axis = 1>(W) y = MatMul(x, a) z = MatMul(x, b)", (9, 8), "MatMul (stored)"),
    "two_views": ("a = MatMul(x, W) b = MatMul(W, x) y = Add(a, b)", (9, 9), "MatMul (stored)"),
}


@pytest.mark.parametrize("case", STORED)
def test_weights_without_one_matrix_may_change_their_type_only(case):
    body, shape, op = STORED[case]
    tensors = {"W": draw(RNG, *shape)} | ({"R": draw(RNG, 1, 16, 4)} if case == "lstm" else {})
    inputs = "float[N,8,9,9] x, float[T,N,9] s, int64[K] i"
    found = found_in(body, tensors, inputs=inputs, opset=11)
    w = found.weights[0]
    assert (w.name, w.op) == ("W", op)
    assert rewriting.FORMS["dp"].supports(w) and rewriting.FORMS["float16"].supports(w) is None


@pytest.mark.parametrize("op", ["Add", "Sub"])
def test_tables_that_are_added_are_weights_and_grids_biases_and_masks_are_not(op):
    """Positions are learned or sines; anchors of boxes lie on a grid, and masks hold two numbers."""
    wave = np.arange(128)[:, None] / 10000 ** (np.arange(64) / 64)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 64, dtype=np.float32)] * 2), -1).reshape(1, -1, 2)
    cases = {
        "learned": draw(RNG, 1, 128, 64),
        "sines": np.sin(wave).astype(np.float32),
        "grid": grid,
        "small": draw(RNG, 63, 65),
        "bias": draw(RNG, 1, 8192),
        "mask": np.triu(np.full((128, 128), -1e4, np.float32), 1),
        "infinite": np.where(np.tri(128, dtype=bool), draw(RNG, 128, 128), np.float32(-np.inf)),
    }
    found = {
        name: found_in(f"y = {op}(x, W)", {"W": table}, inputs="float[] x", opset=13)
        for name, table in cases.items()
    }
    assert {n for n, f in found.items() if f.weights} == {"learned", "sines"}
    assert all(f.weights[0].op == op for n, f in found.items() if f.weights)
    said = {n: f.kept[0].reason for n, f in found.items() if f.kept}
    assert "few different numbers" in said["grid"] and "few different numbers" in said["mask"]
    assert "no table of 4,096" in said["small"] and "no table of 4,096" in said["bias"]
    assert "infinity" in said["infinite"]


KEPT = {
    "is read by Mul": ("y = Mul(x, W)", {}),
    "is read by Add, and is no table": ("y = Add(x, W)", {}),
    "has no reader": ("y = Relu(x)", {}),
    "graph output": ("y = Relu(x) V = MatMul(x, W)", {"outputs": "float[] y, float[9,9] W"}),
    "--freeze-initializers": ("y = MatMul(x, W)", {"inputs": "float[N,8,9,9] x, float[9,9] W"}),
    "reaches a graph output": ("z = MatMul(x, W) y = Identity(W)", {}),
    "is read by Custom": ("y = MatMul(x, W) z = Custom(W)", {}),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_is_left_alone_has_its_reason(reason):
    body, more = KEPT[reason]
    graph_found = found_in(body, {"W": draw(RNG, 9, 9)}, **more)
    assert not graph_found.weights
    (kept,) = graph_found.kept
    assert kept.weight == "W" and reason in kept.reason and kept.nbytes == 324


def test_below_a_kilobyte_nothing_is_looked_at():
    body, tensors = "a = MatMul(x, V) y = MatMul(a, W)", {"V": draw(RNG, 9, 28), "W": draw(RNG, 28, 10)}
    found = found_in(body, tensors, smallest=1024)
    assert [w.name for w in found.weights] == ["W"] and not found.kept
    assert weights.MIN_BYTES == 1024


def test_8_weights_inside_functions_are_named():
    proto = model("y = Relu(x)", "float[N,9] x", "float[N,9] y", {})
    node = onnx.helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(draw(RNG, 20, 20)))
    inner = onnx.helper.make_node("MatMul", ["a", "w"], ["b"])
    proto.functions.append(
        onnx.helper.make_function(
            "local", "F", ["a"], ["b"], [node, inner], [onnx.helper.make_opsetid("", 17)]
        )
    )
    proto.opset_import.append(onnx.helper.make_opsetid("local", 1))
    _, found = rewriting.find(proto)
    (kept,) = (k for k in found.kept if "function" in k.weight)
    assert "F" in kept.weight and kept.nbytes == 1600


def test_finding_changes_nothing():
    proto = model("y = MatMul(x, W)", "float[N,9] x", "float[N,9] y", {"W": draw(RNG, 9, 9)}, constants=["W"])
    held, found = rewriting.find(proto)
    before = ir.to_proto(held.ir).SerializeToString(deterministic=True)
    weights.tensor_of(found, "W")
    assert ir.to_proto(held.ir).SerializeToString(deterministic=True) == before
    assert ir.to_proto(held.ir).graph.node[0].attribute[0].t.name == ""  # onnx-ir's own look-up would name it


# ---- choosing by name


@pytest.fixture
def four():
    body = "a = MatMul(x, enc.q) b = MatMul(a, enc.k) c = Conv(x, stem) y = Add(b, c)".replace(".", "_")
    tensors = {"enc_q": draw(RNG, 9, 9), "enc_k": draw(RNG, 9, 9), "stem": draw(RNG, 8, 8, 1, 1)}
    proto = model(body, "float[N,8,9,9] x", "float[N,8,9,9] y", tensors)
    for index, node in enumerate(proto.graph.node):
        node.name = f"node{index}"
    return rewriting.find(proto)[1]


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ([], [], ["enc_q", "enc_k", "stem"]),
        (["enc_*"], [], ["enc_q", "enc_k"]),
        (["re:_[qk]$"], ["enc_k"], ["enc_q"]),
        (["Conv"], [], ["stem"]),
        ([], ["MatMul"], ["stem"]),
        (["node1"], [], ["enc_k"]),
        (["stem", "enc_q"], [], ["enc_q", "stem"]),
    ],
)
def test_patterns(four, include, exclude, left):
    chosen = weights.select(four, include, exclude)
    assert sorted(w.name for w in chosen.weights) == sorted(left)
    assert {k.weight for k in chosen.kept} == {w.name for w in four.weights} - set(left)


@pytest.mark.parametrize("pattern", ["nothing", "re:^z", "re:(", "LSTM"])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_means_nothing_is_an_error(four, pattern, option):
    with pytest.raises(UsageError, match=f"--{option}"):
        weights.select(four, **{"include": (), "exclude": (), option: [pattern]})


@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1.0, 1e30, 1e60])
def test_numbers_that_float32_does_not_hold_are_left_alone(scale):
    """They are decoded in float32: a bug was reported, or the weight was zero."""
    tensors = {"W": scale * RNG.standard_normal((8, 6)), "V": RNG.standard_normal((6, 30))}
    found = found_in(
        "h = MatMul(x, W) y = MatMul(h, V)", tensors, inputs="double[N,8] x", outputs="double[] y"
    )
    kept = {k.weight: k.reason for k in found.kept}
    assert ("W" in kept) == (scale in (1e-60, 1e60)) and "V" not in kept
    assert all("float32" in reason for reason in kept.values())
