"""Integers of any size come back from their codes; bytes are foreseen; rounding to whole steps."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from rewriting import FORMS, branching, constant, draw, find, model, nodes_of, rewrite, session
from test_forms import SPARED, weight_of
from test_packing import (
    X,
    assert_decode_and_are_no_larger_together,
    assert_decodes,
    finished,
    part_of,
    sheet,
    together,
)
from test_rounding import EPS32, curved, problem, quadratic

import onnxdp
from onnxdp import model as model_file
from onnxdp import refine, walk
from onnxdp.build import Builder, nbytes
from onnxdp.errors import TargetError
from onnxdp.methods import codes, escapes, packing, streams
from onnxdp.methods.codes import CODES, EARLY, MOST, bits_of, code_for, like
from onnxdp.methods.escapes import Coded
from onnxdp.methods.form import Task
from onnxdp.methods.packing import Packing
from onnxdp.methods.problem import coded_of
from onnxdp.methods.rounding import Curvature, Lattice
from onnxdp.methods.roundings import RATES, Roundings
from onnxdp.methods.streams import Part
from onnxdp.passes import GatherConstants, ReplaceWeights, ShortenNames
from onnxdp.records import Weight
from onnxdp.settings import Settings

QUANT = FORMS["quant"]
CODED = [code for _, code in (*CODES, *EARLY)]
OPSETS = [11, 13, 17, 21]
NAMED = pytest.mark.parametrize("code", CODED, ids=lambda c: f"{'.'.join(map(str, c.levels[:-1]))}+{c.raw}")
FOLDED = {"Identity", "Cast"}
"""What stands at the outputs of test models."""


def laplace(size, spread, seed=0, most=MOST):
    """Integers as weights round to: many zeros, few large ones."""
    drawn = np.random.default_rng(seed).laplace(size=size) * spread
    return np.rint(np.clip(drawn, -most, most)).astype(np.int8 if most == MOST else np.int16)


def meant_for(code, size, seed=0):
    """About what a code is for: some integers of every stream."""
    bits = next(most for most, c in (*CODES, *EARLY) if c == code)
    return laplace(size, 0.35 * 2.0 ** (bits - 1) if bits > 1 else 0.15, seed, code.most)


def within(code, numbers):
    """Integers of the type of a code, some of them as large as they may be, or their lowest bits anything."""
    wide = np.array(numbers, np.int64) * (1 << code.raw) + np.arange(len(numbers)) % 7 * (code.raw > 0)
    return np.clip(wide, -code.most, code.most).astype(code.kind)


some_integers = st.one_of(
    st.lists(st.integers(-MOST, MOST), min_size=1, max_size=300),
    st.lists(st.integers(-1, 1), min_size=1, max_size=300),
    st.builds(lambda n, size: [n] * size, st.integers(-MOST, MOST), st.integers(1, 300)),
    st.builds(lambda at, size: [0] * at + [MOST] + [0] * size, st.integers(0, 99), st.integers(0, 99)),
    st.builds(lambda size, scale, s: laplace(size, scale, s).tolist(), st.integers(1, 300), st.floats(0, 60),
              st.integers(0, 9)),
)  # fmt: skip


# ---- the digits


@NAMED
@given(numbers=some_integers)
@settings(max_examples=100, deadline=None)
def test_any_integers_come_back(code, numbers):
    integers = within(code, numbers)
    coded = Coded.of(integers, code)
    assert coded.size == integers.size
    assert coded.integers().dtype == code.kind and np.array_equal(coded.integers(), integers)
    again = Coded.unpacked(coded.code, coded.words(), integers.size)
    assert np.array_equal(again.integers(), integers)
    for a, b in zip(again.streams, coded.streams, strict=True):
        assert np.array_equal(a, b)


@NAMED
@given(numbers=some_integers)
@settings(max_examples=50, deadline=None)
def test_a_stream_has_a_digit_for_every_escape_of_the_one_before(code, numbers):
    coded = Coded.of(within(code, numbers), code)
    stages = coded.code.stages
    assert len(coded.streams) == len(stages)
    begun = stages[:-1] if stages[-1].last else stages
    assert begun == code.stages[: len(begun)]
    left = coded.size
    for stage, digits in zip(stages, coded.streams, strict=True):
        assert digits.max(initial=0) < stage.levels and len(digits) == -(-left // stage.integers)
        left = 0 if stage.last else np.count_nonzero(digits == stage.levels - 1) * stage.integers
    assert left == 0


@pytest.mark.parametrize("zeros", [1, 2, 7, 20, 5003])
@NAMED
def test_zeros_come_back(code, zeros):
    integers = np.zeros(zeros, code.kind)
    coded = Coded.of(integers, code)
    words = coded.words()
    assert np.array_equal(Coded.unpacked(coded.code, words, zeros).integers(), integers)
    # a bit each, or bytes where they are few
    assert sum(w.nbytes for w in words) <= zeros * (1 + code.raw) // 8 + 64


# ---- bits


@NAMED
def test_bits_of_several_weights_add_up(code):
    parts = [meant_for(code, n, seed=n) for n in (120, 960, 16_800)]
    parts = [p[: codes._seams(p, code)[-1]] for p in parts]  # whole digits
    assert sum(p.size for p in parts) > 15_000
    whole = sum(bits_of(p, code) for p in parts)
    assert bits_of(np.concatenate(parts), code) == pytest.approx(whole, rel=1e-12)
    # order matters only where a digit tells of several
    if all(stage.integers == 1 for stage in code.stages):
        assert bits_of(np.concatenate(parts)[::-1], code) == pytest.approx(whole, rel=1e-12)


@NAMED
@given(numbers=some_integers)
@settings(max_examples=50, deadline=None)
def test_what_lies_between_seams_takes_the_same_bits_anywhere(code, numbers):
    integers = np.resize(within(code, numbers), 3000)
    seams = codes._seams(integers, code)
    first, last = seams[len(seams) // 3], seams[-1]
    turned = np.concatenate([integers[first:last], integers[:first], integers[last:]])
    assert bits_of(turned, code) == bits_of(integers, code)


@NAMED
def test_bits_are_those_of_the_words(code):
    integers = meant_for(code, 400_000)
    coded = Coded.of(integers, code)
    assert len(coded.streams) > 2
    assert not code.raw or coded.words()[-1].nbytes == integers.size * code.raw / 8
    for digits, words, levels in zip(coded.streams, coded.words(), coded.code.levels, strict=not code.raw):
        least = min(p.nbytes(digits.size) for p in packing.offered(levels, 17))
        assert (
            words.nbytes == Packing.best(levels, digits.size, 17, streamed=True).nbytes(digits.size) >= least
        )
    packed = sum(
        min(p.nbytes(d.size) for p in packing.offered(n, 17))
        for n, d in zip(coded.code.levels, coded.streams, strict=True)
    )
    packed += integers.size * code.raw / 8
    # a digit's bits are those of 9600: a last word there, of 4 bytes, and one in each stream here
    slack = 4 * len(coded.streams) + packed * 4 / (9600 / 32)
    assert abs(packed - bits_of(integers, coded.code) / 8) <= slack


def test_codes_stay_near_the_entropy():
    """Sizes that fall off exponentially are within a fifth of a bit, at few bits."""
    for spread in np.geomspace(0.15, 1.6, 12):
        integers = laplace(1 << 16, spread)
        share = np.unique(integers, return_counts=True)[1] / integers.size
        entropy = -float(np.sum(share * np.log2(share)))
        assert entropy <= min(bits_of(integers, c) for c in CODED) / integers.size <= entropy + 0.2


def test_streams_that_are_left_out_make_files_smaller():
    """What decodes a stream is bytes, too: few escapes are not worth it."""
    for code in CODED:
        for size in (30, 300, 3000, 30_000):
            integers = meant_for(code, size, seed=size)

            def whole(coded):
                return nbytes(17, lambda build: escapes.draw(build, coded, "w", [coded.size], wide=True))

            cut = Coded.of(integers, code)
            with mock.patch.object(escapes, "cut", lambda code, found: (0, code)):
                full = Coded.of(integers, code)
            if len(full.streams) == len(code.stages):
                assert whole(cut) <= whole(full) + 64  # what decodes one is about as long as another


@pytest.mark.parametrize("size", [10_000, 65_536, 70_001, 100_003, 300_000])
def test_what_stands_for_a_weight_takes_its_bits(size):
    for bits in RATES:
        made = like("w", size, bits)
        assert made.shape == (size,) and made.dtype == code_for(bits).kind
        assert 0.995 * bits <= bits_of(made, code_for(bits)) / size <= bits


def test_what_stands_for_a_weight_is_its_own():
    for size in (100, 5000, 70_000):
        made = [like(name, size, 2.0) for name in ("a", "a", "b", "c")]
        assert np.array_equal(made[0], made[1])
        assert not np.array_equal(made[0], made[2]) and not np.array_equal(made[2], made[3])


# ---- the operators


def drawn_integers(opset, cases):
    """A model whose outputs are the integers of (code, integers), drawn and cut to their size."""
    made, paper = sheet(opset)
    values = []
    for i, (code, integers) in enumerate(cases):
        build = Builder(made.graph, f"w{i}", paper)
        value = escapes.draw(build, Coded.of(integers, code), f"w{i}", [integers.size], wide=i % 2 == 1)
        values.append(build.node("Div", [value, build.constant("unit", np.float32(code.unit))], "integers"))
        assert not build.nodes  # constants only
    return finished(made, paper, values, [1] * len(cases))


@pytest.mark.parametrize("opset", OPSETS)
@NAMED
def test_runtime_and_reference_decode_the_integers_and_nothing_is_left(opset, code, tmp_path):
    numbers = [meant_for(code, n, seed=n) for n in (1, 2, 5, 24, 700, 5003)]
    numbers += [np.full(30, n, code.kind) for n in (0, 1, -code.most, code.most)]
    numbers += [within(code, n) for n in ([0] * 50 + [MOST] + [0] * 51, range(-MOST, MOST + 1))]
    proto = drawn_integers(opset, [(code, n) for n in numbers])
    onnx.checker.check_model(proto, full_check=True)
    got = session(proto, str(tmp_path / "o.onnx")).run(None, X)[1:]
    same = ReferenceEvaluator(proto).run(None, X)[1:]
    for a, b, want in zip(got, same, numbers, strict=True):
        assert a.shape == want.shape and np.array_equal(a, want) and np.array_equal(b, want)
    left = onnx.load(tmp_path / "o.onnx")
    assert {n.op_type for n in left.graph.node} <= {"Identity"}
    assert sum(int(np.prod(t.dims)) for t in left.graph.initializer) <= sum(n.size for n in numbers)


def untold(proto):
    """Outputs of Compress of which the file does not say how many there are."""
    told = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in proto.graph.value_info
        if v.type.tensor_type.elem_type == onnx.TensorProto.INT32
    }
    places = [o for n in nodes_of(proto) if n.op_type == "Compress" for o in n.output]
    assert places
    return [p for p in places if not all(told.get(p) or [0])]


def convs(opset=17, wide=8, **kinds):
    """A chain of Conv, and params for each."""
    rng = np.random.default_rng(3)
    tensors = {n: (rng.laplace(size=(wide, wide, 3, 3)) / wide).astype(np.float32) for n in kinds}
    names = ["x", *(f"t{i}" for i in range(len(kinds) - 1)), "y"]
    body = " ".join(f"{b} = Conv({a}, {w})" for a, b, w in zip(names, names[1:], kinds, strict=False))
    size = 2 * len(kinds) + 2
    proto = model(body, f"float[N,{wide},{size},{size}] x", f"float[N,{wide},2,2] y", tensors, opset=opset)
    feed = {"x": draw(rng, 2, wide, size, size)}
    return proto, {n: ("quant", k) for n, k in kinds.items()}, feed


def test_codes_that_begin_alike_keep_words_of_their_own():
    proto, params, feed = convs(
        wide=24, a={"bits": 2.375}, b={"bits": 3.25}, c={"bits": 2.5}, d={"bits": 3.0}
    )
    with mock.patch.object(streams, "common", lambda parts: {code: code for _, code in parts}):
        rewrite(proto, params).assert_equals_dense(feed)


def test_branches_may_call_their_weights_alike():
    rng = np.random.default_rng(0)

    def branch(name):
        w = numpy_helper.from_array(draw(rng, 300, 300) / np.float32(17), "W")
        out = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("MatMul", ["x", "W"], [name])], name, [], [out], [w])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("t"), else_branch=branch("e"))
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 300]) for n in "xy"]
    cond = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [ends[0], cond], [ends[1]])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = onnxdp.compress(proto, ratio=10, samples=64).model
    x = draw(rng, 8, 300)
    for cond in (True, False):
        feed = {"x": x, "c": np.array(cond)}
        (before,), (after,) = (session(m).run(None, feed) for m in (proto, made))
        # at most 3.2 bits a number: less than a quarter is lost, and all of it by the other branch's weight
        assert np.linalg.norm(after - before) < 0.5 * np.linalg.norm(before)


def test_a_size_beyond_which_arrays_go_is_refused_with_the_bytes_there_are(monkeypatch):
    """Steps of 1e-8 are no float16, as which outlines would count them that nobody tells."""
    monkeypatch.setattr(Roundings, "foreseen", lambda self, outline: outline)
    rng = np.random.default_rng(0)
    tensors = {n: draw(rng, 128, 128) * np.float32(1e-7) for n in "AB"} | {"s": np.array(1e6, np.float32)}
    body = "a = MatMul(x, A) b = Mul(a, s) c = Relu(b) d = MatMul(c, B) y = Mul(d, s)"
    proto = model(body, "float[N,128] x", "float[N,128] y", tensors)
    with pytest.raises(TargetError, match="best reachable") as first:
        onnxdp.compress(proto, size="1000")
    foreseen = re.search(r"--size (\d+)", str(first.value))[1]
    with pytest.raises(TargetError, match="smallest result takes") as second:
        onnxdp.compress(proto, size=foreseen)
    real = int(re.search(r"--size (\d+)", str(second.value))[1])
    assert real > int(foreseen) and onnxdp.compress(proto, size=str(real)).report.target.nbytes <= real


@given(
    spare_bytes=st.integers(-3000, 3000),
    size=st.integers(5000, 200_000),
    jump=st.integers(1, 800),
)
def test_filling_keeps_the_most_that_fits(spare_bytes, size, jump):
    """Bytes follow the bits asked for in jumps; what is kept fits if anything that was tried does."""
    tried = {}

    def fit(spare):
        taken = -(-int(spare * size / 8) // jump) * jump
        tried[taken] = spare_bytes - taken
        return taken, None

    kept, _ = refine._filled(fit, lambda taken: (spare_bytes - taken, 64), mock.Mock(size=size))
    fitting = [left for left in tried.values() if left >= 0]
    assert tried[kept] == (min(fitting) if fitting else tried[kept])
    assert len(tried) <= 6


def test_files_tell_how_many_escapes_there_are(tmp_path):
    proto, params, feed = convs(wide=32, A={"bits": 2.0}, B={"bits": 3.0}, C={"bits": 1.0})
    made = rewrite(proto, params)
    assert not untold(made.proto)
    held, found = find(proto)
    ReplaceWeights(found, list(made.encoded.values()), FORMS, {}, "test")(held.ir)
    GatherConstants()(held.ir)
    shorten = ShortenNames(held.original_value_info)
    shorten(held.ir)
    held.original_value_info = shorten.value_info
    copied = model_file.copy(held)
    counts = {len(walk.told(m.ir)) for m in (held, copied)}
    assert len(counts) == 1 and counts.pop() > 3
    for name, external in (("in", False), ("out", True)):
        for m in (held, copied):
            path = tmp_path / f"{name}.onnx"
            model_file.write(replace(m, external=external), path, overwrite=True)
            assert len(list(tmp_path.glob(f"{name}*"))) == 1 + external
            onnx.checker.check_model(path, full_check=True)
            read = onnx.load(path)
            assert not untold(read)
            assert len(read.graph.value_info) == sum(n.op_type == "Compress" for n in read.graph.node)
    short = model_file.serialize(held)
    assert short.ByteSize() == model_file.output_size(held) < made.proto.ByteSize()
    assert np.array_equal(session(short).run(None, feed)[0], session(made.proto).run(None, feed)[0])
    # what was written is read, and what it says stays
    again = model_file.read(tmp_path / "in.onnx")
    assert not untold(model_file.serialize(again))


@pytest.mark.parametrize("opset", OPSETS)
def test_weights_of_several_codes_and_levels_share_streams(opset, tmp_path):
    kinds = [{"bits": b} for b in (0.5, 1.25, 2.0, 4.0, 5.0, 7.0, 10.5)] + [{"levels": n} for n in (3, 1625)]
    kinds = {f"W{i}": k for i, k in enumerate([*kinds, *kinds])}
    proto, params, feed = convs(opset, **kinds)
    made = rewrite(proto, params)
    made.assert_equals_dense(feed)
    session(made.proto, str(tmp_path / "o.onnx"))
    left = onnx.load(tmp_path / "o.onnx")
    assert [n.op_type for n in left.graph.node] == ["Conv"] * len(kinds)
    # together: as many chains as codes, not as weights
    assert sum(n.op_type == "Range" for n in made.proto.graph.node) < 5 * 4 + 2
    assert not untold(made.proto)


def coded_part(bits, shape, *, dtype="float32", seed=0):
    """A rounded weight whose steps lie along the first axis."""
    size = int(np.prod(shape))
    steps = (np.random.default_rng(seed).random(shape[0]) + 0.25).astype(np.float16).astype(np.float32)
    weight = Weight(f"layer{seed}.weight", "Conv", ("node",), shape, dtype, 4 * size, inputs=1, outputs=1)
    code = code_for(bits)
    words = Coded.of(meant_for(code, size, seed), code)
    return Part(weight, code, words, shape, steps.reshape(-1, *[1] * (len(shape) - 1)), half=True)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.5, 1.0, 1.25, 2.0, 5.0, 7.0, 9.0, 11.0, 3, 84, 1625]),
            st.integers(1, 9),
            st.integers(1, 40),
        ),
        min_size=1,
        max_size=6,
    )
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_weights_decode_and_are_no_larger_together(cases):
    parts = [
        (coded_part if isinstance(n, float) else part_of)(n, shape, seed=i)
        for i, (n, *shape) in enumerate((n, rows, columns) for n, rows, columns in cases)
        for shape in [tuple(shape)]
    ]
    assert_decode_and_are_no_larger_together(parts)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_of_one_code_decode_from_long_streams(dtype, monkeypatch):
    parts = [
        coded_part(b, (60, 80), seed=i, dtype=dtype)
        for i, b in enumerate([1.0, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0])
    ]
    short = together(17, parts)
    monkeypatch.setattr(packing, "_SPREAD", 50)
    long = together(17, parts)
    assert_decodes(long, parts)
    assert long != short
    monkeypatch.setattr(streams, "SMALL", 100)
    assert_decodes(together(17, parts), parts)


@pytest.mark.parametrize(
    ("op", "size", "kind"),
    [("Conv", (9, 80), "INT16"), ("Conv", (1100, 300), "INT8"), ("LSTM", (1, 1100, 300), "INT16")],
)
def test_escapes_of_small_and_of_lstm_weights_are_scattered_in_16_bits(op, size, kind):
    """OpenVINO (2026.4) folds no ScatterElements of 8 bits, and refused an LSTM of dtln_1 for that."""
    parts = [coded_part(b, size, seed=i) for i, b in enumerate([1.0, 2.0, 4.0])]
    parts = [replace(p, weight=replace(p.weight, op=op)) for p in parts]
    proto = onnx.shape_inference.infer_shapes(together(17, parts), data_prop=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.output)}
    scattered = [n for n in proto.graph.node if n.op_type == "ScatterElements"]
    assert scattered and {types[n.output[0]] for n in scattered} == {onnx.TensorProto.DataType.Value(kind)}


@pytest.mark.parametrize("bits", [0.75, 2.0, 4.0, 5.0, 7.0, 10.5])
def test_a_large_weight_decodes_and_folds(bits, tmp_path):
    weight = weight_of((1100, 1024), op="Gemm")  # more digits than are taken apart by division
    assert weight.size > packing._SPREAD and weight.size > streams.SMALL
    sketch = QUANT.outline(weight, {"bits": bits})
    made, paper = sheet(17)
    value = QUANT.emit(Builder(made.graph, "W", paper), weight, sketch, None)
    proto = finished(made, paper, [value], [2])
    got = session(proto, str(tmp_path / "o.onnx")).run(None, X)[1]
    assert np.array_equal(got, QUANT.decode(weight, sketch))
    assert {n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node} <= FOLDED
    assert len(np.unique(got)) > 3


def test_a_weight_inside_the_body_of_an_if():
    rng = np.random.default_rng(3)
    inside = constant("w", draw(rng, 64, 60))
    text = branching("float[N,60]", f"{inside} p = MatMul(x, w)", "q = MatMul(x, V)")
    proto = model(text, "float[N,64] x, bool cond", "float[N,60] y", {"V": draw(rng, 64, 60)})
    made = rewrite(proto, {"w": ("quant", {"bits": 3.0}), "V": ("quant", {"bits": 1.25})})
    assert not untold(made.proto)
    for cond in (True, False):
        made.assert_equals_dense({"x": draw(rng, 4, 64), "cond": np.array(cond)})


# ---- rounding within so many bits


def encoded(weight, tensor, params, samples=None):
    return QUANT.encode(Task(weight, tensor, samples, False), params, Settings(), device="cpu")


def integers_of(weight, made):
    return coded_of(weight, made).integers()


def trained(shape, kind, seed=1):
    """Numbers whose rows differ in size, as those of trained weights do."""
    rng = np.random.default_rng(seed)
    numbers = rng.laplace(size=shape) if kind == "laplace" else rng.standard_normal(shape)
    sizes = np.exp(rng.normal(0, 0.3, (shape[0], *[1] * (len(shape) - 1))))
    return (0.05 * numbers * sizes).astype(np.float32)


def seen(inputs, seed=2, rows=300):
    """Samples whose columns resemble one another, (1, rows, inputs)."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) / inputs**0.5 + 0.1
    return (rng.standard_normal((1, rows, inputs)) @ mix / rows**0.5).astype(np.float32)


@pytest.mark.parametrize("bits", [0.375, 0.5, 0.75, 1.25, 2.0, 2.25, 3.375, 4.5, 6.0, 7.5, 9.0, 10.5])
@pytest.mark.parametrize("kind", ["gauss", "laplace"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_weight_takes_its_bits_and_no_more(bits, kind, sampled):
    weight = weight_of((100, 120), op="Gemm")
    tensor = trained((100, 120), kind)
    made = encoded(weight, tensor, {"bits": bits}, seen(120) if sampled else None)
    taken = bits_of(integers_of(weight, made), code_for(bits)) / weight.size
    assert (0.995 if bits > 0.5 else 0.99) * bits <= taken <= bits  # where most are zero, sweeps go in steps


@pytest.mark.parametrize("bits", [0.5, 1.25, 2.0, 3.375, 4.5, 6.0, 8.0, 10.5])
def test_cost_is_never_less_than_what_is_stored(bits):
    """But for streams that are left out and words that are short, because what decodes them is shorter."""
    for shape in ((30, 40), (100, 120), (256, 288)):
        weight = weight_of(shape, op="Gemm")
        made = encoded(weight, trained(shape, "laplace"), {"bits": bits})
        cost = QUANT.cost(weight, {"bits": bits})
        assert 0.99 * cost - SPARED <= made.nbytes <= cost + SPARED


@pytest.mark.parametrize("levels", [3, 5, 7, 16, 40, 255, 1625])
@pytest.mark.parametrize("sampled", [False, True])
def test_codes_lose_less_than_even_levels_of_as_many_bytes(levels, sampled):
    weight = weight_of((128, 144), op="Gemm")
    tensor, samples = trained((128, 144), "laplace"), seen(144) if sampled else None
    even = QUANT.cost(weight, {"levels": levels})
    bits = max(b for b in RATES if QUANT.cost(weight, {"bits": b}) <= even)
    errors = [encoded(weight, tensor, p, samples).error for p in ({"bits": bits}, {"levels": levels})]
    assert errors[0] < errors[1]


def test_more_bits_lose_less():
    weight = weight_of((64, 72), op="Gemm")
    tensor = trained((64, 72), "gauss")
    errors = [encoded(weight, tensor, {"bits": b}).error for b in RATES[::4]]
    assert all(b < a for a, b in pairwise(errors))


def test_errors_are_near_those_of_entropy_coding():
    """Entropy coded whole steps are 0.255 bits above the bound of Gaussians (Gish and Pierce 1968)."""
    weight = weight_of((100, 200), op="Gemm")
    tensor = np.random.default_rng(0).standard_normal((100, 200)).astype(np.float32)
    for bits in (3.0, 4.0, 5.0, 7.0, 9.0):
        made = encoded(weight, tensor, {"bits": bits})
        share = np.unique(integers_of(weight, made), return_counts=True)[1] / weight.size
        entropy = -float(np.sum(share * np.log2(share)))
        entropy += (share.size - 1) / (2 * weight.size * np.log(2))  # counts make it less (Miller 1955)
        # 20000 numbers: the logarithm of their squares' mean, and of the errors', is good to 0.01
        assert abs(entropy - 0.255 + np.log2(made.error)) < 0.03


@given(
    shape=st.sampled_from([(1, 1), (1, 7), (9, 1), (5, 6), (12, 20), (40, 50)]),
    bits=st.sampled_from(RATES),
    kind=st.sampled_from(["gauss", "zero", "one", "huge", "columns", "equal"]),
    sampled=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_odd_weights_are_rounded_like_any_other(shape, bits, kind, sampled, seed):
    tensor = draw(np.random.default_rng(seed), *shape)
    if kind == "zero":
        tensor[:] = 0
    elif kind == "one":
        tensor[:] = 0
        tensor[-1, -1] = 0.3
    elif kind == "huge":
        tensor[0, 0] = 1e4
    elif kind == "columns":
        tensor[::2] = 0
    elif kind == "equal":
        tensor[:] = 0.25
    weight = weight_of(shape, op="Gemm")
    made = encoded(weight, tensor, {"bits": bits}, seen(shape[1]) if sampled else None)
    integers, back = integers_of(weight, made).astype(int), QUANT.decode(weight, made)
    code = code_for(bits)
    assert abs(integers).max() <= code.most
    assert np.isfinite(back).all() and np.isfinite(made.error) and back.shape == shape
    assert not back[~tensor.any(axis=1)].any()
    if kind == "zero":
        assert made.error == 0 and not integers.any()
    # so few zeros that one digit is more
    assert bits_of(integers.astype(code.kind), code) <= max(bits * weight.size, 2)


@pytest.mark.parametrize("bits", [1.25, 2.0, 6.0, 8.0])
@pytest.mark.parametrize("kept", [1, 20, 400])
@pytest.mark.parametrize("sampled", [False, True])
def test_more_bits_than_a_sparse_weight_can_use_do_no_harm(bits, kept, sampled):
    """Where few numbers are not zero, no step takes so many bits; it must not become smaller and smaller."""
    rng = np.random.default_rng(kept)
    tensor = np.zeros(64 * 72, np.float32)
    tensor[rng.choice(tensor.size, kept, replace=False)] = rng.standard_normal(kept)
    weight, tensor = weight_of((64, 72), op="Gemm"), tensor.reshape(64, 72)
    samples = seen(72) if sampled else None
    made = encoded(weight, tensor, {"bits": bits}, samples)
    few = encoded(weight, tensor, {"levels": 5}, samples)  # 2.5 bits
    # some bits are fewer than those of 5 levels; squares are summed up in float32
    assert made.error <= (few.error if bits > 2.4 or kept < 400 else 1.5 * few.error) + 64 * EPS32


@pytest.mark.parametrize("times", [1, 5, 50, 1000])
@pytest.mark.parametrize("sampled", [False, True])
def test_one_huge_number_loses_less_than_with_even_levels(times, sampled):
    tensor = trained((64, 72), "gauss")
    tensor[5, 7] = times * np.abs(tensor).max()
    weight, samples = weight_of((64, 72), op="Gemm"), seen(72) if sampled else None
    made = encoded(weight, tensor, {"bits": 4.0}, samples)
    assert abs(integers_of(weight, made).astype(int)).max() <= MOST
    assert made.error < encoded(weight, tensor, {"levels": 16}, samples).error


@pytest.mark.parametrize("bits", [0.5, 1.25, 3.0, 6.0, 8.5, 11.0])
@pytest.mark.parametrize(
    ("dtype", "kind", "eps"), [("float16", "float16", 2.0**-10), ("float64", "double", EPS32)]
)
def test_weights_of_other_types(dtype, kind, eps, bits):
    rng = np.random.default_rng(3)
    proto = model("y = MatMul(x, W)", f"{kind}[N,8] x", f"{kind}[N,6] y", {"W": draw(rng, 8, 6, dtype=dtype)})
    made = rewrite(proto, {"W": ("quant", {"bits": bits})})
    made.assert_equals_dense({"x": draw(rng, 4, 8, dtype=dtype)}, eps=eps)


def test_quick_rounding_says_about_what_care_would():
    weight = weight_of((100, 120), op="Gemm")
    for kind in ("gauss", "laplace"):
        task = Task(weight, trained((100, 120), kind), seen(120), False)
        for bits in (1.25, 2.5, 4.5, 8.0):
            made = [
                QUANT.encode(replace(task, quick=q), {"bits": bits}, Settings(), device="cpu").error
                for q in (True, False)
            ]
            assert 0.9 < made[1] / made[0] < 1.05


@pytest.mark.parametrize("mean", [0.5, 5.0], ids=["weakly", "strongly"])
@pytest.mark.parametrize("bits", [1.0, 2.0, 2.75])
@pytest.mark.parametrize("kind", ["alike", "positive", "shifted"])
def test_numbers_and_inputs_with_a_mean_are_rounded_as_well_with_care(kind, bits, mean):
    """Sweeps at larger steps took more bits, steps were doubled, and all numbers were zero in the end."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((100, 100)).astype(np.float32)
    w = {"alike": 1 + w / 1000, "positive": np.abs(w), "shifted": w + 2}[kind]
    x = np.maximum(rng.standard_normal((1, 200, 100)) + mean, 0).astype(np.float32) / np.float32(200**0.5)
    task = Task(weight_of((100, 100), op="MatMul"), w, x, False)
    quick, care = (
        QUANT.encode(replace(task, quick=q), {"bits": bits}, Settings(), device="cpu").error
        for q in (True, False)
    )
    assert care < 1.5 * quick < 0.3


# ---- lattices


@given(
    inputs=st.integers(1, 60), outputs=st.integers(1, 6), stack=st.sampled_from([1, 2]),
    coarse=st.sampled_from([0.02, 0.3, 1.0, 3.0]), most=st.sampled_from([1, 3, MOST]),
    seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_sweeps_at_one_factor_never_lose_more(inputs, outputs, stack, coarse, most, seed):
    w, moment = problem(inputs, outputs, seed, stack)
    curvature = curved(moment)
    steps = coarse * np.sqrt(np.mean(w * w, axis=1))
    lattice = Lattice(w, curvature, steps, parts=1)
    order = np.argsort(curvature.order, axis=-1)
    h = np.take_along_axis(
        np.take_along_axis(curvature.moment, order[:, :, None], 1), order[:, None, :], 2
    ).astype(np.float64)

    def lost(factor):
        q = lattice.integers.astype(np.float64)
        assert np.abs(q).max() <= most and lattice.integers.dtype == np.int16
        return quadratic(h, w - factor * steps[:, None, :] * q)

    for factor in (1.0, 0.7):
        lattice.sweep(factor, most) if factor < 1 else lattice.round(factor, most)
        losses = [lost(factor)]
        for _ in range(4):
            lattice.sweep(factor, most)
            losses.append(lost(factor))
        # sums of `inputs` products in float32, updated `inputs` times; of sizes up to w's and q's
        q = factor * steps[:, None, :] * np.abs(lattice.integers)
        slack = 4 * inputs * EPS32 * quadratic(np.abs(h), np.abs(w) + q)
        assert all(np.all(b <= a + slack) for a, b in pairwise(losses))


@given(inputs=st.integers(1, 60), outputs=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_refitted_steps_lose_no_more_and_errors_are_what_they_say(inputs, outputs, seed):
    w, moment = problem(inputs, outputs, seed)
    curvature = curved(moment)
    steps = 0.5 * np.sqrt(np.mean(w * w, axis=1))
    lattice = Lattice(w, curvature, steps, parts=1)
    lattice.round(0.9, MOST)
    lattice.sweep(0.9, MOST)
    made = lattice.rounded()
    assert np.array_equal(made.digits, lattice.integers) and np.all(made.scale > 0)
    q = made.digits.astype(np.float64)
    damped = moment.astype(np.float64) + curvature.damping[:, None, None] * np.eye(inputs)
    before = quadratic(damped, w - 0.9 * steps[:, None, :] * q)
    after = quadratic(damped, w - made.scale[:, None, :] * q)
    slack = 8 * inputs * EPS32 * quadratic(np.abs(damped), np.abs(w) + made.scale[:, None, :] * np.abs(q))
    assert np.all(after <= before + slack)
    assert np.all(np.abs(made.error - quadratic(moment, w - made.scale[:, None, :] * q)) <= slack)
    assert np.all(np.abs(made.energy - quadratic(moment, w)) <= slack)


def test_without_samples_numbers_are_rounded_to_the_nearest_step():
    w = np.random.default_rng(0).standard_normal((1, 30, 5)).astype(np.float32)
    curvature = Curvature.flat(30, np.zeros(1, np.float32))
    steps = np.full((1, 5), 0.25, np.float32)
    lattice = Lattice(w, curvature, steps, parts=1)
    for go in (lattice.round, lattice.sweep):
        go(0.5, MOST)
        assert np.array_equal(lattice.integers, np.rint(w / np.float32(0.125)))


# ---- what is offered


def test_small_and_large_models_and_old_operators_keep_even_levels():
    """Codes have operators; raw bits take memory while a session is made."""
    weight = weight_of((60, 72), op="Gemm")
    tensor = trained((60, 72), "gauss")

    def kinds(**how):
        task = Task(weight, tensor, None, True, **how)
        solved = QUANT.solve([task], Settings(), device="cpu")
        return {next(iter(c.params)) for (c,) in solved.candidates()}

    assert kinds() == kinds(total=16_400, bits=4.0) == {"bits"}
    assert kinds(total=10**7, bits=4.0) == {"bits", "levels"}
    assert kinds(opset=10) == kinds(opset=9) == {"levels"}
    assert kinds(total=16_000, bits=4.0) == {"levels"}  # 8000 bytes


@pytest.mark.parametrize(("total", "early"), [(1 << 21, True), (1 + (1 << 21), False)])
def test_small_models_have_raw_bits_early(total, early):
    weight = weight_of((60, 72), op="Gemm")
    task = Task(weight, trained((60, 72), "gauss"), None, True, bits=4.0, total=total)
    offered = [c.params["bits"] for (c,) in QUANT.solve([task], Settings(), device="cpu").candidates()]
    assert len(offered) == len(set(offered)) > 60 and offered == sorted(offered)
    assert {code_for(b).raw > 0 for b in offered if 3.25 < b < 5.5} == {early}
    assert not any(code_for(b).raw for b in offered if b <= 3.25)


def test_raw_bits_save_what_they_cost_memory_for():
    """Something each, a tenth of a bit on average, on numbers whose sizes fall off as those of weights do."""
    saved = []
    for bits in (b for b in RATES if codes.is_early(b)):
        integers, plain = like("w", 1 << 16, bits), code_for(bits - 1 / 16)
        few = np.clip(integers, -MOST, MOST).astype(plain.kind)
        saved.append((bits_of(few, plain) - bits_of(integers, code_for(bits))) / integers.size)
    assert min(saved) > 0 and np.mean(saved) > 0.1


def test_words_are_those_that_any_reader_unpacks():
    """Digits lie in a file as Packing of the oldest set packs them: an encoding is no model's own."""
    for code in CODED:
        coded = Coded.of(meant_for(code, 5003), code)
        for levels, digits, words in zip(
            coded.code.levels, coded.streams, coded.words(), strict=not code.raw
        ):
            best = Packing.best(levels, digits.size, 11, streamed=True)
            assert np.array_equal(best.unpack(words, digits.size), digits)
