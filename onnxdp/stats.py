"""What each weight sees of the probes: sampled rows of its input, gathered in streamed runs of ONNX Runtime.

Rows are kept rather than second moments: a 25088-wide input needs no 25088 x 25088 matrix, and X W is cheaper
than H W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from onnxdp.network import Network, bias_input
from onnxdp.pieces import Stream
from onnxdp.records import Array, Weight
from onnxdp.weights import Found, Reader, can_centre, constant

_ROWS = 1024

_PRODUCTS = frozenset(("Conv", "Gemm", "MatMul"))

_CACHED = 2_000_000
"""Bytes of patches that are gathered pixel by pixel, in the cache, before they are turned by channels."""

MAX_BYTES = 96_000_000
"""Rows held at a time; weights beyond are gathered in further runs."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Rows that one weight multiplies.

    Attributes
    ----------
    samples : ndarray of shape (groups, rows, inputs), float32
        Divided by sqrt(rows); centred where ``mean`` is given.
    mean : ndarray of shape (groups, inputs), float32, or None
        None where the bias cannot take it up.
    """

    samples: Array
    mean: Array | None


def rows_wanted(weight: Weight) -> int:
    """Return the sampled rows for a weight: 32 for each input, 2048 to 16384 (long ones to 4096)."""
    return int(np.clip(32 * weight.inputs, 2048, 16384 if weight.inputs <= 640 else 4096))


def chunks(items: Sequence[Sequence[Weight]], samples: int) -> Iterator[list[Sequence[Weight]]]:
    """Split items (weights decided together) into runs whose rows fit into memory together."""
    held: list[Sequence[Weight]] = []
    total = 0
    for item in items:
        nbytes = sum(
            4 * min(rows_wanted(w), samples * max(1, w.positions)) * w.inputs * w.groups for w in item
        )
        if held and total + nbytes > MAX_BYTES:
            yield held
            held, total = [], 0
        held.append(item)
        total += nbytes
    if held:
        yield held


def gather(
    stream: Stream,
    found: Found,
    chosen: Sequence[Weight],
    network: Network,
    *,
    seed: int,
    share: float = 1.0,
) -> dict[str, Seen]:
    """Run the probes on and sample the inputs of the chosen weights.

    Parameters
    ----------
    stream : Stream
        Of the original, before the first of the chosen weights; left at the last of them.
    found : Found
    chosen : sequence of Weight
        A weight none of whose readers lies in the outermost graph is left out of the result.
    network : Network
    seed : int
        Of the choice of rows.
    share : float
        Of the rows that each weight wants.

    Returns
    -------
    dict of str to Seen
    """
    places = [(network.place(tap.output), weight, tap) for weight in chosen for tap in _taps(found, weight)]
    counts = {w.name: sum(w is other for _, other, _ in places) for w in chosen}
    rows: dict[str, list[Array]] = {}
    for place, weight, tap in sorted(places, key=lambda p: p[0]):
        stream.advance(place, {})
        count = math.ceil(share * rows_wanted(weight) / counts[weight.name])
        rows.setdefault(weight.name, []).append(sampled(stream, weight, tap, count, seed))
    return {w.name: _seen(rows.pop(w.name), can_centre(found, w)) for w in chosen if w.name in rows}


def sampled(stream: Stream, weight: Weight, tap: Tap, count: int, seed: int) -> Array:
    """Return about ``count`` rows, of all feeds that a stream shows, that a weight sees where it is halted.

    Returns
    -------
    ndarray of shape (groups, rows, inputs), float32
    """
    total = tap.count(weight, stream.tensor(stream.shown[0], tap.source).shape)
    return _sampled(stream, weight, tap, None, min(-(-count // len(stream.shown)), total), seed)[0]


def sampled_beside(
    stream: Stream, weight: Weight, tap: Tap, name: str | None, count: int, seed: int
) -> tuple[Array, Array | None]:
    """Return what :func:`sampled` does, and rows of a tensor alike to the output, in the same places.

    How many there are does not depend on what the network makes of the feeds, so that two
    networks give as many.

    Returns
    -------
    ndarray of shape (groups, rows, inputs), float32
    ndarray of shape (groups, rows, outputs), or None where the tensor is of another shape.
    """
    total = stream.batch * max(1, weight.positions)
    return _sampled(stream, weight, tap, name, min(-(-count // len(stream.shown)), total), seed)


def _sampled(
    stream: Stream, weight: Weight, tap: Tap, name: str | None, few: int, seed: int
) -> tuple[Array, Array | None]:
    """Take a few rows of each feed, some twice where there are not as many, zeros where there are none.

    Both tensors in one go: where a stream does not hold them, it runs a feed again when it is come back to.
    """
    few, shown = max(few, 1), stream.shown
    rows = np.zeros((weight.groups, few * len(shown), weight.inputs), np.float32)
    beside = []
    for done, number in enumerate(shown):
        x = stream.tensor(number, tap.source)
        total = tap.count(weight, x.shape)  # may depend on the feed's numbers
        if not total:
            continue
        rng = np.random.default_rng((seed, number))
        picked = np.sort(rng.choice(total, few, replace=total < few))
        tap.put(weight, x, picked, rows[:, done * few : (done + 1) * few].swapaxes(0, 1))
        if name is not None:
            beside.append(tap.output_rows(weight, x.shape, stream.tensor(number, name), picked))
    alike = [y for y in beside if y is not None]
    return rows, np.concatenate(alike, axis=1) if len(alike) == len(shown) else None


def counting(network: Network, found: Found) -> Callable[[Mapping[str, Array], int], dict[str, int]]:
    """Return what counts, of a feed of so many samples, the output positions of one that weights multiply.

    Weights that nothing is seen to feed are absent.
    """
    taps = {w.name: _taps(found, w) for w in found.weights}
    wanted = sorted({t.source for group in taps.values() for t in group})
    session = network.session(wanted or network.outputs)

    def positions(feed: Mapping[str, Array], samples: int) -> dict[str, int]:
        outputs = network.run(session, feed, wanted or network.outputs, {})
        return {
            w.name: sum(t.count(w, outputs[t.source].shape) for t in taps[w.name]) // samples
            for w in found.weights
            if taps[w.name]
        }

    return positions


@dataclass(frozen=True, slots=True)
class Tap:
    """One place where a weight meets activations: the tensor's name and the reader's geometry."""

    source: str
    reader: Reader

    @property
    def output(self) -> str:
        """Name of the tensor that the reader makes."""
        return self.reader.node.outputs[0].name or ""

    def put(self, weight: Weight, x: Array, picked: Array, rows: Array) -> None:
        """Put the inputs at some places into ``rows``, (places, groups, inputs)."""
        if self.reader.node.op_type == "Conv":
            _put_patches(weight, x, _geometry(self.reader.node, weight, x.shape), picked, rows)
        else:
            rows[:, 0] = self._flat(weight, x)[picked]

    @property
    def added(self) -> str | None:
        """Name of the tensor that an Add, the only reader of the output, adds to it; None without one."""
        uses = list(self.reader.node.outputs[0].uses())
        if len(uses) != 1 or uses[0][0].op_type != "Add" or uses[0][0].domain:
            return None
        add, index = uses[0]
        other = add.inputs[1 - index]
        return other.name if other is not None and constant(other) is None else None

    def output_rows(self, weight: Weight, shape: tuple[int, ...], y: Array, picked: Array) -> Array | None:
        """Return rows of an output-like tensor, at the places that :meth:`put` takes from an input.

        Parameters
        ----------
        weight : Weight
        shape : tuple of int
            Of the input.
        y : ndarray of the output's shape
        picked : ndarray of int

        Returns
        -------
        ndarray of shape (groups, rows, outputs), or None where ``y`` is of another shape.
        """
        if self.reader.node.op_type == "Conv":
            places = _geometry(self.reader.node, weight, shape).outputs
            if y.shape != (shape[0], weight.groups * weight.outputs, *places):
                return None
            rows = np.moveaxis(y, 1, -1).reshape(-1, weight.groups, weight.outputs)
        else:
            if self.reader.index == 0 or y.size != int(np.prod(shape)) // weight.inputs * weight.outputs:
                return None
            rows = y.reshape(-1, 1, weight.outputs)
        return rows[picked].swapaxes(0, 1)

    def count(self, weight: Weight, shape: tuple[int, ...]) -> int:
        """Return the rows there are, of all samples."""
        if self.reader.node.op_type == "Conv":
            return shape[0] * int(np.prod(_geometry(self.reader.node, weight, shape).outputs))
        return int(np.prod(shape)) // weight.inputs

    def _flat(self, weight: Weight, x: Array) -> Array:
        """Rows of a Gemm or MatMul: the last axis of x on the left, the last but one of x on the right."""
        node = self.reader.node
        turned = node.attributes.get("transA" if self.reader.index == 1 else "transB")
        turn = (turned is not None and bool(turned.as_int())) != (self.reader.index == 0)
        if turn and x.ndim > 1:
            x = x.swapaxes(-1, -2)
        return x.reshape(-1, weight.inputs)


@dataclass(frozen=True, slots=True)
class _Geometry:
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    outputs: tuple[int, ...]


def _taps(found: Found, weight: Weight) -> list[Tap]:
    """Return the activations in the outermost graph that meet the weight."""
    if weight.op not in ("Conv", "Gemm", "MatMul"):
        return []
    taps = []
    for reader in found.readers[weight.name]:
        node = reader.node
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.graph is not found.graph:
            continue
        value = node.inputs[1 - reader.index]
        if value is not None and value.name and constant(value) is None:
            taps.append(Tap(value.name, reader))
    return taps


def first_place(network: Network, found: Found, weight: Weight) -> int:
    """Return the place of the first node of the main graph that multiplies by the weight; 0 without one."""
    return min((network.place(tap.output) for tap in _taps(found, weight)), default=0)


def single_tap(found: Found, weight: Weight) -> Tap | None:
    """Return the one place where the weight meets activations, None where there are several or none."""
    taps = _taps(found, weight)
    return taps[0] if len(taps) == len(found.readers[weight.name]) == 1 else None


def sources(found: Found) -> dict[str, str]:
    """Name the tensor (with the reader's geometry) that each weight reads, where it is one."""
    result = {}
    for weight in found.weights:
        taps = _taps(found, weight)
        if len(taps) == len(found.readers[weight.name]) == 1:
            node = taps[0].reader.node
            geometry = sorted((k, str(a.value)) for k, a in node.attributes.items())
            result[weight.name] = f"{taps[0].source} {node.op_type} {geometry}"
    return result


def _seen(pieces: list[Array], centre: bool) -> Seen:
    rows = pieces.pop() if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    pieces.clear()
    mean = rows.mean(axis=1, dtype=np.float64).astype(np.float32) if centre else None
    if mean is not None:
        rows -= mean[:, None, :]
    rows *= np.float32(1 / math.sqrt(rows.shape[1]))
    return Seen(rows, mean)


def _geometry(node: ir.Node, weight: Weight, shape: tuple[int, ...]) -> _Geometry:
    spatial = len(shape) - 2
    kernel = weight.shape[2:]

    def ints(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        attribute = node.attributes.get(name)
        return tuple(attribute.as_ints()) if attribute is not None else default

    strides, dilations = ints("strides", (1,) * spatial), ints("dilations", (1,) * spatial)
    pads = ints("pads", (0,) * (2 * spatial))
    auto = node.attributes.get("auto_pad")
    mode = auto.as_string() if auto is not None else "NOTSET"
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        outputs = tuple(-(-n // s) for n, s in zip(shape[2:], strides, strict=True))
        total = [
            max(0, (o - 1) * s + r - n) for o, s, r, n in zip(outputs, strides, reach, shape[2:], strict=True)
        ]
        begins = tuple(t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in total)
        return _Geometry(kernel, strides, dilations, begins, outputs)
    if mode == "VALID":
        pads = (0,) * (2 * spatial)
    outputs = tuple(
        (n + pads[i] + pads[i + spatial] - reach[i]) // strides[i] + 1 for i, n in enumerate(shape[2:])
    )
    return _Geometry(kernel, strides, dilations, pads[:spatial], outputs)


def _put_patches(weight: Weight, x: Array, g: _Geometry, picked: Array, rows: Array) -> None:
    """Put im2col at some output positions into (rows, groups, inputs); zeros beyond the border."""
    image, *places = np.unravel_index(picked, (x.shape[0], *g.outputs))
    offsets = np.indices(g.kernel).reshape(len(g.kernel), -1)
    pixels = np.moveaxis(x, 1, -1)
    if len(picked) * weight.tap > pixels.size // x.shape[1]:  # most are wanted more than once
        pixels = np.ascontiguousarray(pixels)
    step = max(1, _CACHED // (x.itemsize * x.shape[1] * weight.tap))
    for first in range(0, len(picked), step):
        some = slice(first, first + step)
        at = [
            p[some, None] * s + o * d - b
            for p, s, o, d, b in zip(places, g.strides, offsets, g.dilations, g.begins, strict=True)
        ]
        nearest = [np.clip(a, 0, n - 1) for a, n in zip(at, x.shape[2:], strict=True)]
        patches = pixels[(image[some, None], *nearest)]
        patches[np.any([a != b for a, b in zip(at, nearest, strict=True)], axis=0)] = 0
        patches = patches.reshape(*patches.shape[:2], weight.groups, -1).transpose(0, 2, 3, 1)
        rows[some] = patches.reshape(-1, weight.groups, weight.inputs)


def mean_output(mean: Array, w: Array) -> Array:
    """Return mean^T W, (groups * outputs,) float64; mean (groups, inputs), W (groups, inputs, outputs).

    What this loses when W becomes W' the bias must gain (method.md 1.3): b' = b + (W - W')^T mu.
    """
    total = np.zeros((w.shape[0], w.shape[2]))
    for first in range(0, w.shape[1], _ROWS):  # a large weight is never doubled in float64
        rows = slice(first, first + _ROWS)
        total += (mean[:, None, rows].astype(np.float64) @ w[:, rows])[:, 0]
    return total.reshape(-1)


def shifted_bias(network: Network, found: Found, name: str, shift: Array) -> dict[str, Array]:
    """Return the bias that makes the output behind a weight gain ``shift``; none where beta is 0."""
    key = bias_input(name)
    node = found.readers[name][0].node
    alpha, beta = (node.attributes[k].as_float() if k in node.attributes else 1.0 for k in ("alpha", "beta"))
    if key not in network.fed or not beta:
        return {}
    return {key: (network.fed[key] + alpha / beta * shift).astype(network.fed[key].dtype)}


def macs(weights: Sequence[Weight]) -> int:
    """Return the multiply-accumulates of one sample through the weights."""
    return sum(w.size * w.positions for w in weights)


def operations(network: Network, feed: Mapping[str, Array], samples: int) -> int:
    """Return the multiply-accumulates of one sample through all Conv, Gemm and MatMul of the main graph.

    Counted from the shapes of one run; products of activations are among them.
    """
    nodes = [n for n in network.proto.graph.node if n.op_type in _PRODUCTS and not n.domain]
    wanted = sorted({name for n in nodes for name in (*n.input[:2], n.output[0])})
    given = {t.name: tuple(t.dims) for t in network.proto.graph.initializer}
    given |= {name: array.shape for name, array in {**network.fed, **feed}.items()}
    made = [name for name in wanted if name not in given]
    outputs = network.run(network.session(made), feed, made, {}) if made else {}
    shapes = given | {name: array.shape for name, array in outputs.items()}
    return sum(_products(n, shapes) for n in nodes) // samples


def _products(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the multiply-accumulates of one node: numbers that it makes, times numbers summed for each."""
    left, right, made = (shapes[name] for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":
        return math.prod(made) * math.prod(right[1:])
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(made) * left[0 if turned else -1]
