"""Rounded pairs and bounded operations: what is drawn, what is counted, what is chosen."""

import itertools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import FORMS, draw, model, one_conv, rewrite, session, with_tensors

import onnxdp
from onnxdp import planner, tables
from onnxdp.errors import PlanError, TargetError, UsageError
from onnxdp.methods.quantized import Quantized
from onnxdp.planner import Item, Operations
from onnxdp.records import Candidate, Plan
from onnxdp.settings import Settings

DIGITS = Path(__file__).parents[1] / "models" / "digits.onnx"
FEW = {"samples": 32}


def params(atoms, *, run="split", taps="atoms", levels=7, code_levels=16):
    return "pair", {"taps": taps, "atoms": atoms, "levels": levels, "code_levels": code_levels, "run": run}


def operations(proto, feed):
    """Multiply-accumulates of Conv, Gemm and MatMul that read activations, by the shapes of a run."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    nodes = [n for n in shown.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    names = sorted({name for n in nodes for name in (*n.input[:2], n.output[0])} - set(feed))
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    shapes = {k: v.shape for k, v in feed.items()}
    shapes |= {n: a.shape for n, a in zip(names, session(shown).run(names, dict(feed)), strict=True)}
    known, total = set(feed), 0
    for node in proto.graph.node:
        if not known & set(node.input):  # folded when a session is made
            continue
        known.update(node.output)
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            left, right, made = (shapes[n] for n in (*node.input[:2], node.output[0]))
            turned = any(a.name == "transA" and a.i for a in node.attribute)
            each = int(np.prod(right[1:])) if node.op_type == "Conv" else left[0 if turned else -1]
            total += int(np.prod(made)) * each
    return total


def assert_equals_decoded(made, x):
    """The bound of rewriting.py, with |D| |C| for the magnitudes of a pair."""
    decode = Quantized.decode
    with mock.patch.object(Quantized, "decode", lambda *a: np.abs(decode(*a))):
        most = made.majorant()
    with mock.patch.object(made, "majorant", return_value=most):
        made.assert_equals_dense({"x": x})


@pytest.mark.parametrize("taps", ["atoms", "both", "codes"])
@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("pads=[1,1,1,1]", (8, 6, 3, 3)),
        ("pads=[2,1,2,1], dilations=[2,1]", (8, 6, 3, 3)),
        ('auto_pad="SAME_UPPER"', (6, 8, 2, 3)),
        ("strides=[2,1], pads=[0,1,1,2]", (8, 6, 3, 2)),
        ("pads=[1,1]", (8, 6, 3)),
    ],
)
def test_two_convolutions_do_what_the_decoded_one_does(text, shape, taps):
    proto, tensors, x = one_conv(text, shape, 1, biased=True, seed=3)
    half = tensors["b"].astype(np.float16).astype(np.float32)  # biases move to the pool of float16
    proto = with_tensors(proto, {"b": half})
    made = rewrite(proto, {"W": params(4, taps=taps)})
    assert_equals_decoded(made, x)
    convs = [n for n in made.proto.graph.node if n.op_type == "Conv"]
    assert len(convs) == 2 and "y" in convs[1].output


@pytest.mark.parametrize("run_as", ["split", "fold"])
@pytest.mark.parametrize("body", ["y = MatMul(x, W)", "y = MatMul(W, x)", "y = Gemm<transB=1>(x, W)"])
def test_products_do_what_the_decoded_one_does(body, run_as):
    rng = np.random.default_rng(4)
    shape = (9, 12) if "transB" in body else (12, 9)
    x = draw(rng, 9, 5) if "(W" in body else draw(rng, 5, 12)
    proto = model(body, "float[a,b] x", "float[c,d] y", {"W": draw(rng, *shape)})
    made = rewrite(proto, {"W": params(3, run=run_as)})
    assert_equals_decoded(made, x)
    assert len([n for n in made.proto.graph.node if n.input[0] == "x" or n.input[1:2] == ["x"]]) == 1


@pytest.mark.parametrize("taps", ["atoms", "both", "codes"])
def test_operations_are_those_of_the_drawn_operators(taps):
    proto, _, x = one_conv("pads=[1,1,1,1]", (16, 12, 3, 3), 1, biased=True, seed=3)
    made = rewrite(proto, {"W": params(5, taps=taps)})
    share = FORMS["pair"].macs(made.weights["W"], made.encoded["W"].params)
    assert operations(made.proto, {"x": x}) == pytest.approx(
        share * operations(proto, {"x": x}), rel=4 * np.finfo(float).eps
    )


def test_taps_in_the_codes_keep_more_where_channels_repeat():
    """Input channels that are copies of four: four atoms of one tap hold all, four of nine taps do not."""
    rng = np.random.default_rng(0)
    weight = draw(rng, 24, 4, 3, 3)[:, rng.integers(0, 4, 12)]
    proto, _, _ = one_conv("pads=[1,1,1,1]", (24, 12, 3, 3), 1, biased=False, seed=3)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W"))
    errors = {
        taps: rewrite(proto, {"W": params(4, taps=taps, levels=127, code_levels=127)}).encoded["W"].error
        for taps in ("atoms", "codes")
    }
    # 127 levels: a step is 2/126 of the largest number, and rounding errs by a third of it in the mean
    assert errors["codes"] < 0.02 < 0.3 < errors["atoms"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"atoms": 99}, "atoms"), ({"atoms": 2.5}, "atoms"), ({"levels": 8}, "levels"),
        ({"run": "fast"}, "run"), ({"code_levels": 1}, "levels"), ({"taps": "none"}, "taps"),
        ({"rank": 3}, "rank"),
        ({"run": None}, "run"),
    ],
)  # fmt: skip
def test_params_without_a_meaning_are_refused_by_name(change, named):
    proto, _, _ = one_conv("pads=[1,1,1,1]", (8, 6, 3, 3), 1, biased=True, seed=3)
    wrong = {k: v for k, v in (params(4)[1] | change).items() if v is not None}
    with pytest.raises(PlanError, match=named):
        rewrite(proto, {"W": ("pair", wrong)})


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(10, 999), st.floats(0.01, 1.0), st.floats(0.1, 1.0)), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.1, 1.0),
    st.floats(0.1, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_both_budgets_hold_and_the_choice_is_near_the_optimum(table, share, lighter):
    items, macs, shares = [], {}, {}
    for i, own in enumerate(table):
        kept = Candidate(f"w{i}", planner.KEEP, {}, 1000, 0.0, 0.0)
        found = [Candidate(f"w{i}", "pair", {"atoms": k}, n, e) for k, (n, e, _) in enumerate(own)]
        shares |= {(f"w{i}", k): s for k, (_, _, s) in enumerate(own)}
        items.append(Item((f"w{i}",), {f"w{i}": (kept, *found)}))
        macs[f"w{i}"] = 1000 * (i + 1)
    whole = sum(macs.values()) + 500

    def left(c):
        return shares[c.weight, c.params["atoms"]] if c.method == "pair" else 1.0

    bound = Operations(whole, whole, int(whole * lighter), macs, left)
    budget = int(1000 * len(items) * share)
    best = None
    for combination in itertools.product(*(item.alone[item.names[0]] for item in items)):
        if sum(c.nbytes for c in combination) <= budget and bound.after(combination) <= bound.budget:
            damage = sum(c.error**2 for c in combination)
            best = damage if best is None else min(best, damage)
    choice = planner.choose(items, {}, budget, {}, bound)
    if best is None:
        assert choice is None
    if choice is None:  # two multipliers reach the hull: what lies beside it may be missed, never a budget
        return
    assert choice.nbytes == sum(c.nbytes for c in choice.candidates.values()) <= budget
    assert bound.after(choice.candidates.values()) <= bound.budget
    # method.md 1.5, for two constraints: within two upgrades' damage of the optimum
    upgrade = max(c.error**2 for item in items for c in item.alone[item.names[0]])
    assert choice.damage <= best + 2 * upgrade + 1e-12


def test_without_a_bound_on_operations_nothing_changes():
    kept = Candidate("w", planner.KEEP, {}, 1000, 0.0, 0.0)
    items = [
        Item(("w",), {"w": (kept, *(Candidate("w", "dp", {"atoms": i}, 90 * i, 1 / i) for i in range(1, 9)))})
    ]
    loose = Operations(100, 100, 100, {"w": 100}, lambda c: 0.5)
    for budget in (100, 300, 700, 1000):
        assert planner.choose(items, {}, budget, {}) == planner.choose(items, {}, budget, {}, loose)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "digits.onnx"
    return out, onnxdp.compress(DIGITS, out, ratio=8, macs=2, **FEW).report


def test_a_model_gets_smaller_and_lighter(halved):
    out, report = halved
    source = onnx.load(DIGITS)
    shape = [d.dim_value or 1 for d in source.graph.input[0].type.tensor_type.shape.dim]
    image = {source.graph.input[0].name: np.zeros(shape, np.float32)}
    assert report.macs.before == operations(source, image)
    assert report.macs.after == operations(onnx.load(out), image)
    assert report.macs.ratio >= 2 and out.stat().st_size <= DIGITS.stat().st_size / 8
    assert report.verification.error < 0.5
    pairs = [line for line in report.lines if line.method == "pair"]
    assert pairs and all("of its operations; " in line.reason for line in pairs)
    assert all(line.reason for line in report.lines)


def test_operations_are_told_in_every_way(halved):
    _, report = halved
    told = json.loads(report.to_json())["macs"]
    assert told == {"before": report.macs.before, "after": report.macs.after, "ratio": report.macs.ratio}
    assert f"macs {report.macs.before} -> {report.macs.after} (2." in tables.report_lines(report, None)[-1]


def test_a_plan_carries_pairs_and_their_reasons(halved, tmp_path):
    out, report = halved
    made = Plan.from_json(report.plan.to_json())
    again = onnxdp.apply(DIGITS, made, tmp_path / "again.onnx").report
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()
    assert again.macs == report.macs and again.lines == report.lines


def test_a_sweep_counts_operations(halved):
    _, report = halved
    (_, point) = onnxdp.sweep(DIGITS, [4, 8], macs=2, **FEW).points
    assert point.sha256 == report.target.sha256 and point.macs == report.macs


def test_operations_alone_leave_half_the_bytes():
    report = onnxdp.compress(DIGITS, None, macs=3, dry_run=True, **FEW).report
    assert report.macs.ratio >= 3 and report.ratio >= 2 and report.plan.target == "macs 3"


@pytest.mark.parametrize(("method", "best"), [("auto", r"ask for --macs \d"), ("quant", "leave --macs out")])
def test_out_of_reach_names_the_best(method, best):
    with pytest.raises(TargetError, match=f"out of reach: the fewest multiply-accumulates .*{best}"):
        onnxdp.plan(DIGITS, ratio=4, macs=500, method=method, **FEW)


@pytest.mark.parametrize("macs", [1, 0, -2, float("nan"), float("inf")])
def test_a_number_of_operations_without_a_meaning_is_refused(macs):
    with pytest.raises(UsageError, match="--macs is original / compressed operations"):
        Settings(macs=macs)


def test_dictionary_pairs_make_runs_lighter_too():
    report = onnxdp.compress(DIGITS, None, ratio=3, macs=2, method="dp", dry_run=True, **FEW).report
    assert report.macs.ratio >= 2 and {c.method for c in report.plan.choices} <= {"dp", "float16"}
