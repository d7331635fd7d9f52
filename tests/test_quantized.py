"""Rounded weights through the whole path: what a session multiplies by, their bytes, what a plan may say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from edges import conv, listing, mlp, onnxdp, refused, save
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import FORMS, branching, constant, draw, find, model, one_conv, rewrite, run
from test_forms import SPARED, weight_of, weights_

import onnxdp as package
from onnxdp import model as model_file
from onnxdp import weights
from onnxdp.errors import UsageError
from onnxdp.methods.codes import code_for
from onnxdp.methods.form import Task
from onnxdp.methods.problem import Problem
from onnxdp.methods.roundings import LEVELS, RATES
from onnxdp.passes import ReplaceWeights
from onnxdp.settings import Settings

QUANT = FORMS["quant"]
EPS32 = float(np.finfo(np.float32).eps)
FEW = [2, 3, 6, 16, 84, 255]


# ---- what a session multiplies by


def exactly(proto, feed, levels, names=("W",)):
    """Rewrite, and demand that the sessions of the result and of the dense model that holds decode agree."""
    made = rewrite(proto, {n: ("quant", {"levels": levels}) for n in names})
    assert set(names) == set(made.encoded)
    made.assert_equals_dense(feed)
    return made


def few_levels(made, name, tensor, axes):
    """Along ``axes`` lie the steps: each has so many levels, and most of the tensor is there."""
    decoded, levels = made.decoded()[name], made.encoded[name].params["levels"]
    rows = np.moveaxis(decoded, axes, range(len(axes))).reshape(*(decoded.shape[a] for a in axes), -1)
    for index in np.ndindex(rows.shape[:-1]):
        assert len(np.unique(rows[index])) <= levels
    assert np.linalg.norm(decoded - tensor) < 0.7 * np.linalg.norm(tensor)  # one bit keeps 0.6 of Gaussians


@pytest.mark.parametrize("levels", FEW)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((6, 4, 3, 3), 1),
        ((6, 4, 3, 3), 2),
        ((8, 1, 3, 3), 8),
        ((6, 4, 3), 1),
        ((4, 3, 2, 2, 2), 2),
        ((6, 4, 1, 1), 1),
    ],
)
def test_conv_plain_grouped_and_depthwise(shape, groups, levels):
    proto, tensors, x = one_conv(f"group = {groups}", shape, groups, biased=False, seed=levels)
    made = exactly(proto, {"x": x}, levels)
    few_levels(made, "W", tensors["W"], (0,))


@pytest.mark.parametrize("levels", FEW)
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_in_both_orientations(trans_b, levels):
    rng = np.random.default_rng(levels)
    tensors = {"W": draw(rng, *((6, 8) if trans_b else (8, 6)))}
    proto = model(f"y = Gemm<transB = {trans_b}>(x, W)", "float[N,8] x", "float[N,6] y", tensors)
    made = exactly(proto, {"x": draw(rng, 4, 8)}, levels)
    few_levels(made, "W", tensors["W"], (0,) if trans_b else (1,))


@pytest.mark.parametrize("levels", FEW)
@pytest.mark.parametrize("left", [True, False])
def test_matmul_on_either_side(left, levels):
    rng = np.random.default_rng(levels)
    tensors = {"W": draw(rng, *((6, 8) if left else (8, 6)))}
    x, y = ("float[8,5]", "float[6,5]") if left else ("float[5,8]", "float[5,6]")
    proto = model(f"y = MatMul({'W, x' if left else 'x, W'})", f"{x} x", f"{y} y", tensors)
    made = exactly(proto, {"x": draw(rng, *((8, 5) if left else (5, 8)))}, levels)
    few_levels(made, "W", tensors["W"], (0,) if left else (1,))


BLOCKED = {
    "Conv": ("y = Conv(x, W)", "float[N,20,6,6] x", "float[N,6,4,4] y", (6, 20, 3, 3), 3),
    "grouped Conv": ("y = Conv<group = 2>(x, W)", "float[N,32,6,6] x", "float[N,6,4,4] y", (6, 16, 3, 3), 3),
    "Gemm": ("y = Gemm(x, W)", "float[N,128] x", "float[N,6] y", (128, 6), 2),
    "Gemm, turned": ("y = Gemm<transB = 1>(x, W)", "float[N,192] x", "float[N,5] y", (5, 192), 3),
    "too few rows": ("y = Conv(x, W)", "float[N,6,6,6] x", "float[N,6,4,4] y", (6, 6, 3, 3), 1),
    "no divisor": ("y = MatMul(x, W)", "float[N,131] x", "float[N,6] y", (131, 6), 1),
}  # fmt: skip


@pytest.mark.parametrize("levels", [255, 1625])
@pytest.mark.parametrize("name", BLOCKED)
def test_many_levels_have_a_step_for_each_block_of_rows(name, levels):
    body, given_, wanted, shape, blocks = BLOCKED[name]
    rng = np.random.default_rng(levels)
    tensors = {"W": draw(rng, *shape)}
    x = draw(rng, 2, *map(int, given_[8:-3].split(",")))
    made = exactly(model(body, given_, wanted, tensors), {"x": x}, levels)
    columns = 5 if name == "Gemm, turned" else 6
    assert made.encoded["W"].arrays["scale"].shape == (columns * blocks,)
    lost = np.abs(made.decoded()["W"] - tensors["W"]).max()
    assert lost <= 4 * np.abs(tensors["W"]).max() / levels


STORED = {
    "ConvTranspose": ("y = ConvTranspose(x, W)", "float[N,5,6,6] x", "float[N,4,8,8] y", (5, 4, 3, 3), (1,)),
    "grouped ConvTranspose": (
        "y = ConvTranspose<group = 2>(x, W)", "float[N,6,5,5] x", "float[N,8,7,7] y", (6, 4, 3, 3), (1,)
    ),
    "Gather": ("y = Gather(W, x)", "int64[N] x", "float[N,7] y", (20, 7), (0,)),
    "Conv behind Reshape": (
        "w = Reshape(W, to) y = Conv(x, w)", "float[N,4,6,6] x", "float[N,8,4,4] y", (8, 36), (0,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("levels", FEW)
@pytest.mark.parametrize("name", STORED)
def test_weights_that_are_no_matrix_of_one_product(name, levels):
    body, given_, wanted, shape, axes = STORED[name]
    rng = np.random.default_rng(levels)
    tensors = {"W": draw(rng, *shape)} | ({"to": np.array([8, 4, 3, 3])} if "Reshape" in name else {})
    x = np.arange(20) if name == "Gather" else draw(rng, 2, *map(int, given_[8:-3].split(",")))
    made = exactly(model(body, given_, wanted, tensors), {"x": x}, levels)
    few_levels(made, "W", tensors["W"], axes)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("levels", [3, 16])
def test_recurrent_weights(op, gates, levels):
    rng = np.random.default_rng(levels)
    tensors = {"W": draw(rng, 2, gates * 4, 5), "R": draw(rng, 2, gates * 4, 4)}
    proto = model(
        f'y = {op}<hidden_size = 4, direction = "bidirectional">(x, W, R)', "float[3,2,5] x",
        "float[3,2,2,4] y", tensors,
    )  # fmt: skip
    made = rewrite(proto, {n: ("quant", {"levels": levels}) for n in "WR"})
    feed = {"x": draw(rng, 3, 2, 5)}
    # the weights are the same numbers, and so is all that follows
    assert np.array_equal(run(made.proto, feed)[0], run(made.dense(), feed)[0])
    few_levels(made, "W", tensors["W"], (0, 1))


@pytest.mark.parametrize("levels", FEW)
@pytest.mark.parametrize(
    ("dtype", "kind", "eps"), [("float16", "float16", 2.0**-10), ("float64", "double", EPS32)]
)
def test_weights_of_other_types(dtype, kind, eps, levels):
    rng = np.random.default_rng(levels)
    proto = model("y = MatMul(x, W)", f"{kind}[N,8] x", f"{kind}[N,6] y", {"W": draw(rng, 8, 6, dtype=dtype)})
    made = rewrite(proto, {"W": ("quant", {"levels": levels})})
    made.assert_equals_dense({"x": draw(rng, 4, 8, dtype=dtype)}, eps=eps)


@pytest.mark.parametrize("levels", FEW)
def test_a_weight_inside_the_body_of_an_if(levels):
    rng = np.random.default_rng(levels)
    inside = constant("w", draw(rng, 8, 6))
    text = branching("float[N,6]", f"{inside} p = MatMul(x, w)", "q = MatMul(x, V)")
    proto = model(text, "float[N,8] x, bool cond", "float[N,6] y", {"V": draw(rng, 8, 6)})
    made = rewrite(proto, {n: ("quant", {"levels": levels}) for n in ("w", "V")})
    for cond in (True, False):
        made.assert_equals_dense({"x": draw(rng, 4, 8), "cond": np.array(cond)})


@given(weight=weights_(), levels=st.sampled_from(LEVELS), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_error_that_is_reported_is_that_of_what_is_stored(weight, levels, seed):
    """In the plain norm, where no samples show another."""
    tensor = draw(np.random.default_rng(seed), *weight.shape)
    made = QUANT.encode(Task(weight, tensor, None, False), {"levels": levels}, Settings(), device="cpu")
    change = np.linalg.norm(QUANT.decode(weight, made) - tensor) / np.linalg.norm(tensor)
    # steps are stored in float16, each 2^-11 off at most; the squares are summed up in float32
    assert abs(change - made.error) <= 2.0**-11 * (1 + made.error) + 4 * weight.size * EPS32


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-7, 1e-3, 1.0, 1e5, 1e9, 1e30, 5e37])
def test_steps_of_any_size_are_held(scale):
    """Where float16 cannot hold a step, float32 does; nothing overflows and nothing becomes zero."""
    weight = weight_of((12, 20), op="Gemm")
    tensor = (draw(np.random.default_rng(3), 12, 20) * scale).astype(np.float32)
    made = QUANT.encode(Task(weight, tensor, None, False), {"levels": 16}, Settings(), device="cpu")
    back, tensor = QUANT.decode(weight, made) / scale, tensor / scale
    # least squares' steps: 2^-11 off, by float16, they cost 2^-22 / (2 error^2); norms in float32 2^-16
    assert np.linalg.norm(back - tensor) == pytest.approx(made.error * np.linalg.norm(tensor), rel=2.0**-14)
    assert made.error < 0.13  # 0.11 is the least for Gaussians on 16 levels (method.md 4.3)


def test_a_mask_of_huge_numbers_is_rounded_like_any_other():
    weight = weight_of((12, 20), op="Gather")
    tensor = np.triu(np.full((12, 20), -3.4e38, np.float32))
    made = QUANT.encode(Task(weight, tensor, None, False), {"levels": 3}, Settings(), device="cpu")
    back = QUANT.decode(weight, made)
    assert np.array_equal(back == 0, tensor == 0)
    assert np.allclose(back, tensor, rtol=2.0**-22, atol=0)  # a step and a product, both in float32


def test_samples_turn_the_error_to_where_it_does_least_harm():
    rng = np.random.default_rng(4)
    weight = weight_of((16, 40), op="Gemm")
    tensor = draw(rng, 16, 40)
    x = (rng.standard_normal((200, 40)) @ (rng.standard_normal((40, 40)) + 0.5)).astype(np.float32)
    lost = []
    for samples in (None, x[None] / np.float32(200**0.5)):
        made = QUANT.encode(Task(weight, tensor, samples, False), {"levels": 4}, Settings(), device="cpu")
        lost.append(np.linalg.norm(x @ (QUANT.decode(weight, made) - tensor).T))
    assert lost[1] < lost[0]


@pytest.mark.parametrize("size", [1e-16, 1e-20, 1e-23, 1e-30, 1e-45])
def test_a_weight_that_is_fed_next_to_nothing_is_rounded_by_itself(size):
    """A share of a mean that float32 hardly holds is none: added to a diagonal it never made it definite."""
    rng = np.random.default_rng(6)
    weight, tensor = weight_of((64, 1, 3, 3), op="Conv", groups=64), draw(rng, 64, 1, 3, 3)
    samples = draw(rng, 64, 90, 9) / np.float32(90**0.5)
    samples[::2] *= np.float32(size)
    made = QUANT.encode(Task(weight, tensor, samples, False), {"levels": 255}, Settings(), device="cpu")
    assert np.abs(QUANT.decode(weight, made) - tensor).max() <= 1.5 * made.arrays["scale"].max()


@pytest.mark.parametrize("size", [1e17, 3e18, 1e30, np.nan, np.inf])
def test_a_weight_that_is_fed_too_much_is_refused(size):
    rng = np.random.default_rng(6)
    samples = draw(rng, 1, 90, 48) * np.float32(size)
    task = Task(weight_of((5, 48), op="Gemm"), draw(rng, 5, 48), samples, False)
    with np.errstate(all="ignore"), pytest.raises(UsageError, match="--inputs or --calibrate"):
        Problem.of(task, "cpu")


def test_a_matrix_of_many_inputs_is_cut_and_still_has_one_step_per_output(monkeypatch):
    monkeypatch.setattr("onnxdp.methods.layout.MOST_INPUTS", 16)
    rng = np.random.default_rng(4)
    weight = weight_of((5, 48), op="Gemm")
    task = Task(weight, draw(rng, 5, 48), draw(rng, 1, 90, 48) / np.float32(90**0.5), False)
    assert Problem.of(task, "cpu").parts == 3
    made = QUANT.encode(task, {"levels": 5}, Settings(), device="cpu")
    assert made.arrays["scale"].shape == (5,) and made.nbytes == QUANT.cost(weight, {"levels": 5})
    assert all(len(np.unique(row)) <= 5 for row in QUANT.decode(weight, made))


def test_blocks_of_rows_lie_within_the_parts_of_a_matrix_of_many_inputs(monkeypatch):
    monkeypatch.setattr("onnxdp.methods.layout.MOST_INPUTS", 160)
    rng = np.random.default_rng(4)
    weight, tensor = weight_of((5, 480), op="Gemm"), draw(rng, 5, 480)
    tensor[:, :40] *= 30
    task = Task(weight, tensor, draw(rng, 1, 90, 480) / np.float32(90**0.5), False)
    assert Problem.of(task, "cpu").parts == 3
    made = QUANT.encode(task, {"levels": 255}, Settings(), device="cpu")
    assert made.arrays["scale"].shape == (5 * 12,) and made.nbytes == QUANT.cost(weight, {"levels": 255})
    monkeypatch.setattr("onnxdp.methods.layout._BLOCK", 1 << 20)
    one = QUANT.encode(task, {"levels": 255}, Settings(), device="cpu")
    assert made.error < 0.7 * one.error


# ---- bytes


@given(
    shapes=st.lists(
        st.tuples(st.integers(2, 24), st.integers(1, 12), st.sampled_from([(), (1, 1), (3, 3)])),
        min_size=1, max_size=4,
    ),
    levels=st.lists(st.sampled_from(LEVELS), min_size=4, max_size=4),
    opset=st.sampled_from([9, 13, 17]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_an_outline_has_the_bytes_of_the_encoding(shapes, levels, opset, seed):
    rng = np.random.default_rng(seed)
    tensors = {f"W{i}": draw(rng, n, m, *(k or (1, 1))) for i, (n, m, k) in enumerate(shapes)}
    body = " ".join(f"y{i} = Conv(x{i}, W{i})" for i in range(len(shapes)))
    inputs, outputs = (
        ", ".join(f"float[N,{s[axis]},H,K] {end}{i}" for i, s in enumerate(shapes))
        for axis, end in ((1, "x"), (0, "y"))
    )
    outputs = outputs.replace("H,K", "?,?")
    held, found = find(model(body, inputs, outputs, tensors, opset=opset))
    params = {w.name: {"levels": n} for w, n in zip(found.weights, levels, strict=False)}
    sizes = []
    for how in ("outline", "encode"):
        copied = model_file.copy(held)
        twin = find_again(copied)
        some = [
            QUANT.outline(w, params[w.name])
            if how == "outline"
            else QUANT.encode(Task(w, tensors[w.name], None, False), params[w.name], Settings(), device="cpu")
            for w in found.weights
        ]
        ReplaceWeights(twin, some, FORMS, {}, "test")(copied.ir)
        sizes.append(model_file.output_size(copied))
    assert sizes[0] == sizes[1]


@given(
    shapes=st.lists(st.tuples(st.integers(8, 40), st.integers(4, 30)), min_size=1, max_size=4),
    bits=st.lists(st.sampled_from(RATES), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_an_outline_of_bits_has_about_the_bytes_of_the_encoding(shapes, bits, seed):
    rng = np.random.default_rng(seed)
    tensors = {f"W{i}": draw(rng, n, m, 3, 3) for i, (n, m) in enumerate(shapes)}
    body = " ".join(f"y{i} = Conv(x{i}, W{i})" for i in range(len(shapes)))
    inputs, outputs = (
        ", ".join(f"float[N,{s[axis]},{hw}] {end}{i}" for i, s in enumerate(shapes))
        for axis, end, hw in ((1, "x", "H,K"), (0, "y", "?,?"))
    )
    held, found = find(model(body, inputs, outputs, tensors))
    sizes = []
    for how in ("outline", "encode"):
        copied = model_file.copy(held)
        some = [
            QUANT.outline(w, {"bits": b})
            if how == "outline"
            else QUANT.encode(Task(w, tensors[w.name], None, False), {"bits": b}, Settings(), device="cpu")
            for w, b in zip(found.weights, bits, strict=False)
        ]
        ReplaceWeights(find_again(copied), some, FORMS, {}, "test")(copied.ir)
        sizes.append(model_file.output_size(copied))
    # the outline's numbers fall off differently, so that other streams of each code may be left out
    codes = {code_for(b) for b in bits[: len(shapes)]}
    assert abs(sizes[0] - sizes[1]) <= 0.01 * sizes[1] + len(codes) * SPARED


def find_again(held):
    with mock.patch.object(weights, "MIN_BYTES", 1):
        return weights.find(held.ir)


@pytest.mark.parametrize("ratio", [4, 8, 12])
@pytest.mark.parametrize("method", ["auto", "quant"])
def test_a_budget_is_kept_and_a_dry_run_says_its_bytes(ratio, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(conv())
    words = ("--ratio", ratio, "--method", method, "--samples", 8)
    foreseen = json.loads(onnxdp("compress", "in.onnx", *words, "--dry-run", "--json").stdout)["target"][
        "nbytes"
    ]
    done = onnxdp("compress", "in.onnx", "out.onnx", *words)
    assert done.exit_code == 0, done.stderr
    assert Path("out.onnx").stat().st_size == foreseen <= Path("in.onnx").stat().st_size // ratio
    session_ops = [n.op_type for n in onnx.load("in.onnx").graph.node]
    assert set(session_ops) <= {n.op_type for n in onnx.load("out.onnx").graph.node}


@pytest.mark.parametrize("method", ["quant", "float16"])
def test_equal_shapes_are_not_taken_for_equal_numbers(method, tmp_path):
    """Equal small constants are stored once in the file, but those of an outline stand for others."""
    rng = np.random.default_rng(5)
    tensors = {n: draw(rng, 16, 16, 1, 1) for n in "ABCDEF"}
    body = "a = Conv(x, A) b = Conv(a, B) c = Conv(b, C) d = Conv(c, D) e = Conv(d, E) y = Conv(e, F)"
    onnx.save(model(body, "float[N,16,8,8] x", "float[N,16,8,8] y", tensors), tmp_path / "in.onnx")
    before = (tmp_path / "in.onnx").stat().st_size
    source, out = tmp_path / "in.onnx", tmp_path / "o.onnx"
    for ratio in (1.55, 1.6) if method == "float16" else (2.5, 3, 4):
        package.compress(source, out, ratio=ratio, samples=8, short_names=True, method=method, overwrite=True)
        assert out.stat().st_size <= before // ratio


# ---- plans


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Give the text of a plan that rounds all three weights, made once."""
    folder = tmp_path_factory.mktemp("plan")
    save(conv(), folder / "in.onnx")
    done = onnxdp("plan", folder / "in.onnx", "-o", folder / "p.json", "--ratio", "10", "--samples", "8")
    assert done.exit_code == 0, done.stderr
    return (folder / "p.json").read_text()


@pytest.fixture
def plan(made, tmp_path, monkeypatch):
    """Give the plan as plain JSON, beside its model."""
    monkeypatch.chdir(tmp_path)
    save(conv())
    Path("p.json").write_text(made)
    plain = json.loads(made)
    assert {c["method"] for c in plain["choices"]} == {"quant"}
    return plain


def edited(plan, *, budget=None, **params):
    plan["budget"] = budget
    choice = next(c for c in plan["choices"] if c["weight"] == "w2")
    choice["params"] = params
    Path("q.json").write_text(json.dumps(plan))


def test_apply_gives_the_bytes_of_compress(plan):
    assert onnxdp("compress", "in.onnx", "direct.onnx", "--ratio", "10", "--samples", "8").exit_code == 0
    assert onnxdp("apply", "in.onnx", "p.json", "planned.onnx").exit_code == 0
    assert Path("direct.onnx").read_bytes() == Path("planned.onnx").read_bytes()
    dry = onnxdp("apply", "in.onnx", "p.json", "--dry-run", "--json")
    assert json.loads(dry.stdout)["target"]["nbytes"] == Path("planned.onnx").stat().st_size


def applied(plan, **params):
    """What became of w2 under a plan edited so, and what such params cost."""
    edited(plan, **params)
    done = onnxdp("apply", "in.onnx", "q.json", "out.onnx", "--json")
    assert done.exit_code == 0, done.stderr
    line = next(x for x in json.loads(done.stdout)["lines"] if x["weight"] == "w2")
    assert (line["method"], line["params"]) == ("quant", params)
    weight = next(w for w in weights.find(model_file.read("in.onnx").ir).weights if w.name == "w2")
    return line, QUANT.cost(weight, params)


@pytest.mark.parametrize("levels", [2, 5, 84, 255])
def test_levels_edited_by_hand_are_honoured(plan, levels):
    line, cost = applied(plan, levels=levels)
    assert line["after"] == cost
    assert package.verify("in.onnx", "out.onnx", samples=8).passed


def test_a_plan_whose_edited_choices_exceed_its_budget_is_refused(plan):
    budget = plan["budget"]
    edited(plan, budget=budget, levels=255)
    for words in (["out.onnx"], ["--dry-run"]):
        before = listing()
        done = onnxdp("apply", "in.onnx", "q.json", *words)
        said = r"error: The plan's choices give ([\d,]+) bytes and its budget is ([\d,]+); raise the budget"
        taken, allowed = (int(n.replace(",", "")) for n in re.match(said, done.stderr).groups())
        assert (done.exit_code, allowed, listing()) == (2, budget, before)
    edited(plan, budget=taken, levels=255)
    assert onnxdp("apply", "in.onnx", "q.json", "out.onnx").exit_code == 0
    assert Path("out.onnx").stat().st_size <= taken


TAKES = (
    f"w2: quant takes levels, one of {', '.join(map(str, LEVELS))}, "
    f"or bits, {RATES[0]} to {RATES[-1]} in steps of {RATES[1] - RATES[0]}."
)


NO_LEVELS = [{"levels": n} for n in (0, 1, 8, 300, -3, 2.5, "x", "5")] + [
    {},
    {"levels": 5, "atoms": 3},
    {"levels": 23, "dim": 2},
    {"levels": 5, "bits": 2.0},
    *({"bits": b} for b in (0, 0.25, 2.1, 12.125, -2.0, "x", "2")),
]


@pytest.mark.parametrize("bits", [0.5, 1.25, 3.0, 6])
def test_bits_edited_by_hand_are_honoured(plan, bits):
    line, cost = applied(plan, bits=bits)
    assert line["after"] <= cost + SPARED
    assert package.verify("in.onnx", "out.onnx", samples=8).passed


@pytest.mark.parametrize("params", NO_LEVELS, ids=str)
def test_levels_without_a_meaning_are_refused_in_one_sentence(plan, params):
    edited(plan, **params)
    refused(2, TAKES, "apply", "in.onnx", "q.json", "out.onnx")


def test_bits_are_refused_where_operators_are_too_old(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = conv()
    old.opset_import[0].version, old.ir_version = 9, 4
    save(old)
    assert onnxdp("plan", "in.onnx", "-o", "p.json", "--ratio", "6", "--samples", "8").exit_code == 0
    plain = json.loads(Path("p.json").read_text())
    assert not any("bits" in c["params"] for c in plain["choices"])
    next(c for c in plain["choices"] if c["weight"] == "w2").update(method="quant", params={"bits": 2.0})
    Path("q.json").write_text(json.dumps(plain))
    done = onnxdp("apply", "in.onnx", "q.json", "out.onnx")
    assert done.exit_code == 2 and done.stderr.startswith("error: w2: bits need operator set 11")
    assert not Path("out.onnx").exists()


@pytest.mark.skipif(not shutil.which("taskset"), reason="no taskset")
def test_the_same_bytes_with_one_thread_and_two(tmp_path, monkeypatch):
    """A weight of 96 outputs is rounded in halves, side by side."""
    monkeypatch.chdir(tmp_path)
    save(mlp())
    hashes = set()
    for number, (threads, cores) in enumerate([("1", "0"), ("2", None), ("2", "0")]):
        env = {**os.environ, **{f"{n}_NUM_THREADS": threads for n in ("OMP", "OPENBLAS", "MKL")}}
        words = [
            "compress",
            "in.onnx",
            f"{number}.onnx",
            "--ratio",
            "8",
            "--method",
            "quant",
            "--samples",
            "8",
            "-q",
        ]
        command = [*(["taskset", "-c", cores] if cores else []), sys.executable, "-m", "onnxdp", *words]
        subprocess.run(command, env=env, check=True)
        hashes.add(listing()[f"{number}.onnx"])
    assert len(hashes) == 1
