"""Small models, their rewriting by hand-picked params, and the dense models that the results must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnxdp import model as model_file
from onnxdp import stats, weights
from onnxdp.methods import form
from onnxdp.methods.form import Task
from onnxdp.passes import FreezeInitializers, ReplaceWeights
from onnxdp.records import Array, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Found

FORMS = {name: form.load(name) for name in form.registered()}


def model(
    body: str,
    inputs: str,
    outputs: str,
    tensors: Mapping[str, Array],
    *,
    opset: int = 17,
    ir: int = 8,
    constants: Iterable[str] = (),
) -> onnx.ModelProto:
    """Parse a graph; tensors become initializers, those in ``constants`` Constant nodes."""
    text = f'<ir_version: {ir}, opset_import: ["" : {opset}]> net ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in reversed(tensors.items()):
        tensor = numpy_helper.from_array(array, name)
        if name in constants:
            tensor.name = ""
            proto.graph.node.insert(0, helper.make_node("Constant", [], [name], f"{name}_node", value=tensor))
        else:
            proto.graph.initializer.insert(0, tensor)
    return proto


def branching(kind: str, p: str, q: str) -> str:
    """The text of ``y``, of this type: where ``cond`` holds, the ``p`` of one body, else another's ``q``."""
    return (
        f"y = If(cond) <then_branch = a () => ({kind} p) {{ {p} }},"
        f" else_branch = b () => ({kind} q) {{ {q} }}>"
    )


def constant(name: str, values: Array) -> str:
    """The text of a Constant of float32, rounded to four digits."""
    dims, told = ",".join(map(str, values.shape)), ", ".join(f"{v:.4f}" for v in values.reshape(-1))
    return f"{name} = Constant <value = float[{dims}] {{{told}}}> ()"


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> Array:
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def one_conv(
    text: str, shape: Sequence[int], groups: int, *, biased: bool, seed: int
) -> tuple[onnx.ModelProto, dict[str, Array], Array]:
    """A model of one Conv of weight ``W`` with these attributes, its tensors, and an input for it."""
    rng = np.random.default_rng(seed)
    rank = len(shape) - 2
    tensors = {"W": draw(rng, *shape)} | ({"b": draw(rng, shape[0])} if biased else {})
    dims = ",".join("?" * (rank + 2))
    body = f"y = Conv<{text}>({', '.join(['x', *tensors])})"
    proto = model(body, f"float[{dims}] x", f"float[{dims}] y", tensors)
    return proto, tensors, draw(rng, 2, shape[1] * groups, *(7, 6, 5)[:rank])


def session(proto: onnx.ModelProto, optimized: str | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if optimized:
        options.optimized_model_filepath = optimized
        # the extended level renames Conv + Relu and the like to operators of ONNX Runtime's own
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    return session(proto).run(None, dict(feed))


def find(proto: onnx.ModelProto, smallest: int = 1) -> tuple[model_file.Model, Found]:
    """Read a model, and find its weights down to ``smallest`` bytes."""
    held = model_file.read(proto)
    FreezeInitializers()(held.ir)
    with mock.patch.object(weights, "MIN_BYTES", smallest):
        return held, weights.find(held.ir)


@dataclass
class Rewritten:
    proto: onnx.ModelProto
    source: onnx.ModelProto
    found: Found
    encoded: dict[str, Encoded]

    @property
    def weights(self) -> dict[str, Weight]:
        return {w.name: w for w in self.found.weights}

    def decoded(self, change: Callable[[Array], Array] = lambda a: a) -> dict[str, Array]:
        """Decode in float32, the stored arrays changed before."""
        held = {}
        for name, e in self.encoded.items():
            arrays = {k: change(a) for k, a in e.arrays.items()}
            held[name] = FORMS[e.method].decode(self.weights[name], replace(e, arrays=arrays))
        return held

    def dense(self) -> onnx.ModelProto:
        """The source, holding decode(encoded)."""
        return with_tensors(self.source, self.decoded())

    def majorant(self) -> onnx.ModelProto:
        """The source with every number's magnitude: what rounding errors grow with."""
        made = with_tensors(self.source, self.decoded(np.abs))
        for tensor in tensors_of(made):
            if tensor.data_type in (1, 10, 11, 16):
                array = np.abs(numpy_helper.to_array(tensor))
                sign = -1 if tensor.name == "mean" else 1
                tensor.CopyFrom(numpy_helper.from_array((sign * array).astype(array.dtype), tensor.name))
        return made

    def terms(self) -> int:
        """The most products that one output number sums up, and eight roundings more."""
        counts = [
            w.inputs
            + int(self.encoded[n].params.get("atoms", 0)) * int(self.encoded[n].params.get("parts", 1))
            for n, w in self.weights.items()
            if n in self.encoded
        ]
        return sum(counts) + 8

    def assert_equals_dense(self, feed: Mapping[str, Array], eps: float = 2.0**-23) -> None:
        """Outputs differ by at most eps * terms * majorant (Higham: gamma_n <= n eps for sums)."""
        onnx.checker.check_model(self.proto, full_check=True)
        largest = run(self.majorant(), {k: np.asarray(np.abs(v)) for k, v in feed.items()})
        for got, wanted, most in zip(run(self.proto, feed), run(self.dense(), feed), largest, strict=True):
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            bound = eps * self.terms() * most.astype(np.float64)
            assert np.all(np.abs(got.astype(np.float64) - wanted.astype(np.float64)) <= bound)


def rewrite(
    proto: onnx.ModelProto,
    params: Mapping[str, tuple[str, Params]],
    shifts: Mapping[str, Array] | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> Rewritten:
    """Encode the named weights by (method, params), those of a group with one dictionary, and rewrite."""
    held, found = find(proto)
    by_name = {w.name: w for w in found.weights}
    tasks = {n: Task(by_name[n], weights.tensor_of(found, n), None, True) for n in params}
    encoded: list[Encoded] = []
    alone = [n for n in params if not any(n in g for g in groups)]
    for group in (*groups, *([n] for n in alone)):
        method = FORMS[params[group[0]][0]]
        given = [params[n][1] for n in group]
        for name, own in zip(group, given, strict=True):
            method.check(by_name[name], own)
        members = [tasks[n] for n in group]
        encoded += method.solve(members, Settings(), device="cpu").encode(members, given)
    copied = model_file.copy(held)
    with mock.patch.object(weights, "MIN_BYTES", 1):
        twin = weights.find(copied.ir)
    ReplaceWeights(twin, encoded, FORMS, shifts or {}, "test")(copied.ir)
    return Rewritten(model_file.serialize(copied), proto, found, {e.weight: e for e in encoded})


def pair(
    atoms: int, *, run: str = "fold", axis: str = "rows", parts: int = 1, dtype: str = "float16", **more: str
) -> tuple[str, Params]:
    return "dp", {"axis": axis, "parts": parts, "atoms": atoms, "dtype": dtype, "run": run, **more}


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs_of(attribute.g)


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and tensors of Constant nodes, all graphs."""
    for graph in graphs_of(proto.graph):
        yield from graph.initializer
        for node in graph.node:
            if node.op_type == "Constant":
                yield node.attribute[0].t


def nodes_of(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for graph in graphs_of(proto.graph) for n in graph.node]


def with_tensors(proto: onnx.ModelProto, arrays: Mapping[str, Array]) -> onnx.ModelProto:
    """Replace weights by name (``name#2``: the second of that name), in their own type."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    seen: dict[str, int] = {}
    for graph in graphs_of(made.graph):
        held = [(t.name, t) for t in graph.initializer]
        held += [(n.output[0], n.attribute[0].t) for n in graph.node if n.op_type == "Constant"]
        for name, tensor in held:
            seen[name] = seen.get(name, 0) + 1
            array = arrays.get(name if seen[name] == 1 else f"{name}#{seen[name]}")
            if array is not None:
                dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                tensor.CopyFrom(
                    numpy_helper.from_array(np.ascontiguousarray(array).astype(dtype), tensor.name)
                )
    return made


def centred(rewritten: Rewritten, name: str, mean: Array) -> Array:
    """The shift of the bias behind a weight whose inputs have this mean."""
    weight = rewritten.weights[name]
    change = weights.tensor_of(rewritten.found, name) - rewritten.decoded()[name]
    return stats.mean_output(mean, weights.blocks(weight, change))
