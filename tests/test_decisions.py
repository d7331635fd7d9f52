"""Outputs of which the numbers decide how many there are are compressed by what decides them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from edges import onnxdp, parsed, save
from onnx import numpy_helper, parser

from onnxdp import decisions, probes, verifier, walk
from onnxdp.inputs import InputSpec

SIZES = {
    name: np.array(n) for name, n in {"sb": [1, 4, -1], "ss": [1, 5, -1], "two": 2, "most": [20]}.items()
}


def convolution(rng, outputs, inputs, size=3):
    return (rng.normal(size=(outputs, inputs, size, size)) * (2 / (inputs * size * size)) ** 0.5).astype(
        np.float32
    )


def detector(threshold: float):
    """Return boxes and scores of a small convolutional network behind NonMaxSuppression: 40 kB."""
    rng = np.random.default_rng(1)
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        detector (float[1, 3, 64, 64] x) => (float[n, 4] found, int64[n, 3] which) {
          a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w1)
          b = Relu (a)
          c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (b, w2)
          d = Relu (c)
          e = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (d, w3)
          at = Conv (e, wb)
          at1 = Reshape (at, sb)
          at2 = Transpose <perm = [0, 2, 1]> (at1)
          boxes = Sigmoid (at2)
          of = Conv (e, wc)
          of1 = Reshape (of, ss)
          scores = Sigmoid (of1)
          which = NonMaxSuppression (boxes, scores, most, overlap, threshold)
          place = Gather <axis = 1> (which, two)
          flat = Squeeze (boxes)
          found = Gather (flat, place)
        }""",
        w1=convolution(rng, 16, 3),
        w2=convolution(rng, 24, 16),
        w3=convolution(rng, 24, 24),
        wb=convolution(rng, 4, 24),
        wc=convolution(rng, 5, 24),
        overlap=np.float32([0.5]),
        threshold=np.float32([threshold]),
        **SIZES,
    )


def chooser():
    """Return a network that keeps the rows of which it likes the first number: 49 kB behind it."""
    rng = np.random.default_rng(0)
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        chooser (float[64, 16] x) => (float[k, 32] y) {
          a = MatMul (x, w1)
          r = Relu (a)
          s = Gather <axis = 1> (a, first)
          liked = Greater (s, zero)
          b = Compress <axis = 0> (r, liked)
          c = MatMul (b, w2)
          d = Relu (c)
          y = MatMul (d, w3)
        }""",
        w1=rng.normal(size=(16, 128)).astype(np.float32),
        w2=(rng.normal(size=(128, 64)) / 8).astype(np.float32),
        w3=(rng.normal(size=(64, 32)) / 8).astype(np.float32),
        first=np.array(0),
        zero=np.float32(0),
    )


@pytest.mark.parametrize("threshold", [0.4, 0.9999], ids=["some", "none"])
@pytest.mark.parametrize("words", [("--ratio", "4"), ("--method", "dp", "--ratio", "1.5"), ()], ids=" ".join)
def test_detections_are_compared_before_they_are_selected(tmp_path, monkeypatch, threshold, words):
    monkeypatch.chdir(tmp_path)
    save(detector(threshold))
    done = onnxdp("compress", "in.onnx", "out.onnx", *words, "--samples", "8", "--json")
    assert done.exit_code == 0, done.stderr
    outputs = {o["name"]: o["relative"] for o in json.loads(done.stdout)["verification"]["outputs"]}
    assert outputs.keys() == {"boxes", "scores"} | ({"found"} if threshold < 0.5 else set())
    assert all(0 < error < 0.1 for error in outputs.values())

    again = onnxdp("verify", "in.onnx", "out.onnx", "--tolerance", "0.1", "--json")
    assert again.exit_code == 0, again.stderr
    assert {o["name"] for o in json.loads(again.stdout)["outputs"]} == outputs.keys()
    made = ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    assert [o.name for o in made.get_outputs()] == ["found", "which"]
    made.run(None, {"x": np.zeros((1, 3, 64, 64), np.float32)})


def test_another_file_that_selects_otherwise_fails_where_nothing_else_can_be_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(detector(0.4))
    other = detector(0.45)
    for node in other.graph.node:  # no tensor has the name that is looked for
        for names in (node.input, node.output):
            names[:] = [f"{n}_" if n in ("boxes", "scores") else n for n in names]
    save(other, "other.onnx")
    done = onnxdp("verify", "in.onnx", "other.onnx", "--tolerance", "0.5")
    assert done.exit_code != 0
    assert "FAILED" in done.stdout


@pytest.mark.parametrize("words", [("--ratio", "6"), ("--method", "dp", "--ratio", "1.5"), ()], ids=" ".join)
def test_weights_behind_rows_that_the_network_chooses_are_fitted(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    save(chooser())
    done = onnxdp("compress", "in.onnx", "out.onnx", *words, "--samples", "8", "--json")
    assert done.exit_code == 0, done.stderr
    x = np.random.default_rng(3).normal(size=(64, 16)).astype(np.float32)
    before, after = (
        ort.InferenceSession(f, providers=["CPUExecutionProvider"]) for f in ("in.onnx", "out.onnx")
    )
    (mine,), (other,) = before.run(None, {"x": x}), after.run(None, {"x": x})
    assert abs(len(mine) - len(other)) < 8
    scale = np.abs(mine).mean()
    assert abs(np.abs(other).mean() - scale) < 0.2 * scale


def classifier(end: str, output: str, **more):
    """Return two layers and what makes of their scores something that is no float: 17 kB."""
    rng = np.random.default_rng(0)
    return parsed(
        f"""<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
        classifier (float[N, 32] x) => ({output} y) {{
          a = MatMul (x, w1)
          r = Relu (a)
          scores = MatMul (r, w2)
          {end}
        }}""",
        w1=(rng.normal(size=(32, 64)) / 8).astype(np.float32),
        w2=(rng.normal(size=(64, 32)) / 6).astype(np.float32),
        **more,
    )


NAMES = np.array([f"class {i}" for i in range(32)], object)
LABELS = f"classlabels_int64s = [{', '.join(map(str, range(32)))}]"
ENDS = {
    "classes": ("p = Softmax (scores) y = ArgMax <axis = 1> (p)", "int64[N, 1]", {}),
    "names": ("i = ArgMax <axis = 1> (scores) y = Gather (names, i)", "string[N, 1]", {"names": NAMES}),
    "yes": ("y = Greater (scores, half)", "bool[N, 32]", {"half": np.float32(0.5)}),
    "bytes": ("b = Sigmoid (scores) c = Mul (b, most) y = Cast <to = 2> (c)", "uint8[N, 32]",
              {"most": np.float32(255)}),
    "places": ("b = Greater (scores, half) y = NonZero (b)", "int64[2, k]", {"half": np.float32(0.5)}),
    "sequence": ("y = SplitToSequence <axis = 1> (scores, sixteen)", "seq(float[N, 16])",
                 {"sixteen": np.array(16)}),
    "optional": ("y = Optional (scores)", "optional(float[N, 32])", {}),
    "map": (f"y = ai.onnx.ml.ZipMap <{LABELS}> (scores)", "seq(map(int64, float))", {}),
}  # fmt: skip


@pytest.mark.parametrize("words", [("--ratio", "3"), ("--method", "dp", "--ratio", "1.5"), ()], ids=" ".join)
@pytest.mark.parametrize("end", ENDS)
def test_outputs_that_are_no_floats_are_compared_by_what_decides_them(tmp_path, monkeypatch, end, words):
    monkeypatch.chdir(tmp_path)
    body, kind, more = ENDS[end]
    model = classifier(body, kind, **more)
    save(model)
    done = onnxdp("compress", "in.onnx", "out.onnx", *words, "--samples", "8", "--json")
    assert done.exit_code == 0, done.stderr
    outputs = json.loads(done.stdout)["verification"]["outputs"]
    # ONNX Runtime gives what is in an Optional
    assert [o["name"] for o in outputs] == [{"bytes": "c", "optional": "y"}.get(end, "scores")]
    assert 0 < outputs[0]["relative"] < 0.03
    made = onnx.load("out.onnx")
    assert [o.type for o in made.graph.output] == [o.type for o in model.graph.output]
    x = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    ort.InferenceSession("out.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})


def two_stages():
    """Return a detector whose second stage, 86 of 108 kB, looks at the best of what the first selects."""
    model = detector(0.4)
    rng = np.random.default_rng(2)
    tail = parser.parse_graph(
        """tail (float[1, 24, 8, 8] d, float[1, 5, 64] scores, int64[k, 1] place) => (float[n, 16] y) {
          score = ReduceMax <axes = [1], keepdims = 0> (scores)
          best, order = TopK (score, many)
          e1 = Reshape (d, rows)
          e2 = Transpose <perm = [0, 2, 1]> (e1)
          flat2 = Squeeze (e2)
          line = Squeeze (order)
          sorted = Gather (flat2, line)
          told = Mod (place, many)
          told1 = Reshape (told, one)
          roi = Gather (sorted, told1)
          h = MatMul (roi, v1)
          hr = Relu (h)
          h2 = MatMul (hr, v2)
          hr2 = Relu (h2)
          y = MatMul (hr2, v3)
        }"""
    )
    model.graph.node.extend(tail.node)
    model.graph.output.extend(tail.output)
    held = {"v1": (24, 128), "v2": (128, 128), "v3": (128, 16)}
    drawn = {n: (rng.normal(size=s) * (2 / s[0]) ** 0.5).astype(np.float32) for n, s in held.items()}
    sizes = {"many": np.array([20]), "rows": np.array([1, 24, -1]), "one": np.array([-1])}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in (drawn | sizes).items())
    return model


@pytest.mark.parametrize("words", [("--ratio", "4"), ("--ratio", "6", "--no-refit"), ()], ids=" ".join)
def test_a_second_stage_is_measured_on_the_rows_that_the_original_selects(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    model = two_stages()
    save(model)
    found = decisions.decisions(model)
    assert set(found.held) == {"which", "order"}
    done = onnxdp("compress", "in.onnx", "out.onnx", *words, "--samples", "32", "--keep-names", "--json")
    assert done.exit_code == 0, done.stderr
    told = {o["name"]: o["relative"] for o in json.loads(done.stdout)["verification"]["outputs"]}
    assert {"y", "found", "boxes", "scores"} <= told.keys()

    original, other = onnx.load("in.onnx"), onnx.load("out.onnx")
    original.graph.output.append(onnx.ValueInfoProto(name="order"))
    decisions.hold(other, found.held)
    a, b = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
        for m in (original, other)
    )
    feeds = probes.make([InputSpec("x", "float32", (1, 3, 64, 64))], samples=24, seed=5).feeds
    lost = size = 0.0
    for feed in feeds:
        y, which, order = a.run(["y", "which", "order"], dict(feed))
        (z,) = b.run(["y"], {**feed, "which/held": which, "order/held": order})
        assert y.shape == z.shape
        lost, size = lost + np.square(y - z).sum(), size + np.square(y).sum()
    assert 0.4 < (lost / size) ** 0.5 / told["y"] < 2.5


def test_selections_are_held_where_all_that_decides_is_given_anyway():
    model = chooser()
    for name, kind, shape in (("a", 1, [64, 128]), ("r", 1, [64, 128]), ("liked", 9, [64])):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    found = decisions.decisions(model)
    assert found.held == ("liked",) and not found.names
    made = verifier.followed(model, found, noisy=False)
    assert {i.name for i in made.get_inputs()} == {"x", "liked/held"}


@pytest.mark.parametrize("where", ["outside", "in a branch"])
def test_told_its_own_selections_a_network_answers_as_before(where):
    model = two_stages()
    if where == "in a branch":  # torchvision asks first whether there are boxes at all
        place = next(i for i, n in enumerate(model.graph.node) if n.op_type == "NonMaxSuppression")
        inner = parser.parse_graph(
            """g (bool no) => (int64[n, 3] which) {
              which = If (no) <
                then_branch = a () => (int64[n, 3] p) { p = Identity (nothing) },
                else_branch = b () => (int64[n, 3] q) {
                  q = NonMaxSuppression (boxes, scores, most, overlap, threshold)
                }
              >
            }"""
        )
        model.graph.node[place].CopyFrom(inner.node[0])
        more = {"no": np.array(False), "nothing": np.zeros((0, 3), np.int64)}
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in more.items())
    held = decisions.decisions(model).held
    assert set(held) == {"which", "order"}
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    decisions.hold(twin, held)
    model.graph.output.append(onnx.ValueInfoProto(name="order"))
    a, b = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]) for m in (model, twin)
    )
    x = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    whole = dict(zip([o.name for o in a.get_outputs()], a.run(None, {"x": x}), strict=True))
    again = b.run(None, {"x": x} | {decisions.given(n): whole[n] for n in held})
    for output, array in zip(b.get_outputs(), again, strict=True):
        np.testing.assert_array_equal(array, whole[output.name])


def test_what_decides_alike_by_the_same_numbers_has_to_give_the_same(tmp_path, monkeypatch):
    """ArgMin for ArgMax, another threshold of NonMaxSuppression: the same decides, and outputs differ."""
    monkeypatch.chdir(tmp_path)
    pairs = [(classifier(f"y = {op} <axis = 1> (scores)", "int64[N, 1]") for op in ("ArgMax", "ArgMin"))]
    pairs += [(detector(t) for t in (0.4, 0.9)), (classifier("y = Greater (scores, half)", "bool[N, 32]",
              half=np.float32(h)) for h in (0.5, 0.7))]  # fmt: skip
    for one, other in pairs:
        save(one, "a.onnx")
        save(other, "b.onnx")
        assert onnxdp("verify", "a.onnx", "a.onnx", "--tolerance", "0").exit_code == 0
        done = onnxdp("verify", "a.onnx", "b.onnx", "--tolerance", "0.01")
        assert done.exit_code == 1 and "FAILED" in done.stdout


def test_an_output_more_is_another_interface_even_if_it_decides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = classifier("y = ArgMax <axis = 1> (scores)", "int64[N, 1]")
    save(one, "a.onnx")
    one.graph.output.append(onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["N", 32]))
    save(one, "b.onnx")
    done = onnxdp("verify", "a.onnx", "b.onnx")
    assert done.exit_code == 2 and "different outputs" in done.stderr


@pytest.mark.parametrize(
    "end",
    [
        "i = ArgMax <axis = 1> (scores) y = Add (i, one)",
        "b = Greater (scores, half) c = Cast <to = 7> (b) y = ReduceSum <keepdims = 1> (c, one)",
        "i = ArgMax <axis = 1> (scores) f = Mul (x, ten) j = Cast <to = 7> (f) y = Concat <axis = 1> (i, j)",
    ],
    ids=["sum", "count", "both"],
)
def test_whole_numbers_are_looked_through_whatever_is_done_to_them(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    more = {"one": np.array([1]), "half": np.float32(0.5), "ten": np.float32(10)}
    save(classifier(end, "int64[N, k]", **more))
    done = onnxdp("compress", "in.onnx", "out.onnx", "--samples", "16", "--json")
    assert done.exit_code == 0, done.stderr
    told = {o["name"]: o["relative"] for o in json.loads(done.stdout)["verification"]["outputs"]}
    assert 0 < told["scores"] <= 0.03


def test_a_long_way_back_is_gone_once():
    """A thousand links, each read by what selects: 4 s where every one of them was gone back from anew."""
    chain = " ".join(f"a{i} = Identity (a{i - 1})" for i in range(1, 1500))
    reads = ", ".join(f"a{i}" for i in range(1500))
    text = f"a0 = Relu (x) {chain} all = Concat <axis = 0> ({reads})"
    text += " n = NonZero (all) y = Concat <axis = 1> (n, n)"
    model = parsed(f'<ir_version: 8, opset_import: ["" : 17]> g (float[8] x) => (int64[1, k] y) {{ {text} }}')
    steps = dict.fromkeys(("reads", "follows"), 0)

    def counting(name, real):
        def counted(*args):
            steps[name] += 1
            return real(*args)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "reads", counting("reads", walk.reads))
        patch.setattr(decisions._Way, "_follows", counting("follows", decisions._Way._follows))
        assert decisions.decisions(model).outputs["y"].tensors == ("a0",)
    assert steps["reads"] <= len(model.graph.node)
    assert steps["follows"] <= 4 * len(model.graph.node)


def test_an_output_that_decides_another_is_compared_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = classifier("y = ArgMax <axis = 1> (scores)", "float[N, 32] scores, int64[N, 1]")
    model.graph.output.append(onnx.helper.make_tensor_value_info("some", onnx.TensorProto.FLOAT, ["k"]))
    model.graph.node.append(onnx.helper.make_node("Compress", ["scores", "yes"], ["some"]))
    model.graph.node.insert(3, onnx.helper.make_node("Greater", ["scores", "none"], ["over"]))
    model.graph.node.insert(4, onnx.helper.make_node("Reshape", ["over", "flat"], ["yes"]))
    for name, value in {"none": np.float32(-1e9), "flat": np.array([-1])}.items():  # all of them, always
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    save(model)
    done = onnxdp("compress", "in.onnx", "out.onnx", "--ratio", "3", "--samples", "8", "--json")
    assert done.exit_code == 0, done.stderr
    outputs = [o["name"] for o in json.loads(done.stdout)["verification"]["outputs"]]
    assert outputs == ["scores", "some"]


def test_a_map_of_classes_that_is_too_large_to_keep_is_not(monkeypatch):
    answer = {"y": np.zeros((1, 8, 8), np.int64), "scores": np.zeros((1, 5, 8, 8), np.float32)}
    monkeypatch.setattr(decisions, "MOST", 4 * answer["scores"].nbytes)
    found = decisions.Decisions({"y": decisions.Instead(("scores",), ("scores",))})
    assert decisions.few(found, answer, 4) == found
    assert not decisions.few(found, answer, 5).outputs
    assert decisions.replaced("y", decisions.Decisions(), [answer]) == ("y",)


@pytest.mark.parametrize(
    ("body", "decided"),
    [
        ("s = Shape(x) o = ConstantOfShape(s) i = NonZero(o) y = Transpose(i)", {}),
        ("a = Relu(x) i = NonZero(a) y = Transpose(i)", {"y": ("a",)}),
        ("a = Relu(x) b = Slice<axes=[0], starts=[0], ends=[1]>(a) y = Neg(b)", {}),
        ("a = Relu(x) n = ReduceSum<keepdims=0>(a) e = Cast<to=7>(n) m = Unsqueeze<axes=[0]>(e) "
         "z = Sub(m, m) b = Slice(a, z, m) y = Neg(b)", {"y": ("a", "n")}),
        ("i = NonZero(x) y = Transpose(i)", {}),  # an input decides, and it is the same for both
    ],
)  # fmt: skip
def test_what_decides_an_output_is_what_was_made_before_the_first_selection(body, decided):
    graph = f"g (float[8] x) => (float y) {{ {body} }}"
    found = decisions.decisions(parsed(f'<ir_version: 8, opset_import: ["" : 12]> {graph}'))
    assert {name: instead.tensors for name, instead in found.outputs.items()} == decided


def test_outputs_that_are_inputs_or_constants_decide_nothing():
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[8] x, int64[4] i) => (float[8] y, int64[4] i, int64[2] k, int64[1] s)
        <int64[2] k = {1, 2}> {
          y = Relu(x) s = Shape(y)
        }"""
    )
    assert decisions.decisions(model) == decisions.Decisions()
