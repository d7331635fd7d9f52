"""What the rewriting makes runs, and equals the dense model that holds the product of the factors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import rewriting
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import branching, constant, draw, model, one_conv, pair, rewrite, run

from onnxdp.build import TERSE

RNG = np.random.default_rng(7)


@st.composite
def convolutions(draw_):
    """A Conv of any geometry, and params for its weight."""
    rank = draw_(st.integers(1, 3))
    groups = draw_(st.sampled_from([1, 1, 1, 2]))
    channels, outputs = draw_(st.sampled_from([2, 4, 6])), groups * draw_(st.sampled_from([4, 6]))
    small = st.integers(1, 3)
    kernel = draw_(st.lists(small, min_size=rank, max_size=rank))
    strides = draw_(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    auto = draw_(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    # ONNX Runtime refuses SAME with dilations
    dilations = (
        [1] * rank
        if auto.startswith("SAME")
        else draw_(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    )
    pads = draw_(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    attributes = {"strides": strides, "dilations": dilations, "group": groups}
    attributes |= {"pads": pads} if auto == "NOTSET" else {"auto_pad": f'"{auto}"'}
    if draw_(st.booleans()):
        attributes["kernel_shape"] = kernel
    text = ", ".join(f"{k} = {v}" for k, v in attributes.items())
    axis = draw_(st.sampled_from(["rows", "columns"]))
    parts = draw_(st.sampled_from([1, 2]))
    m, n = channels * int(np.prod(kernel)), outputs // groups
    most = min(m // parts, n) if axis == "rows" else min(m, n // parts)
    params = pair(
        draw_(st.integers(1, most)),
        run=draw_(st.sampled_from(["fold", "split"])),
        axis=axis,
        parts=parts,
        dtype=draw_(st.sampled_from(["float16", "float32"])),
    )
    return text, (outputs, channels, *kernel), groups, params, draw_(st.booleans()), draw_(st.integers(0, 99))


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_conv_equals_the_dense_model(case):
    text, shape, groups, params, biased, seed = case
    proto, _, x = one_conv(text, shape, groups, biased=biased, seed=seed)
    made = rewrite(proto, {"W": params})
    made.assert_equals_dense({"x": x})
    ops = sorted(n.op_type for n in made.proto.graph.node if n.op_type == "Conv")
    split = (
        params[1]["run"] == "split"
        and groups == 1
        and (params[1]["parts"] == 1 or params[1]["axis"] == "rows")
    )
    assert len(ops) == (2 if split else 1)


@pytest.mark.parametrize("run_as", ["fold", "split"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_bias_shift_lands_behind_the_conv(run_as, biased, normalised):
    rng = np.random.default_rng(3)
    tensors = {"W": draw(rng, 8, 4, 3, 3)} | ({"b": draw(rng, 8)} if biased else {})
    body = f"y = Conv<pads = [1, 1, 1, 1]>({', '.join(['x', *tensors])})"
    if normalised:
        body = body.replace("y =", "c =") + " y = BatchNormalization(c, scale, shift, mean, var)"
        tensors |= {n: draw(rng, 8) for n in ("scale", "shift", "mean")} | {"var": draw(rng, 8) ** 2 + 0.5}
    proto = model(body, "float[N,4,6,6] x", "float[N,8,6,6] y", tensors)
    params = {"W": pair(3, run=run_as)}
    plain = rewrite(proto, params)
    shift = rewriting.centred(plain, "W", draw(rng, 1, 36))
    made = rewrite(proto, params, {"W": shift})
    x = draw(rng, 2, 4, 6, 6)
    (before,), (after,) = run(plain.proto, {"x": x}), run(made.proto, {"x": x})
    gain = tensors["scale"] / np.sqrt(tensors["var"] + 1e-5) if normalised else 1.0
    wanted = (gain * shift)[:, None, None]
    (most,) = run(plain.majorant(), {"x": np.abs(x)})
    assert np.all(np.abs(after - before - wanted) <= 2.0**-23 * plain.terms() * (most + np.abs(wanted)))
    # nothing new stands in the graph for it: a bias that was there, the mean of what follows, or a new bias
    assert [n.op_type for n in made.proto.graph.node] == [n.op_type for n in plain.proto.graph.node]
    conv = next(n for n in made.proto.graph.node if n.output[0] in ("y", "c") and n.op_type == "Conv")
    assert (len(conv.input) == 3) == (biased or not normalised)
    assert "b" not in {t.name for t in made.proto.graph.initializer}


GEMM_BIASES = {"n": (6,), "1n": (1, 6), "scalar": (), "one": (1,), "full": (3, 6), "m1": (3, 1), "none": None}


@given(
    st.sampled_from(list(GEMM_BIASES)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([1.0, -2.0, 0.0]),
    st.booleans(),
    st.sampled_from(["fold", "split"]),
    st.sampled_from([("rows", 1), ("rows", 2), ("columns", 2)]),
    st.sampled_from(["float16", "float32"]),
    st.sampled_from([7, 9, 11, 17]),
)
@settings(max_examples=80, deadline=None)
def test_gemm_equals_the_dense_model(kind, trans_a, trans_b, alpha, beta, left, run_as, cut, dtype, opset):
    rng = np.random.default_rng(5)
    if kind == "none" and opset < 11:
        kind = "n"  # Gemm must have a bias there
    m, k, n = 3, 8, 6
    a, b = ((k, m) if trans_a else (m, k)), ((n, k) if trans_b else (k, n))
    weight, x = (a, b) if left else (b, a)
    if left:
        weight, x = ((k, 4) if trans_a else (4, k)), b
    tensors = {"W": draw(rng, *weight)}
    shape = GEMM_BIASES[kind]
    if shape is not None:
        tensors["b"] = np.asarray(draw(rng, *(4 if left and d == 3 else d for d in shape)))
    operands = ["W", "x"] if left else ["x", "W"]
    flags = f"transA = {int(trans_a)}, transB = {int(trans_b)}, alpha = {alpha}, beta = {beta}"
    proto = model(
        f"y = Gemm<{flags}>({', '.join([*operands, *list(tensors)[1:]])})",
        f"float[{x[0]},{x[1]}] x", f"float[{4 if left else 3},6] y", tensors, opset=opset,
    )  # fmt: skip
    made = rewrite(proto, {"W": pair(2, run=run_as, axis=cut[0], parts=cut[1], dtype=dtype)})
    made.source = made.source if beta >= 0 else _with_beta(made.source, beta)
    made.assert_equals_dense({"x": draw(rng, *x)})
    assert made.proto.graph.node[-1].output[0] == "y" and made.proto.opset_import[0].version == opset


def _with_beta(proto, beta):
    """The majorant needs beta's magnitude: move the sign into the bias."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for attribute in made.graph.node[-1].attribute:
        if attribute.name == "beta":
            attribute.f = abs(beta)
    for tensor in made.graph.initializer:
        if tensor.name == "b":
            array = -onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), "b"))
    return made


@pytest.mark.parametrize("kind", ["n", "1n", "scalar", "one", "none"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("run_as", ["fold", "split"])
def test_the_bias_shift_of_a_gemm_goes_through_alpha_and_beta(kind, alpha, beta, run_as):
    rng = np.random.default_rng(5)
    shape = GEMM_BIASES[kind]
    tensors = {"W": draw(rng, 8, 6)} | ({} if shape is None else {"b": np.asarray(draw(rng, *shape))})
    body = f"y = Gemm<alpha = {alpha}, beta = {beta}>({', '.join(['x', *tensors])})"
    proto = model(body, "float[N,8] x", "float[N,6] y", tensors)
    plain = rewrite(proto, {"W": pair(2, run=run_as)})
    shift = rewriting.centred(plain, "W", draw(rng, 1, 8))
    made = rewrite(proto, {"W": pair(2, run=run_as)}, {"W": shift})
    x = draw(rng, 4, 8)
    (before,), (after,) = run(plain.proto, {"x": x}), run(made.proto, {"x": x})
    (most,) = run(plain.majorant(), {"x": np.abs(x)})
    assert np.all(np.abs(after - before - alpha * shift) <= 2.0**-23 * plain.terms() * (most + np.abs(shift)))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("run_as", ["fold", "split"])
@pytest.mark.parametrize("cut", [("rows", 1), ("rows", 2), ("columns", 3)])
def test_matmul_equals_the_dense_model(left, lead, run_as, cut):
    rng = np.random.default_rng(5)
    x = (*lead, 8, 5) if left else (*lead, 5, 8)
    y = (*lead, 6, 5) if left else (*lead, 5, 6)
    tensors = {"W": draw(rng, 6, 8) if left else draw(rng, 8, 6)}
    inputs, outputs = (f"float[{','.join(map(str, s))}]" for s in (x, y))
    body = f"y = MatMul({'W, x' if left else 'x, W'})"
    made = rewrite(
        model(body, f"{inputs} x", f"{outputs} y", tensors),
        {"W": pair(2, run=run_as, axis=cut[0], parts=cut[1])},
    )
    made.assert_equals_dense({"x": draw(rng, *x)})
    products = [n for n in made.proto.graph.node if n.op_type == "MatMul" and "x" not in n.name]
    assert len(products) == 2


CHAINS = {
    "identity": ("w = Identity(W)", (8, 6)),
    "transpose": ("w = Transpose<perm = [1, 0]>(W)", (6, 8)),
    "reshape": ("w = Reshape(W, to)", (4, 12)),
    "reshape_flat": ("w = Reshape(W, to)", (48,)),
    "cast": ("w = Cast<to = 1>(W)", (8, 6)),
    "both": ("v = Transpose(W) w = Identity(v)", (6, 8)),
    "reshape_then_transpose": ("v = Reshape(W, from) w = Transpose<perm = [1, 0]>(v)", (2, 24)),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("constant", [True, False])
def test_a_weight_behind_operators_that_move_it(chain, constant):
    rng = np.random.default_rng(5)
    steps, shape = CHAINS[chain]
    dtype = "float16" if chain == "cast" else "float32"
    tensors = {"W": draw(rng, *shape, dtype=dtype)}
    tensors |= {"to": np.array([8, -1])} if "to" in steps.split("(W, ")[-1][:2] else {}
    tensors |= {"from": np.array([6, 8])} if "from" in steps else {}
    proto = model(
        f"{steps} y = MatMul(x, w)",
        "float[N,8] x",
        "float[N,6] y",
        tensors,
        constants=["W"] if constant else [],
    )
    _, found = rewriting.find(proto)
    (weight,) = (w for w in found.weights if w.name == "W")
    assert (weight.op, weight.inputs, weight.outputs) == ("MatMul", 8, 6)
    made = rewrite(proto, {"W": pair(3, run="split")})  # cannot be split: the product takes its place
    # a float16 weight is the dense model's rounding of the product, done the same way
    made.assert_equals_dense({"x": draw(rng, 4, 8)})
    assert [n.output[0] for n in proto.graph.node][1 if constant else 0 :] == [
        n.output[0] for n in made.proto.graph.node if not n.output[0].startswith(TERSE)
    ]


@pytest.mark.parametrize("step", ["Identity", "Cast<to = 1>"])
def test_a_conv_kernel_behind_identity_or_cast_is_a_matrix(step):
    rng = np.random.default_rng(5)
    tensors = {"W": draw(rng, 8, 4, 3, 3)}
    proto = model(f"w = {step}(W) y = Conv(x, w)", "float[N,4,6,6] x", "float[N,8,4,4] y", tensors)
    made = rewrite(proto, {"W": pair(3, run="split")})
    made.assert_equals_dense({"x": draw(rng, 2, 4, 6, 6)})


def test_a_conv_kernel_that_was_reshaped_may_change_its_type_only():
    rng = np.random.default_rng(5)
    tensors = {"W": draw(rng, 8, 36), "to": np.array([8, 4, 3, 3])}
    proto = model("w = Reshape(W, to) y = Conv(x, w)", "float[N,4,6,6] x", "float[N,8,4,4] y", tensors)
    _, found = rewriting.find(proto)
    assert found.weights[0].op == "Conv (stored)"
    assert rewriting.FORMS["dp"].supports(found.weights[0])
    rewrite(proto, {"W": ("float16", {})}).assert_equals_dense({"x": draw(rng, 2, 4, 6, 6)})


@pytest.mark.parametrize("constant", [True, False])
def test_a_tied_embedding_is_stored_once(constant):
    rng = np.random.default_rng(5)
    body = "e = Gather(W, ids) t = Transpose<perm = [1, 0]>(W) y = MatMul(e, t)"
    tensors = {"W": draw(rng, 12, 8)}
    proto = model(body, "int64[N] ids", "float[N,12] y", tensors, constants=["W"] if constant else [])
    _, found = rewriting.find(proto)
    (weight,) = found.weights
    assert (weight.op, weight.inputs, weight.outputs, len(weight.nodes)) == ("MatMul", 8, 12, 2)
    made = rewrite(proto, {"W": pair(3)})
    assert sorted(t.name for t in made.proto.graph.initializer) == ["W.atoms", "W.codes"]
    made.assert_equals_dense({"ids": np.arange(12)})


@pytest.mark.parametrize("run_as", ["fold", "split"])
def test_a_weight_of_several_nodes_is_folded_once(run_as):
    rng = np.random.default_rng(5)
    body = (
        "a = Conv<strides = [2, 2]>(x, W) b = Conv<pads = [1, 1, 1, 1]>(x, W)"
        " c = ReduceSum(a) d = ReduceSum(b) y = Add(c, d)"
    )
    proto = model(body, "float[N,4,6,6] x", "float[1,1,1,1] y", {"W": draw(rng, 8, 4, 3, 3)})
    made = rewrite(proto, {"W": pair(3, run=run_as)})
    assert [t.name for t in made.proto.graph.initializer][:2] == ["W.atoms", "W.codes"]
    made.assert_equals_dense({"x": draw(rng, 2, 4, 6, 6)}, eps=2.0**-23 * 800)  # 2 * 8 * 36 sums per output


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
@pytest.mark.parametrize("run_as", ["fold", "split"])
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_other_floating_types(dtype, run_as, stored):
    rng = np.random.default_rng(5)
    import ml_dtypes

    kind = {"float16": "float16", "float64": "double", "bfloat16": "float"}[dtype]
    weight = draw(rng, 8, 6)
    tensors = {"W": weight.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)}
    step, name = ("w = Cast<to = 1>(W)", "w") if dtype == "bfloat16" else ("", "W")
    proto = model(f"{step} y = MatMul(x, {name})", f"{kind}[N,8] x", f"{kind}[N,6] y", tensors)
    made = rewrite(proto, {"W": pair(3, run=run_as, dtype=stored)})
    # the product is taken in float32; splitting a float64 weight is exact to its own type, folding is not
    eps = {"float16": 2.0**-10, "float64": 2.0**-23, "bfloat16": 2.0**-7}[dtype]
    x = draw(rng, 4, 8).astype({"float16": "float16", "float64": "float64"}.get(dtype, "float32"))
    made.assert_equals_dense({"x": x}, eps=eps)
    casts = [n for n in made.proto.graph.node if n.op_type == "Cast" and n.output[0].startswith(TERSE)]
    if dtype == "float16" and run_as == "split":
        assert len(casts) == (0 if stored == "float16" else 2)  # what is of the type already needs no detour


BODIES = {
    "constants": ("{0} p = MatMul(x, w)", "{1} q = MatMul(x, w)", ["w", "w#2"]),
    "captured": ("p = MatMul(x, W)", "r = MatMul(x, W) q = Add(r, r)", ["W"]),
    "one_reader": ("p = MatMul(x, W)", "q = MatMul(x, V)", ["W", "V"]),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("run_as", ["fold", "split"])
@pytest.mark.parametrize("together", [True, False])
def test_weights_inside_if_bodies(body, run_as, together):
    rng = np.random.default_rng(5)
    *bodies, names = BODIES[body]
    held = [constant("w", draw(rng, 8, 6)) for _ in range(2)]
    text = branching("float[N,6]", *(b.format(*held) for b in bodies))
    tensors = {n: draw(rng, 8, 6) for n in names if n in "WV"}
    proto = model(text, "float[N,8] x, bool cond", "float[N,6] y", tensors)
    _, found = rewriting.find(proto)
    assert [w.name for w in found.weights] == names
    shared = {"dictionary": names[0]} if together and len(names) == 2 else {}
    params = {n: pair(3, run=run_as, **shared) for n in names}
    made = rewrite(proto, params, groups=[names] if shared else [])
    for cond in (True, False):
        feed = {"x": draw(rng, 4, 8), "cond": np.array(cond)}
        made.assert_equals_dense(feed)
    atoms = [t.name for t in rewriting.tensors_of(made.proto) if ".atoms" in t.name]
    assert len(atoms) == (1 if shared else len(names))


def test_weights_inside_a_loop_body():
    rng = np.random.default_rng(5)
    text = (
        "n = Constant<value_int = 3>() go = Constant<value = bool {1}>()"
        " y = Loop(n, go, x) <body = step (int64 i, bool c, float[N,8] s) => (bool k, float[N,8] t)"
        " { k = Identity(c) u = MatMul(s, W) v = Constant <value = float[8,8] {%s}> () z = MatMul(u, v)"
        " t = Mul(z, eighth) }>"
    )
    text %= ", ".join(f"{v:.4f}" for v in draw(rng, 64))
    tensors = {"W": draw(rng, 8, 8), "eighth": np.array(0.125, np.float32)}
    proto = model(text, "float[N,8] x", "float[N,8] y", tensors)
    made = rewrite(proto, {"W": pair(3), "v": pair(3, run="split")})
    # three rounds through both weights
    made.assert_equals_dense({"x": draw(rng, 4, 8)}, eps=3 * 2.0**-23)


def test_two_constants_multiplied_by_each_other():
    rng = np.random.default_rng(5)
    proto = model(
        "c = MatMul(A, B) y = MatMul(x, c)", "float[N,8] x", "float[N,6] y",
        {"A": draw(rng, 8, 7), "B": draw(rng, 7, 6)},
    )  # fmt: skip
    for names in (["A", "B"], ["B", "A"], ["A"], ["B"]):
        made = rewrite(proto, {n: pair(3, run="split") for n in names})
        made.assert_equals_dense({"x": draw(rng, 4, 8)})


# ---- one dictionary of several weights


@pytest.mark.parametrize(
    "run_as", [("split", "split"), ("fold", "split"), ("split", "fold"), ("fold", "fold")]
)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("constants", [[], ["V"], ["W"], ["V", "W"]])
def test_convs_on_one_tensor_run_one_atoms_operator(run_as, parts, constants):
    rng = np.random.default_rng(5)
    tensors = {"V": draw(rng, 6, 4, 3, 3), "W": draw(rng, 8, 4, 3, 3), "b": draw(rng, 8)}
    # initializers stand in another order than their nodes
    body = "r = Relu(x) p = Conv(r, W, b) q = Conv(r, V) y = Concat<axis = 1>(p, q)"
    proto = model(body, "float[N,4,6,6] x", "float[N,14,4,4] y", tensors, constants=constants)
    params = {n: pair(3, run=how, parts=parts, dictionary="V") for n, how in zip("VW", run_as, strict=True)}
    made = rewrite(proto, params, groups=[["V", "W"]])
    made.assert_equals_dense({"x": draw(rng, 2, 4, 6, 6)})
    atoms = [t for t in made.proto.graph.initializer if t.name.endswith(".atoms")]
    assert [t.name for t in atoms] == ["V.shared.atoms"]
    convs = [n for n in made.proto.graph.node if n.op_type == "Conv"]
    assert len(convs) == (3 if "split" in run_as else 2)  # one atoms operator, and one for each weight


def test_atoms_on_other_tensors_or_other_geometry_run_apart():
    rng = np.random.default_rng(5)
    tensors = {n: draw(rng, 6, 4, 3, 3) for n in "UVW"}
    body = (
        "r = Relu(x) p = Conv(r, W) q = Conv(x, V) s = Conv<strides = [1, 1]>(r, U)"
        " y = Concat<axis = 1>(p, q, s)"
    )
    proto = model(body, "float[N,4,6,6] x", "float[N,18,4,4] y", tensors)
    params = {n: pair(3, run="split", dictionary="U") for n in "UVW"}
    made = rewrite(proto, params, groups=[["U", "V", "W"]])
    made.assert_equals_dense({"x": draw(rng, 2, 4, 6, 6)})
    assert sum(t.name.endswith(".atoms") for t in made.proto.graph.initializer) == 1
    readers = [n for n in made.proto.graph.node if n.op_type == "Cast" and n.input[0].endswith(".atoms")]
    assert len(readers) == 1  # decoded once, however many operators read it


@pytest.mark.parametrize(("op", "trans_b"), [("MatMul", 0), ("Gemm", 0), ("Gemm", 1)])
def test_products_of_one_tensor_run_one_atoms_operator(op, trans_b):
    rng = np.random.default_rng(5)
    shape = (6, 8) if trans_b else (8, 6)
    attributes = [f"<transB = {trans_b}, alpha = {a}>" if op == "Gemm" else "" for a in (1.0, 2.0, 0.5)]
    body = " ".join(f"{o} = {op}{a}(r, {w})" for o, a, w in zip("qkv", attributes, "QKV", strict=True))
    proto = model(
        f"r = Relu(x) {body} y = Concat<axis = 1>(q, k, v)", "float[N,8] x", "float[N,18] y",
        {n: draw(rng, *shape) for n in "QKV"},
    )  # fmt: skip
    made = rewrite(proto, {n: pair(3, run="split", dictionary="Q") for n in "QKV"}, groups=[["Q", "K", "V"]])
    made.assert_equals_dense({"x": draw(rng, 4, 8)})
    products = [n.name for n in made.proto.graph.node if n.op_type == op]
    assert len(products) == 4 and products[0] == "Q.atoms.product"
    assert [t.name for t in made.proto.graph.initializer if "atoms" in t.name] == ["Q.shared.atoms"]
