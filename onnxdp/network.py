"""The network with its weights fed from outside: one small session measures any replacement of any weight.

Nothing is copied per candidate, the weights stay mapped from their file, and what lies before a weight is run
once for all candidates of it (its suffix session starts from the tensors that are alive there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxdp import model as model_file
from onnxdp import runtime, weights
from onnxdp.model import Model
from onnxdp.passes import LiftWeights
from onnxdp.probes import Probes
from onnxdp.records import Array
from onnxdp.weights import Found, bias_is_constant, can_centre

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
        self.specification = _without_inputs(self.proto, self.fed)
        self._threads, self._provider = threads, provider
        self.outputs = [o.name for o in self.proto.graph.output]
        self._made_at = {name: i for i, node in enumerate(self.proto.graph.node) for name in node.output}
        self._position: dict[str, int] = {
            name: i for i, node in reversed(list(enumerate(self.proto.graph.node))) for name in _reads(node)
        }

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
        return runtime.run(session, {**self.fed, **feed, **changes}, outputs)

    def answers(self) -> Callable[[Mapping[str, Array]], Array] | None:
        """Return a function that gives the scores of the classes, where the network has one such output."""
        watched = _before_softmax(self.proto.graph)
        if len(watched) != 1:
            return None
        session = self.session(watched)

        def scores(feed: Mapping[str, Array]) -> Array:
            return self.run(session, feed, watched, {})[watched[0]]

        return scores

    def position(self, weight: str) -> int:
        """Return the place, in graph order, of the first node that reads the weight."""
        return self._position.get(weight, 0)

    def place(self, output: str) -> int:
        """Return the place, in graph order, of the node that makes a tensor."""
        return self._made_at[output]

    def alive(self, position: int) -> list[str]:
        """Name the tensors made before ``position`` that are read from there on, or are outputs."""
        nodes = self.proto.graph.node
        made = {name for node in nodes[:position] for name in node.output if name}
        later = [name for node in nodes[position:] for name in _reads(node)]
        return sorted(made & {*later, *self.outputs})

    def segment(self, start: int, stop: int | None, types: Mapping[str, int], outputs: Sequence[str]) -> Any:
        """Make a session of the nodes from ``start`` to ``stop``; tensors alive at the start become inputs.

        Parameters
        ----------
        start, stop : int
            Places in graph order; None is the end.
        types : mapping of str to int
            ONNX element types of the tensors alive at ``start``.
        outputs : sequence of str
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        graph = proto.graph
        nodes = list(graph.node)[start:stop]
        needed = {name for node in nodes for name in _reads(node)} | set(outputs)
        inputs = [v for v in graph.input if v.name in needed]
        inputs += [
            onnx.helper.make_tensor_value_info(n, types[n], None) for n in self.alive(start) if n in needed
        ]
        held = [t for t in graph.initializer if t.name in needed]
        for part, kept in ((graph.node, nodes), (graph.input, inputs), (graph.initializer, held)):
            copies = [_copy(k) for k in kept]
            del part[:]
            part.extend(copies)
        _set_outputs(graph, outputs)
        return self._session(proto, outputs)

    def _session(self, proto: onnx.ModelProto, outputs: Sequence[str]) -> Any:
        # ONNX Runtime 1.31 fuses Conv and Add even where the Conv's own output is asked for, and then fails.
        disabled = () if set(outputs) <= set(self.outputs) else ("ConvAddActivationFusion",)
        return runtime.session(proto, threads=self._threads, provider=self._provider, disabled=disabled)


class Stream:
    """A run of the network over all probes, halted between two nodes; moved on piece by piece.

    Parameters
    ----------
    network : Network
    probes : Probes
    """

    def __init__(self, network: Network, probes: Probes) -> None:
        self._network = network
        self._given = probes.feeds
        self._place = 0
        self._state: list[dict[str, Array]] = [{} for _ in probes.feeds]

    @property
    def feeds(self) -> int:
        """Number of feeds that run side by side."""
        return len(self._given)

    def advance(self, place: int, changes: Changes) -> None:
        """Run to the node at ``place``, some weights on the way changed; from the start if it is past."""
        if place < self._place:
            self._place, self._state = 0, [{} for _ in self._given]
        if place == self._place:
            return
        alive = self._network.alive(place)
        made = [n for n in alive if n not in self._state[0]]
        if made:
            session = self._network.segment(self._place, place, types_of(self._state[0]), made)
            wanted = [i.name for i in session.get_inputs()]
            for given, state in zip(self._given, self._state, strict=True):
                everything = {**self._network.fed, **given, **state, **changes}
                state.update(runtime.run(session, {n: everything[n] for n in wanted}, made))
        for state in self._state:
            for name in set(state) - set(alive):
                del state[name]
        self._place = place

    def state(self, feed: int) -> Mapping[str, Array]:
        """Return the tensors of one feed that are alive here."""
        return self._state[feed]

    def has(self, name: str) -> bool:
        """Whether a tensor is alive here."""
        return name in self._state[0]

    def tensor(self, feed: int, name: str) -> Array:
        """Return a tensor that is alive here, or an input, of one feed; float32."""
        state = self._state[feed]
        return np.asarray(state[name] if name in state else self._given[feed][name], np.float32)


@dataclass(slots=True)
class Suffix:
    """The part of the network from one weight on, and what reaches it from the probes."""

    session: Any
    inputs: frozenset[str]
    feeds: list[dict[str, Array]] = field(default_factory=list)


class Meter:
    """Measures what changed weights do to the network's outputs on held-out probes.

    The outputs are looked at before a closing Softmax; what all samples have in common does not count as
    signal (prototype.md section 4: normalised by the variance between pictures).
    """

    def __init__(self, network: Network, probes: Probes) -> None:
        self.network = network
        self._probes = probes
        self.watched = _before_softmax(network.proto.graph)
        self._all = list(dict.fromkeys((*self.watched, *network.outputs)))
        self._session = network.session(self._all)
        self._base = [self._clean(network.run(self._session, f, self._all, {})) for f in probes.feeds]
        self._power = {n: _variance(np.stack([b[n] for b in self._base]), probes) for n in self._floating()}
        self._size = {n: float(sum(np.square(b[n]).sum() for b in self._base)) for n in self._floating()}
        self._suffixes: dict[int, Suffix] = {}
        self._tensors: list[dict[str, Array]] | None = None
        self.runs = 0

    def together(self, changes: Changes) -> tuple[float, float]:
        """Return (damage, relative output error) of all changes at once.

        Damage is the squared error of the watched outputs over their variance between samples, the mean of
        all outputs; the relative error is ``||z - z'|| / ||z||``, the largest of all outputs as they are.
        """
        got = [
            self._clean(self.network.run(self._session, f, self._all, changes)) for f in self._probes.feeds
        ]
        self.runs += 1
        return self._compare(got)

    def alone(self, weight: str, changes: Changes) -> float:
        """Return the damage of changes to one weight, running only what comes after it."""
        suffix = self._suffix(weight)
        got = []
        for feed in suffix.feeds:
            given = {k: v for k, v in {**self.network.fed, **feed, **changes}.items() if k in suffix.inputs}
            got.append(self._clean(runtime.run(suffix.session, given, self.watched)))
        return self._compare(got)[0]

    def undone(self, groups: Sequence[Sequence[str]], changes: Changes) -> list[float]:
        """Return the damage of all changes but those to one group of inputs, for each group in turn.

        A group starts with a weight: only what comes after the first node that reads it is run again.
        """
        stream = Stream(self.network, self._probes)
        order = sorted(range(len(groups)), key=lambda k: self.network.position(groups[k][0]))
        found = [0.0] * len(groups)
        for k in order:
            position = self.network.position(groups[k][0])
            stream.advance(position, changes)
            rest = {n: a for n, a in changes.items() if n not in groups[k]}
            session = self._session_from(position, types_of(stream.state(0)))
            wanted = {i.name for i in session.get_inputs()}
            got = []
            for number, feed in enumerate(self._probes.feeds):
                everything = {**self.network.fed, **feed, **stream.state(number), **rest}
                given = {n: a for n, a in everything.items() if n in wanted}
                got.append(self._clean(runtime.run(session, given, self.watched)))
            found[k] = self._compare(got)[0]
        return found

    def _session_from(self, position: int, types: Mapping[str, int]) -> Any:
        """Return the session of the nodes from a place on, made once."""
        if position in self._suffixes:
            return self._suffixes[position].session
        return self.network.segment(position, None, types, self.watched)

    def prepare(self, names: Sequence[str]) -> None:
        """Run the network once for the tensors that the suffixes of the named weights start from."""
        positions = {self.network.position(n) for n in names}
        wanted = sorted({t for p in positions for t in self.network.alive(p)} - set(self.watched))
        if not wanted:
            self._tensors = [dict(b) for b in self._base]
            return
        session = self.network.session([*self.watched, *wanted])
        self._tensors = [
            self.network.run(session, f, [*self.watched, *wanted], {}) for f in self._probes.feeds
        ]

    def _suffix(self, weight: str) -> Suffix:
        position = self.network.position(weight)
        if position not in self._suffixes:
            assert self._tensors is not None, "prepare() comes first"
            alive = self.network.alive(position)
            types = types_of({n: self._tensors[0][n] for n in alive})
            session = self.network.segment(position, None, types, self.watched)
            inputs = frozenset(i.name for i in session.get_inputs())
            feeds = [
                {**f, **{n: t[n] for n in alive}}
                for f, t in zip(self._probes.feeds, self._tensors, strict=True)
            ]
            self._suffixes[position] = Suffix(session, inputs, feeds)
        return self._suffixes[position]

    def _clean(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            n: np.nan_to_num(a.astype(np.float64), posinf=1e30, neginf=-1e30) if a.dtype.kind == "f" else a
            for n, a in outputs.items()
        }

    def _floating(self) -> Iterator[str]:
        for name in self._all:
            if self._base[0][name].dtype.kind == "f" and self._base[0][name].size:
                yield name

    def _compare(self, got: Sequence[Mapping[str, Array]]) -> tuple[float, float]:
        damages, errors = [0.0], [0.0]
        for name in self._floating():
            if name not in got[0]:
                continue
            apart = float(sum(_squares(a[name], b[name]) for a, b in zip(got, self._base, strict=True)))
            if name in self.watched:
                damages.append(apart / (self._power[name] or 1.0))
            if name in self.network.outputs:
                errors.append((apart / (self._size[name] or 1.0)) ** 0.5)
        return sum(damages) / max(1, len(damages) - 1), max(errors)


def types_of(tensors: Mapping[str, Array]) -> dict[str, int]:
    """Return the ONNX element type of each array."""
    return {n: onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in tensors.items()}


def _squares(a: Array, b: Array) -> float:
    """Sum the squared differences; outputs of different shapes (which values may decide) count whole."""
    if a.shape != b.shape:
        return float(np.square(b).sum() + np.square(a).sum())
    return float(np.square(a - b).sum())


def _variance(stacked: Array, probes: Probes) -> float:
    """Sum of squares about the mean over samples; about zero where there is one sample only."""
    rows = (
        stacked.reshape(probes.samples, -1) if stacked.size % probes.samples == 0 else stacked.reshape(1, -1)
    )
    if len(rows) < 2:
        return float(np.square(rows).sum())
    centred = float(np.square(rows - rows.mean(axis=0)).sum())
    return centred or float(np.square(rows).sum())


def _before_softmax(graph: onnx.GraphProto) -> list[str]:
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


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, and that its subgraphs take from outside (over-counted, harmlessly)."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names.update(o.name for o in graph.output)
            for inner in graph.node:
                names |= _reads(inner)
    return names


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
