"""The network with its weights fed from outside: one small session measures any replacement of any weight.

Nothing is copied per candidate, and the weights stay mapped from their file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxdp import decisions, noise, runtime, walk, weights
from onnxdp import model as model_file
from onnxdp.model import Model
from onnxdp.passes import LiftWeights
from onnxdp.records import Array
from onnxdp.weights import Found, bias_is_constant, can_centre

LAID_OUT = 256_000_000
"""Bytes of all weights up to which sessions may hold them; above, they stay mapped from their file."""

_FLOATING = frozenset((onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE))

Changes = Mapping[str, Array]
"""Input name of the lifted network (a weight's name, or ``bias_input`` of it) -> array of the stored type."""


def bias_input(weight: str) -> str:
    """Name the input that feeds the bias behind a weight."""
    return f"{weight}/bias"


class Network:
    """The network, its weights among its inputs.

    Parameters
    ----------
    model : Model
        Not changed.
    found : Found
        Its weights; all that have a type and a name that can be fed are lifted, those of subgraphs too.
    threads : int or None
    provider : {"cpu", "cuda"}
    """

    def __init__(
        self, model: Model, found: Found, *, threads: int | None = None, provider: str = "cpu"
    ) -> None:
        copied = model_file.copy(model)
        twin = weights.find(copied.ir)
        shadowed = _names_of_others(copied.ir, [twin.values[w.name] for w in found.weights])
        lifted = [w for w in found.weights if w.dtype != "bfloat16" and w.name not in shadowed]
        centred = [w for w in lifted if can_centre(found, w)]
        self.fed: dict[str, Array] = {}
        for w in lifted:
            tensor = weights.constant(found.values[w.name])
            assert tensor is not None
            self.fed[w.name] = tensor.numpy()
        for w in centred:
            self.fed[bias_input(w.name)] = _bias_of(found.readers[w.name][0].node, w.outputs * w.groups)
        LiftWeights(
            {w.name: twin.values[w.name] for w in lifted},
            {bias_input(w.name): twin.readers[w.name][0].node for w in centred},
        )(copied.ir)
        self.proto = model_file.serialize(copied)
        self.noisy = noise.draws(self.proto)
        if self.noisy:
            noise.settle(self.proto)
        self.specification = _without_inputs(self.proto, self.fed)
        self.decisions = decisions.decisions(self.specification)
        self._selecting = onnx.ModelProto()  # as it selects by itself, where that is held
        if self.decisions.held:
            self._selecting.CopyFrom(self.proto)
            decisions.hold(self.proto, self.decisions.held)
        self._selected: dict[bytes, dict[str, Array]] = {}
        self._threads, self._provider = threads, provider
        self.outputs = [o.name for o in self.proto.graph.output]
        self._made_at = {name: i for i, node in enumerate(self.proto.graph.node) for name in node.output}
        self._laid_out = sum(a.nbytes for a in self.fed.values()) <= LAID_OUT
        self._reads = [walk.reads(node) for node in self.proto.graph.node]
        self._readers = Counter(name for names in self._reads for name in names)
        self._position: dict[str, int] = {
            name: i for i, names in reversed(list(enumerate(self._reads))) for name in names
        }
        self._shell = onnx.ModelProto()
        self._shell.CopyFrom(self.proto)
        for part in (
            self._shell.graph.node,
            self._shell.graph.input,
            self._shell.graph.initializer,
            self._shell.graph.output,
        ):
            del part[:]

    def session(self, outputs: Sequence[str]) -> Any:
        """Make a session that gives the named tensors."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        _set_outputs(proto.graph, outputs)
        return self._session(proto, outputs)

    def run(
        self, session: Any, feed: Mapping[str, Array], outputs: Sequence[str], changes: Changes
    ) -> dict[str, Array]:
        """Run one feed with some of the weights changed."""
        return runtime.run(session, {**self.fed, **self.complete(feed), **changes}, outputs)

    def complete(self, feed: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return a feed with what the network selects, by its own weights, where that is held."""
        held = self.decisions.held
        if not held or decisions.given(held[0]) in feed:
            return feed
        digest = hashlib.blake2b()
        for name in sorted(feed):
            digest.update(np.ascontiguousarray(feed[name]).tobytes())
        key = digest.digest()
        if key not in self._selected:
            made = runtime.run(self._selector, {**self.fed, **feed}, held)
            self._selected[key] = {decisions.given(n): x for n, x in made.items()}
        return {**feed, **self._selected[key]}

    @cached_property
    def _selector(self) -> Any:
        """The session that selects."""
        _set_outputs(self._selecting.graph, self.decisions.held)
        return self._session(self._selecting, self.decisions.held)

    def answers(self) -> Callable[[Mapping[str, Array]], Array] | None:
        """Return a function that gives the scores of the classes, where the network has one such output.

        Of sequences and of maps, the mean over all places: (samples, places, classes) and (samples, classes,
        height, width).
        """
        watched, outputs = before_softmax(self.proto.graph), self.proto.graph.output
        if len(watched) != 1 or outputs[0].type.tensor_type.elem_type not in _FLOATING:
            return None
        run = self._runs(watched)

        def scores(feed: Mapping[str, Array]) -> Array:
            given = run(feed)[watched[0]]
            places = (1,) if given.ndim == 3 else tuple(range(2, given.ndim))
            return given.mean(axis=places) if places else given

        return scores

    def responses(self) -> Callable[[Mapping[str, Array]], Sequence[Array]]:
        """Return a function that gives all floating-point outputs."""
        run = self._runs(self.outputs)
        return lambda feed: [a for a in run(feed).values() if decisions.is_floating(a)]

    def _runs(self, outputs: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        """Return a function that gives some tensors; its session, weights held, is made at the first call."""

        @cache
        def session() -> Any:
            return self.segment(0, None, {}, outputs, self.fed)

        def run(feed: Mapping[str, Array]) -> dict[str, Array]:
            everything = {**self.fed, **self.complete(feed)}
            return runtime.run(
                session(), {i.name: everything[i.name] for i in session().get_inputs()}, outputs
            )

        return run

    @property
    def halts(self) -> list[int]:
        """The places of all weights, rising."""
        return sorted({self.position(name) for name in self.fed})

    def position(self, weight: str) -> int:
        """Return the place, in graph order, of the first node that reads the weight."""
        return self._position.get(weight, 0)

    def place(self, output: str) -> int:
        """Return the place, in graph order, of the node that makes a tensor."""
        return self._made_at[output]

    def alive(self, position: int) -> list[str]:
        """Name the tensors made before ``position`` that are read from there on, or are outputs."""
        later = {*self.outputs, *self.decisions.names}.union(*self._reads[position:])
        return sorted(n for n in later if n and self._made_at.get(n, position) < position)

    def readers(self, name: str) -> int:
        """Count the nodes of the main graph that read an input."""
        return self._readers[name]

    def segment(
        self,
        start: int,
        stop: int | None,
        types: Mapping[str, int],
        outputs: Sequence[str],
        held: Changes = MappingProxyType({}),
    ) -> Any:
        """Make a session of the nodes from ``start`` to ``stop``; tensors alive at the start become inputs.

        Parameters
        ----------
        start, stop : int
            Places in graph order; None is the end.
        types : mapping of str to int
            ONNX element types of the tensors alive at ``start``.
        outputs : sequence of str
        held : mapping of str to ndarray
            Weights that are constants of the session instead of inputs, unless all are too large for that.
        """
        held = held if self._laid_out else {}
        proto = onnx.ModelProto()
        proto.CopyFrom(self._shell)
        whole, graph = self.proto.graph, proto.graph
        needed = set(outputs).union(*self._reads[start:stop])
        graph.node.extend(whole.node[start:stop])
        graph.input.extend(v for v in whole.input if v.name in needed and v.name not in held)
        graph.input.extend(
            onnx.helper.make_tensor_value_info(n, types[n], None) for n in self.alive(start) if n in needed
        )
        graph.initializer.extend(t for t in whole.initializer if t.name in needed)
        graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in held.items() if n in needed)
        graph.output.extend(v for v in whole.output if v.name in outputs)
        _set_outputs(graph, outputs)
        return self._session(proto, outputs)

    def _session(self, proto: onnx.ModelProto, outputs: Sequence[str]) -> Any:
        # ONNX Runtime 1.31 fuses Conv and Add even where the Conv's own output is asked for, and then fails.
        disabled = () if set(outputs) <= set(self.outputs) else ("ConvAddActivationFusion",)
        return runtime.session(proto, threads=self._threads, provider=self._provider, disabled=disabled)


def types_of(tensors: Mapping[str, Array]) -> dict[str, int]:
    """Return the ONNX element type of each array."""
    return {n: onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in tensors.items()}


def before_softmax(graph: onnx.GraphProto) -> list[str]:
    """Name the outputs, a closing Softmax looked through: probabilities saturate, scores do not."""
    made = {name: node for node in graph.node for name in node.output}
    return [
        made[o.name].input[0] if o.name in made and made[o.name].op_type == "Softmax" else o.name
        for o in graph.output
    ]


def _without_inputs(proto: onnx.ModelProto, fed: Mapping[str, Array]) -> onnx.ModelProto:
    """Return the inputs a caller feeds, with the nodes that tell what they mean."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    kept = [_copy(v) for v in made.graph.input if v.name not in fed]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    # Their sizes stay: the rows of a table are what ids may be.
    made.graph.initializer.extend(onnx.TensorProto(name=n, dims=a.shape) for n, a in fed.items())
    return made


def _set_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    known = {o.name: _copy(o) for o in graph.output}
    del graph.output[:]
    graph.output.extend(known.get(n) or onnx.ValueInfoProto(name=n) for n in names)


def _copy(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _names_of_others(model: ir.Model, weights_: Sequence[ir.Value]) -> set[str]:
    """Name every value but the weights: an input of a weight's name would hide in a subgraph that has one."""
    own = {id(v) for v in weights_}
    every = (
        v
        for graph in model.graphs()
        for v in (*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs))
    )
    return {v.name for v in every if v.name and id(v) not in own}


def _bias_of(node: ir.Node, outputs: int) -> Array:
    """Return the bias as a vector (outputs,) of the weight's type; zeros where there is none."""
    assert bias_is_constant(node)
    weight = weights.constant(node.inputs[1])
    assert weight is not None
    dtype = weight.numpy().dtype
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(outputs, dtype)
    bias = weights.constant(node.inputs[2])
    assert bias is not None
    return np.ascontiguousarray(np.broadcast_to(bias.numpy().reshape(-1), (outputs,)).astype(dtype))
