"""What BatchNormalization nodes remember of their inputs in training, and how far probes are from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnxdp import runtime, walk
from onnxdp.network import Network
from onnxdp.ranges import Misfit
from onnxdp.records import Array

FIRST = 3
"""How many nodes are looked at: the range of the pictures shows in the first ones."""
_TINY = 1e-12


def misfit(network: Network) -> Misfit | None:
    """Return a function that compares the statistics of feeds with those that the network remembers.

    Compared are the mean and variance of each channel in front of the first :data:`FIRST` nodes: the
    symmetric Kullback-Leibler divergence of the two Gaussians, its median over channels (dead ones are far
    off whatever is fed), the mean over nodes.

    Returns
    -------
    callable or None
        None where no node remembers anything; means of 0 with variances of 1 have been folded elsewhere.
    """
    known = _remembered(network.proto.graph)[:FIRST]
    if not known:
        return None
    fed = {i.name for i in network.specification.graph.input}
    wanted = [name for name, _, _ in known if name not in fed]
    session = network.segment(0, max(map(network.place, wanted)) + 1, {}, wanted) if wanted else None
    reads = {i.name for i in session.get_inputs()} if session is not None else set()

    def tensors(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        given = {n: x for n, x in {**network.fed, **network.complete(feed)}.items() if n in reads}
        return {**feed, **runtime.run(session, given, wanted)} if session is not None else feed

    def measured(feeds: Sequence[Mapping[str, Array]]) -> float:
        run = [tensors(f) for f in feeds]
        apart = [_apart(np.concatenate([r[name] for r in run]), m, v) for name, m, v in known]
        return float(np.mean([np.median(channels) for channels in apart]))

    return measured


def _remembered(graph: onnx.GraphProto) -> list[tuple[str, Array, Array]]:
    """List (input, means, variances) of the nodes whose statistics mean something, in graph order."""
    held = {t.name: t for t in graph.initializer}
    for node in graph.node:
        value = walk.constant(node)
        if value is not None:
            held[node.output[0]] = value
        elif node.op_type == "Identity" and node.input[0] in held:
            held[node.output[0]] = held[node.input[0]]
    found = []
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not {node.input[3], node.input[4]} <= held.keys():
            continue
        mean, variance = (onnx.numpy_helper.to_array(held[n]).astype(np.float64) for n in node.input[3:5])
        if mean.any() or (variance != 1).any():
            found.append((node.input[0], mean, variance))
    return found


def _apart(x: Array, mean: Array, variance: Array) -> Array:
    """Symmetric divergence per channel, (channels,), of x, (n, channels, ...), from Gaussians; nats."""
    x = x.astype(np.float64)
    axes = (0, *range(2, x.ndim))
    square = np.square(x.mean(axes) - mean)
    a, b = x.var(axes) + _TINY, variance + _TINY
    return np.asarray(((a + square) / b + (b + square) / a) / 2 - 1)
