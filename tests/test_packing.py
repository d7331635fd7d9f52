"""Packed integers come back exactly, everywhere; small vectors share one float16 initializer."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from rewriting import FORMS, branching, find, model, nodes_of, rewrite, session, tensors_of, with_tensors

from onnxdp import model as model_file
from onnxdp import walk, weights
from onnxdp.build import Builder, Paper, half_of, nbytes
from onnxdp.methods import packing as packing_file
from onnxdp.methods import streams
from onnxdp.methods.escapes import Coded
from onnxdp.methods.form import Task
from onnxdp.methods.packing import BITS, Grid, Packing, digit_type, offered, unit
from onnxdp.methods.streams import Part
from onnxdp.passes import GatherConstants, ReplaceWeights, ShortenNames
from onnxdp.records import Weight
from onnxdp.settings import Settings

LEVELS = [*(n for n in range(2, 256) if n % 2 or n <= 128), 257, 1625, 2047]
OPSETS = [7, 9, 10, 11, 13, 17, 21, 23]
X = {"x": np.zeros(1, np.float32)}


def sheet(opset: int) -> tuple[ir.Model, Paper]:
    """A model that copies x, and paper to draw on."""
    x, y = ir.val("x", ir.DataType.FLOAT, [1]), ir.val("y", ir.DataType.FLOAT, [1])
    graph = ir.Graph(
        [x], [y], nodes=[ir.node("Identity", [x], outputs=[y])], opset_imports={"": opset}, name="g"
    )
    made = ir.Model(graph, ir_version=10 if opset > 20 else 8)
    return made, Paper(made)


def finished(made: ir.Model, paper: Paper, values: list[ir.Value], ranks: list[int]) -> onnx.ModelProto:
    """Serialize the model with the values as further outputs."""
    for value, rank in zip(values, ranks, strict=True):
        node = ir.node("Identity", [value])  # a graph's output comes from a node
        made.graph.append(node)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([None] * rank)
        made.graph.outputs.append(node.outputs[0])
    paper.finish()
    proto = ir.to_proto(made)
    told = {name for _, name in walk.told(made)}
    kept = [info for info in proto.graph.value_info if info.name in told]
    del proto.graph.value_info[:]  # as model_file leaves it
    proto.graph.value_info.extend(kept)
    onnx.checker.check_model(proto)
    return proto


def digits_of(levels: int, size: int) -> np.ndarray:
    """Digits of which the last, padded word's is the largest."""
    drawn = np.random.default_rng(levels).integers(0, levels, size, dtype=digit_type(levels))
    drawn[-3:] = levels - 1
    return drawn


def wanted(levels: int, digits: np.ndarray) -> np.ndarray:
    """The centred integers, in units of the grid's step: k - (L - 1) / 2."""
    return (digits.astype(np.float64) - (levels - 1) / 2) / unit(levels)


def drawn(opset: int, packings: list[Packing], shapes: list[tuple[int, ...]]):
    """A model that decodes one weight for each packing, and what its outputs must be."""
    made, paper = sheet(opset)
    values, expected = [], []
    for i, (packing, shape) in enumerate(zip(packings, shapes, strict=True)):
        digits = digits_of(packing.levels, int(np.prod(shape)))
        build = Builder(made.graph, f"w{i}", paper)
        values.append(packing_file.draw(build, packing, packing.pack(digits), shape))
        assert not build.nodes  # constants only
        expected.append(wanted(packing.levels, digits).reshape(shape))
    return finished(made, paper, values, [len(s) for s in shapes]), expected


def shapes_of(packing: Packing) -> list[tuple[int, ...]]:
    """Where the last word is full and where it is not; with one dimension and with more."""
    k = packing.digits
    return [(5 * k,), (5 * k + 1,), (4, 3 * k), (7, 1, 5, 2 * k - 1), (1, 1)]


# ---- the words


@pytest.mark.parametrize("word", BITS)
def test_unpacking_undoes_packing_for_all_levels_and_lengths(word):
    for levels in (n for n in LEVELS if n <= 1 << BITS[word]):
        most = next(k for k in range(1, 40) if levels ** (k + 1) > 1 << BITS[word])
        whole = digits_of(levels, 70)
        for digits in {1, most}:
            packing = Packing(levels, word, digits)
            for size in range(1, 71):
                words = packing.pack(whole[-size:])
                assert words.dtype == word and words.shape == (-(-size // digits),)
                assert words.nbytes == packing.nbytes(size)
                back = packing.unpack(words, size)
                assert back.dtype == digit_type(levels) and np.array_equal(back, whole[-size:])


@pytest.mark.parametrize(("levels", "word", "digits"), [(3, "uint8", 5), (7, "uint16", 5), (7, "uint32", 11)])
def test_a_large_weight_is_packed_block_by_block(levels, word, digits, monkeypatch):
    packing = Packing(levels, word, digits)
    whole = digits_of(levels, 1_000_003)
    at_once = packing.pack(whole)
    monkeypatch.setattr(packing_file, "_BLOCK", 1000)
    assert np.array_equal(packing.pack(whole), at_once)
    assert np.array_equal(packing.unpack(at_once, whole.size), whole)


def test_a_word_is_a_number_whose_low_digit_comes_first():
    assert Packing(10, "uint16", 4).pack(np.array([1, 2, 3, 4, 5], np.uint8)).tolist() == [4321, 5]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_digits_come_back(data):
    levels = data.draw(st.sampled_from(LEVELS))
    packing = data.draw(st.sampled_from(offered(levels, 17)))
    digits = np.array(data.draw(st.lists(st.integers(0, levels - 1), max_size=80)), digit_type(levels))
    assert np.array_equal(packing.unpack(packing.pack(digits), digits.size), digits)


@pytest.mark.parametrize("levels", [0, 1, 130, 254, 256, 1624, 2049])
def test_levels_that_are_not_offered_are_refused(levels):
    with pytest.raises(ValueError, match="not offered"):
        unit(levels)
    with pytest.raises(ValueError, match="not offered"):
        Packing.best(levels, 100, 17)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Packing(3, "uint8", 6)
    with pytest.raises(ValueError, match="not all digits"):
        Packing(3, "uint8", 5).pack(np.array([0, 3], np.uint8))
    with pytest.raises(ValueError, match="nothing"):
        Packing.best(3, 0, 17)


def test_a_step_of_the_integers_is_a_step_of_the_grid():
    for levels in LEVELS:
        table = Grid.even(levels).values.astype(int)
        assert np.all(np.diff(table) * unit(levels) == 1) and table[0] == -table[-1]
        assert np.array_equal(table, wanted(levels, np.arange(levels)))


# ---- the operators


@pytest.mark.parametrize("opset", OPSETS)
def test_runtime_and_reference_decode_the_integers(opset):
    few = [2, 3, 6, 7, 9, 11, 15, 20, 63, 84, 127, 128, 255, 1625]
    packings = [p for levels in few for p in offered(levels, opset)]
    # all that best can choose from, no more than one table of 84 kB where tables are stored
    packings = [p for p in packings if p.digits * p.levels**p.digits < 90_000 or p.word == "uint32"]
    if opset > 9:
        packings = [p for p in packings if p.word != "uint32" or p.digits >= len(offered(p.levels, 17)) - 1]
        packings = [p for p in packings if p.levels != 2 or p.word != "uint32"]
    assert {p.word for p in packings} == set(BITS if opset >= 10 else ["uint8", "uint16"])
    for levels in few:
        mine = [p for p in packings if p.levels == levels]
        cases = [(p, s) for p in mine for s in shapes_of(p)]
        if not cases:
            continue
        proto, expected = drawn(opset, *map(list, zip(*cases, strict=True)))
        got = session(proto).run(None, X)[1:]
        same = ReferenceEvaluator(proto).run(None, X)[1:]
        for a, b, want in zip(got, same, expected, strict=True):
            assert a.dtype == b.dtype == np.float32 and a.shape == want.shape
            assert np.array_equal(a, want) and np.array_equal(b, want)


def test_all_levels_decode():
    """As best packs a weight of middle size."""
    for some in np.array_split(LEVELS, 8):
        packings = [Packing.best(int(n), 5003, 17) for n in some]
        proto, expected = drawn(17, packings, [(5003, 1)] * len(packings))
        for got, want in zip(session(proto).run(None, X)[1:], expected, strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize("opset", OPSETS)
def test_only_the_decoded_weight_is_left_when_the_session_is_made(opset, tmp_path):
    packings = [Packing.best(n, 5003, opset) for n in (3, 7, 15, 63, 255)]
    proto, expected = drawn(opset, packings, [(5003,)] * len(packings))
    session(proto, str(tmp_path / "o.onnx"))
    left = onnx.load(tmp_path / "o.onnx")
    assert {n.op_type for n in left.graph.node} <= {"Identity"}
    held = sorted(t.dims[0] for t in left.graph.initializer if t.dims)
    assert all(n == 5003 for n in held) and len(held) <= len(expected)


@pytest.mark.parametrize("opset", OPSETS)
def test_words_lie_in_the_file_and_cannot_be_fed(opset):
    packing = offered(7, opset)[-1]
    proto, _ = drawn(opset, [packing], [(1000,)])
    assert [i.name for i in proto.graph.input] == ["x"]
    (words,) = (t for t in proto.graph.initializer if t.name == "w0.words")
    assert numpy_helper.to_array(words).nbytes == packing.nbytes(1000)
    types = {n.op_type for n in proto.graph.node}
    assert types <= {
        "Identity", "Cast", "Gather", "Reshape", "Slice", "Div", "Mod", "Range", "Transpose"
    }  # fmt: skip
    halves = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert not halves


@pytest.mark.parametrize("opset", [7, 17])
def test_weights_of_the_same_levels_share_one_table(opset):
    def tables(count: int) -> tuple[int, int, int]:
        proto, _ = drawn(opset, [Packing(15, "uint8", 2)] * count, [(9, n) for n in range(2, 2 + count)])
        ranges = sum(n.op_type == "Range" for n in proto.graph.node)
        held = sum(list(t.dims) == [225, 2] for t in proto.graph.initializer)
        return ranges, held, len(proto.graph.initializer)

    one, many = tables(1), tables(5)
    assert one[:2] == many[:2] == ((0, 1) if opset < 11 else (1, 0))
    # a further weight brings its words and its shape; slicing brings three integers and one for each odd size
    assert many[2] - one[2] <= 4 * 2 + 2 + 2


def test_the_smaller_of_a_stored_and_a_generated_table_is_drawn():
    for levels, digits in [(2, 3), (2, 8), (3, 2), (3, 5), (7, 5), (15, 2), (40, 3)]:
        grid = Grid.even(levels)
        drawings = (packing_file._table, packing_file._stored, packing_file._generated)
        taken, *both = (nbytes(17, lambda b, f=f, a=grid, d=digits: f(b, a, d)) for f in drawings)
        assert taken == min(both)


@pytest.mark.parametrize("opset", [7, 17])
def test_a_weight_in_a_branch_reads_the_table_outside(opset):
    text = branching("float[6,5]", "p = Identity(w)", "q = Neg(w)")
    held = model_file.read(
        model(text, "bool cond", "float[6,5] y", {"w": np.zeros((6, 5), np.float32)}, opset=opset)
    )
    (branch, other) = (a.as_graph() for a in held.ir.graph[0].attributes.values())
    paper = Paper(held.ir)
    packing, digits = Packing(15, "uint8", 2), digits_of(15, 30)
    for graph in (branch, other):
        node = graph[0]
        build = Builder(graph, "w", paper)
        node.replace_input_with(0, packing_file.draw(build, packing, packing.pack(digits), (6, 5)))
        assert node.inputs[0].producer().graph is None  # waits for the end
    paper.finish()
    proto = model_file.serialize(held)
    onnx.checker.check_model(proto, full_check=True)
    for take, sign in ((True, 1), (False, -1)):
        feed = {"cond": np.array(take)}
        want = sign * wanted(15, digits).reshape(6, 5)
        assert np.array_equal(session(proto).run(None, feed)[0], want)
        assert np.array_equal(ReferenceEvaluator(proto).run(None, feed)[0], want)
    assert sum(n.op_type == "Range" for n in nodes_of(proto)) == (opset >= 11)
    assert sum(t.name == "dp.L15.x2" for t in tensors_of(proto)) == (opset < 11)


# ---- bytes


@pytest.mark.parametrize("opset", [7, 10, 17])
def test_no_other_packing_gives_a_smaller_file(opset):
    for levels in (2, 3, 5, 7, 15, 31, 84, 255):
        for size in (30, 432, 9216, 70_001):
            best = Packing.best(levels, size, opset)
            digits = digits_of(levels, size)

            def whole(p: Packing, digits=digits, size=size) -> int:
                return nbytes(opset, lambda b: packing_file.draw(b, p, p.pack(digits), (size, 1)))

            least = whole(best)
            assert abs(least - best.cost(size, opset)) <= 16  # of lengths, written with as many digits
            others = [p for p in offered(levels, opset) if p.nbytes(size) < least + 16 and p.digits <= 16]
            assert best in offered(levels, opset) and least <= min(map(whole, others)) + 16


def test_a_further_weight_costs_no_table():
    for levels in (3, 7, 15, 84):
        for packing in offered(levels, 17)[1::3]:
            first, more = (packing.cost(10_000, 17, first=f) for f in (True, False))
            table = min(200, packing.digits * levels**packing.digits)  # as it is, or what generates it
            assert packing.nbytes(10_000) < more < first - table
        best = Packing.best(levels, 2000, 17, first=False)
        assert best.digits >= Packing.best(levels, 2000, 17).digits


def test_integers_of_decoding_are_as_short_as_they_can_be():
    for numbers in ([64, 3, 3, 3], [-1], [0], [1 << 40]):
        plain = len(numpy_helper.from_array(np.array(numbers), "dp1").SerializeToString())
        made, paper = sheet(17)
        tensor = ir.serde.serialize_tensor(Builder(made.graph, "w", paper).ints(numbers).const_value)
        assert tensor.ByteSize() <= plain and numpy_helper.to_array(tensor).tolist() == numbers
    assert nbytes(17, lambda b: b.ints([64, 3, 3, 3])) < 25


def test_integers_that_openvino_misreads_lie_raw():
    made, paper = sheet(17)
    packing = Packing(84, "uint32", 5)  # its divisors are 1, 84^2, 84^4: as varints OpenVINO reads 1, 0, 84^2
    words = packing.pack(digits_of(84, 50))
    value = packing_file.draw(Builder(made.graph, "w", paper), packing, words, (50,))
    tensors = finished(made, paper, [value], [1]).graph.initializer
    long = [t for t in tensors if t.data_type == onnx.TensorProto.UINT32]
    assert [84**0, 84**2, 84**4] in [numpy_helper.to_array(t).reshape(-1).tolist() for t in long]
    assert all(t.raw_data and not t.uint64_data for t in long)


def test_what_only_decodes_has_a_short_name_that_is_not_taken():
    made, _ = sheet(17)
    made.graph.outputs[0].name = "dp2"
    paper = Paper(made)
    packing = Packing(3, "uint8", 5)
    value = packing_file.draw(
        Builder(made.graph, "a.long.name", paper), packing, packing.pack(digits_of(3, 22)), (2, 11)
    )
    proto = finished(made, paper, [value], [2])
    chain = [n for n in proto.graph.node if n.op_type != "Identity"]
    assert all(not n.name and len(n.output[0]) <= 4 for n in chain)
    assert [t.name for t in proto.graph.initializer if not t.name.startswith("dp")] == ["a.long.name.words"]
    names = [o for n in proto.graph.node for o in n.output] + [t.name for t in proto.graph.initializer]
    assert len(names) == len(set(names)) and "dp2" in names


# ---- small vectors


def vectors_of(seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(16,), (32,), (16, 1, 1, 1), (8, 1, 1, 1), (5, 1), (7, 1), (1, 9), (1, 4), (3, 4, 1), (2, 4, 1)]
    return [(0.01 + rng.random(s)).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("opset", OPSETS)
def test_vectors_are_stored_in_one_initializer_for_each_axis_and_fold(opset, tmp_path):
    made, paper = sheet(opset)
    given = vectors_of()
    values = [
        Builder(made.graph, f"layer{i}.weight", paper).vector("scale", v, v.shape)
        for i, v in enumerate(given)
    ]
    proto = finished(made, paper, values, [v.ndim for v in given])
    pools = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    shapes = [(48,), (24, 1, 1, 1), (12, 1), (1, 13), (5, 4, 1)]
    assert [tuple(t.dims) for t in pools] == shapes
    assert not [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    got = session(proto, str(tmp_path / "o.onnx")).run(None, X)[1:]
    same = ReferenceEvaluator(proto).run(None, X)[1:]
    for a, b, vector in zip(got, same, given, strict=True):
        assert a.dtype == np.float32 and a.shape == vector.shape
        assert np.array_equal(a, half_of(vector)) and np.array_equal(a, b)
        assert np.all(np.abs(a - vector.astype(np.float64)) <= 2.0**-11 * vector)  # normal numbers
    left = onnx.load(tmp_path / "o.onnx")
    assert {n.op_type for n in left.graph.node} <= {"Identity"}


def test_a_pool_is_smaller_than_its_vectors_apart():
    def pooled(build: Builder) -> None:
        for i in range(20):
            value = Builder(build.graph, f"layer{i}.weight", build._paper).vector(
                "bias", np.full(16, i + 1, np.float32), (16,)
            )
            build.graph.append(ir.node("Identity", [value], name=""))

    def apart(build: Builder) -> None:
        for i in range(20):
            value = Builder(build.graph, f"layer{i}.weight", build._paper).constant(
                "bias", np.full(16, i + 1, np.float32)
            )
            build.graph.append(ir.node("Identity", [value], name=""))

    assert nbytes(17, pooled) < nbytes(17, apart) - 20 * (2 * 16 + 2 * len("layer1.weight.bias") - 20)


@pytest.mark.parametrize(("size", "kind"), [(2, "float32"), (200, "float16")])
def test_a_vector_alone_is_stored_as_is_smaller(size, kind):
    made, paper = sheet(17)
    vector = np.linspace(0.1, 0.9, size, dtype=np.float32)
    value = Builder(made.graph, "w", paper).vector("bias", vector, (size,))
    proto = finished(made, paper, [value], [1])
    (held,) = proto.graph.initializer
    assert numpy_helper.to_array(held).dtype == kind
    assert held.name == ("w.bias" if kind == "float32" else "dp.vectors")
    # the same numbers either way
    assert np.array_equal(session(proto).run(None, X)[1], half_of(vector))


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.array([1.0, 7e4], np.float32), "too large"),
        (np.array([1.0, -np.inf], np.float32), "infinite"),
        (np.array([1.0, np.nan], np.float32), "no number"),
        (np.array([1.0, 3e-8], np.float32), "lost"),
        (np.array([1.0, 1.1e-6], np.float32), "coarse"),
        (np.array([1.0, 2.0], np.float64), "another type"),
        (np.array([1.0, 2.0], np.float16), "another type"),
    ],
)
def test_what_float16_cannot_hold_stays_a_constant(array, why):
    assert half_of(array) is None, why
    made, paper = sheet(17)
    value = Builder(made.graph, "w", paper).vector("bias", array, (2, 1))
    assert value.name == "w.bias" and value.is_initializer() and value.const_value.shape == (2, 1)
    assert np.array_equal(value.const_value.numpy().reshape(-1), array, equal_nan=True)
    paper.finish()
    assert len(made.graph.initializers) == 1 and len(list(made.graph)) == 1


@given(st.lists(st.floats(-7e4, 7e4, width=32), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_halves_are_within_a_thousandth_of_every_number(numbers):
    array = np.array(numbers, np.float32)
    half = half_of(array)
    wide = array.astype(np.float64)
    if half is not None:
        assert half.dtype == np.float16 and np.all(np.abs(half - wide) <= 2.0**-10 * np.abs(wide))
    else:
        small = (np.abs(wide) < 2.0**-14) & (wide != 0)
        assert np.any(small | (np.abs(wide) > np.finfo(np.float16).max))


@pytest.mark.parametrize("opset", [7, 17])
def test_a_vector_in_a_branch_reads_the_pool_outside(opset):
    text = branching("float[9]", "p = Identity(w)", "q = Neg(w)")
    held = model_file.read(
        model(text, "bool cond", "float[9] y", {"w": np.zeros(9, np.float32)}, opset=opset)
    )
    paper = Paper(held.ir)
    given = [np.linspace(i, i + 1, 9, dtype=np.float32) + 1 for i in range(2)]
    for attribute, vector in zip(held.ir.graph[0].attributes.values(), given, strict=True):
        graph = attribute.as_graph()
        build = Builder(graph, "a.weight.with.a.name", paper)
        graph[0].replace_input_with(0, build.vector("bias", vector, (9,)))
    paper.finish()
    proto = model_file.serialize(held)
    onnx.checker.check_model(proto, full_check=True)
    assert [n.op_type for n in proto.graph.node] == ["Cast", "Split", "If"]
    for take, want in ((True, half_of(given[0])), (False, -half_of(given[1]))):
        assert np.array_equal(session(proto).run(None, {"cond": np.array(take)})[0], want)


def test_a_vector_that_nothing_reads_is_not_stored():
    made, paper = sheet(17)
    build = Builder(made.graph, "w", paper)
    build.vector("bias", np.ones(200, np.float32), (200,))
    paper.finish()
    assert not made.graph.initializers


def test_a_vector_carries_its_numbers_until_it_is_stored():
    made, paper = sheet(17)
    vector = np.linspace(0.1, 0.9, 200, dtype=np.float32)
    value = Builder(made.graph, "w", paper).vector("bias", vector, (200, 1))
    assert np.array_equal(value.const_value.numpy(), half_of(vector).astype(np.float32)[:, None])
    finished(made, paper, [value], [2])
    assert value.const_value is None and value.producer().op_type == "Cast"


# ---- many weights together


def part_of(
    levels: int, shape: tuple[int, ...], *, axis: int = 0, dtype: str = "float32", seed: int = 0
) -> Part:
    """A rounded weight whose steps lie along one axis, or whose one step serves all (axis -1)."""
    size = int(np.prod(shape))
    packing = Packing.best(levels, size, 17)
    digits = np.random.default_rng(seed + size).integers(0, levels, size, dtype=digit_type(levels))
    steps = np.random.default_rng(seed).random(shape[axis] if axis >= 0 else 1) + 0.25
    steps = steps.astype(np.float16).astype(np.float32)
    steps = steps.reshape([d if i == axis else 1 for i, d in enumerate(shape)])
    weight = Weight(f"layer{seed}.weight", "Conv", ("node",), shape, dtype, 4 * size, inputs=1, outputs=1)
    return Part(weight, packing, packing.pack(digits), shape, steps, half=True)


def value_of(part: Part) -> np.ndarray:
    if isinstance(part.words, Coded):
        integers = part.words.numbers()
    else:
        integers = wanted(part.code.levels, part.code.unpack(part.words, part.weight.size))
    return integers.astype(np.float32).reshape(part.stored) * part.steps


def together(opset: int, parts: list[Part]) -> onnx.ModelProto:
    made, paper = sheet(opset)
    fresh = [replace(p, value=ir.Value(name=None)) for p in parts]
    values = [streams.draw(Builder(made.graph, p.weight.name, paper), p) for p in fresh]
    for value, part in zip(values, parts, strict=True):
        made.graph.append(node := ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}))
        node.outputs[0].type, node.outputs[0].shape = (
            ir.TensorType(ir.DataType.FLOAT),
            ir.Shape(part.weight.shape),
        )
        made.graph.outputs.append(node.outputs[0])
    return finished(made, paper, [], [])


def assert_decodes(proto: onnx.ModelProto, parts: list[Part], tmp_path=None) -> None:
    optimized = None if tmp_path is None else str(tmp_path / "o.onnx")
    got = session(proto, optimized).run(None, X)[1:]
    same = ReferenceEvaluator(proto).run(None, X)[1:]
    for a, b, part in zip(got, same, parts, strict=True):
        want = value_of(part).astype(part.weight.dtype).astype(np.float32)
        assert a.shape == part.weight.shape and np.array_equal(a, want) and np.array_equal(b, want)


MIXED = [
    (3, (8, 4, 3, 3)), (3, (16, 4, 3, 3)), (2, (5, 4, 3, 3)), (7, (6, 4, 3, 3)), (3, (9, 2, 1, 1)),
    (15, (9, 2, 1, 1)), (40, (10, 7)), (255, (11, 7)), (84, (12, 7)), (4, (13, 11, 1)), (3, (77,)),
]  # fmt: skip


@pytest.mark.parametrize("opset", OPSETS)
def test_weights_drawn_together_decode_and_fold(opset, tmp_path):
    parts = [part_of(n, shape, seed=i) for i, (n, shape) in enumerate(MIXED)]
    parts += [part_of(5, (6, 10), axis=1, seed=20), part_of(5, (3, 20), axis=-1, seed=21)]
    parts += [part_of(3, (n, 4, 3, 3), dtype="float16", seed=n) for n in (4, 5)]
    proto = together(opset, parts)
    assert_decodes(proto, parts, tmp_path)
    left = onnx.load(tmp_path / "o.onnx")
    assert {n.op_type for n in left.graph.node} <= {"Identity", "Cast"}  # the Casts are the test's own
    assert sum(n.op_type == "Cast" for n in left.graph.node) <= 2
    words = [t for t in proto.graph.initializer if t.name.endswith("words")]
    assert len(words) == len({p.code.levels for p in parts}) < len(parts)


def assert_decode_and_are_no_larger_together(parts):
    proto = together(17, parts)
    assert_decodes(proto, parts)
    with mock.patch.object(streams, "SMALL", 0):
        apart = together(17, parts)
    assert_decodes(apart, parts)
    # names of what is not shared differ by some bytes from those on the blank sheet that was compared
    assert proto.ByteSize() <= apart.ByteSize() + 2 * len(parts) + 16


@given(
    st.lists(
        st.tuples(st.sampled_from([2, 3, 4, 6, 9, 23, 255]), st.integers(1, 9), st.integers(1, 40)),
        min_size=1,
    )
)
@settings(max_examples=40, deadline=None)
def test_any_weights_decode_and_are_no_larger_together(cases):
    parts = [part_of(n, (rows, columns), seed=i) for i, (n, rows, columns) in enumerate(cases)]
    assert_decode_and_are_no_larger_together(parts)


def test_a_further_weight_of_known_levels_and_rows_costs_some_bytes():
    parts = [part_of(3, (20, 4, 3, 3), seed=i) for i in range(12)]
    few, many = (together(17, parts[:n]) for n in (6, 12))
    readers = [p.graph.node[-1].ByteSize() + p.graph.output[-1].ByteSize() + 4 for p in (few, many)]
    numbers = -(-720 // 5) + 2 * 20
    assert (many.ByteSize() - few.ByteSize()) / 6 <= numbers + max(readers) + 10


def test_one_weight_is_drawn_as_if_alone():
    part = part_of(3, (20, 4, 3, 3))
    proto = together(17, [part])
    made, paper = sheet(17)
    build = Builder(made.graph, part.weight.name, paper)
    integers = packing_file.draw(build, part.code, part.words, part.stored)
    value = build.node("Mul", [integers, build.vector("scale", part.steps, part.steps.shape)], "value")
    alone = finished(made, paper, [value], [4])
    ops = [[n.op_type for n in p.graph.node if n.op_type != "Identity"] for p in (proto, alone)]
    assert sorted(ops[0][:-1]) == sorted(ops[1])  # but for the test's own Cast
    assert_decodes(proto, [part])


def test_a_large_weight_has_a_chain_of_its_own(monkeypatch):
    monkeypatch.setattr(streams, "SMALL", 2000)
    parts = [part_of(3, (n, 10), seed=n) for n in (60, 70, 300, 400)]
    proto = together(17, parts)
    assert_decodes(proto, parts)
    sizes = sorted(int(np.prod(t.dims)) for t in proto.graph.initializer if t.name.endswith("words"))
    assert sizes == [1300 // 5, 3000 // 5, 4000 // 5]
    monkeypatch.setattr(streams, "_MOST", 1000)
    names = [t.name for t in together(17, parts).graph.initializer if t.name.endswith("words")]
    assert sorted(names) == [f"layer{n}.weight.words" for n in (300, 400, 60, 70)]


def test_a_long_stream_is_taken_apart_by_a_table(monkeypatch):
    parts = [part_of(n, (30, 10), seed=i) for i, n in enumerate([3, 3, 7, 7, 11, 11])]
    short = together(17, parts)
    monkeypatch.setattr(packing_file, "_SPREAD", 100)
    long = together(17, parts)
    assert long != short
    assert_decodes(long, parts)


def test_weights_in_branches_read_the_stream_outside():
    text = branching("float[6,5]", "p = Identity(w)", "q = Neg(w)")
    held = model_file.read(model(text, "bool cond", "float[6,5] y", {"w": np.zeros((6, 5), np.float32)}))
    paper, parts = Paper(held.ir), [part_of(3, (6, 5), seed=i) for i in range(2)]
    for attribute, part in zip(held.ir.graph[0].attributes.values(), parts, strict=True):
        graph = attribute.as_graph()
        graph[0].replace_input_with(0, streams.draw(Builder(graph, part.weight.name, paper), part))
    paper.finish()
    proto = model_file.serialize(held)
    onnx.checker.check_model(proto, full_check=True)
    assert len([t for t in tensors_of(proto) if t.name.endswith("words")]) == 1
    for take, want in ((True, value_of(parts[0])), (False, -value_of(parts[1]))):
        assert np.array_equal(session(proto).run(None, {"cond": np.array(take)})[0], want)


# ---- vectors beside rounded weights


BLOCK = (
    "c = Conv(x, W, b) n = BatchNormalization(c, s, o, m, v) f = Flatten(n) g = MatMul(f, V) y = Add(g, d)"
)


def block(rng: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    tensors = {"W": rng.standard_normal((8, 4, 3, 3)), "V": rng.standard_normal((128, 6))}
    tensors |= {n: rng.random(8) + 0.5 for n in "bsomv"} | {"d": rng.random(6) + 0.5}
    tensors = {k: a.astype(np.float32) for k, a in tensors.items()}
    return model(BLOCK, "float[N,4,6,6] x", "float[N,6] y", tensors), tensors


@pytest.mark.parametrize(("method", "params"), [("quant", {"levels": 16}), ("float16", {})])
def test_biases_and_normalisation_move_into_the_pool_beside_rounded_weights(method, params):
    rng = np.random.default_rng(4)
    proto, tensors = block(rng)
    made = rewrite(proto, {"W": (method, params), "V": (method, params)})
    kinds = {t.name: t.data_type for t in made.proto.graph.initializer}
    vectors = set("bsomvd")
    if method == "float16":
        assert vectors <= set(kinds)
        return
    wide = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
    assert wide <= {"W.scale", "V.scale"} and not vectors & set(kinds)
    rounded = {n: a.astype(np.float16).astype(np.float32) for n, a in tensors.items() if n in vectors}
    same = with_tensors(made.dense(), rounded)
    feed = {"x": rng.standard_normal((3, 4, 6, 6)).astype(np.float32)}
    assert np.array_equal(
        session(made.proto, "/dev/null").run(None, feed)[0], session(same, "/dev/null").run(None, feed)[0]
    )


def test_what_was_not_selected_stays_exact():
    proto, _ = block(np.random.default_rng(4))
    held, found = find(proto)
    found = weights.select(found, ["V"], [])
    (weight,) = found.weights
    task = Task(weight, weights.tensor_of(found, "V"), None, False)
    (encoded,) = [FORMS["quant"].encode(task, {"levels": 16}, Settings(), device="cpu")]
    ReplaceWeights(found, [encoded], FORMS, {}, "test")(held.ir)
    names = {t.name for t in model_file.serialize(held).graph.initializer}
    assert {"W", "b", "s", "o", "m", "v", "d"} <= names


@given(st.floats(-12, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_size_of_a_file_does_not_depend_on_the_shift_of_a_bias(exponent, biased):
    rng = np.random.default_rng(5)
    tensors = {"W": rng.standard_normal((8, 4, 3, 3)).astype(np.float32)}
    tensors |= {"b": rng.standard_normal(8).astype(np.float32)} if biased else {}
    body = f"y = Conv({', '.join(['x', *tensors])})"
    proto = model(body, "float[N,4,6,6] x", "float[N,8,4,4] y", tensors)
    shifts = [np.zeros(8, np.float32), (10.0**exponent * rng.standard_normal(8)).astype(np.float32)]
    sizes = {rewrite(proto, {"W": ("quant", {"levels": 4})}, {"W": s}).proto.ByteSize() for s in shifts}
    assert len(sizes) == 1


def test_what_is_added_may_lose_small_numbers_beside_large_ones():
    vector = np.array([1.0, 3e-8, -1e-6], np.float32)
    assert half_of(vector) is None and half_of(vector, additive=True) is not None
    assert half_of(vector[1:], additive=True) is None and half_of(vector[1:], additive=None) is not None
    assert half_of(np.array([1.0, 7e4], np.float32), additive=None) is None


@pytest.mark.parametrize("name", ["cifar10_resnet20", "cifar10_resnet56", "cifar10_googlenet_narrow"])
def test_a_real_network_of_rounded_weights_has_the_originals_nodes(name, shared, tmp_path):
    path = shared / "models" / f"{name}.onnx"
    held = model_file.read(path)
    found = weights.find(held.ir)
    method, rng = FORMS["quant"], np.random.default_rng(1)
    encoded = []
    for i, w in enumerate(found.weights):
        made = method.outline(w, {"levels": (2, 3, 4, 7)[i % 4]})
        packing = Packing.best(int(made.params["levels"]), w.size, 17)
        words = packing.pack(rng.integers(0, packing.levels, w.size, dtype=digit_type(packing.levels)))
        scale = (0.02 + 0.05 * rng.random(made.arrays["scale"].shape)).astype(np.float16)
        encoded.append(replace(made, arrays={"words": words, "scale": scale}))
    numbers = sum(e.nbytes for e in encoded)
    decoded = {e.weight: method.decode(w, e) for w, e in zip(found.weights, encoded, strict=True)}
    ReplaceWeights(found, encoded, FORMS, {}, "test")(held.ir)
    GatherConstants()(held.ir)
    shorten = ShortenNames(held.original_value_info)
    shorten(held.ir)
    held.original_value_info = shorten.value_info
    proto, dense = model_file.serialize(held), with_tensors(onnx.load(path), decoded)
    assert proto.ByteSize() - numbers < 60 * len(dense.graph.node) + 2 * vectors_in(dense, decoded) + 8000
    sessions = [session(p, str(tmp_path / f"{i}.onnx")) for i, p in enumerate((proto, dense))]
    left, wanted_ = (
        sorted(n.op_type for n in onnx.load(tmp_path / f"{i}.onnx").graph.node) for i in range(2)
    )
    assert left == wanted_
    shape = [d if isinstance(d, int) else 2 for d in sessions[0].get_inputs()[0].shape]
    feed = {sessions[0].get_inputs()[0].name: rng.standard_normal(shape).astype(np.float32)}
    (got,), (want,) = (s.run(None, feed) for s in sessions)
    # vectors are rounded to 11 bits, as often as there are layers
    assert np.linalg.norm(got - want) <= 2.0**-11 * len(encoded) * np.linalg.norm(want)


def vectors_in(proto: onnx.ModelProto, decoded: dict[str, np.ndarray]) -> int:
    return sum(int(np.prod(t.dims)) for t in proto.graph.initializer if t.name not in decoded)
