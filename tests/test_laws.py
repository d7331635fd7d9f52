"""Laws of the whole path: nothing else changes, and the same request gives the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import builders
import numpy as np
import onnx
import pytest
from onnx import helper
from rewriting import draw, model, nodes_of, pair, rewrite, run, session, tensors_of

import onnxdp
from onnxdp import model as model_file
from onnxdp import weights
from onnxdp.build import TERSE
from onnxdp.passes import ReplaceWeights

MODELS = Path(__file__).parents[1] / "models"

OPSETS = [7, 9, 11, 13, 17, 21]
RATIOS = {"dp": 3, "auto": 6}
each = pytest.mark.parametrize(("method", "opset"), [(m, o) for m in RATIOS for o in OPSETS])


def network(opset: int, *, constants: tuple[str, ...] = ()) -> onnx.ModelProto:
    """Conv with BatchNormalization, two Conv of one tensor, Gemm; and all that may get lost."""
    rng = np.random.default_rng(11)

    def low(outputs: int, *rest: int) -> np.ndarray:
        inputs = int(np.prod(rest))
        u, _ = np.linalg.qr(rng.standard_normal((outputs, outputs)))
        v, _ = np.linalg.qr(rng.standard_normal((inputs, inputs)))
        count = min(inputs, outputs)
        w = (u[:, :count] * 0.7 ** np.arange(count)) @ v[:count]
        return w.reshape(outputs, *rest).astype(np.float32)

    tensors = {
        "c1.weight": low(32, 16, 3, 3),
        "c2.weight": low(32, 32, 3, 3),
        "c3.weight": low(16, 32, 3, 3),
        "fc.weight": low(10, 48 * 16),
        "fc.bias": draw(rng, 10),
        "scale": draw(rng, 32) ** 2 + 0.5,
        "shift": draw(rng, 32),
        "mean": draw(rng, 32),
        "var": draw(rng, 32) ** 2 + 0.5,
        "small": draw(rng, 8, 8),
        "buffer": draw(rng, 1, 32, 4, 4),
    }
    body = (
        "a = Conv<pads = [1, 1, 1, 1]>(x, 'c1.weight')".replace("'", "")
        + " b = BatchNormalization(a, scale, shift, mean, var) r = Relu(b) s = Add(r, buffer)"
        " p = Conv<pads = [1, 1, 1, 1]>(s, c2.weight) q = Conv<pads = [1, 1, 1, 1]>(s, c3.weight)"
        " t = Concat<axis = 1>(p, q) f = Flatten(t) y = Gemm<transB = 1>(f, fc.weight, fc.bias)"
        " m = MatMul(small, small)"
    )
    safe = {k: k.replace(".", "_") for k in tensors}
    for name, plain in safe.items():
        body = body.replace(name, plain)
    proto = model(
        body, "float[N,16,4,4] x", "float[N,10] y, float[8,8] m", {safe[k]: v for k, v in tensors.items()},
        opset=opset, constants=[safe[c] for c in constants],
    )  # fmt: skip
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type.lower()}{index}"
        node.doc_string = f"node {index}"
    proto.doc_string, proto.producer_name, proto.producer_version = "a model", "tests", "1.2"
    proto.model_version, proto.domain, proto.graph.doc_string = 3, "org.example", "a graph"
    proto.graph.input[0].doc_string, proto.graph.output[0].doc_string = "pictures", "scores"
    helper.set_model_props(proto, {"author": "someone", "labels": "0..9"})
    proto.graph.value_info.append(helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["N", 32, 4, 4]))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def plainly(message):
    """Empty domains absent and metadata sorted, as model.py says it writes them."""
    made = type(message)()
    made.CopyFrom(message)
    if isinstance(made, onnx.ModelProto):
        made.metadata_props.sort(key=lambda p: p.key)
        for opset in made.opset_import:
            opset.ClearField("domain")
    for node in nodes_of(made) if isinstance(made, onnx.ModelProto) else [made]:
        if not node.domain:
            node.ClearField("domain")
    return made


def opsets(proto: onnx.ModelProto) -> list[tuple[str, int]]:
    return [(o.domain, o.version) for o in proto.opset_import]  # an empty domain may become an absent one


@pytest.fixture(scope="module")
def compressed():
    """Each opset's model, and what compress makes of it by each method, made once."""
    held: dict[tuple[str, int], tuple[onnx.ModelProto, onnxdp.Result]] = {}

    def of(method: str, opset: int) -> tuple[onnx.ModelProto, onnxdp.Result]:
        if (method, opset) not in held:
            proto, ratio = network(opset), RATIOS[method]
            made = onnxdp.compress(proto, ratio=ratio, method=method, samples=64, short_names=False)
            held[method, opset] = proto, made
        return held[method, opset]

    return of


@each
def test_23_24_25_27_nothing_else_changes(compressed, method, opset):
    source, result = compressed(method, opset)
    made = result.model
    planned = {c.weight for c in result.report.plan.choices}
    assert {"c1_weight", "c2_weight", "c3_weight", "fc_weight"} >= planned and len(planned) >= 3
    for field in ("ir_version", "producer_name", "producer_version", "doc_string", "model_version", "domain"):
        assert getattr(made, field) == getattr(source, field), field
    assert opsets(made) == opsets(source)
    assert made.graph.name == source.graph.name and made.graph.doc_string == source.graph.doc_string
    assert list(made.graph.input) == list(source.graph.input)
    assert list(made.graph.output) == list(source.graph.output)
    # how many places Compress gives is said, because ONNX Runtime cannot infer it; nothing else is
    places = {o for n in made.graph.node if n.op_type == "Compress" for o in n.output}
    assert [v for v in made.graph.value_info if v.name not in places] == list(source.graph.value_info)
    props = {p.key: p.value for p in made.metadata_props}
    assert props.pop(ReplaceWeights.KEY).split() == [onnxdp.__version__, method]
    assert props == {p.key: p.value for p in source.metadata_props}
    # untouched nodes: all of them there, in order, the whole message equal
    before = {n.name: n for n in source.graph.node}
    after = {n.name: n for n in made.graph.node}
    if method == "auto":  # what normalises goes into the Conv before it, which makes its tensor then
        (gone,) = (n for n in before.values() if n.op_type == "BatchNormalization")
        del before[gone.name]
        (conv,) = (n for n in before.values() if n.output[0] == gone.input[0])
        conv.output[0] = gone.output[0]
    assert [n.name for n in made.graph.node if n.name in before] == list(before)
    for name, node in before.items():
        if not planned & set(node.input) and node.op_type != "BatchNormalization":
            assert plainly(after[name]) == plainly(node)
        assert (after[name].op_type, after[name].output, after[name].doc_string) == (
            node.op_type, node.output, node.doc_string
        )  # fmt: skip


@each
def test_every_new_name_starts_with_its_weights_but_those_of_decoding(compressed, method, opset):
    source, result = compressed(method, opset)
    planned = tuple(c.weight for c in result.report.plan.choices)
    old = {n.name for n in source.graph.node} | {t.name for t in source.graph.initializer}
    constant = {t.name for t in result.model.graph.initializer}
    for node in result.model.graph.node:  # in order: what reads constants only is constant itself
        if node.input and constant.issuperset(node.input):
            constant.update(node.output)
    new = [n for n in result.model.graph.node if n.name not in old]
    assert new
    for node in new:
        if node.output[0] in constant:
            assert not node.name and all(o.startswith(TERSE) for o in node.output)
        else:
            assert node.name.startswith(planned) and list(node.output) == [node.name]
    stored = [t for t in result.model.graph.initializer if t.name not in old]
    assert any(t.name.startswith(planned) for t in stored)
    # what several weights share (shapes, tables, vectors) is named after none of them
    assert all(t.name.startswith((*planned, TERSE)) for t in stored)


@each
def test_no_operator_is_newer_than_the_opset(compressed, method, opset):
    made = compressed(method, opset)[1].model
    domains = {o.domain for o in made.opset_import}
    for node in nodes_of(made):
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        assert schema.since_version <= opset and node.domain in domains
    onnx.checker.check_model(made, full_check=True)


@each
def test_19_what_no_plan_names_is_byte_identical(compressed, method, opset):
    source, result = compressed(method, opset)
    planned = {c.weight for c in result.report.plan.choices}
    after = {t.name: t for t in result.model.graph.initializer}
    biases = {"mean", "fc_bias"}  # they may take up what the mean of the inputs loses
    # beside rounded weights, what normalises is in the weight and bias of the Conv before it
    folded = {"scale", "shift", "var"} if method == "auto" else set()
    for tensor in source.graph.initializer:
        if tensor.name not in planned | biases | folded:
            assert after[tensor.name] == tensor
    assert (planned | folded).isdisjoint(after)


@each
def test_2_no_initializer_is_unreachable_and_no_byte_is_added(compressed, method, opset):
    source, result = compressed(method, opset)
    made = result.model
    read = {i for n in nodes_of(made) for i in n.input}
    assert {t.name for t in made.graph.initializer} <= read
    assert made.ByteSize() == result.report.target.nbytes <= source.ByteSize() // RATIOS[method]


def ops_of(path) -> dict[str, int]:
    nodes = nodes_of(onnx.load(path))
    return {op: sum(n.op_type == op for n in nodes) for op in {n.op_type for n in nodes}}


@pytest.mark.parametrize("opset", [7, 13, 21])
@pytest.mark.parametrize("stored", ["float16", "float32"])
@pytest.mark.parametrize("parts", [1, 2])
def test_11_12_decoding_folds_away_when_the_session_is_made(tmp_path, opset, stored, parts):
    proto = network(opset)
    params = {
        "c1_weight": pair(4, parts=parts, dtype=stored),
        "c2_weight": pair(4, axis="columns", parts=parts, dtype=stored),
        "c3_weight": ("float16", {}),
        "fc_weight": pair(4, parts=parts, dtype=stored),
    }
    made = rewrite(proto, params)
    session(proto, str(tmp_path / "before.onnx"))
    session(made.proto, str(tmp_path / "after.onnx"))
    assert ops_of(tmp_path / "after.onnx") == ops_of(tmp_path / "before.onnx")


def test_split_operators_leave_nothing_but_themselves(tmp_path):
    proto = network(17)
    params = {n: pair(4, run="split") for n in ("c1_weight", "fc_weight")}
    params |= {n: pair(4, run="split", parts=2, dictionary="c2_weight") for n in ("c2_weight", "c3_weight")}
    made = rewrite(proto, params, groups=[["c2_weight", "c3_weight"]])
    session(proto, str(tmp_path / "before.onnx"))
    session(made.proto, str(tmp_path / "after.onnx"))
    before, after = ops_of(tmp_path / "before.onnx"), ops_of(tmp_path / "after.onnx")
    assert after == before | {"Conv": before["Conv"] + 2, "Gemm": 2}


@pytest.mark.parametrize("constants", [(), ("c1.weight", "small", "fc.weight")])
def test_an_empty_plan_changes_no_byte(constants):
    proto = network(17, constants=constants)
    proto.graph.initializer[0].doc_string = "kept"
    copied = model_file.read(proto)
    replaced = ReplaceWeights(weights.find(copied.ir), (), {}, {}, "nothing")
    assert not replaced(copied.ir).modified
    assert plainly(model_file.serialize(copied)) == plainly(proto)


def test_an_empty_plan_is_not_carried_out_as_a_copy():
    proto = network(17)
    plan = onnxdp.plan(proto, ratio=3)
    empty = onnxdp.Plan(plan.model_sha256, plan.target, plan.budget, plan.settings, (), ())
    with pytest.raises(onnxdp.TargetError, match="changes no weight"):
        onnxdp.apply(proto, empty)


def test_constants_that_no_plan_names_are_left_as_they_are():
    proto = network(17, constants=("small", "fc.weight", "c3.weight"))
    made = rewrite(proto, {"c1_weight": pair(4)}).proto
    before = {n.name: n for n in proto.graph.node if n.op_type == "Constant"}
    assert {n.name: n for n in made.graph.node if n.op_type == "Constant"} == before


def test_42_the_same_request_gives_the_same_bytes():
    proto = network(17)
    first, second = (onnxdp.compress(proto, ratio=3, seed=1).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_6_constants_shrink_like_initializers():
    names = ("c1.weight", "c2.weight", "c3.weight", "fc.weight")
    made = {c: onnxdp.compress(network(17, constants=c), ratio=3).report for c in ((), names)}
    stored = {c: {(p.weight, p.method, p.nbytes) for p in r.plan.choices} for c, r in made.items()}
    small, large = sorted(r.target.nbytes for r in made.values())
    assert {w for w, *_ in stored[()]} == {w for w, *_ in stored[names]}
    assert large <= 1.02 * small


@pytest.mark.parametrize("fed", ["W", "V"])
def test_28_initializers_that_are_graph_inputs(fed):
    rng = np.random.default_rng(3)
    tensors = {n: draw(rng, 48, 4) @ draw(rng, 4, 48) for n in "WV"}
    body, outputs = "a = MatMul(x, W) r = Relu(a) y = MatMul(r, V)", "float[N,48] y"
    signature = f"float[N,48] x, float[48,48] {fed}"
    new = model(body, signature, outputs, tensors, ir=8)
    result = onnxdp.compress(new, ratio=1.2)
    assert [v.name for v in result.model.graph.input] == ["x", fed]
    assert next(t for t in result.model.graph.initializer if t.name == fed) == next(
        t for t in new.graph.initializer if t.name == fed
    )
    (kept,) = (k for k in result.report.plan.kept if k.weight == fed)
    assert "--freeze-initializers" in kept.reason
    frozen = onnxdp.compress(new, ratio=3, freeze_initializers=True)
    assert [v.name for v in frozen.model.graph.input] == ["x"] and frozen.model.ir_version == 8
    old = model(body, "float[N,48] x, float[48,48] W, float[48,48] V", outputs, tensors, ir=3, opset=9)
    below = onnxdp.compress(old, ratio=3)
    assert below.model.ir_version == 4 and [v.name for v in below.model.graph.input] == ["x"]
    assert any("raised to 4" in notice for notice in below.report.notices)


SMALL = ["alexnet", "vgg16", "resnet18", "resnet50", "googlenet", "transformer"]


@pytest.mark.parametrize("name", SMALL)
def test_ratio_2_on_the_builders(name):
    proto = builders.build(name, small=True)
    result = onnxdp.compress(proto, ratio=2, samples=24)
    made = result.model
    assert made.ByteSize() <= proto.ByteSize() // 2
    assert list(made.graph.input) == list(proto.graph.input)
    assert list(made.graph.output) == list(proto.graph.output)
    assert opsets(made) == opsets(proto) and made.ir_version == proto.ir_version
    assert result.report.verification is not None and result.report.verification.passed
    # how much is lost is measured elsewhere; weights in the wrong places would give an error near 1
    assert result.report.verification.error < 0.5
    names = {t.name for t in tensors_of(made)}
    assert {i for n in nodes_of(made) for i in n.input} >= names
    feed = {"ids": np.zeros((2, 16), np.int64)} if name == "transformer" else None
    if feed:
        assert [a.shape for a in run(made, feed)] == [a.shape for a in run(proto, feed)]


def low_rank(rng, *shape: int, dtype: str = "float32") -> np.ndarray:
    return (draw(rng, shape[0], 5) @ draw(rng, 5, shape[1]) / 8).astype(dtype)


def if_model(inside: bool) -> onnx.ModelProto:
    """Both branches hold a Constant of one and the same name, or read initializers of the graph outside."""
    rng = np.random.default_rng(8)
    branches = []
    for key, output in (("a", "p"), ("b", "q")):
        body = f"{output} = MatMul(x, w)" if inside else f"{output} = MatMul(x, W{key})"
        tensors = {"w": low_rank(rng, 48, 48)} if inside else {}
        text = model(body, "", f"float[N,48] {output}", tensors, constants=["w"])
        branches.append(text.graph)
    outer = {} if inside else {n: low_rank(rng, 48, 48) for n in ("Wa", "Wb")}
    proto = model("y = Relu(x)", "float[N,48] x, bool cond", "float[N,48] y", outer)
    node = helper.make_node("If", ["cond"], ["y"], "choose", then_branch=branches[0], else_branch=branches[1])
    proto.graph.node[0].CopyFrom(node)
    return proto


def typed(dtype: str, cast: bool = False) -> onnx.ModelProto:
    import ml_dtypes

    rng = np.random.default_rng(8)
    kind = {"float16": "float16", "float64": "double", "bfloat16": "bfloat16"}[dtype]
    held = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensors = {n: low_rank(rng, 64, 64).astype(held) for n in "VW"}
    steps = "v = Cast<to = 1>(V) w = Cast<to = 1>(W) " if cast else ""
    v, w = ("v", "w") if cast else ("V", "W")
    kind = "float" if cast else kind
    body = f"{steps}a = MatMul(x, {v}) r = Relu(a) y = MatMul(r, {w})"
    return model(body, f"{kind}[N,64] x", f"{kind}[N,64] y", tensors)


def tied() -> onnx.ModelProto:
    body = "e = Gather(W, ids) t = Transpose<perm = [1, 0]>(W) y = MatMul(e, t)"
    return model(body, "int64[N] ids", "float[N,96] y", {"W": low_rank(np.random.default_rng(8), 96, 48)})


WHOLE = {
    "if_constants": (lambda: if_model(True), 3),
    "if_captured": (lambda: if_model(False), 3),
    "float16": (lambda: typed("float16"), 3),
    "float64": (lambda: typed("float64"), 6),
    "float16_cast": (lambda: typed("float16", cast=True), 3),
    "bfloat16_cast": (lambda: typed("bfloat16", cast=True), 3),
    "tied": (tied, 3),
}


@pytest.mark.parametrize("name", WHOLE)
def test_5_7_9_the_whole_path(name):
    make, ratio = WHOLE[name]
    proto = make()
    result = onnxdp.compress(proto, ratio=ratio, method="dp")
    assert result.model.ByteSize() <= proto.ByteSize() // ratio
    # weights of rank 5: what is left is the rounding of the factors, and of the weight's own type
    assert result.report.verification.error < {"bfloat16_cast": 2.0**-6}.get(name, 2.0**-8)
    assert {i for n in nodes_of(result.model) for i in n.input} >= {
        t.name for t in result.model.graph.initializer
    }
    onnx.checker.check_model(result.model, full_check=True)


@pytest.mark.parametrize("name", WHOLE)
def test_5_7_9_the_whole_path_of_rounded_weights(name):
    """About 5 bits a number: each of two products loses some 5 % if rounded to nearest (method.md 4.3)."""
    proto = WHOLE[name][0]()
    # of the smallest, what decodes takes a sixth
    ratios = {"float16": 3, "float16_cast": 3, "bfloat16_cast": 3, "float64": 12, "if_captured": 5}
    ratio = ratios.get(name, 6)
    result = onnxdp.compress(proto, ratio=ratio, samples=256)
    assert result.model.ByteSize() <= proto.ByteSize() // ratio
    assert {c.method for c in result.report.plan.choices} <= {"quant", "float16"}
    assert result.report.verification.error < 0.1
    onnx.checker.check_model(result.model, full_check=True)


def test_a_weight_is_kept_for_the_reason_that_holds():
    rng = np.random.default_rng(8)
    halves = {n: low_rank(rng, 64, 64).astype("float16") for n in ("Table", "V", "W")}
    thin = np.full((1, 1024), 1e6, np.float32)  # no pair is smaller, and float16 ends at 65504
    proto = model(
        "e = Gather(Table, ids) a = MatMul(e, V) r = Relu(a) b = MatMul(r, W) c = Cast<to = 1>(b)"
        " m = ReduceMax<axes = [1], keepdims = 1>(c) y = MatMul(m, Thin)",
        "int64[N] ids", "float[N,1024] y", {**halves, "Thin": thin}, opset=17,
    )  # fmt: skip
    made = onnxdp.plan(proto, ratio=1.06, method="dp")
    reasons = {k.weight: k.reason for k in made.kept}
    assert [c.method for c in made.choices] == ["dp"]
    refused = "dictionary pairs rebuild Conv, Gemm and MatMul weights, not those of Gather"
    assert reasons.pop("Table") == f"{refused}; is stored as float16 already"
    assert reasons.pop("Thin") == "no form of it is smaller"
    assert [*reasons.values()] == ["nothing smaller was worth its damage"]


def test_a_model_of_integers_is_said_to_hold_them():
    rng = np.random.default_rng(8)
    tables = {f"T{k}": rng.integers(-127, 127, (64, 32 + k), np.int8) for k in range(3)}
    body = " ".join(f"g{k} = Gather(T{k}, ids) y{k} = Cast<to = 1>(g{k})" for k in range(3))
    outputs = ", ".join(f"float[N,{32 + k}] y{k}" for k in range(3))
    proto = model(body, "int64[N] ids", outputs, tables, opset=17)
    said = r"T2 \(2,176 bytes\), the largest of 3 alike \(6,336 bytes\), holds integers \(int8\)"
    with pytest.raises(onnxdp.TargetError, match=f"Nothing to gain: of what it holds, {said}"):
        onnxdp.compress(proto, ratio=2)


def test_reasons_compare_damages_as_far_as_they_can_be_compared():
    """A float16 weight beside pairs: both may do none, one may, or both; no ratio to nothing is said."""
    rng = np.random.default_rng(8)
    tensors = {"V": low_rank(rng, 64, 64), "W": draw(rng, 64, 64), "U": draw(rng, 64, 64)}
    proto = model(
        "a = MatMul(x, V) r = Relu(a) b = MatMul(r, W) s = Relu(b) y = MatMul(s, U)",
        "float[N,64] x", "float[N,64] y", tensors, opset=17,
    )  # fmt: skip
    said = {c.method: c.reason for c in onnxdp.plan(proto, ratio=2.1, method="dp").choices}
    assert set(said) == {"dp", "float16"}
    no_pair = "no other form is as small"
    damage = r"does no damage, dp in as many bytes (\d[\d.e-]*|none either)"
    ratio = r"(\d\.\d|\d+|over 1,000) times less damage than dp in as many bytes"
    assert re.fullmatch(f"{no_pair}|{damage}|{ratio}", said["float16"]) and said["dp"] == no_pair


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_36_compress_works_without_any_known_shape(dtype):
    rng = np.random.default_rng(8)
    tensors = {"W": draw(rng, 32, 16, 3, 3, dtype=dtype), "V": low_rank(rng, 32, 64, dtype=dtype)}
    tensors["W"] = (tensors["W"].reshape(32, -1)[:, :4].astype(np.float32) @ draw(rng, 4, 144) / 16).astype(
        dtype
    )
    tensors["W"] = tensors["W"].reshape(32, 16, 3, 3)
    kind = {"float32": "float", "float16": "float16"}[dtype]
    proto = model(
        "c = Conv<pads = [1, 1, 1, 1]>(x, W) g = GlobalAveragePool(c) f = Flatten(g) y = MatMul(f, V)",
        f"{kind}[B,16,H,W] x", f"{kind}[B,K] y", tensors,
    )  # fmt: skip
    result = onnxdp.compress(proto, ratio=2.5, samples=8)
    assert result.model.ByteSize() <= proto.ByteSize() / 2.5
    assert list(result.model.graph.input) == list(proto.graph.input)
